"""The registered ops: registration, derivatives, compilation, batching and threads."""

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from optical import OTAlignmentLoss, ot_alignment, sinkhorn, sinkhorn_divergence, sinkhorn_vectors
from optical.backends import reference
from optical.backends.dense import PaddedProblem
from optical.backends.problem import GRADIENTS, Problem, Solution
from optical.testing.cases import all_cases, random_case, random_vector_case

ALL = {case.name: case for case in all_cases()}
FORWARD = torch.ops.optical.sinkhorn.default
BACKWARD = torch.ops.optical.sinkhorn_backward.default
APPLY = torch.ops.optical.apply_plan.default
DIFFERENTIABLE = [Problem._fields.index(name) for name in ("x", "y", "log_a", "log_b")]


def fields(name, gradient="envelope", backend="reference"):
    return list(ALL[name].problem(gradient, backend))


# ----------------------------------------------------------------------------------- registration

CHECKED = [
    ("transposed_strides", "envelope"),
    ("no_problem", "implicit"),
    ("everything", "unroll"),
    ("cosine_ragged", "implicit"),
    ("dot_ragged_packed", "unroll"),
]


@pytest.mark.parametrize(
    ("name", "gradient", "backend"),
    [
        *((*case, "reference") for case in CHECKED),
        ("dot_ragged_packed", "implicit", "auto"),
    ],
)
@pytest.mark.filterwarnings("ignore:optical runs its plain PyTorch reference")
def test_opcheck_forward(name, gradient, backend):
    inputs = fields(name, gradient, backend)
    for index in DIFFERENTIABLE:
        if inputs[index] is not None:
            copied = inputs[index].clone(memory_format=torch.preserve_format)
            inputs[index] = copied.requires_grad_()
    torch.library.opcheck(FORWARD, tuple(inputs))


@pytest.mark.parametrize(("name", "gradient"), CHECKED)
def test_opcheck_backward(name, gradient):
    inputs = fields(name, gradient)
    solution = Solution(*FORWARD(*inputs))
    upstream = torch.rand(2, len(solution.value), dtype=torch.float64)
    potentials = (None, None)
    if gradient == "unroll":
        potentials = torch.rand_like(solution.f), None
    saved = solution.f, solution.g, solution.w, solution.z, solution.n_iter
    needs = (gradient != "implicit", inputs[1] is not None)
    torch.library.opcheck(BACKWARD, (*upstream, *potentials, *inputs, *saved, *needs))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("name", ["7x5", "dot_ragged_packed"])
