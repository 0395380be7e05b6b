"""Distillation objectives: agreement with plain loops, padding, gradients and token weights."""

import itertools

import pytest
import torch

from optical.losses import distillation, objectives
from optical.losses.distillation import DivergenceDistillationLoss, OTDistillationLoss, Tokens
from optical.ot.functional import sinkhorn_vectors

KINDS = {
    "position": objectives.PositionDistillationLoss,
    "pooled": objectives.PooledDistillationLoss,
    "greedy": objectives.GreedyDistillationLoss,
    "contrastive": objectives.ContrastiveBitextLoss,
    "ot": OTDistillationLoss,
    "divergence": DivergenceDistillationLoss,
}


class Fixed(torch.nn.Module):
    """A model that returns its features."""

    def forward(self, features, task=None):
        return features


def clouds(lengths, width, seed, dim=6):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(len(lengths), width, dim, generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Tokens(torch.nn.functional.normalize(vectors, dim=-1), mask)


def pair():
    return clouds([4, 2, 5], 6, 1), clouds([3, 4, 5], 5, 2)


def loss(kind, **options):
    return KINDS[kind](Fixed(), Fixed(), **options)


def rows(tokens):
    return [x[m] for x, m in zip(tokens.vectors, tokens.mask, strict=True)]


def test_position():
    student, teacher = pair()
    squares = [
        (x - y).square().sum()
        for a, b in zip(rows(student), rows(teacher), strict=True)
        for x, y in zip(a, b, strict=False)
    ]
    actual = loss("position").compare(student, teacher, "document")
    torch.testing.assert_close(actual, torch.stack(squares).mean())
    # Masked tokens do not occupy a position.
    gap = student.mask.clone()
    gap[0, 1] = False
    kept = [student.vectors[0, [0, 2, 3]], *rows(student)[1:]]
    squares = [
        (x - y).square().sum()
        for a, b in zip(kept, rows(teacher), strict=True)
        for x, y in zip(a, b, strict=False)
    ]
    actual = loss("position").compare(student._replace(mask=gap), teacher, "document")
    torch.testing.assert_close(actual, torch.stack(squares).mean())


def test_pooled():
    student, teacher = pair()
    squares = [
        (x.mean(0) - y.mean(0)).square().sum()
        for x, y in zip(rows(student), rows(teacher), strict=True)
    ]
    actual = loss("pooled").compare(student, teacher, "document")
    torch.testing.assert_close(actual, torch.stack(squares).mean())
    # Token weights are the weights of the mean.
    mass = student.mask * torch.arange(1.0, 7.0)
    x = (student.vectors * mass[..., None]).sum(1) / mass.sum(1, keepdim=True)
    y = torch.stack([y.mean(0) for y in rows(teacher)])
    actual = loss("pooled").compare(student._replace(mass=mass), teacher, "document")
    torch.testing.assert_close(actual, (x - y).square().sum(-1).mean())


def test_greedy_matches_the_nearest_pair_first():
    student, teacher = pair()
    squares = []
    for x, y in zip(rows(student), rows(teacher), strict=True):
        left = list(itertools.product(range(len(x)), range(len(y))))
        while left:
            i, j = max(left, key=lambda place: float(x[place[0]] @ y[place[1]]))
            squares.append((x[i] - y[j]).square().sum())
            left = [(a, b) for a, b in left if a != i and b != j]
    actual = loss("greedy").compare(student, teacher, "document")
    torch.testing.assert_close(actual, torch.stack(squares).mean())


def test_divergence_subtracts_half_of_the_cost_of_each_side_to_itself():
    student, teacher = pair()
    values = []
    for x, y in zip(rows(student), rows(teacher), strict=True):
        across, within, fixed = (
            sinkhorn_vectors(left[None], right[None], epsilon=0.2, max_iter=2000).value
            for left, right in ((x, y), (x, x), (y, y))
        )
        values.append(across - (within + fixed) / 2)
    actual = loss("divergence", epsilon=0.2, max_iter=2000).compare(student, teacher, "document")
    torch.testing.assert_close(actual, torch.cat(values).mean())
    # Equal sets have none, in any order; the transport cost does not see it.
    turned = Tokens(student.vectors.flip(1), student.mask.flip(1))
    assert loss("divergence", epsilon=0.2).compare(student, turned, "document").abs() < 1e-5
    assert loss("ot", epsilon=0.2).compare(student, turned, "document") > 0.01


def test_divergence_tends_to_transport_and_to_the_distance_of_the_means():
    student, teacher = pair()
    sharp = loss("divergence", epsilon=1e-3, max_iter=3000).compare(student, teacher, "document")
    transport = loss("ot", epsilon=1e-3, max_iter=3000).compare(student, teacher, "document")
    torch.testing.assert_close(sharp, transport, atol=5e-3, rtol=0)
    blurred = loss("divergence", epsilon=1e4).compare(student, teacher, "document")
    pooled = loss("pooled").compare(student, teacher, "document")
    torch.testing.assert_close(blurred, pooled / 2, atol=1e-3, rtol=0)


def test_divergence_does_not_draw_the_tokens_of_a_sentence_together():
    """From the teacher's own tokens, the transport cost moves the student."""
    _, teacher = pair()
    gradients = {}
    for kind in ("ot", "divergence"):
        x = teacher.vectors.clone().requires_grad_()
        loss(kind, epsilon=0.2, max_iter=500).compare(
            teacher._replace(vectors=x), teacher, "document"
        ).backward()
        gradients[kind] = x.grad.norm()
    assert gradients["divergence"] < 1e-4 * gradients["ot"]


@pytest.mark.parametrize("role", ["query", "document"])
def test_contrastive_scores_by_maxsim(role):
    student, teacher = pair()
    queries, documents = (student, teacher) if role == "query" else (teacher, student)
    scores = torch.stack(
        [torch.stack([(q @ d.T).amax(1).mean() for d in rows(documents)]) for q in rows(queries)]
    )
    logits = scores / 0.1
    own = torch.arange(3)
    cross = torch.nn.functional.cross_entropy
    actual = loss("contrastive", temperature=0.1).compare(student, teacher, role)
    torch.testing.assert_close(actual, (cross(logits, own) + cross(logits.T, own)) / 2)
    with pytest.raises(ValueError, match=r"temperature is 0; expected a number > 0"):
        loss("contrastive", temperature=0)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_empty_texts_are_ignored(kind):
    student, teacher = pair()
    compare = loss(kind).compare
    expected = compare(student, teacher, "document")
    moved = [tokens.vectors.clone() for tokens in (student, teacher)]
    for vectors, tokens in zip(moved, (student, teacher), strict=True):
        vectors[~tokens.mask] = 1e3
    actual = compare(
        student._replace(vectors=moved[0]), teacher._replace(vectors=moved[1]), "document"
    )
    torch.testing.assert_close(actual, expected)
    empty = torch.zeros_like(student.mask)
    alone = compare(student._replace(mask=empty), teacher, "document")
    assert alone == 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_student_only(kind):
    student, teacher = pair()
    x, y = (tokens.vectors.clone().requires_grad_() for tokens in (student, teacher))
    source = {"token_embeddings": y, "attention_mask": teacher.mask, "task": "document"}
    target = {"token_embeddings": x, "attention_mask": student.mask}
    # Stored vectors of the teacher are not computed again.
    module = loss(kind)
    module.teacher.forward = None
    (actual,) = module([{**source, "token_embeddings": y.detach()}, target]).values()
    actual.backward()
    assert x.grad[student.mask].abs().sum() > 0 and torch.isfinite(x.grad).all()
    assert x.grad[~student.mask].abs().sum() == 0


def test_masses_weight_the_tokens_and_zero_leaves_them_out():
    student, teacher = pair()
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 9, tokens.mask.shape, generator=generator) for tokens in pair()]
    features = [
        {"token_embeddings": t.vectors, "attention_mask": t.mask, "input_ids": i, "task": "query"}
        for t, i in zip((teacher, student), reversed(ids), strict=True)
    ]
    even = torch.ones(10)
    plain = loss("ot")(features)["ot_cost"]
    # Equal masses give the loss without masses.
    weighed = loss("ot", student_mass=even, teacher_mass=2 * even)(features)["ot_cost"]
    torch.testing.assert_close(weighed, plain)
    # A token of mass zero is treated as padding.
    without = even.clone()
    dropped = ids[0][0, 0]
    without[dropped] = 0
    actual = loss("ot", student_mass=without)(features)["ot_cost"]
    masked = [features[0], {**features[1], "attention_mask": student.mask & (ids[0] != dropped)}]
    torch.testing.assert_close(actual, loss("ot")(masked)["ot_cost"])
    assert not torch.isclose(actual, plain)


