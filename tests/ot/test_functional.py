"""The public functions: shapes, dtypes, masks, padding, options and error messages."""

import doctest
import math

import pytest
import torch
import torch.nn.functional as F

from optical import SinkhornResult, Status, ot_alignment, sinkhorn, sinkhorn_vectors
from optical.backends import registry
from optical.backends.dense import PaddedProblem
from optical.losses import alignment
from optical.ot import functional, result
from optical.testing.cases import packed, random_vector_case

NAN, INF = math.nan, math.inf


def clouds(batch=3, n=5, m=7, dim=8, dtype=torch.float32):
    student = torch.randn(batch, n, dim, dtype=dtype, requires_grad=True)
    teacher = torch.randn(batch, m, dim, dtype=dtype)
    student_mask = torch.arange(n) < torch.tensor([[n], [2], [0]])[:batch]
    teacher_mask = torch.arange(m) < torch.tensor([[3], [m], [m]])[:batch]
    return student, teacher, student_mask, teacher_mask


@pytest.mark.parametrize(
    "module", [functional, alignment, registry, result], ids=lambda m: m.__name__
)
def test_examples_in_the_docstrings(module):
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed


def test_shapes_and_dtypes_of_the_result():
    result = sinkhorn(torch.rand(2, 3, 4), epsilon=0.1)
    assert isinstance(result, SinkhornResult)
    for field, shape in {"value": (2,), "value_linear": (2,), "f": (2, 3), "g": (2, 4)}.items():
        assert getattr(result, field).shape == shape
    for field in ("marginal_error", "n_iter", "status", "gradient_residual"):
        assert getattr(result, field).shape == (2,)
    assert result.n_iter.dtype == result.status.dtype == torch.int32
    assert result.plan().shape == (2, 3, 4)
    assert "value=" in repr(result) and "arguments=" not in repr(result)
    with pytest.raises(AttributeError):
        result.value = None


def test_marginals_are_uniform_by_default():
    plan = sinkhorn(torch.rand(2, 3, 4).double(), epsilon=1.0).plan()
    torch.testing.assert_close(plan.sum(2), torch.full((2, 3), 1 / 3).double())
    torch.testing.assert_close(plan.sum(1), torch.full((2, 4), 1 / 4).double())


def test_epsilon_may_differ_between_problems():
    cost = torch.rand(2, 3, 4)
    both = sinkhorn(cost, epsilon=torch.tensor([0.1, 0.5]))
    for i, epsilon in enumerate((0.1, 0.5)):
        alone = sinkhorn(cost[i : i + 1], epsilon=epsilon)
        torch.testing.assert_close(both.value[i : i + 1], alone.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_costs_are_computed_in_float32(dtype):
    cost = torch.rand(2, 3, 4).to(dtype).requires_grad_()
    result = sinkhorn(cost, epsilon=0.1)
    result.value.sum().backward()
    assert result.value.dtype == torch.float32 and cost.grad.dtype == dtype
    assert torch.equal(result.value, sinkhorn(cost.detach().float(), epsilon=0.1).value)


def test_masks_shorten_the_texts():
    student, teacher, student_mask, teacher_mask = clouds()
    actual = ot_alignment(student, teacher, student_mask, teacher_mask)
    for i in range(2):
        x, y = student[i, student_mask[i]][None], teacher[i, teacher_mask[i]][None]
        cost = 1 - F.cosine_similarity(x[:, :, None], y[:, None], dim=-1)
        expected = sinkhorn(cost, epsilon=0.05, max_iter=50).value_linear
        torch.testing.assert_close(actual[i : i + 1], expected, rtol=1e-5, atol=1e-5)
    assert actual[2] == 0
    actual.sum().backward()
    assert not student.grad[~student_mask].any() and student.grad[0].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32])
def test_masks_may_be_numbers(dtype):
    student, teacher, student_mask, teacher_mask = clouds()
    expected = ot_alignment(student, teacher, student_mask, teacher_mask)
    actual = ot_alignment(student, teacher, student_mask.to(dtype), teacher_mask.to(dtype))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("gradient", ["envelope", "unroll"])
