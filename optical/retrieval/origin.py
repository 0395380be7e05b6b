"""The model that made the vectors of an index, and whether a query model may search them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optical.models.fingerprint import fingerprints, partners, share_space

logger = logging.getLogger("optical")


@dataclass(frozen=True)
class Origin:
    """The model and settings that made the vectors of an index.

    Attributes:
        model: fingerprint of the model; "" if the index records none.
        role: role in which the model read the texts.
        partners: fingerprints of the partners of the model.
    """

    model: str
    role: str
    partners: tuple[str, ...] = ()

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Origin:
        """Return the origin in the record of an index."""
        return cls(
            record.get("model", ""),
            record.get("role", "document"),
            tuple(record.get("partners", ())),
        )

    @classmethod
    def of_model(cls, model: Any, role: str) -> Origin:
        """Return the origin of vectors that a model makes."""
        return cls(fingerprints(model)[role], role, partners(model))

    def to_json(self) -> str:
        return json.dumps({"model": self.model, "role": self.role, "partners": self.partners})

    def check_searchable(self, model: Any, index: object) -> None:
        """Check that the vectors of a query model are comparable with those of the index.

        Args:
            model: model of the queries.
            index: name of the index for messages.

        Raises:
            ValueError: the texts were read as queries; or nothing records that the model shares
                the vector space of the model of the index.
        """
        if self.role != "document":
            raise ValueError(
                f"{index}: its texts were encoded as queries, and queries search documents; write "
                "it again with the role document"
            )
        if not self.model:
            logger.warning("%s: records no model, so nothing shows that it fits this one", index)
        elif not share_space(model, self.model, self.partners):
            raise ValueError(
                f"{index}: its documents were encoded by another model (fingerprint {self.model}, "
                f"that of the given model is {fingerprints(model)['document']}), and nothing "
                "records that one was trained from the other; write the index again, or add "
                "--any-model if they share a vector space"
            )
