"""Students that began alike and learnt apart, made one by the mean of their weights.

"Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time" (Wortsman et al., arXiv 2203.05482). What one learnt from translations and another
from switched text need not be learnt together to be used together.
"""

from __future__ import annotations

from typing import Any

from optical.encoder import load_retriever
from optical.options import AverageOptions
from optical.transfer import Finished


def average(options: AverageOptions, args: Any) -> Finished:
    """Average the weights of retrievers that differ in nothing else.

    Args:
        options: the retrievers.
        args: training arguments, of which only the folder to write to is read.

    Returns:
        What ``training.run`` saves: the first retriever with the mean of all weights, each in the
        dtype that it has there.

    Raises:
        FileNotFoundError, ValueError: no such model, or one with other units or other weights than
            the first, because it is no student of the same start.
    """
    options.validate()
    first = load_retriever(options.models[0])
    sums = {name: value.double() for name, value in first.state_dict().items()}
    units = first.tokenizer.get_vocab()
    for name in options.models[1:]:
        model = load_retriever(name)
        if model.tokenizer.get_vocab() != units:
            raise ValueError(f"models: {name} has other units than {options.models[0]}")
        weights = model.state_dict()
        for key in sums.keys() | weights.keys():
            shapes = [tuple(one[key].shape) if key in one else None for one in (weights, sums)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"models: {key} of {name} has the shape {shapes[0]}, expected that of "
                    f"{options.models[0]}, {shapes[1]}"
                )
            sums[key] += weights[key]
    # What is copied keeps its dtype, whole numbers included.
    first.load_state_dict({key: total / len(options.models) for key, total in sums.items()})
    return Finished(first, args)