def test_opcheck_apply_plan(name, transpose):
    inputs = fields(name)
    solution = Solution(*FORWARD(*inputs))
    potential = solution.f if transpose else solution.g
    v = torch.rand(*potential.shape, 3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(APPLY, (*inputs, solution.f, solution.g, v, transpose))


def test_outputs_do_not_share_memory():
    inputs = fields("init_no_iteration")
    tensors = [*FORWARD(*inputs), *(x for x in inputs if isinstance(x, torch.Tensor))]
    addresses = [x.data_ptr() for x in tensors if x.numel()]
    assert len(set(addresses)) == len(addresses)


# ------------------------------------------------------------------------------------ derivatives

MODES = {
    "plain": {},
    "rho": {"rho": (0.4, 1.5)},
    "semi": {"rho": (None, 0.7)},
    "omega": {"omega": 1.4},
    "anneal": {"anneal": (2.0, 0.5)},
    "tol": {"tol": 1e-2},
}


def small(kind):
    lengths = {"rows": [4, 2], "columns": [3, 5]}
    if kind == "given":
        case = random_case("", 2, 4, 5, **lengths)
    else:
        case = random_vector_case("", kind, batch=2, n=4, m=5, dim=3, seed=1, **lengths)
    return case


def leaves_of(case):
    tensors = [case.x, case.y, case.log_a, case.log_b]
    # A log-mass of -inf cannot be perturbed; `solver` restores it.
    tensors = [x if x is None else x.nan_to_num(neginf=0.0).clone() for x in tensors]
    return [x if x is None else x.requires_grad_() for x in tensors]


def solver(case, options):
    def solve(x, y, log_a, log_b):
        log_a = torch.where(case.log_a > -math.inf, log_a, -math.inf)
        log_b = torch.where(case.log_b > -math.inf, log_b, -math.inf)
        common = {"epsilon": 0.5, "backend": "reference", **options}
        if y is None:
            return sinkhorn(x, log_a, log_b, **common)
        return sinkhorn_vectors(x, y, log_a, log_b, cost=case.kind, **common)

    return solve


KINDS = ["cosine", "sqeuclidean", "dot"]


@pytest.mark.parametrize(
    ("kind", "mode"), [*(("given", mode) for mode in MODES), *((kind, "semi") for kind in KINDS)]
)
def test_gradcheck_of_unroll(kind, mode):
    case = small(kind)
    options = {"gradient": "unroll", "max_iter": 3, **MODES[mode]}
    leaves = leaves_of(case)

    def outputs(*moved):
        x, y, *masses = moved if case.y is not None else (moved[0], None, *moved[1:])
        result = solver(case, options)(x, y, *masses)
        return result.value, result.value_linear, result.f, result.g, result.plan()

    assert torch.autograd.gradcheck(outputs, [x for x in leaves if x is not None], fast_mode=True)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("given", mode) for mode in ("plain", "rho", "semi", "omega", "anneal", "anderson")),
        *((kind, mode) for kind in KINDS for mode in ("plain", "rho")),
    ],
)
def test_gradcheck_of_implicit(kind, mode):
    """Compares with finite differences of the converged solution, for both values."""
    case = small(kind)
    options = {"anderson": {"anderson": 3}} | MODES
    options = {"gradient": "implicit", "max_iter": 300, "tol": 1e-14, **options[mode]}
    leaves = leaves_of(case)
    penalised = "rho" in options

    def outputs(*moved):
        x, y, log_a, log_b = moved if case.y is not None else (moved[0], None, *moved[1:])
        if "rho" not in options or mode == "semi":
            # With fixed marginals, the total masses must stay equal.
            log_a, log_b = (
                torch.where(own > -math.inf, moving, -math.inf).log_softmax(1)
                for moving, own in ((log_a, case.log_a), (log_b, case.log_b))
            )
            log_a, log_b = (x.masked_fill(x == -math.inf, 0.0) for x in (log_a, log_b))
        result = solver(case, options)(x, y, log_a, log_b)
        return result.value, result.value_linear

    assert penalised == (mode in ("rho", "semi"))
    leaves = [x for x in leaves if x is not None]
    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("mode", ["plain", "rho", "semi", "omega", "anneal"])
def test_gradcheck_of_the_envelope_of_the_value_at_convergence(mode):
    case = small("cosine")
    options = {"max_iter": 300, "tol": 1e-14, **MODES[mode]}

    def value(x, y, log_a, log_b):
        if mode != "rho":
            log_a, log_b = (
                torch.where(own > -math.inf, moving, -math.inf).log_softmax(1)
                for moving, own in ((log_a, case.log_a), (log_b, case.log_b))
            )
            log_a, log_b = (x.masked_fill(x == -math.inf, 0.0) for x in (log_a, log_b))
        return solver(case, options)(x, y, log_a, log_b).value

    assert torch.autograd.gradcheck(value, leaves_of(case), fast_mode=True)


def test_the_envelope_of_value_linear_is_the_plan_and_not_the_total_derivative():
    cost = ALL["7x5"].x.clone().requires_grad_()
    gradients = {}
    for gradient in GRADIENTS:
        result = sinkhorn(cost, epsilon=0.1, max_iter=400, gradient=gradient, backend="reference")
        gradients[gradient] = torch.autograd.grad(result.value_linear.sum(), cost)[0]
    envelope, total = gradients["envelope"], gradients["unroll"]
    torch.testing.assert_close(envelope, result.plan().detach())
    torch.testing.assert_close(gradients["implicit"], total)
    assert 0.1 < (envelope - total).abs().sum() / total.abs().sum() < 1


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_agree_with_autograd_through_the_reference(gradient):
    """For packed vectors with a penalty; autograd differentiates cost, padding and iterations."""
    case = replace(ALL["cosine_packed_rho"], max_iter=8 if gradient == "unroll" else 150)
    actual = []
    for solve in (FORWARD, by_autograd):
        inputs = list(case.problem(gradient, "reference"))
        leaves = [inputs[index].clone().requires_grad_() for index in DIFFERENTIABLE]
        for index, leaf in zip(DIFFERENTIABLE, leaves, strict=True):
            inputs[index] = leaf
        value, value_linear, *_ = solve(*inputs)
        loss = (value * torch.linspace(-1, 2, len(value), dtype=torch.float64)).sum()
        if gradient != "envelope":  # exact for the value only
            loss = loss + value_linear.square().sum()
        actual.append(torch.autograd.grad(loss, leaves))
    for grad, expected in zip(*actual, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)