@pytest.mark.parametrize("filling", [NAN, INF, -INF, 1e30, 0.0])
def test_values_of_padding_do_not_matter(filling, gradient):
    student, teacher, student_mask, teacher_mask = clouds()
    values, gradients = [], []
    for fill in (1.0, filling):
        x = student.detach().masked_fill(~student_mask[:, :, None], fill).requires_grad_()
        y = teacher.masked_fill(~teacher_mask[:, :, None], fill).requires_grad_()
        value = ot_alignment(x, y, student_mask, teacher_mask, max_iter=10, gradient=gradient)
        value.sum().backward()
        assert not x.grad[~student_mask].any() and not y.grad[~teacher_mask].any()
        values.append(value)
        gradients.append((x.grad, y.grad))
    assert torch.equal(*values)
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_a_zero_vector_has_cost_one_and_a_finite_gradient():
    student = torch.zeros(1, 2, 4, requires_grad=True)
    value = ot_alignment(student, torch.randn(1, 3, 4))
    value.sum().backward()
    assert value.item() == pytest.approx(1) and student.grad.isfinite().all()


@pytest.mark.parametrize("gradient", ["envelope", "unroll"])
def test_the_cosine_does_not_depend_on_lengths(gradient):
    student, teacher, *_ = clouds(dtype=torch.float64)
    options = {"gradient": gradient, "max_iter": 10}
    lengths = torch.rand(3, 5, 1).double() + 0.1
    scaled = ot_alignment(student * lengths, 3 * teacher, **options)
    torch.testing.assert_close(scaled, ot_alignment(student, teacher, **options))
    scaled.sum().backward()
    # The gradient is orthogonal to the vector.
    torch.testing.assert_close((student.grad * student).sum(-1), torch.zeros(3, 5).double())


