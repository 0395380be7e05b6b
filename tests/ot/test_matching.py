"""Doubly stochastic matrices, dustbins and partial transport against independent formulas."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from optical.backends import library
from optical.backends.problem import Status
from optical.ot import matrix_scaling
from optical.ot.matching import doubly_stochastic, dustbin_matching, partial_transport
from optical.testing.tolerance import assert_close_to_truth

INF = math.inf
DTYPES = [torch.float32, torch.float64]

# --------------------------------------------------------------------------- doubly stochastic


def log_loop(logits, iterations, temperature=1.0):
    """The specification: rows, then columns, in the log domain; forbidden rows are skipped."""
    x = logits / temperature
    for _ in range(iterations):
        for dim in (-1, -2):
            none = (x == -INF).all(dim, keepdim=True)
            x = x - torch.where(none, 0.0, x).logsumexp(dim, keepdim=True).masked_fill(none, 0.0)
    return x.exp()


def division_loop(logits, iterations):
    """The loop of hyper-connections: softmax of the rows, then divisions by sums."""
    p = logits.softmax(-1)
    p = p / p.sum(-2, keepdim=True)
    for _ in range(iterations - 1):
        p = p / p.sum(-1, keepdim=True)
        p = p / p.sum(-2, keepdim=True)
    return p


def with_gradient(function, x, upstream):
    x = x.detach().clone().requires_grad_()
    result = function(x)
    (gradient,) = torch.autograd.grad(result, x, upstream.to(result))
    return result.detach(), gradient


def draw(batch, n, scale, forbidden=0.0):
    x = torch.randn(batch, n, n, dtype=torch.float64) * scale
    return x.masked_fill(torch.rand(batch, n, n) < forbidden, -INF)


# scale 60 and 400 leave the safe range of u and v, in which scaling is repeated in the log domain.
CASES = [
    *[(n, 1.0, 0.0, 20) for n in (1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 64)],
    *[(n, 10.0, 0.2, 17) for n in (3, 4, 9, 30, 64)],
    *[(n, 60.0, 0.0, 33) for n in (3, 4, 8, 21, 64)],
    *[(n, 400.0, 0.1, 50) for n in (4, 6, 19)],
    *[(n, 3.0, 0.0, 1) for n in (4, 10)],
    (4, 1.0, 0.0, 100),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matrices_and_gradients_are_those_of_the_loop(case, dtype):
    n, scale, forbidden, iterations = case
    logits = draw(19, n, scale, forbidden).to(dtype)
    upstream = torch.randn(19, n, n, dtype=torch.float64)
    truth = with_gradient(lambda x: log_loop(x, iterations), logits.double(), upstream)
    loop = with_gradient(lambda x: log_loop(x, iterations), logits, upstream)
    out = with_gradient(lambda x: doubly_stochastic(x, iterations=iterations), logits, upstream)
    for name, actual, expected, same_dtype in zip(("P", "gradient"), out, truth, loop, strict=True):
        assert actual.dtype == dtype
        assert_close_to_truth(actual, expected, same_dtype, dtype=dtype, scale=1.0, name=name)
    assert (out[0][logits == -INF] == 0).all()
    assert (out[1][logits == -INF] == 0).all()


def test_it_is_the_loop_of_hyper_connections():
    logits = draw(10, 4, 2.0)
    torch.testing.assert_close(doubly_stochastic(logits), division_loop(logits, 20))


def test_gumbel_sinkhorn_at_a_low_temperature():
    logits = draw(20, 12, 1.0)
    out = doubly_stochastic(logits, iterations=300, temperature=0.02)
    torch.testing.assert_close(out, log_loop(logits, 300, 0.02))
    upstream = torch.randn_like(logits)
    settings = {"iterations": 40, "temperature": 0.05}
    actual = with_gradient(lambda x: doubly_stochastic(x, **settings), logits, upstream)
    expected = with_gradient(lambda x: log_loop(x, 40, 0.05), logits, upstream)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(dtype):
    logits, upstream = draw(9, 4, 2.0).to(dtype), torch.randn(9, 4, 4).to(dtype)
    out = with_gradient(doubly_stochastic, logits, upstream)
    truth = with_gradient(lambda x: log_loop(x, 20), logits.double(), upstream)
    for actual, expected in zip(out, truth, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected.to(dtype), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 3), (2, 0, 3), (2, 1, 2, 2)])
def test_leading_dimensions_and_strides(lead):
    logits = torch.randn(*lead, 5, 5).mT
    upstream = torch.randn(5, 5).expand(*lead, 5, 5)
    out, gradient = with_gradient(doubly_stochastic, logits, upstream)
    assert out.shape == gradient.shape == (*lead, 5, 5)
    expected = with_gradient(lambda x: log_loop(x, 20), logits, upstream)
    torch.testing.assert_close((out, gradient), expected)


@pytest.mark.parametrize("n", [4, 11])
def test_a_matrix_does_not_depend_on_its_neighbours_or_threads(n):
    # Some matrices leave the safe range of u and v, at different iterations.
    logits, upstream = draw(300, n, 40.0).float(), torch.randn(300, n, n)
    logits[::3] *= 3
    function = lambda x: doubly_stochastic(x, iterations=40)  # noqa: E731
    together = with_gradient(function, logits, upstream)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = with_gradient(function, logits, upstream)
    finally:
        torch.set_num_threads(threads)
    for i in (0, 1, 17, 18, 299):
        alone = with_gradient(function, logits[i : i + 1], upstream[i : i + 1])
        for x, y, z in zip(together, again, alone, strict=True):
            assert torch.equal(x, y)
            assert torch.equal(x[i : i + 1], z)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("n", [4, 6])
def test_nan_stays_in_its_matrix(n, value, backend):
    logits, upstream = torch.randn(20, n, n), torch.randn(20, n, n)
    clean = with_gradient(lambda x: doubly_stochastic(x, backend=backend), logits, upstream)
    logits[7, 1, 2] = value
    dirty = with_gradient(lambda x: doubly_stochastic(x, backend=backend), logits, upstream)
    others = torch.arange(20) != 7
    for x, y in zip(clean, dirty, strict=True):
        assert torch.equal(x[others], y[others])
        assert y[7].isnan().all()


def test_an_upstream_gradient_of_nan_stays_in_its_matrix_and_off_forbidden_entries():
    logits, upstream = torch.randn(3, 4, 4), torch.randn(3, 4, 4)
    logits[:, 0, 1] = -INF
    upstream[1] = math.nan
    upstream[2, 0, 1] = math.nan  # like that of log P at a forbidden entry
    _, gradient = with_gradient(doubly_stochastic, logits, upstream)
    assert gradient[[0, 2]].isfinite().all()
    allowed = logits[1] > -INF
    assert gradient[1][allowed].isnan().all()
    assert (gradient[:, 0, 1] == 0).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_and_columns_without_an_allowed_entry_are_padding(backend):
    logits, upstream = draw(5, 7, 1.0), torch.randn(5, 7, 7, dtype=torch.float64)
    padded = logits.clone()
    padded[:, 5:], padded[:, :, 5:] = -INF, -INF
    out, gradient = with_gradient(lambda x: doubly_stochastic(x, backend=backend), padded, upstream)
    smaller = with_gradient(doubly_stochastic, logits[:, :5, :5], upstream[:, :5, :5])
    torch.testing.assert_close((out[:, :5, :5], gradient[:, :5, :5]), smaller)
    for x in (out, gradient):
        assert not x[:, 5:].any()
        assert not x[:, :, 5:].any()


def test_no_permutation_is_allowed():
    # Two rows share their only column: the iterations of u and v diverge without end.
    logits = torch.tensor([[0.0, -INF, -INF], [1.0, -INF, -INF], [0.0, 0.0, 0.0]])
    upstream = torch.arange(9.0).view(3, 3)
    out = with_gradient(lambda x: doubly_stochastic(x, iterations=200), logits, upstream)
    truth = with_gradient(lambda x: log_loop(x, 200), logits.double(), upstream)
    torch.testing.assert_close([x.double() for x in out], list(truth), rtol=1e-5, atol=1e-5)


def test_long_work_is_divided_into_calls(monkeypatch):
    logits, upstream = torch.randn(3, 17, 5, 5), torch.randn(3, 17, 5, 5)
    expected = with_gradient(doubly_stochastic, logits, upstream)
    monkeypatch.setattr(matrix_scaling, "WORK_PER_CALL", 20 * 25 * 7)
    actual = with_gradient(doubly_stochastic, logits, upstream)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("n", [2, 4, 5])
def test_gradcheck(n):
    logits = torch.randn(3, n, n, dtype=torch.float64, requires_grad=True)
    function = lambda x: doubly_stochastic(x, iterations=6, temperature=0.7)  # noqa: E731
    assert torch.autograd.gradcheck(function, logits)


def test_large_matrices_take_the_route_of_sinkhorn():
    logits, upstream = draw(2, 70, 2.0), torch.randn(2, 70, 70, dtype=torch.float64)
    logits[0, 3, 5] = -INF
    out = with_gradient(lambda x: doubly_stochastic(x, temperature=0.5), logits, upstream)
    expected = with_gradient(lambda x: log_loop(x, 20, 0.5), logits, upstream)
    torch.testing.assert_close(out, expected)


@pytest.mark.filterwarnings("ignore:optical runs its plain PyTorch reference")
def test_without_a_library(monkeypatch):
    monkeypatch.setattr(library, "load_cpu", lambda: library.Loaded(None, "no compiler"))
    logits = torch.randn(3, 4, 4)
    out = doubly_stochastic(logits)
    torch.testing.assert_close(out, log_loop(logits, 20))
    with pytest.raises(RuntimeError, match="no compiler"):
        doubly_stochastic(logits, backend="cpu")


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_as_one_graph(dynamic):
    compiled = torch.compile(
        lambda x: doubly_stochastic(x * 2).square(),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    for batch, n in ((3, 4), (5, 6), (7, 9)):
        logits, upstream = torch.randn(batch, n, n), torch.randn(batch, n, n)
        actual = with_gradient(compiled, logits, upstream)
        expected = with_gradient(lambda x: log_loop(x * 2, 20).square(), logits, upstream)
        torch.testing.assert_close(actual, expected)


def test_exports():
    class Layer(torch.nn.Module):
        def forward(self, x):
            return doubly_stochastic(x)

    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Layer(), (torch.randn(3, 4, 4),), dynamic_shapes=shapes)
    logits = torch.randn(8, 4, 4)
    torch.testing.assert_close(program.module()(logits), log_loop(logits, 20))


def test_opcheck():
    logits, upstream = torch.randn(3, 4, 4, requires_grad=True), torch.randn(3, 4, 4)
    torch.library.opcheck(torch.ops.optical.doubly_stochastic.default, (logits, 5, 0.5))
    operator = torch.ops.optical.doubly_stochastic_backward.default
    torch.library.opcheck(operator, (logits.detach(), upstream, 5, 0.5))


def test_transforms():
    logits = torch.randn(3, 4, 4, dtype=torch.float64)

    def loss(x):
        return (doubly_stochastic(x) ** 2).sum()

    def expected_loss(x):
        return (log_loop(x, 20) ** 2).sum()

    torch.testing.assert_close(grad(loss)(logits), grad(expected_loss)(logits))
    torch.testing.assert_close(vmap(grad(loss))(logits), vmap(grad(expected_loss))(logits))
    torch.testing.assert_close(grad(lambda x: vmap(loss)(x).sum())(logits), grad(loss)(logits))
    torch.testing.assert_close(
        jacrev(doubly_stochastic)(logits[0]), jacrev(lambda x: log_loop(x, 20))(logits[0])
    )
    last = vmap(doubly_stochastic, in_dims=2, out_dims=2)(logits.movedim(0, 2))
    torch.testing.assert_close(last.movedim(2, 0), log_loop(logits, 20))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    logits = torch.randn(3, 4, 4, requires_grad=True)
    checkpoint(doubly_stochastic, logits, use_reentrant=reentrant)[:, 0].square().sum().backward()
    (expected,) = torch.autograd.grad(doubly_stochastic(logits)[:, 0].square().sum(), logits)
    assert torch.equal(logits.grad, expected)


def test_derivatives_that_do_not_exist_are_refused():
    logits = torch.randn(4, 4, requires_grad=True)
    (first,) = torch.autograd.grad(doubly_stochastic(logits)[0, 0], logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second and no forward-mode derivative"):
        first.sum().backward()
    tangent = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match="no second and no forward-mode derivative"):
        jvp(doubly_stochastic, (logits.detach(),), (tangent,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        doubly_stochastic(forward_ad.make_dual(logits.detach(), tangent))


def test_the_reference_has_every_derivative():
    logits = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    settings = {"iterations": 4, "backend": "reference"}
    assert torch.autograd.gradgradcheck(lambda x: doubly_stochastic(x, **settings), logits)
    primal, tangent = logits.detach(), torch.randn(3, 3, dtype=torch.float64)
    _, derivative = jvp(lambda x: doubly_stochastic(x, **settings), (primal,), (tangent,))
    _, expected = jvp(lambda x: log_loop(x, 4), (primal,), (tangent,))
    torch.testing.assert_close(derivative, expected)


def test_changes_in_place_are_noticed():
    logits = torch.randn(2, 4, 4, requires_grad=True)
    doubled = logits * 2
    out = doubly_stochastic(doubled)
    doubled.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"logits": [[0.0]]}, TypeError, "logits is a list; expected a tensor"),
        ({"logits": torch.zeros(3)}, ValueError, r"shape \(3,\); expected \(..., n, n\)"),
        ({"logits": torch.zeros(3, 4)}, ValueError, r"shape \(3, 4\); expected \(..., n, n\)"),
        ({"logits": torch.zeros(3, 3).int()}, TypeError, "dtype torch.int32; expected float64"),
        ({"iterations": 0}, ValueError, "iterations is 0; expected an int >= 1"),
        ({"iterations": 2**31}, ValueError, r"expected an int >= 1 and < 2\*\*31"),
        ({"iterations": 2.0}, TypeError, "iterations is a float; expected an int >= 1"),
        ({"iterations": True}, TypeError, "iterations is a bool"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0; expected a finite number > 0"),
        ({"temperature": torch.ones(())}, TypeError, "temperature is a Tensor; expected a float"),
        ({"backend": "gpu"}, ValueError, "backend is 'gpu'; expected one of 'auto'"),
    ],
)
def test_wrong_arguments(settings, error, message):
    with pytest.raises(error, match=message):
        doubly_stochastic(**{"logits": torch.zeros(3, 3)} | settings)


def test_the_op_checks_what_reaches_the_library():
    scale = torch.ops.optical.doubly_stochastic.default
    backward = torch.ops.optical.doubly_stochastic_backward.default
    for wrong in (torch.zeros(3), torch.zeros(2, 3), torch.zeros(0, 0), torch.zeros(2000, 2000)):
        with pytest.raises(ValueError, match="expected"):
            scale(wrong, 5, 1.0)
    with pytest.raises(TypeError, match="expected float32"):
        scale(torch.zeros(3, 3).bfloat16(), 5, 1.0)
    with pytest.raises(ValueError, match="shape"):
        backward(torch.zeros(2, 3, 3), torch.zeros(3, 3), 5, 1.0)
    with pytest.raises(TypeError, match="float64"):
        backward(torch.zeros(3, 3), torch.zeros(3, 3).double(), 5, 1.0)
    with pytest.raises(ValueError, match="refused"):
        scale(torch.zeros(3, 3), 0, 1.0)


# ------------------------------------------------------------------------------------ dustbins


def superglue(scores, last_column, last_row, corner, iterations, rows=None, columns=None):
    """Log-plan by the formulas of SuperGlue, with the masks of GeoTransformer."""
    batch, n, m = scores.shape
    rows = torch.ones(batch, n, dtype=torch.bool) if rows is None else rows
    columns = torch.ones(batch, m, dtype=torch.bool) if columns is None else columns
    scores = torch.cat([scores, last_column.expand(batch, n, 1)], 2)
    bottom = torch.cat([last_row.expand(batch, 1, m), corner.expand(batch, 1, 1)], 2)
    scores = torch.cat([scores, bottom], 1)
    n_valid, m_valid = (x.sum(1, keepdim=True).to(scores) for x in (rows, columns))
    norm = -(n_valid + m_valid).log()
    log_mu = torch.cat([norm.expand(batch, n), m_valid.log() + norm], 1)
    log_nu = torch.cat([norm.expand(batch, m), n_valid.log() + norm], 1)
    both = torch.nn.functional.pad(rows, (0, 1), value=True)[:, :, None]
    both = both & torch.nn.functional.pad(columns, (0, 1), value=True)[:, None, :]
    scores = scores.masked_fill(~both, -1e12)
    log_mu = log_mu.masked_fill(~torch.nn.functional.pad(rows, (0, 1), value=True), -1e12)
    log_nu = log_nu.masked_fill(~torch.nn.functional.pad(columns, (0, 1), value=True), -1e12)
    u, v = torch.zeros_like(log_mu), torch.zeros_like(log_nu)
    for _ in range(iterations):
        u = log_mu - (scores + v[:, None, :]).logsumexp(2)
        v = log_nu - (scores + u[:, :, None]).logsumexp(1)
    return scores + u[:, :, None] + v[:, None, :] - norm[:, :, None], both


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("iterations", [1, 6, 100])
def test_it_is_the_optimal_matching_of_superglue(iterations, dtype):
    scores = (3 * torch.randn(3, 9, 12)).to(dtype).requires_grad_()
    alpha = torch.tensor(1.3, dtype=dtype, requires_grad=True)
    upstream = torch.randn(3, 10, 13, dtype=torch.float64)
    actual = dustbin_matching(scores, alpha, iterations=iterations)
    actual = actual, *torch.autograd.grad(actual, (scores, alpha), upstream.to(dtype))
    results = []
    for other in (torch.float64, dtype):
        leaves = [x.detach().to(other).requires_grad_() for x in (scores, alpha)]
        expected, _ = superglue(leaves[0], *[leaves[1]] * 3, iterations)
        gradients = torch.autograd.grad(expected, leaves, upstream.to(other))
        results.append((expected, *gradients))
    for name, x, truth, same in zip(("log_plan", "scores", "alpha"), actual, *results, strict=True):
        size = max(1.0, truth.abs().max().item())
        assert_close_to_truth(x, truth, same, dtype=dtype, scale=size, name=name)


def test_it_is_the_masked_transport_of_geotransformer():
    scores = torch.randn(4, 7, 5, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    rows = torch.arange(7) < torch.tensor([[7], [3], [1], [5]])
    columns = torch.rand(4, 5) < 0.6
    columns[:, 2] = True
    actual = dustbin_matching(scores, alpha, mask_a=rows, mask_b=columns.int())
    expected, both = superglue(scores, alpha, alpha, alpha, 100, rows, columns)
    assert (actual[~both] == -INF).all()
    torch.testing.assert_close(actual[both], expected[both])
    upstream = torch.randn_like(actual)
    gradients = [
        torch.autograd.grad(torch.where(both, x, 0.0), (scores, alpha), upstream)
        for x in (actual, expected)
    ]
    torch.testing.assert_close(*gradients)
    assert (gradients[0][0][~both[:, :-1, :-1]] == 0).all()


def test_a_dustbin_per_side_and_per_problem():
    scores = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    last_column = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    last_row = torch.tensor(-0.3, dtype=torch.float64, requires_grad=True)
    actual = dustbin_matching(scores, (last_column, last_row), iterations=30)
    assert actual.shape == (2, 3, 5, 6)
    flat = last_column.reshape(6, 1, 1)
    corner = (flat + last_row) / 2
    expected, _ = superglue(scores.flatten(0, 1), flat, last_row, corner, 30)
    torch.testing.assert_close(actual.flatten(0, 1), expected)
    gradients = [
        torch.autograd.grad(x.exp()[..., 0].sum(), (last_column, last_row))
        for x in (actual, expected.view_as(actual))
    ]
    torch.testing.assert_close(*gradients)
    single = dustbin_matching(scores[0, 0], 1.0, iterations=30)
    together = dustbin_matching(scores, (1, 1.0), iterations=30)
    torch.testing.assert_close(single, together[0, 0])


def test_the_implicit_gradient_is_the_limit_of_the_unrolled_one():
    scores = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    gradients = []
    for gradient in ("unroll", "implicit"):
        plan = dustbin_matching(scores, alpha, iterations=400, gradient=gradient).exp()
        gradients.append(torch.autograd.grad(plan.square().sum(), (scores, alpha)))
    torch.testing.assert_close(*gradients)


def test_half_precision_scores_and_forbidden_pairs():
    scores = torch.randn(2, 4, 4)
    scores[0, 1, 2] = -INF
    actual = dustbin_matching(scores.bfloat16(), 0.5)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, dustbin_matching(scores.bfloat16().float(), 0.5))
    assert actual[0, 1, 2] == -INF
    assert actual[1].isfinite().all()
    torch.testing.assert_close(actual.exp().sum(1)[:, :4], torch.ones(2, 4))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0)])
def test_problems_without_entries(shape):
    batch, n, m = shape
    out = dustbin_matching(torch.zeros(shape), 1.0)
    assert out.shape == (batch, n + 1, m + 1)
    # All rows (or all columns) are in the dustbin.
    torch.testing.assert_close(out.exp()[:, :n, m], torch.ones(batch, n))
    torch.testing.assert_close(out.exp()[:, n, :m], torch.ones(batch, m))


def test_matching_compiles_as_one_graph():
    compiled = torch.compile(
        lambda x, alpha, mask: dustbin_matching(x, alpha, iterations=9, mask_a=mask).exp(),
        fullgraph=True,
        backend="aot_eager",
    )
    scores, mask = torch.randn(2, 4, 5), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]) == 1
    alpha = torch.tensor(1.0, requires_grad=True)
    actual, expected = (
        torch.autograd.grad(x[:, 0, 0].sum(), alpha)
        for x in (
            compiled(scores, alpha, mask),
            dustbin_matching(scores, alpha, iterations=9, mask_a=mask).exp(),
        )
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"scores": torch.zeros(3)}, ValueError, r"scores has shape \(3,\); expected \(..., n, m"),
        ({"dustbin": "1"}, TypeError, "dustbin holds a str; expected a number, a tensor"),
        ({"dustbin": (1.0,)}, ValueError, "dustbin has 1 entries; expected a pair"),
        ({"dustbin": torch.ones(5)}, ValueError, r"dustbin has shape \(5,\); expected \(2,\)"),
        ({"iterations": 0}, ValueError, "iterations is 0; expected an int >= 1"),
        ({"mask_a": torch.ones(2, 4)}, ValueError, r"mask_a has shape \(2, 4\); .* in scores"),
        ({"mask_b": torch.full((2, 4), 0.5)}, ValueError, "mask_b holds 0.5; expected 0"),
    ],
)
def test_wrong_arguments_of_matching(settings, error, message):
    with pytest.raises(error, match=message):
        dustbin_matching(**{"scores": torch.zeros(2, 3, 4), "dustbin": 1.0} | settings)


# --------------------------------------------------------------------------- partial transport


def masses(*shape):
    x = torch.rand(*shape, dtype=torch.float64) + 0.1
    return x / x.sum(-1, keepdim=True)


PARTIAL = [(5, 7, 0.1, 0.5), (20, 20, 0.05, 0.9), (30, 12, 0.02, 0.3), (8, 8, 0.1, 0.999)]


@pytest.mark.parametrize("case", PARTIAL, ids=str)
def test_plans_are_those_of_pot(case):
    ot = pytest.importorskip("ot", reason="compares with the package POT")
    n, m, epsilon, mass = case
    cost, a, b = torch.rand(n, m, dtype=torch.float64), masses(n), 1.3 * masses(m)
    out = partial_transport(cost, mass, a, b, epsilon=epsilon, max_iter=20000, tol=1e-11)
    assert out.status == Status.CONVERGED
    expected = ot.partial.entropic_partial_wasserstein(
        a.numpy(), b.numpy(), cost.numpy(), epsilon, m=mass, numItermax=20000, stopThr=1e-15
    )
    torch.testing.assert_close(out.plan, torch.as_tensor(expected), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(out.value_linear, (out.plan * cost).sum())


def test_plans_satisfy_the_optimality_conditions():
    cost, a, b = torch.rand(4, 9, 6, dtype=torch.float64), masses(4, 9), masses(4, 6)
    mass = torch.tensor([0.1, 0.5, 0.8, 0.95], dtype=torch.float64)
    epsilon = 0.05
    out = partial_transport(cost, mass, a, b, epsilon=epsilon, max_iter=20000, tol=1e-12)
    assert (out.status == Status.CONVERGED).all()
    torch.testing.assert_close(out.plan.sum((1, 2)), mass)
    torch.testing.assert_close(out.slack_a, a - out.plan.sum(2))
    torch.testing.assert_close(out.slack_b, b - out.plan.sum(1))
    assert (out.slack_a > -1e-11).all()
    assert (out.slack_b > -1e-11).all()
    # log P + cost / epsilon = f_i + g_j + t, with f = 0 in rows and g = 0 in columns with slack.
    dual = out.plan.log() + cost / epsilon
    assert (dual[:, :1, :1] + dual - dual[:, :1] - dual[:, :, :1]).abs().max() < 1e-9
    for slack, potential in ((out.slack_a, dual[:, :, 0]), (out.slack_b, dual[:, 0, :])):
        free = slack > 1e-9
        highest = potential.amax(1, keepdim=True).expand_as(potential)
        assert free.any()
        torch.testing.assert_close(potential[free], highest[free])


def test_the_cost_tends_to_the_exact_one():
    scipy_optimize = pytest.importorskip("scipy.optimize", reason="solves the linear program")
    n, m, mass = 6, 8, 0.6
    cost = torch.rand(n, m, dtype=torch.float64)
    exact = scipy_optimize.linprog(
        cost.flatten().numpy(),
        A_ub=np.concatenate([np.kron(np.eye(n), np.ones((1, m))), np.tile(np.eye(m), n)]),
        b_ub=np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)]),
        A_eq=np.ones((1, n * m)),
        b_eq=[mass],
    ).fun
    errors = [
        partial_transport(cost, mass, epsilon=epsilon, max_iter=20000).value_linear.item() - exact
        for epsilon in (0.1, 0.01, 0.001)
    ]
    assert errors[0] > errors[1] > errors[2] > -1e-6
    assert errors[2] < 1e-3


def test_padding_forbidden_pairs_and_neighbours_change_nothing():
    cost, a, b = torch.rand(2, 5, 6, dtype=torch.float64), masses(2, 5), masses(2, 6)
    settings = {"epsilon": 0.1, "max_iter": 500, "tol": 1e-8}
    expected = partial_transport(cost[:1], 0.5, a[:1], b[:1], **settings)
    padded = torch.full((2, 7, 8), math.nan, dtype=torch.float64)
    padded[:, :5, :6] = cost
    padded[1, 0, 0] = math.nan
    pad = torch.nn.functional.pad
    for options in (
        {"a": pad(a, (0, 2)), "b": pad(b, (0, 2))},
        {
            "a": pad(a, (0, 2), value=0.2),
            "b": pad(b, (0, 2), value=0.2),
            "mask_a": torch.arange(7).expand(2, 7) < 5,
            "mask_b": torch.arange(8).expand(2, 8) < 6,
        },
    ):
        out = partial_transport(padded, 0.5, **options, **settings)
        torch.testing.assert_close(out.plan[0, :5, :6], expected.plan[0])
        assert not out.plan[0, 5:].any()
        assert not out.plan[0, :, 6:].any()
        torch.testing.assert_close(out.value_linear[:1], expected.value_linear)
        assert out.status.tolist() == [Status.CONVERGED, Status.INFEASIBLE]
    cost[0, 1, 2] = INF
    out = partial_transport(cost, 0.5, a, b, **settings)
    assert out.plan[0, 1, 2] == 0
    assert out.value_linear.isfinite().all()


def test_gradients_of_partial_plans():
    cost = torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
    a, b = (x.requires_grad_() for x in (masses(2, 3), masses(2, 4)))
    mass = torch.tensor([0.4, 0.7], dtype=torch.float64, requires_grad=True)

    def outputs(cost, mass, a, b):
        out = partial_transport(cost, mass, a, b, epsilon=0.3, max_iter=30, tol=0)
        return out.plan, out.value_linear, out.slack_a

    assert torch.autograd.gradcheck(outputs, (cost, mass, a, b))
    forbidden = torch.tensor([[0.0, INF], [1.0, 0.5]], requires_grad=True)
    partial_transport(forbidden, 0.5, epsilon=0.3).value_linear.backward()
    assert forbidden.grad.isfinite().all()
    assert forbidden.grad[0, 1] == 0


def test_all_of_the_mass_is_balanced_transport():
    from optical import sinkhorn

    cost, a, b = torch.rand(3, 6, 5, dtype=torch.float64), masses(3, 6), masses(3, 5)
    out = partial_transport(cost, 1.0, a, b, epsilon=0.2, max_iter=5000, tol=1e-12)
    expected = sinkhorn(cost, a.log(), b.log(), epsilon=0.2, max_iter=1000).plan()
    torch.testing.assert_close(out.plan, expected)


def test_status_and_leading_dimensions():
    cost = torch.rand(2, 3, 4, 5)
    out = partial_transport(cost, 0.5, epsilon=0.05, max_iter=3)
    assert out.plan.shape == (2, 3, 4, 5)
    assert out.slack_a.shape == (2, 3, 4)
    assert out.slack_b.shape == (2, 3, 5)
    assert out.value_linear.shape == out.status.shape == out.marginal_error.shape == (2, 3)
    assert (out.status == Status.MAX_ITER).any()
    single = partial_transport(cost[1, 2].bfloat16(), 0.5, epsilon=0.05)
    assert single.plan.dtype == torch.float32
    assert single.status.shape == ()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"cost": torch.zeros(3)}, ValueError, r"cost has shape \(3,\); expected \(..., n, m\)"),
        ({"mass": 0.0}, ValueError, "mass is 0.0; expected a finite number > 0"),
        ({"mass": 1.1}, ValueError, "mass is 1.1.*; expected a number > 0 and at most 1,"),
        ({"mass": torch.tensor([0.5, 2.0])}, ValueError, "mass is 2; expected a number > 0"),
        ({"mass": torch.ones(3)}, ValueError, r"mass has shape \(3,\); expected \(2,\)"),
        ({"mass": "1"}, TypeError, "mass is a str; expected a float > 0"),
        ({"epsilon": 0.0}, ValueError, "epsilon is 0.0; expected a finite number > 0"),
        ({"epsilon": torch.ones(2)}, TypeError, "epsilon is a Tensor; expected a float"),
        ({"max_iter": -1}, ValueError, "max_iter is -1; expected an int >= 0"),
        ({"tol": -1.0}, ValueError, "tol is -1.0; expected a finite number >= 0"),
        ({"a": torch.ones(2, 4)}, ValueError, r"a has shape \(2, 4\); expected \(2, 3\)"),
        ({"a": -torch.ones(2, 3)}, ValueError, "a holds -1.0; expected masses >= 0"),
    ],
)
def test_wrong_arguments_of_partial_transport(settings, error, message):
    arguments = {"cost": torch.zeros(2, 3, 4), "mass": 0.5, "epsilon": 0.1} | settings
    with pytest.raises(error, match=message):
        partial_transport(**arguments)