def test_unbalanced_plans_may_leave_tokens_unmatched():
    student, teacher = pair()
    plain = loss("ot").compare(student, teacher, "document")
    free = loss("ot", rho=0.1).compare(student, teacher, "document")
    assert free < plain


@pytest.mark.parametrize(
    ("mass", "error", "message"),
    [
        (torch.tensor([1.0, -1.0]), ValueError, "student_mass is -1.0 at 1; expected finite"),
        (torch.tensor([1.0, float("nan")]), ValueError, "student_mass is nan at 1"),
        (torch.tensor([float("inf"), 1.0]), ValueError, "student_mass is inf at 0"),
        (torch.ones(5, 1), ValueError, r"student_mass has shape \(5, 1\); expected \(voc"),
        (torch.ones(5).long(), TypeError, "student_mass has dtype torch.int64"),
        ([1.0], TypeError, "student_mass has list"),
    ],
)
def test_a_wrong_table_of_weights_is_refused(mass, error, message):
    with pytest.raises(error, match=message):
        loss("ot", student_mass=mass)


def test_a_table_that_is_shorter_than_the_vocabulary_is_refused():
    student = Fixed()
    student.tokenizer = range(7)
    with pytest.raises(ValueError, match="student_mass has 5 entries; expected 7"):
        OTDistillationLoss(student, Fixed(), student_mass=torch.ones(5))


def test_weights_of_any_size_are_normalised():
    mass = torch.tensor([[3e38, 1.5e38, 0.0]])
    tokens = Tokens(torch.zeros(1, 3, 2), mass > 0, mass)
    expected = torch.tensor([[2 / 3, 1 / 3, 0.0]])
    torch.testing.assert_close(distillation._log_masses(tokens).exp(), expected)


def test_a_teacher_that_is_the_student_is_refused():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="teacher has all parameters of model"):
        OTDistillationLoss(model, model)
    assert model.weight.requires_grad
