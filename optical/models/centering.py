"""Centre the token vectors of a retriever, so that they are less alike.

The token vectors of a pre-trained encoder share a large component: two random tokens of
multilingual-e5-small have a mean cosine of .61. MaxSim and optimal transport compare what remains.
Subtracting the mean vector leaves just that (Mu and Viswanath, All-but-the-Top, ICLR 2018).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from optical.models.encoding import encode

logger = logging.getLogger("optical")


def center_vectors(model: Any, texts: Sequence[str]) -> Any:
    """Return a retriever that subtracts the mean token vector of some texts.

    Args:
        model: a ``MultiVectorEncoder`` whose vectors are normalised last. Its modules are shared.
        texts: documents in the language of the retriever; some hundred suffice.

    Returns:
        The modules of the model and, before the normalisation, a ``Dense`` whose weight is the
        identity and whose bias is minus the mean. Later trainings change both.

    Raises:
        ValueError: the model does not normalise its vectors, or there is no text.
    """
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    modules = list(model)
    if not isinstance(modules[-1], Normalize):
        raise ValueError("center: the model does not normalise its token vectors")
    if not texts:
        raise ValueError("center: no text given to compute the mean token vector of")
    unnormalised = MultiVectorEncoder(modules=modules[:-1], prompts=model.prompts)
    mean = encode(unnormalised, texts, "document").vectors.mean(0).cpu()
    width = len(mean)
    dense = Dense(
        in_features=width,
        out_features=width,
        bias=True,
        activation_function=torch.nn.Identity(),
        init_weight=torch.eye(width),
        init_bias=-mean,
        module_input_name="token_embeddings",
    )
    # The mask follows the projections, as in models that are built with a dimension.
    place = next(i for i, x in enumerate(modules) if isinstance(x, (MultiVectorMask, Normalize)))
    logger.info("center: the mean token vector of %d texts is subtracted", len(texts))
    return MultiVectorEncoder(
        modules=[*modules[:place], dense, *modules[place:]], prompts=model.prompts
    )