def by_autograd(*values):
    return reference.forward(PaddedProblem(Problem(*values)).with_cost)


def test_upstream_gradients_of_both_values_add_up():
    case = ALL["ragged"]
    cost, log_a = case.x.clone().requires_grad_(), case.log_a.clone().requires_grad_()
    result = sinkhorn(cost, log_a, case.log_b, epsilon=0.1)
    up_value, up_linear = torch.tensor([[0.0, 1.0, -2.0, 3.0], [0.0, 5.0, 2.0, 0.5]]).double()
    (result.value * up_value + result.value_linear * up_linear).sum().backward()
    expected = (up_value + up_linear)[:, None, None] * result.plan()
    torch.testing.assert_close(cost.grad, expected)
    assert not cost.grad[0].any() and not cost.grad[2].any()
    torch.testing.assert_close(log_a.grad, up_value[:, None] * log_a.detach().exp() * result.f)
    assert not log_a.grad[case.log_a == -math.inf].any()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_an_upstream_gradient_of_zero_gives_zero(gradient):
    case = ALL["cosine_33x31"]
    x = case.x.clone().requires_grad_()
    result = sinkhorn_vectors(
        x, case.y, epsilon=0.4, max_iter=5, gradient=gradient, backend="reference"
    )
    (result.value[:1] * 2 + 0 * result.value_linear[1]).sum().backward()
    assert x.grad[0].any() and not x.grad[1:].any()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_only_one_input_requires_a_gradient(index, gradient):
    case = ALL["cosine_ragged"]
    inputs = [x.clone() for x in (case.x, case.y, case.log_a, case.log_b)]
    all_inputs = [x.clone().requires_grad_() for x in inputs]
    inputs[index].requires_grad_()
    for tensors in (inputs, all_inputs):
        result = sinkhorn_vectors(
            *tensors, epsilon=0.1, max_iter=5, gradient=gradient, backend="reference"
        )
        (result.value + result.value_linear).sum().backward()
    assert [x.grad is not None for x in inputs] == [i == index for i in range(4)]
    torch.testing.assert_close(inputs[index].grad, all_inputs[index].grad)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_which_outputs_are_differentiable(gradient):
    cost = torch.rand(2, 3, 4, requires_grad=True)
    result = sinkhorn(cost, epsilon=0.1, gradient=gradient, backend="reference")
    assert result.value.requires_grad and result.value_linear.requires_grad
    for tensor in (result.marginal_error, result.n_iter, result.status, result.gradient_residual):
        assert not tensor.requires_grad
    for tensor in (result.f, result.g):
        assert tensor.requires_grad == (gradient == "unroll")
    for tensor in (result.plan(), result.log_plan(), result.apply_plan(torch.rand(2, 4, 1))):
        assert tensor.requires_grad == (gradient != "envelope")


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_second_derivative_raises(gradient):
    cost = torch.rand(2, 3, 4, requires_grad=True)
    loss = sinkhorn(cost, epsilon=0.1, gradient=gradient, backend="reference").value.sum()
    (first,) = torch.autograd.grad(loss, cost, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"no second derivative; .*optical\.backends\.reference\.sinkhorn"
    ):
        first.sum().backward()


def test_the_reference_has_a_second_derivative():
    cost = torch.rand(1, 3, 3, dtype=torch.float64, requires_grad=True)
    log_a, epsilon = torch.zeros(1, 3).double().log_softmax(1), torch.tensor([0.5]).double()

    def value(cost):
        return reference.sinkhorn(cost, log_a, log_a, epsilon, 3, rho_a=2.0).value

    assert torch.autograd.gradgradcheck(value, cost)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("name", ["ragged", "everything", "cosine_ragged", "dot_ragged_packed"])
