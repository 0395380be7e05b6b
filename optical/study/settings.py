"""The settings of a study, as read from its configuration file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optical.report.summary import StudyDescription
from optical.retrieval.evaluation import DEFAULT_MEASURES
from optical.study.arms import ArmConfig, LexiconConfig, fill_languages
from optical.training.options import EncoderOptions, Role, TeacherOptions

# Keys of a collection that name a file, a folder or an id.
COLLECTION_FILES = ("source", "queries", "documents", "qrels")


@dataclass
class StudyConfig:
    """The configuration of a study; docs/study.md documents the YAML keys with an example.

    Attributes that the report needs are described in ``StudyDescription``.

    Attributes:
        collection_languages: languages of collections that do not exist in all languages.
        pools: collection -> languages whose documents are also searched as one pool.
        report: folder of the report inside the output folder.
        store_teacher: compute the teacher's token vectors once per text, for all arms and seeds.
        encode_bf16: run encoders in bfloat16 to search; scores stay in float32.
        ceiling: languages of the monolingual ceiling.
        phrasebook: whether the study is the embedded demonstration.
    """

    title: str
    output: Path
    languages: tuple[str, ...]
    collections: dict[str, dict[str, Any]]
    arms: list[ArmConfig]
    low: tuple[str, ...] = ()
    high: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)
    note: str = ""
    role: Role = "document"
    seeds: tuple[int, ...] = (0,)
    encoder: str = ""
    encoder_options: EncoderOptions | None = None
    encoder_trainer_args: dict[str, Any] = field(default_factory=dict)
    teacher: str = ""
    teacher_options: TeacherOptions | None = None
    teacher_trainer_args: dict[str, Any] = field(default_factory=dict)
    lexicons: dict[str, LexiconConfig] = field(default_factory=dict)
    collection_languages: dict[str, tuple[str, ...]] = field(default_factory=dict)
    pools: dict[str, tuple[str, ...]] = field(default_factory=dict)
    report: str = ""
    store_teacher: bool = False
    passage_length: int | None = None
    passage_stride: int | None = None
    encode_bf16: bool = False
    against: tuple[str, ...] = ()
    translation: str = ""
    curves: dict[str, tuple[str, ...]] = field(default_factory=dict)
    word_alignment: dict[str, Any] | None = None
    measures: tuple[str, ...] = DEFAULT_MEASURES
    ceiling: tuple[str, ...] = ("en",)
    alignment: dict[str, str] | None = None
    phrasebook: bool = False
    config_text: str = ""

    def role_of(self, collection: str) -> str:
        """Return the role of the student in a collection, "query" or "document"."""
        return str(self.collections[collection].get("role", self.role))

    def languages_of(self, collection: str) -> tuple[str, ...]:
        """Return the languages of a collection, including those of the ceiling."""
        return self.collection_languages.get(collection, (*self.languages, *self.ceiling))

    def bitext_of(self, language: str) -> list[str]:
        """Return the files of parallel sentences of a language that any arm is trained on."""
        if language not in self.languages:
            return []
        files = (fill_languages(arm.options.get("bitext", []), [language]) for arm in self.arms)
        return sorted({path for paths in files for path in paths})

    @property
    def roles(self) -> list[str]:
        """The roles of all collections; the role of the study is first."""
        roles = {self.role_of(name) for name in self.collections}
        return sorted(roles, key=lambda role: role != self.role)

    def arm(self, name: str) -> ArmConfig:
        return next(arm for arm in self.arms if arm.name == name)

    def describe(self) -> StudyDescription:
        """Return the properties that the report needs."""
        shared = {entry.name for entry in dataclasses.fields(StudyDescription)}
        shared &= {entry.name for entry in dataclasses.fields(self)}
        shared -= {"arms", "collections"}
        return StudyDescription(
            arms=tuple(arm.name for arm in self.arms),
            collections=tuple(self.collections),
            **{name: getattr(self, name) for name in shared},
        )
