"""The Triton kernels on CPU tensors, in the interpreter, by the one tolerance rule.

Run as ``TRITON_INTERPRET=1 python -m pytest tests/triton_interpreter``. The interpreter says
nothing about layouts or races; ``tests/test_triton_compile.py`` compiles the kernels for GPUs.
"""

import math
from dataclasses import replace

import pytest
import torch

from optical import BackendUnsupported, backends, ot_alignment, sinkhorn
from optical.arguments import example
from optical.testing import (
    FIELDS,
    assert_backend_correct,
    plain_problems,
    random_clouds,
    random_problem,
    solve,
)

pytest.importorskip("triton")
# Discarded branches of tl.where divide by zero here; on a GPU that is silent.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# What the kernels do not serve is refused by name.
ENVELOPE = ("envelope",)
# Each iteration of each problem costs milliseconds here, and eight reach every branch but one.
ALL = {
    problem.name: replace(problem, max_iter=min(8, problem.max_iter))
    for problem in (*plain_problems(), random_clouds("cosine", "cosine"))
    if max(problem.cost.shape[1:]) <= 128 and len(problem.cost) <= 4
}


@pytest.mark.parametrize("name", ALL)
def test_every_problem_by_the_tolerance_rule(name, poisoned_memory):
    assert_backend_correct("triton", ALL[name], torch.float32, gradients=ENVELOPE)


@pytest.mark.parametrize(("n", "m"), [(16, 16), (17, 16), (33, 5), (128, 128), (100, 127)])
def test_every_tile_size(n, m):
    assert_backend_correct(
        "triton", random_problem(f"{n}x{m}", 1, n, m), torch.float32, gradients=ENVELOPE
    )


def test_drifting_scalings_are_rebuilt_and_lost_ones_are_redone():
    """Costs whose scalings pass 2^30 within one run, so that every branch of the loop is taken."""
    ramp = torch.linspace(0, 6, 12, dtype=torch.float64)
    cost = (ramp[:, None] * ramp[None, :])[None] + torch.rand(1, 12, 12).double()
    problem = random_problem("ramp", 1, 12, 12, epsilon=0.05, max_iter=40)
    assert_backend_correct("triton", replace(problem, x=cost), torch.float32, gradients=ENVELOPE)
    log_a = torch.linspace(0, -300, 12, dtype=torch.float64).log_softmax(0)[None]
    lost = replace(problem, name="lost", log_a=log_a, max_iter=10)
    assert_backend_correct("triton", lost, torch.float32, gradients=ENVELOPE)


def test_stops_each_problem_at_its_own_iteration():
    problem = replace(ALL["epsilon_per_problem"], max_iter=40, tol=1e-3).to(torch.float32)
    out, expected = solve("triton", problem), solve("reference", problem)
    assert (out["n_iter"] - expected["n_iter"]).abs().max() <= 1
    assert len(set(out["n_iter"].tolist())) == 3
    fixed = [replace(problem, max_iter=k, tol=0.0) for k in out["n_iter"].tolist()]
    for i, same in enumerate(fixed):
        truth = solve("reference", same.to(torch.float64))
        torch.testing.assert_close(
            out["value"][i].double(), truth["value"][i], rtol=1e-5, atol=1e-5
        )


def test_a_problem_alone_has_the_bits_it_has_in_a_batch():
    problem = ALL["ragged"].to(torch.float32)
    together = solve("triton", problem)
    for i in (0, 3):
        alone = solve("triton", problem.one(i))
        for field in FIELDS:
            assert torch.equal(alone[field], together[field][i : i + 1]), field


def test_gradient_through_the_loss():
    gradients = []
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    teacher = torch.randn(3, 7, 8)
    for backend in ("triton", "reference"):
        student = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
        student = student.masked_fill(~mask[:, :, None], math.nan).requires_grad_()
        ot_alignment(student, teacher, mask, max_iter=8, backend=backend).sum().backward()
        assert not student.grad[~mask].any()
        gradients.append(student.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_refusals_name_the_limit():
    assert backends.BACKENDS["triton"].supports(example(torch.zeros(1, 128, 128))) is None
    with pytest.raises(BackendUnsupported, match=r"cost is 129 x 4; .* up to 128 x 128"):
        sinkhorn(torch.zeros(1, 129, 4), epsilon=0.1, backend="triton")
    with pytest.raises(BackendUnsupported, match="does not know gradient='implicit', rho"):
        sinkhorn(torch.zeros(1, 3, 4), epsilon=0.1, rho=1.0, gradient="implicit", backend="triton")
    with pytest.raises(BackendUnsupported, match=r"the problem is float64; .* float32"):
        sinkhorn(torch.zeros(1, 3, 4).double(), epsilon=0.1, backend="triton")


def test_auto_never_picks_the_interpreter():
    assert backends.choose("auto", example(torch.zeros(1, 3, 4))).name != "triton"
