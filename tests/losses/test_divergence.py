"""The Sinkhorn divergence: values of converged runs, status, warnings and gradients."""

import doctest
import math
import warnings

import pytest
import torch

from optical import Status, sinkhorn_divergence, sinkhorn_vectors
from optical.losses.divergence import DivergenceResult
from optical.losses import divergence
from optical.testing.cases import packed, random_vector_case

INF = math.inf
SQUARED = {"cost": "sqeuclidean"}
GRADIENTS = ["envelope", "implicit", "unroll"]


@pytest.fixture(autouse=True)
def no_warning():
    """Fail on warnings that a test does not expect."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scattered(batch, n, m, dim=2, seed=0):
    """Independent clouds."""
    g = generator(seed)
    return torch.randn(batch, n, dim, generator=g), torch.randn(batch, m, dim, generator=g)


def copies(n, m, seed=0):
    """A cloud, and noisy copies of its points, some of them several times."""
    g = generator(seed)
    x = torch.randn(1, n, 2, generator=g)
    y = x[:, torch.randint(0, n, (m,), generator=g)] + 0.01 * torch.randn(1, m, 2, generator=g)
    return x, y


def truth(x, y, epsilon, cost="sqeuclidean", tol=1e-8, max_iter=100_000):
    """The divergence by runs in float64, each from the potentials of twice its temperature."""
    values = []
    for a, b in ((x, y), (x, x), (y, y)):
        init = None
        for power in range(20, -1, -1):
            last = {"tol": tol, "max_iter": max_iter} if power == 0 else {"tol": 1e-3}
            options = {"max_iter": 1000, "anderson": 8, "init": init} | last
            result = sinkhorn_vectors(
                a.double(), b.double(), cost=cost, epsilon=epsilon * 2**power, **options
            )
            init = result.f, result.g
        values.append(result.value)
    return values[0] - values[1] / 2 - values[2] / 2


def test_examples_in_the_docstring():
    failed, tried = doctest.testmod(divergence, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed


# --------------------------------------------------------------------------------- the divergence


def test_the_divergence_combines_three_values():
    case = random_vector_case("", "sqeuclidean", rows=[9, 4, 1], columns=[12, 12, 5])
    log_a = (case.log_a + 0.4).requires_grad_()
    options = {"epsilon": 2.0, "rho": 1.5, "max_iter": 60, "cost": "sqeuclidean"}
    actual = sinkhorn_divergence(case.x, case.y, log_a, case.log_b, **options)
    pairs = [
        sinkhorn_vectors(x, y, a, b, **options).value
        for x, y, a, b in (
            (case.x, case.y, log_a, case.log_b),
            (case.x, case.x, log_a, log_a),
            (case.y, case.y, case.log_b, case.log_b),
        )
    ]
    excess = log_a.exp().sum(1) - case.log_b.exp().sum(1)
    expected = pairs[0] - pairs[1] / 2 - pairs[2] / 2 + 2.0 / 2 * excess**2
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(x.sum(), log_a, retain_graph=True)[0] for x in (actual, expected)]
    torch.testing.assert_close(*grads)
    assert not grads[0][case.log_a == -INF].any()


def test_the_divergence_of_packed_problems_agrees_with_padded_ones():
    case = random_vector_case("", "sqeuclidean", rows=[9, 0, 3], columns=[12, 7, 5], epsilon=2.0)
    flat = packed(case)
    options = {"epsilon": 2.0, "cost": "sqeuclidean", "rho": 3.0}
    expected = sinkhorn_divergence(case.x, case.y, case.log_a + 0.2, case.log_b, **options)
    actual = sinkhorn_divergence(
        flat.x,
        flat.y,
        flat.log_a + 0.2,
        flat.log_b,
        cu_seqlens_a=flat.cu_a,
        cu_seqlens_b=flat.cu_b,
        **options,
    )
    torch.testing.assert_close(actual, expected)
    assert actual[1] == 0


def test_the_divergence_is_zero_for_equal_sets_and_otherwise_positive():
    x, y = torch.randn(3, 6, 4).double(), torch.randn(3, 5, 4).double()
    options = {"epsilon": 0.5, "cost": "sqeuclidean", "max_iter": 500}
    equal = sinkhorn_divergence(x, x.flip(1), **options)
    assert equal.abs().max() < 1e-9
    assert (sinkhorn_divergence(x, y, **options) > 0.1).all()
    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(sinkhorn_divergence(leaf, x, **options).sum(), leaf)[0]
    assert gradient.abs().max() < 1e-3


@pytest.mark.parametrize("reach", [None, 0.8])
def test_the_divergence_agrees_with_geomloss(reach):
    geomloss = pytest.importorskip("geomloss")
    x, y = torch.rand(2, 7, 3).double(), torch.rand(2, 6, 3).double() + 0.3
    blur = 0.4
    loss = geomloss.SamplesLoss(
        "sinkhorn", p=2, blur=blur, reach=reach, scaling=0.99, debias=True, backend="tensorized"
    )
    # For p = 2, the cost of GeomLoss is half the squared distance.
    expected = 2 * loss(x, y)
    rho = None if reach is None else 2 * reach**2
    options = {"cost": "sqeuclidean", "max_iter": 2000, "rho": rho}
    actual = sinkhorn_divergence(x, y, epsilon=2 * blur**2, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_the_divergence_requires_equal_penalties():
    x = torch.randn(1, 3, 2)
    with pytest.raises(ValueError, match=r"rho is \(1.0, 2.0\); expected one strength for both"):
        sinkhorn_divergence(x, x, epsilon=0.1, rho=(1.0, 2.0))
    assert sinkhorn_divergence(x, x, epsilon=0.1, rho=(1.0, 1.0)).abs() < 1e-5


# -------------------------------------------------------------------------------- converged values


HARD = {
    "20 and 20 points": (*scattered(20, 20, 20), 0.01),
    "30 and 100 points": (*scattered(4, 30, 100, seed=1), 0.01),
    "30 points and 100 copies": (*copies(30, 100), 0.01),
    "30 points and 100 other copies": (*copies(30, 100, seed=3), 0.01),
    "200 and 200 points": (*scattered(1, 200, 200, seed=2), 1e-3),
    "30 points, 100 copies, cold": (*copies(30, 100, seed=4), 1e-3),
    "30 and 30 points, warm": (*scattered(4, 30, 30, seed=5), 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HARD)
def test_the_default_is_converged(name, dtype):
    x, y, epsilon = HARD[name]
    result = sinkhorn_divergence(
        x.to(dtype), y.to(dtype), epsilon=epsilon, return_result=True, **SQUARED
    )
    assert result.status.eq(Status.CONVERGED).all() and (result.marginal_error <= 1e-5).all()
    assert result.value.dtype == result.marginal_error.dtype == dtype
    torch.testing.assert_close(result.value.double(), truth(x, y, epsilon), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-2, 0.1, 1.0])
def test_the_default_converges_for_the_cosine(epsilon):
    x, y = scattered(3, 50, 60, dim=64)
    y[:, :50] = x + 0.5 * y[:, :50]
    result = sinkhorn_divergence(x, y, epsilon=epsilon, return_result=True)
    assert result.status.eq(Status.CONVERGED).all()
    expected = truth(x, y, epsilon, cost="cosine")
    torch.testing.assert_close(result.value.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("blur", [0.05, 0.5])
@pytest.mark.parametrize("reach", [None, 0.8])
def test_the_default_agrees_with_geomloss(blur, reach):
    geomloss = pytest.importorskip("geomloss", reason="needs the extra `bench`")
    g = generator()
    x, y = (
        torch.rand(2, 60, 3, generator=g).double(),
        torch.rand(2, 50, 3, generator=g).double() + 0.3,
    )
    options = {"blur": blur, "reach": reach, "scaling": 0.99, "backend": "tensorized"}
    # For p = 2, the cost of GeomLoss is half the squared distance.
    expected = 2 * geomloss.SamplesLoss("sinkhorn", p=2, **options)(x, y)
    rho = None if reach is None else 2 * reach**2
    actual = sinkhorn_divergence(x, y, epsilon=2 * blur**2, rho=rho, **SQUARED)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["20 and 20 points", "30 points and 100 copies"])
def test_the_schedule_converges_without_acceleration(name):
    """Other devices compute in float32 and do not accelerate."""
    x, y, epsilon = HARD[name]
    solver = divergence._Solver(epsilon, SQUARED, accelerated=False)
    sides = [divergence._Side(t, *[None] * 5) for t in (x, y)]
    pairs = ((0, 1), (0, 0), (1, 1))
    results = [solver.solve(sides[i], sides[j])[0] for i, j in pairs]
    assert all((result.marginal_error <= 1e-4).all() for result in results)
    values = [result.value for result in results]
    value = values[0] - (values[1] + values[2]) / 2
    torch.testing.assert_close(value.double(), truth(x, y, epsilon), rtol=5e-3, atol=0)


def test_one_set_meets_many():
    x, y = torch.randn(6, 2), torch.randn(4, 8, 2)
    expected = sinkhorn_divergence(x.expand(4, 6, 2), y, epsilon=0.2, **SQUARED)
    torch.testing.assert_close(sinkhorn_divergence(x, y, epsilon=0.2, **SQUARED), expected)
    assert sinkhorn_divergence(x, y[0], epsilon=0.2, **SQUARED).shape == ()


def test_masses_may_be_probabilities():
    x, y = scattered(2, 6, 5)
    a, b = torch.rand(2, 6).softmax(1), torch.rand(2, 5).softmax(1)
    a[0, 2] = 0
    a[0] /= a[0].sum()
    for rho in (None, 2.0):
        actual = sinkhorn_divergence(x, y, a=a, b=b, epsilon=0.5, rho=rho, **SQUARED)
        expected = sinkhorn_divergence(x, y, a.log(), b.log(), epsilon=0.5, rho=rho, **SQUARED)
        torch.testing.assert_close(actual, expected)
    scaled = sinkhorn_divergence(x, y, a=3 * a, b=2 * b, epsilon=0.5, rho=2.0, **SQUARED)
    logarithms = (3 * a).log(), (2 * b).log()
    expected = sinkhorn_divergence(x, y, *logarithms, epsilon=0.5, rho=2.0, **SQUARED)
    torch.testing.assert_close(scaled, expected)


def test_the_temperature_is_differentiable():
    x, y = (t.double() for t in scattered(2, 6, 5))
    epsilon = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)

    def loss(epsilon):
        return sinkhorn_divergence(x, y, epsilon=epsilon, tol=1e-10, **SQUARED)

    assert torch.autograd.gradcheck(loss, (epsilon,), eps=1e-5, atol=1e-6)


def test_large_sets_converge():
    g = generator()
    x, y = torch.rand(1, 1000, 3, generator=g), torch.rand(1, 1200, 3, generator=g) + 0.3
    result = sinkhorn_divergence(x, y, epsilon=0.005, return_result=True, **SQUARED)
    assert result.status.item() == Status.CONVERGED and result.n_iter.item() < 500


@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
def test_equal_sets_have_divergence_zero(epsilon):
    x, _ = scattered(2, 40, 40)
    for other in (x, x[:, torch.randperm(40)]):
        value = sinkhorn_divergence(x, other, epsilon=epsilon, **SQUARED)
        assert value.abs().max() < 1e-9


def test_small_distances_keep_their_digits():
    x, step = torch.rand(1, 100, 3).double(), torch.randn(1, 100, 3).double()
    for size in (1e-1, 1e-2, 1e-3):
        y = x + size * step
        expected = truth(x, y, 0.05, tol=1e-11)
        actual = sinkhorn_divergence(x, y, epsilon=0.05, **SQUARED)
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=0)


def test_temperatures_may_differ_between_problems():
    x, y = scattered(3, 30, 40)
    epsilon = torch.tensor([1e-3, 0.05, 1.0])
    together = sinkhorn_divergence(x, y, epsilon=epsilon, return_result=True, **SQUARED)
    assert together.status.eq(Status.CONVERGED).all()
    for i, value in enumerate(together.value):
        alone = sinkhorn_divergence(
            x[i : i + 1], y[i : i + 1], epsilon=epsilon[i].item(), **SQUARED
        )
        torch.testing.assert_close(alone[0], value, rtol=1e-4, atol=1e-6)


def test_a_problem_gives_the_same_bits_alone_and_in_a_batch():
    x, y = scattered(5, 30, 40)
    y[2] *= 100
    together = sinkhorn_divergence(x, y, epsilon=0.01, return_result=True, **SQUARED)
    for i in range(5):
        alone = sinkhorn_divergence(
            x[i : i + 1], y[i : i + 1], epsilon=0.01, return_result=True, **SQUARED
        )
        for actual, expected in zip(alone, together, strict=True):
            assert torch.equal(actual, expected[i : i + 1])


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_gradient_is_that_of_the_converged_value(gradient):
    x, y = (t.double() for t in scattered(2, 8, 9))
    log_a = torch.randn(2, 8).double().log_softmax(1).requires_grad_()
    options = {"epsilon": 2.0, "gradient": gradient, "tol": 1e-9, **SQUARED}
    leaf = x.requires_grad_()

    def loss(x, log_a):
        return sinkhorn_divergence(x, y, log_a.log_softmax(1), **options)

    assert torch.autograd.gradcheck(loss, (leaf, log_a), eps=1e-5, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------- status and warnings


def test_the_result_names_the_worst_of_three_solves():
    x, y = scattered(3, 12, 15)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1] = False
    y[2, 3, 0] = math.nan
    with pytest.warns(RuntimeWarning, match="is NaN for a problem without a plan"):
        result = sinkhorn_divergence(x, y, epsilon=0.1, mask_a=mask, return_result=True, **SQUARED)
    assert isinstance(result, DivergenceResult)
    assert result.status.tolist() == [Status.CONVERGED, Status.EMPTY, Status.INFEASIBLE]
    assert result.value[0] > 0 and result.value[1] == 0 and result.value[2].isnan()
    assert result.status.dtype == result.n_iter.dtype == torch.int32
    across = sinkhorn_vectors(x[:1], y[:1], epsilon=0.1, tol=1e-5, max_iter=5000, **SQUARED)
    assert across.value.shape == result.marginal_error[:1].shape
    assert result.n_iter[0] > 3  # with the iterations of the warm start


def test_masses_without_a_plan_are_reported_and_give_nan():
    x, y = scattered(2, 6, 5)
    log_a, log_b = torch.full((2, 6), 1 / 6).log(), torch.full((2, 5), 1 / 5).log()
    log_a[0, 5], log_a[0, :5] = -INF, math.log(1 / 5)
    log_b[0] += math.log(2)
    x.requires_grad_()
    log_a.requires_grad_()
    for max_iter in (100, 101, 1000):
        with pytest.warns(RuntimeWarning, match="total masses of its sides differ"):
            result = sinkhorn_divergence(
                *(x, y, log_a, log_b),
                epsilon=0.5,
                max_iter=max_iter,
                tol=1e-2,
                return_result=True,
                **SQUARED,
            )
        assert result.value[0].isnan() and result.value[1].isfinite()
        assert result.status.tolist() == [Status.INFEASIBLE, Status.CONVERGED]
    # A gradient scaler sees the NaN; padding and other problems do not.
    for leaf in torch.autograd.grad(result.value.sum(), (x, log_a)):
        assert leaf[0, :5].isnan().all() and not leaf[0, 5].any() and leaf[1].isfinite().all()
    value = sinkhorn_divergence(x, y, log_a, log_b, epsilon=0.5, rho=1.0, **SQUARED)
    assert value.isfinite().all()


def test_a_run_that_is_too_short_warns_and_names_what_to_raise():
    x, y = scattered(2, 30, 40)
    options = {"epsilon": 1e-3, "return_result": True, **SQUARED}
    message = r"the marginal error is \de-0\d, tol is 1e-05; raise max_iter \(50\), epsilon or tol"
    with pytest.warns(RuntimeWarning, match=message):
        result = sinkhorn_divergence(x, y, max_iter=50, **options)
    assert result.status.eq(Status.MAX_ITER).all() and result.n_iter.eq(50).all()
    with pytest.warns(RuntimeWarning, match='use gradient="envelope"'):
        sinkhorn_divergence(x, y, max_iter=120, gradient="unroll", **options)


def test_a_warning_recurs_once_per_place():
    x, y = scattered(2, 30, 40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(5):
            sinkhorn_divergence(x, y, epsilon=1e-3, max_iter=5, **SQUARED)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_short_runs_are_plain_and_their_status_is_tested():
    x, y = scattered(2, 10, 12)
    options = {"epsilon": 3.0, "max_iter": 60, **SQUARED}
    actual = sinkhorn_divergence(x, y, return_result=True, **options)
    assert actual.n_iter.eq(60).all() and actual.status.eq(Status.CONVERGED).all()
    x, y = x.double(), y.double()
    pairs = ((x, y), (x, x), (y, y))
    across, *within = (sinkhorn_vectors(*pair, **options).value for pair in pairs)
    torch.testing.assert_close(actual.value, (across - sum(within) / 2).float())


def test_a_tolerance_of_zero_runs_plain_iterations_in_silence():
    x, y = scattered(2, 10, 12)
    result = sinkhorn_divergence(
        x, y, epsilon=0.01, tol=0.0, max_iter=200, return_result=True, **SQUARED
    )
    assert result.status.eq(Status.MAX_ITER).all() and result.n_iter.eq(200).all()


def test_explicit_options_replace_the_schedule(monkeypatch):
    calls = []

    def record(*args, **options):
        calls.append(options)
        return sinkhorn_vectors(*args, **options)

    monkeypatch.setattr(divergence, "sinkhorn_vectors", record)
    x, y = scattered(1, 5, 6)
    options = {"epsilon": 0.5, **SQUARED}
    sinkhorn_divergence(x, y, **options)
    automatic = calls.copy()
    assert len(automatic) == 12 and [call["anderson"] for call in automatic] == [5] * 12
    assert automatic[3]["tol"] == 1e-5 and automatic[3]["max_iter"] == 5000
    for change in ({"anderson": 2}, {"anneal": (4.0, 0.5)}, {"omega": 1.2}, {"gradient": "unroll"}):
        calls.clear()
        sinkhorn_divergence(x, y, **options, **change)
        assert len(calls) == 3 and all(call.get("init") is None for call in calls)
        for name, value in change.items():
            assert all(call[name] == value for call in calls)
    calls.clear()
    sinkhorn_divergence(x, y, **options, max_iter=700, tol=1e-7)
    assert len(calls) == 12 and calls[3]["max_iter"] == 700 and calls[3]["tol"] == 1e-7


def test_compiled_with_the_defaults():
    def value(x, y):
        return sinkhorn_divergence(x, y, epsilon=0.1, backend="reference", **SQUARED)

    x, y = scattered(2, 4, 5)
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), value(x, y))


def test_vmap_agrees_with_a_loop():
    x, y = torch.randn(3, 2, 5, 2), torch.randn(3, 2, 6, 2)

    def value(x, y):
        return sinkhorn_divergence(x, y, epsilon=0.1, **SQUARED)

    expected = torch.stack([value(*pair) for pair in zip(x, y, strict=True)])
    torch.testing.assert_close(torch.vmap(value)(x, y), expected)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "x is a list; expected a tensor", {"x": [[[0.0]]]}),
        (TypeError, "y has dtype torch.int64", {"y": torch.zeros(1, 3, 2).long()}),
        (ValueError, "epsilon is 0; expected a finite number > 0", {"epsilon": 0}),
        (ValueError, "tol is -1", {"tol": -1}),
        (TypeError, "max_iter is a str", {"max_iter": "many"}),
        (ValueError, "cost is 'p2'; expected one of", {"cost": "p2"}),
    ],
)
def test_errors_name_the_argument(error, message, arguments):
    x = torch.randn(1, 3, 2)
    with pytest.raises(error, match=message):
        sinkhorn_divergence(**{"x": x, "y": x, "epsilon": 0.1} | arguments)