def test_apply_plan_multiplies_the_plan_and_has_two_derivatives(name, transpose):
    case = ALL[name]
    values = case.problem("envelope", "reference")
    solution = Solution(*FORWARD(*values))
    dense = PaddedProblem(values)
    plan = dense.plan(solution.f, solution.g)
    read, written = (dense.a, dense.b) if transpose else (dense.b, dense.a)
    potential = solution.f if transpose else solution.g
    v = torch.randn(*potential.shape, 2, dtype=torch.float64, requires_grad=True)
    actual = APPLY(*values, solution.f, solution.g, v, transpose)
    expected = written.pack((plan.mT if transpose else plan) @ read.pad(v))
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(actual)
    for pair in zip(
        torch.autograd.grad((actual * weights).square().sum(), v, create_graph=True),
        torch.autograd.grad((expected * weights).square().sum(), v, create_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(*pair)
        second = [torch.autograd.grad(grad.square().sum(), v)[0] for grad in pair]
        torch.testing.assert_close(*second)


# ------------------------------------------------------------------------ compilation and batching


def loss_of(student, teacher, mask):
    loss = OTAlignmentLoss(max_iter=10, backend="reference", rho=0.5, gradient="implicit")
    return loss(student, teacher, mask)


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiles_as_one_graph_with_dynamic_shapes(compiler):
    compiled = torch.compile(loss_of, fullgraph=True, backend=compiler, dynamic=True)
    for size in (5, 9):
        teacher = torch.randn(3, 7, 8)
        mask = torch.arange(size)[None, :] < torch.tensor([[size], [2], [0]])
        results = []
        for function in (loss_of, compiled):
            generator = torch.Generator().manual_seed(0)
            student = torch.randn(3, size, 8, generator=generator).requires_grad_()
            loss = function(student, teacher, mask)
            loss.backward()
            results.append((loss.detach(), student.grad))
        torch.testing.assert_close(*results)


def everything_of(x, y, cu_a, cu_b):
    result = sinkhorn_vectors(
        x,
        y,
        epsilon=0.1,
        cu_seqlens_a=cu_a,
        cu_seqlens_b=cu_b,
        max_iter=5,
        tol=1e-3,
        anneal=(1.0, 0.5),
        backend="reference",
    )
    return result.value, result.apply_plan(y), result


def test_packed_problems_and_the_result_object_compile():
    x, y = torch.randn(9, 4), torch.randn(7, 4)
    offsets = torch.tensor([0, 4, 9]), torch.tensor([0, 3, 7], dtype=torch.int32)
    compiled = torch.compile(everything_of, fullgraph=True, backend="aot_eager", dynamic=True)
    value, product, result = compiled(x, y, *offsets)
    expected = everything_of(x, y, *offsets)
    torch.testing.assert_close((value, product), expected[:2])
    assert torch.equal(result.status, expected[2].status)
    torch.testing.assert_close(result.plan(), expected[2].plan())


def test_the_divergence_compiles():
    def divergence(x, y, lengths):
        options = {"cost": "sqeuclidean", "max_iter": 5, "backend": "reference"}
        return sinkhorn_divergence(x, y, epsilon=0.1, lengths_a=lengths, **options)

    inputs = torch.randn(3, 4, 2), torch.randn(3, 5, 2), torch.tensor([4, 2, 0])
    compiled = torch.compile(divergence, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), divergence(*inputs))


class Distance(torch.nn.Module):
    def forward(self, student, teacher, mask):
        return ot_alignment(student, teacher, mask, max_iter=5, backend="reference")


def test_exports_with_dynamic_shapes_and_loads_again(tmp_path):
    def inputs(batch, size):
        mask = torch.arange(size) < torch.randint(1, size + 1, (batch, 1))
        return torch.randn(batch, size, 8), torch.randn(batch, 7, 8), mask

    batch, size = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("size", min=2, max=64)
    shapes = ({0: batch, 1: size}, {0: batch}, {0: batch, 1: size})
    program = torch.export.export(Distance(), inputs(3, 5), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "distance.pt2")
    loaded = torch.export.load(tmp_path / "distance.pt2").module()
    other = inputs(4, 6)
    torch.testing.assert_close(loaded(*other), Distance()(*other))
    # Importing the package after PyTorch is enough for a process that only loads the program.
    code = "import sys, torch, optical; torch.export.load(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "distance.pt2")], check=True)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_vmap_agrees_with_a_loop(gradient):
    student, teacher = torch.randn(4, 3, 5, 8, requires_grad=True), torch.randn(3, 7, 8)
    mask = torch.arange(5)[None] < torch.tensor([[5], [2], [0]])

    def distance(student):
        options = {"max_iter": 7, "gradient": gradient, "backend": "reference"}
        return ot_alignment(student, teacher, mask, **options)

    together, apart = torch.vmap(distance)(student), torch.stack([distance(x) for x in student])
    torch.testing.assert_close(together, apart)
    grads = [torch.autograd.grad(x.square().sum(), student)[0] for x in (together, apart)]
    torch.testing.assert_close(*grads)


def test_vmap_over_each_argument_and_nested():
    cost, epsilon = torch.rand(2, 3, 4), torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    actual = torch.vmap(lambda epsilon: sinkhorn(cost, epsilon=epsilon).value)(epsilon)
    torch.testing.assert_close(actual[1], sinkhorn(cost, epsilon=epsilon[1]).value)
    lengths = torch.tensor([[1, 2], [3, 3]])
    actual = torch.vmap(lambda n: sinkhorn(cost, epsilon=0.1, lengths_a=n).value)(lengths)
    torch.testing.assert_close(actual[0], sinkhorn(cost, epsilon=0.1, lengths_a=lengths[0]).value)
    nested = torch.vmap(torch.vmap(lambda cost: sinkhorn(cost, epsilon=0.1).f, in_dims=1))
    many = torch.rand(2, 3, 5, 4, 6)
    expected = [[sinkhorn(many[i, :, j], epsilon=0.1).f for j in range(5)] for i in range(2)]
    torch.testing.assert_close(nested(many), torch.stack([torch.stack(x) for x in expected]))
    values = torch.rand(6, 2, 4, 1)
    result = sinkhorn(cost, epsilon=0.1)
    products = torch.vmap(result.apply_plan)(values)
    torch.testing.assert_close(products, result.plan() @ values)


def test_vmap_over_packed_problems_raises():
    offsets = torch.tensor([0, 2, 4])
    with pytest.raises(ValueError, match="give cu_seqlens of all of them"):
        torch.vmap(
            lambda x: (
                sinkhorn_vectors(
                    x, x, epsilon=0.1, cu_seqlens_a=offsets, cu_seqlens_b=offsets
                ).value
            )
        )(torch.randn(3, 4, 2))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_autocast_does_not_change_results(gradient):
    options = {"gradient": gradient, "backend": "reference", "max_iter": 5}
    student, teacher = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 7, 8)

    def step():
        result = sinkhorn_vectors(student, teacher, epsilon=0.1, **options)
        student.grad = None
        (result.value + result.value_linear).sum().backward()
        return result.value, result.f, result.plan(), result.apply_plan(teacher), student.grad

    expected = step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = step()
        cost = torch.randn(2, 5, 8) @ torch.randn(2, 8, 7)
        assert cost.dtype == torch.bfloat16
        assert sinkhorn(cost, epsilon=1.0, **options).value.dtype == torch.float32
    for tensor, truth in zip(actual, expected, strict=True):
        assert torch.equal(tensor, truth)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_calls_do_not_synchronise_with_the_device(gradient):
    """Fake tensors have no values, so a check that read one on the host would raise."""
    with FakeTensorMode():
        student, teacher = torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 7, 8)
        options = {"epsilon": torch.full((3,), 0.1), "tol": 1e-3, "max_iter": 3}
        options |= {"gradient": gradient, "rho": 1.0}
        result = sinkhorn_vectors(
            student, teacher, lengths_a=torch.tensor([1, 2, 3]), init=None, **options
        )
        result.apply_plan(teacher)
        result.value.sum().backward()
        assert student.grad.shape == student.shape
        packed = sinkhorn_vectors(
            torch.randn(9, 8),
            torch.randn(7, 8),
            cu_seqlens_a=torch.tensor([0, 1, 4, 9]),
            cu_seqlens_b=torch.tensor([0, 1, 4, 7]),
            **options,
        )
        assert packed.value.shape == (3,) and packed.f.shape == (9,)


def test_concurrent_threads_get_the_same_results():
    names = ["ragged", "everything", "cosine_ragged", "rho", "omega", "dot_ragged_packed"] * 4

    def solve(name):
        inputs = fields(name, "unroll")
        leaf = inputs[0].clone().requires_grad_()
        value, value_linear, *_ = FORWARD(leaf, *inputs[1:])
        return value.detach(), torch.autograd.grad((value + value_linear).sum(), leaf)[0]

    alone = [solve(name) for name in names]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(solve, names))
    for actual, expected in zip(together, alone, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
