"""The tolerance rule's own calls of the operator."""

import pytest
import torch

from optical.backends.problem import GRADIENTS
from optical.testing.cases import random_case, random_vector_case
from optical.testing.tolerance import solve

CASES = [random_case("cost", 3, 5, 6), random_vector_case("vectors", "cosine")]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_gradients_are_computed_where_the_problem_is(case, gradient):
    """A tensor made elsewhere would have to be copied, which a CUDA graph refuses to capture."""
    with torch.device("meta"):
        out = solve("reference", case, gradient)
    assert {tensor.device.type for tensor in out.values()} == {"cpu"}