def test_a_permutation_of_the_tokens_has_cost_zero():
    teacher = F.normalize(torch.randn(2, 6, 64), dim=-1)
    actual = ot_alignment(teacher[:, torch.randperm(6)], teacher, epsilon=0.02, max_iter=200)
    assert (actual < 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_vectors_are_computed_in_float32(dtype):
    student, teacher = (x.detach().to(dtype) for x in clouds(dim=128)[:2])
    actual = ot_alignment(student, teacher)
    assert actual.dtype == torch.float32
    truth = ot_alignment(student.double(), teacher.double()).float()
    torch.testing.assert_close(actual, truth, rtol=0, atol=1e-5)
    mixed = ot_alignment(student, teacher.float())
    assert torch.equal(mixed, actual)


def test_a_teacher_without_gradient_receives_none():
    student, teacher, *_ = clouds()
    with torch.no_grad():
        targets = 2 * teacher
    ot_alignment(student, targets).sum().backward()
    assert student.grad.any() and targets.grad is None


# --------------------------------------------------------------- masks, lengths, offsets, options


def same(actual, expected):
    for field in ("value", "value_linear", "marginal_error"):
        torch.testing.assert_close(getattr(actual, field), getattr(expected, field))


def test_masks_lengths_and_masses_are_equivalent():
    cost = torch.rand(3, 4, 5)
    lengths = torch.tensor([4, 2, 0]), torch.tensor([5, 3, 1], dtype=torch.int32)
    masks = [torch.arange(n) < x[:, None] for n, x in zip((4, 5), lengths, strict=True)]
    masses = [
        torch.where(mask, -mask.sum(1, keepdim=True).clamp(min=1).log(), -INF) for mask in masks
    ]
    expected = sinkhorn(cost, *masses, epsilon=0.1)
    assert expected.status.tolist() == [Status.MAX_ITER, Status.MAX_ITER, Status.EMPTY]
    by_length = sinkhorn(cost, epsilon=0.1, lengths_a=lengths[0], lengths_b=lengths[1])
    by_mask = sinkhorn(cost, epsilon=0.1, mask_a=masks[0].float(), mask_b=masks[1].long())
    for actual in (by_length, by_mask):
        assert torch.equal(actual.value, expected.value) and torch.equal(actual.f, expected.f)


def test_a_mask_applies_to_given_masses():
    cost, log_a = torch.rand(1, 3, 4), torch.tensor([[0.5, 0.3, 0.2]]).log()
    mask = torch.tensor([[True, False, True]])
    actual = sinkhorn(cost, log_a, epsilon=0.1, rho=1.0, mask_a=mask)
    expected = sinkhorn(cost[:, [0, 2]], log_a[:, [0, 2]], epsilon=0.1, rho=1.0)
    same(actual, expected)
    assert actual.f[0, 1] == 0 and not actual.plan()[0, 1].any()


@pytest.mark.parametrize("kind", ["cosine", "sqeuclidean", "dot"])
def test_vectors_are_equivalent_to_their_cost(kind):
    case = random_vector_case("", kind, rows=[9, 4, 1], columns=[12, 12, 5], epsilon=1.0)
    cost = PaddedProblem(case.problem()).with_cost.x
    masses = (case.log_a, case.log_b)
    expected = sinkhorn(cost, *masses, epsilon=1.0, rho=(None, 2.0), max_iter=30)
    options = {"cost": kind, "epsilon": 1.0, "rho": (None, 2.0), "max_iter": 30}
    actual = sinkhorn_vectors(case.x, case.y, *masses, **options)
    same(actual, expected)
    torch.testing.assert_close(actual.plan(), expected.plan())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_problems_are_equivalent_to_padded_ones(dtype):
    lengths = [4, 0, 9], [2, 5, 12]
    padded = random_vector_case("", "cosine", rows=lengths[0], columns=lengths[1])
    flat = packed(padded)
    offsets = {"cu_seqlens_a": flat.cu_a.to(dtype), "cu_seqlens_b": flat.cu_b.to(dtype)}
    actual = sinkhorn_vectors(flat.x, flat.y, epsilon=0.1, **offsets)
    sizes = [torch.tensor(x) for x in lengths]
    expected = sinkhorn_vectors(
        padded.x, padded.y, epsilon=0.1, lengths_a=sizes[0], lengths_b=sizes[1]
    )
    same(actual, expected)
    torch.testing.assert_close(actual.plan(), expected.plan())
    valid = torch.arange(9) < sizes[0][:, None]
    assert actual.f.shape == (13,) and torch.allclose(actual.f, expected.f[valid])
    v = torch.randn(3, 12, 2).double()
    inside = v[torch.arange(12) < sizes[1][:, None]]
    torch.testing.assert_close(actual.apply_plan(inside), expected.apply_plan(v)[valid])
    again = sinkhorn_vectors(
        flat.x, flat.y, flat.log_a, flat.log_b, epsilon=0.1, init=(actual.f, actual.g), **offsets
    )
    assert (again.marginal_error <= actual.marginal_error + 1e-12).all()


def test_the_options_reach_the_operator():
    cost = torch.rand(2, 6, 7).double()
    plain = sinkhorn(cost, epsilon=0.05, tol=1e-9, max_iter=2000)
    for options in (
        {"omega": 1.3},
        {"anderson": 5},
        {"anneal": (1.0, 0.7)},
        {"init": (plain.f, plain.g)},
    ):
        actual = sinkhorn(cost, epsilon=0.05, tol=1e-9, max_iter=2000, **options)
        torch.testing.assert_close(actual.value, plain.value, rtol=0, atol=1e-7)
        assert not torch.equal(actual.n_iter, plain.n_iter), options
        assert actual.status.tolist() == [Status.CONVERGED] * 2
    for rho in (2.0, (2.0, 2.0), (2, INF), (None, 2.0), INF, None):
        actual = sinkhorn(cost, epsilon=0.05, rho=rho, max_iter=500)
        kept = (rho[0] if isinstance(rho, tuple) else rho) in (None, INF)
        error = (actual.plan().sum(2) - 1 / 6).abs().sum(1)
        assert (error < 1e-4).all() == kept
    assert (sinkhorn(cost, epsilon=0.1, gradient="implicit").gradient_residual < 1e-6).all()


def test_each_gradient_mode_is_the_one_requested():
    x, y = torch.randn(2, 4, 3).double(), torch.randn(2, 5, 3).double()
    actual = {}
    for gradient in ("envelope", "implicit", "unroll"):
        leaf = x.clone().requires_grad_()
        loss = ot_alignment(leaf, y, epsilon=0.3, max_iter=200, gradient=gradient)
        actual[gradient] = torch.autograd.grad(loss.sum(), leaf)[0]
    torch.testing.assert_close(actual["implicit"], actual["unroll"])
    assert (actual["envelope"] - actual["unroll"]).abs().max() > 1e-3


def test_low_memory_agrees_to_rounding():
    x, y = torch.randn(2, 40, 8), torch.randn(2, 30, 8)
    same(*(sinkhorn_vectors(x, y, epsilon=0.2, low_memory=low) for low in (False, True)))


def test_x_and_y_may_differ_in_dtype():
    x, y = torch.randn(2, 4, 3).bfloat16(), torch.randn(2, 5, 3)
    actual = sinkhorn_vectors(x.requires_grad_(), y.half(), epsilon=0.1)
    assert actual.value.dtype == torch.float32
    wide = sinkhorn_vectors(x, y.double(), epsilon=0.1)
    assert wide.value.dtype == torch.float64
    (wide.value + actual.value).sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_apply_plan_multiplies_the_plan():
    x, y = torch.randn(2, 4, 3), torch.randn(2, 5, 3)
    result = sinkhorn_vectors(x, y, epsilon=0.2)
    torch.testing.assert_close(result.apply_plan(y), result.plan() @ y)
    torch.testing.assert_close(
        result.apply_plan(x.half(), transpose=True), result.plan().mT @ x.half().float()
    )
    for v, message in (
        (x, r"v has shape \(2, 4, 3\); expected \(2, 5, 3\), one vector per column"),
        (y[0], r"v has shape \(5, 3\); expected 3 dimensions, one vector per column"),
        (y.to("meta"), "v is on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            result.apply_plan(v)
    with pytest.raises(TypeError, match="v has dtype"):
        result.apply_plan(y.long())


# ------------------------------------------------------------------------------------------ errors


COST = torch.zeros(2, 3, 4)
MASS_A, MASS_B = torch.zeros(2, 3), torch.zeros(2, 4)
NESTED = torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(3, 4)], layout=torch.jagged)
BAD_CALLS = [
    (ValueError, r"log_a has shape \(2, 3\); expected \(3,\), as in cost", {"cost": COST[0]}),
    (ValueError, r"cost has shape \(4,\); expected \(..., n, m\)", {"cost": COST[0, 0]}),
    (
        ValueError,
        r"log_a has shape \(2, 3\); expected \(2, 3, 4\), as in cost",
        {"cost": COST[..., None]},
    ),
    (TypeError, "cost is a numpy array; expected a tensor", {"cost": COST.numpy()}),
    (TypeError, "cost is a sparse_coo tensor; expected a dense", {"cost": COST.to_sparse()}),
    (TypeError, "cost is a nested tensor; expected a dense .*pad it", {"cost": NESTED}),
    (TypeError, "cost is a list; expected a tensor", {"cost": [[0.0]]}),
    (TypeError, "cost has dtype torch.int64; expected float64", {"cost": COST.long()}),
    (TypeError, "cost has dtype torch.complex64", {"cost": COST.to(torch.complex64)}),
    (ValueError, r"log_a has shape \(2, 4\); expected \(2, 3\)", {"log_a": MASS_B}),
    (ValueError, r"log_b has shape \(1, 4\); expected \(2, 4\)", {"log_b": MASS_B[:1]}),
    (ValueError, r"log_b has shape \(4,\); expected \(batch, m\)", {"log_b": MASS_B[0]}),
    (TypeError, "log_a has dtype torch.bool", {"log_a": MASS_A > 0}),
    (TypeError, "log_a is a float", {"log_a": 0.5}),
    (ValueError, "log_a is on meta; expected cpu, where cost is", {"log_a": MASS_A.to("meta")}),
    (ValueError, "epsilon is 0; expected a finite number > 0", {"epsilon": 0}),
    (ValueError, "epsilon is -0.1", {"epsilon": -0.1}),
    (ValueError, "epsilon is nan", {"epsilon": NAN}),
    (ValueError, "epsilon is inf", {"epsilon": INF}),
    (TypeError, "epsilon is a str; expected a float", {"epsilon": "0.1"}),
    (TypeError, "epsilon is a bool", {"epsilon": True}),
    (TypeError, "epsilon has dtype torch.int64", {"epsilon": torch.ones(2).long()}),
    (
        ValueError,
        r"epsilon has shape \(3,\); expected a float or shape \(2,\)",
        {"epsilon": torch.ones(3)},
    ),
    (ValueError, "epsilon is on meta", {"epsilon": torch.ones(2, device="meta")}),
    (
        ValueError,
        "epsilon requires grad, which gradient='unroll' does not give",
        {"epsilon": torch.ones(2, requires_grad=True), "gradient": "unroll"},
    ),
    (ValueError, "max_iter is -1; expected an int >= 0", {"max_iter": -1}),
    (ValueError, r"max_iter is 4294967297; expected an int < 2\*\*31", {"max_iter": 2**32 + 1}),
    (TypeError, "max_iter is a float", {"max_iter": 10.0}),
    (TypeError, "max_iter is a bool", {"max_iter": True}),
    (ValueError, "tol is -0.5; expected a finite number >= 0", {"tol": -0.5}),
    (ValueError, "tol is nan", {"tol": NAN}),
    (TypeError, "tol is a str", {"tol": "small"}),
    (
        ValueError,
        "gradient is 'exact'; expected one of 'envelope', 'implicit', 'unroll'",
        {"gradient": "exact"},
    ),
    (ValueError, "backend is 'numpy'; expected one of 'auto'", {"backend": "numpy"}),
    (TypeError, "backend is a NoneType; expected a str", {"backend": None}),
    (ValueError, "rho is 0; expected numbers > 0", {"rho": 0}),
    (ValueError, r"rho is \(1.0, -2.0\)", {"rho": (1.0, -2.0)}),
    (ValueError, "rho is nan", {"rho": NAN}),
    (ValueError, r"rho has 3 entries; expected a pair \(rho_a, rho_b\)", {"rho": (1, 2, 3)}),
    (TypeError, "rho holds a str", {"rho": "1"}),
    (TypeError, "rho holds a bool", {"rho": (True, None)}),
    (ValueError, "omega is 2.0; expected a number between 0 and 2", {"omega": 2.0}),
    (ValueError, "omega is 0", {"omega": 0}),
    (ValueError, "omega is nan", {"omega": NAN}),
    (TypeError, "omega is a NoneType; expected a float", {"omega": None}),
    (ValueError, "anderson is 17; expected an int from 0 to 16", {"anderson": 17}),
    (ValueError, "anderson is -1", {"anderson": -1}),
    (TypeError, "anderson is a bool", {"anderson": True}),
    (ValueError, r"omega is 1.5; expected 1.0 with anderson", {"anderson": 2, "omega": 1.5}),
    (
        ValueError,
        "gradient='unroll' cannot differentiate Anderson acceleration; use 'implicit'",
        {"anderson": 2, "gradient": "unroll"},
    ),
    (ValueError, r"anneal is \(0, 0.5\); expected a finite start > 0", {"anneal": (0, 0.5)}),
    (ValueError, r"anneal is \(1.0, 1.0\); .* a ratio between 0 and 1", {"anneal": (1.0, 1.0)}),
    (ValueError, r"anneal is \(inf, 0.5\)", {"anneal": (INF, 0.5)}),
    (TypeError, r"anneal is a float; expected a pair \(start, ratio\)", {"anneal": 0.5}),
    (TypeError, "anneal is a str; expected a float", {"anneal": ("1", 0.5)}),
    (TypeError, r"init is a Tensor; expected a pair \(f, g\)", {"init": MASS_A}),
    (ValueError, r"init has 1 entries", {"init": (MASS_A,)}),
    (ValueError, r"init\[1\] has shape \(2, 3\); expected \(2, 4\)", {"init": (MASS_A, MASS_A)}),
    (TypeError, r"init\[0\] is a NoneType", {"init": (None, MASS_B)}),
    (TypeError, r"init\[0\] has dtype torch.int64", {"init": (MASS_A.long(), MASS_B)}),
    (ValueError, r"init\[0\] is on meta", {"init": (MASS_A.to("meta"), MASS_B)}),
    (ValueError, r"mask_a has shape \(2, 4\); expected \(2, 3\)", {"mask_a": MASS_B}),
    (TypeError, "mask_b is a list; expected a bool tensor", {"mask_b": [[True]]}),
    (TypeError, "mask_b has dtype torch.complex64", {"mask_b": MASS_B.to(torch.complex64)}),
    (ValueError, "mask_b is on meta", {"mask_b": MASS_B.to("meta")}),
    (
        ValueError,
        "lengths_a is given together with mask_a; expected one of them",
        {"mask_a": MASS_A, "lengths_a": torch.ones(2).long()},
    ),
    (ValueError, "lengths_a is 4 at 1; expected 0 to 3", {"lengths_a": torch.tensor([3, 4])}),
    (ValueError, "lengths_b is -1 at 0; expected 0 to 4", {"lengths_b": torch.tensor([-1, 4])}),
    (
        ValueError,
        r"lengths_a has shape \(3,\); expected \(2,\)",
        {"lengths_a": torch.ones(3).int()},
    ),
    (TypeError, "lengths_a has dtype torch.float32; expected int64", {"lengths_a": torch.ones(2)}),
    (TypeError, "lengths_a is a list; expected an integer tensor", {"lengths_a": [3, 3]}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD_CALLS, ids=lambda x: str(x)[:40])
def test_errors_of_sinkhorn_name_the_argument(error, message, change):
    arguments = {"cost": COST, "log_a": MASS_A, "log_b": MASS_B, "epsilon": 0.1} | change
    with pytest.raises(error, match=message):
        sinkhorn(**arguments)


STUDENT, TEACHER = torch.zeros(2, 3, 8), torch.zeros(2, 4, 8)
BAD_CLOUDS = [
    (
        ValueError,
        r"teacher has shape \(2, 4, 8\); expected \(m, dim=8\) as in student",
        {"student": STUDENT[0]},
    ),
    (
        ValueError,
        r"teacher has shape \(3, 4, 8\); expected \(batch=2, m, dim=8\)",
        {"teacher": torch.zeros(3, 4, 8)},
    ),
    (ValueError, r"teacher has shape \(2, 4, 9\)", {"teacher": torch.zeros(2, 4, 9)}),
    (TypeError, "student has dtype torch.int64", {"student": STUDENT.long()}),
    (TypeError, "teacher is a NoneType", {"teacher": None}),
    (
        ValueError,
        "teacher is on meta; expected cpu, where student is",
        {"teacher": TEACHER.to("meta")},
    ),
    (
        ValueError,
        r"student_mask has shape \(2, 4\); expected \(2, 3\)",
        {"student_mask": torch.ones(2, 4)},
    ),
    (
        ValueError,
        r"teacher_mask has shape \(4,\); expected \(2, 4\)",
        {"teacher_mask": torch.ones(4)},
    ),
    (TypeError, "student_mask is a list; expected a bool tensor", {"student_mask": [[True]]}),
    (
        TypeError,
        "teacher_mask has dtype torch.complex64",
        {"teacher_mask": torch.ones(2, 4).to(torch.complex64)},
    ),
    (ValueError, "teacher_mask is on meta", {"teacher_mask": torch.ones(2, 4, device="meta")}),
    (ValueError, "epsilon is 0.0", {"epsilon": 0.0}),
    (ValueError, "gradient is 'exact'", {"gradient": "exact"}),
    (ValueError, "cost is 'l2'; expected one of 'cosine', 'sqeuclidean', 'dot'", {"cost": "l2"}),
    (
        ValueError,
        r"student has shape \(2, 3, 0\); expected dim >= 1",
        {"student": torch.zeros(2, 3, 0), "teacher": torch.zeros(2, 4, 0)},
    ),
    (TypeError, "temperature", {"temperature": 0.1}),
    (TypeError, "low_memory is a int; expected a bool", {"low_memory": 1}),
    (ValueError, "precision is 'half'; expected one of 'exact', 'fast'", {"precision": "half"}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD_CLOUDS, ids=lambda x: str(x)[:40])
def test_errors_of_ot_alignment_name_the_argument(error, message, change):
    with pytest.raises(error, match=message):
        ot_alignment(**({"student": STUDENT, "teacher": TEACHER} | change))


PACKED_X, PACKED_Y = torch.zeros(5, 8), torch.zeros(7, 8)
ENDS_A, ENDS_B = torch.tensor([0, 2, 5]), torch.tensor([0, 7, 7])
BAD_PACKS = [
    (ValueError, "cu_seqlens_b is None; expected one for each side", {"cu_seqlens_b": None}),
    (ValueError, "begins with 1; expected 0", {"cu_seqlens_a": torch.tensor([1, 2, 5])}),
    (
        ValueError,
        "falls from 3 to 2 at 2; it must not",
        {"cu_seqlens_a": torch.tensor([0, 3, 2, 5])},
    ),
    (
        ValueError,
        "ends with 4; expected 5, the length of x",
        {"cu_seqlens_a": torch.tensor([0, 2, 4])},
    ),
    (
        ValueError,
        "ends with 8; expected 7, the length of y",
        {"cu_seqlens_b": torch.tensor([0, 7, 8])},
    ),
    (
        ValueError,
        r"cu_seqlens_b has shape \(2,\); expected \(3,\), as cu_seqlens_a",
        {"cu_seqlens_b": torch.tensor([0, 7])},
    ),
    (ValueError, r"cu_seqlens_a has shape \(1, 3\)", {"cu_seqlens_a": ENDS_A[None]}),
    (ValueError, r"cu_seqlens_a has shape \(0,\)", {"cu_seqlens_a": ENDS_A[:0]}),
    (TypeError, "cu_seqlens_a has dtype torch.float32", {"cu_seqlens_a": ENDS_A.float()}),
    (TypeError, "cu_seqlens_a is a list; expected an integer tensor", {"cu_seqlens_a": [0, 2, 5]}),
    (ValueError, "cu_seqlens_a is on meta", {"cu_seqlens_a": ENDS_A.to("meta")}),
    (ValueError, r"x has shape \(1, 5, 8\); expected \(N, dim\)", {"x": PACKED_X[None]}),
    (ValueError, r"y has shape \(7, 9\); expected \(M, dim=8\) as in x", {"y": torch.zeros(7, 9)}),
    (ValueError, r"log_b has shape \(5,\); expected \(7,\)", {"log_b": torch.zeros(5)}),
    (ValueError, r"log_b has shape \(2, 7\); expected \(M,\)", {"log_b": torch.zeros(2, 7)}),
    (
        ValueError,
        "mask_a is given together with cu_seqlens_a; expected one of them",
        {"mask_a": torch.ones(5)},
    ),
    (
        ValueError,
        "lengths_b is given together with cu_seqlens_b",
        {"lengths_b": torch.tensor([7, 0])},
    ),
    (ValueError, r"epsilon has shape \(3,\); expected .* \(2,\)", {"epsilon": torch.ones(3)}),
    (ValueError, r"init\[0\] has shape \(7,\)", {"init": (torch.zeros(7), torch.zeros(7))}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD_PACKS, ids=lambda x: str(x)[:40])
def test_errors_of_packed_problems_name_the_argument(error, message, change):
    arguments = {"x": PACKED_X, "y": PACKED_Y, "epsilon": 0.1}
    arguments |= {"cu_seqlens_a": ENDS_A, "cu_seqlens_b": ENDS_B}
    sinkhorn_vectors(**arguments)
    with pytest.raises(error, match=message):
        sinkhorn_vectors(**(arguments | change))
