"""The public functions: shapes, dtypes, masks, padding, and what every user error says."""

import doctest
import math

import pytest
import torch
import torch.nn.functional as F

import optical
from optical import (
    BackendUnsupported,
    SinkhornResult,
    backends,
    functional,
    losses,
    ot_alignment,
    sinkhorn,
)

NAN, INF = math.nan, math.inf


def clouds(batch=3, n=5, m=7, dim=8, dtype=torch.float32):
    student = torch.randn(batch, n, dim, dtype=dtype, requires_grad=True)
    teacher = torch.randn(batch, m, dim, dtype=dtype)
    student_mask = torch.arange(n) < torch.tensor([[n], [2], [0]])[:batch]
    teacher_mask = torch.arange(m) < torch.tensor([[3], [m], [m]])[:batch]
    return student, teacher, student_mask, teacher_mask


def test_public_names():
    expected = {"BackendUnsupported", "OTAlignmentLoss", "SinkhornResult", "__version__"}
    assert set(optical.__all__) == expected | {"ot_alignment", "sinkhorn"}
    assert all(hasattr(optical, name) for name in optical.__all__)


@pytest.mark.parametrize("module", [functional, losses, backends], ids=lambda m: m.__name__)
def test_examples_in_the_docstrings(module):
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed


def test_shapes_and_dtypes_of_the_result():
    result = sinkhorn(torch.rand(2, 3, 4), epsilon=0.1)
    assert isinstance(result, SinkhornResult)
    for field, shape in {"value": (2,), "value_linear": (2,), "f": (2, 3), "g": (2, 4)}.items():
        assert getattr(result, field).shape == shape
    assert result.marginal_error.shape == result.n_iter.shape == (2,)
    assert result.plan().shape == (2, 3, 4)
    assert "value=" in repr(result) and "cost=" not in repr(result)
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


def test_a_mask_gives_the_distance_of_the_shorter_texts():
    student, teacher, student_mask, teacher_mask = clouds()
    found = ot_alignment(student, teacher, student_mask, teacher_mask)
    for i in range(2):
        x, y = student[i, student_mask[i]][None], teacher[i, teacher_mask[i]][None]
        cost = 1 - F.cosine_similarity(x[:, :, None], y[:, None], dim=-1)
        expected = sinkhorn(cost, epsilon=0.05, max_iter=50).value_linear
        torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-5, atol=1e-5)
    assert found[2] == 0
    found.sum().backward()
    assert not student.grad[~student_mask].any() and student.grad[0].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32])
def test_attention_masks_of_numbers_mean_the_same(dtype):
    student, teacher, student_mask, teacher_mask = clouds()
    expected = ot_alignment(student, teacher, student_mask, teacher_mask)
    found = ot_alignment(student, teacher, student_mask.to(dtype), teacher_mask.to(dtype))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("gradient", ["envelope", "unroll"])
@pytest.mark.parametrize("filling", [NAN, INF, -INF, 1e30, 0.0])
def test_padding_may_hold_anything(filling, gradient):
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


def test_a_zero_vector_is_at_distance_one_with_a_finite_gradient():
    student = torch.zeros(1, 2, 4, requires_grad=True)
    value = ot_alignment(student, torch.randn(1, 3, 4))
    value.sum().backward()
    assert value.item() == pytest.approx(1) and student.grad.isfinite().all()


@pytest.mark.parametrize("gradient", ["envelope", "unroll"])
def test_the_length_of_a_vector_does_not_matter(gradient):
    student, teacher, *_ = clouds(dtype=torch.float64)
    options = {"gradient": gradient, "max_iter": 10}
    lengths = torch.rand(3, 5, 1).double() + 0.1
    scaled = ot_alignment(student * lengths, 3 * teacher, **options)
    torch.testing.assert_close(scaled, ot_alignment(student, teacher, **options))
    scaled.sum().backward()
    # So moving a vector along itself changes nothing.
    torch.testing.assert_close((student.grad * student).sum(-1), torch.zeros(3, 5).double())


def test_identical_clouds_in_another_order_are_close():
    teacher = F.normalize(torch.randn(2, 6, 64), dim=-1)
    found = ot_alignment(teacher[:, torch.randperm(6)], teacher, epsilon=0.02, max_iter=200)
    assert (found < 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_vectors_lose_nothing_after_their_own_rounding(dtype):
    student, teacher = (x.detach().to(dtype) for x in clouds(dim=128)[:2])
    found = ot_alignment(student, teacher)
    assert found.dtype == torch.float32
    truth = ot_alignment(student.double(), teacher.double()).float()
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-5)
    mixed = ot_alignment(student, teacher.float())
    assert torch.equal(mixed, found)


def test_only_the_student_learns():
    student, teacher, *_ = clouds()
    with torch.no_grad():
        targets = 2 * teacher
    ot_alignment(student, targets).sum().backward()
    assert student.grad.any() and targets.grad is None


def test_unroll_is_exact_for_the_finite_run():
    student, teacher, student_mask, teacher_mask = clouds(dtype=torch.float64)

    def distance(student):
        return ot_alignment(
            student, teacher, student_mask, teacher_mask, max_iter=3, gradient="unroll"
        )

    assert torch.autograd.gradcheck(distance, student)


COST = torch.zeros(2, 3, 4)
MASS_A, MASS_B = torch.zeros(2, 3), torch.zeros(2, 4)
BAD_CALLS = [
    (ValueError, r"cost has shape \(3, 4\).*add the batch dimension", {"cost": COST[0]}),
    (
        ValueError,
        r"cost has shape \(2, 3, 4, 1\); expected \(batch, n, m\)",
        {"cost": COST[..., None]},
    ),
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
    (ValueError, "epsilon requires grad", {"epsilon": torch.ones(2, requires_grad=True)}),
    (ValueError, "max_iter is -1; expected an int >= 0", {"max_iter": -1}),
    (TypeError, "max_iter is a float", {"max_iter": 10.0}),
    (TypeError, "max_iter is a bool", {"max_iter": True}),
    (ValueError, "tol is -0.5; expected a finite number >= 0", {"tol": -0.5}),
    (ValueError, "tol is nan", {"tol": NAN}),
    (TypeError, "tol is a str", {"tol": "small"}),
    (
        ValueError,
        "gradient is 'implicit'; expected 'envelope' or 'unroll'",
        {"gradient": "implicit"},
    ),
    (ValueError, "backend is 'numpy'; expected one of 'auto'", {"backend": "numpy"}),
    (TypeError, "backend is a NoneType; expected a str", {"backend": None}),
    (
        BackendUnsupported,
        "'cpu' cannot serve gradient='unroll'",
        {"gradient": "unroll", "backend": "cpu"},
    ),
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
        r"student has shape \(3, 8\); expected \(batch, n, dim\)",
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
]


@pytest.mark.parametrize(("error", "message", "change"), BAD_CLOUDS, ids=lambda x: str(x)[:40])
def test_errors_of_ot_alignment_name_the_argument(error, message, change):
    with pytest.raises(error, match=message):
        ot_alignment(**({"student": STUDENT, "teacher": TEACHER} | change))
