"""OTAlignmentLoss: reductions, options and gradients."""

import pytest
import torch

from optical import OTAlignmentLoss, ot_alignment


def clouds():
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    return torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 7, 8), mask


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reduces_the_costs_of_the_pairs(reduction):
    student, teacher, mask = clouds()
    options = {"epsilon": 0.1, "max_iter": 7, "tol": 1e-6, "backend": "reference"}
    actual = OTAlignmentLoss(**options, reduction=reduction)(student, teacher, mask)
    pairs = ot_alignment(student, teacher, mask, **options)
    assert torch.equal(actual, {"mean": pairs.mean(), "sum": pairs.sum(), "none": pairs}[reduction])


@pytest.mark.parametrize("gradient", ["envelope", "implicit", "unroll"])
def test_the_gradient_of_the_mean_is_that_of_the_costs(gradient):
    student, teacher, mask = clouds()
    options = {"epsilon": 0.1, "max_iter": 7, "gradient": gradient}
    mean = 3 * OTAlignmentLoss(**options)(student, teacher, mask)
    costs = ot_alignment(student, teacher, mask, **options)
    found, wanted = (torch.autograd.grad(x, student)[0] for x in (mean, 3 * costs.mean()))
    assert torch.equal(found, wanted)
    assert torch.equal(mean, 3 * costs.mean())


def test_the_mean_has_no_second_derivative():
    student, teacher, mask = clouds()
    loss = OTAlignmentLoss()(student, teacher, mask)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


def test_temperatures_that_change_before_backward_are_noticed():
    student, teacher, mask = clouds()
    epsilon = torch.full((3,), 0.1)
    loss = OTAlignmentLoss(epsilon=epsilon)(student, teacher, mask)
    epsilon.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_has_no_state_and_prints_its_options():
    loss = OTAlignmentLoss(epsilon=0.1, reduction="sum")
    assert not list(loss.parameters()) and not loss.state_dict()
    assert repr(loss) == (
        "OTAlignmentLoss(cost='cosine', epsilon=0.1, max_iter=50, tol=0.0, gradient='envelope', "
        "backend='auto', reduction='sum')"
    )


def test_accepts_every_option_of_ot_alignment():
    student, teacher, mask = clouds()
    options = {"cost": "sqeuclidean", "rho": (0.5, None), "gradient": "implicit", "tol": 1e-4}
    options |= {"anderson": 4, "max_iter": 60, "epsilon": 2.0, "anneal": (8.0, 0.5)}
    loss = OTAlignmentLoss(**options, reduction="none")
    actual = loss(student, teacher, mask)
    assert torch.equal(actual, ot_alignment(student, teacher, mask, **options))
    assert "rho=(0.5, None)" in repr(loss)


def test_training_reduces_the_loss():
    student, teacher, mask = clouds()
    loss = OTAlignmentLoss()
    optimizer = torch.optim.Adam([student], lr=0.1)
    history = []
    for _ in range(30):
        optimizer.zero_grad()
        value = loss(student, teacher, mask)
        value.backward()
        optimizer.step()
        history.append(value.item())
    assert history[-1] < 0.6 * history[0]


def test_a_pair_without_tokens_counts_as_zero():
    student, teacher, mask = clouds()
    three = OTAlignmentLoss(reduction="sum")(student, teacher, mask)
    two = OTAlignmentLoss(reduction="sum")(student[:2], teacher[:2], mask[:2])
    torch.testing.assert_close(three, two)
    (gradient,) = torch.autograd.grad(three, student)
    assert not gradient[2].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "max"}, "reduction is 'max'; expected one of 'mean', 'sum', 'none'"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"max_iter": -2}, "max_iter is -2"),
        ({"gradient": "none"}, "gradient is 'none'"),
        ({"cost": "manhattan"}, "cost is 'manhattan'; expected one of 'cosine', 'sqeuclidean'"),
        ({"rho": 0.0}, "rho is 0.0"),
        ({"backend": "gpu"}, "backend is 'gpu'"),
    ],
)
def test_invalid_options_raise_in_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        OTAlignmentLoss(**options)


def test_unknown_options_raise():
    with pytest.raises(TypeError, match="temperature"):
        OTAlignmentLoss(temperature=0.1)
