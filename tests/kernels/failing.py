"""Problems that fail or barely succeed, and what their results must be."""

import math
from dataclasses import replace

import torch

from optical.ot import autograd
from optical.testing.cases import packed, random_case, random_vector_case

RELAXED = replace(random_case("relaxed", 3, 9, 7, epsilon=0.2, max_iter=60), omega=1.6, tol=1e-3)
RELAXED = replace(RELAXED, epsilon=torch.tensor([0.05, 0.2, 1.0]).double())
LENGTHS = {"rows": [5, 3, 4, 0], "columns": [2, 4, 4, 3]}
MALFORMED = [("x", math.nan), ("log_a", math.nan), ("log_b", math.inf), ("epsilon", 0.0)]


def errors_of_iterates(case, count):
    """(count, batch) L1 errors of both marginals of the iterates 1 to ``count``, in float64."""
    cost, epsilon = case.x, case.epsilon[:, None]
    f, g = torch.zeros_like(case.log_a), torch.zeros_like(case.log_b)
    a, b, errors = case.log_a.exp(), case.log_b.exp(), []
    for k in range(count):
        omega = case.omega if k else 1.0
        scores = case.log_b[:, None] + (g[:, None] - cost) / epsilon[:, :, None]
        step = 1 / (1 + epsilon / case.rho_a)
        f = (1 - omega) * f - omega * step * epsilon * scores.logsumexp(2)
        scores = case.log_a[:, :, None] + (f[:, :, None] - cost) / epsilon[:, :, None]
        step = 1 / (1 + epsilon / case.rho_b)
        g = (1 - omega) * g - omega * step * epsilon * scores.logsumexp(1)
        plan = (scores + case.log_b[:, None] + g[:, None] / epsilon[:, :, None]).exp()
        rows = (plan.sum(2) - a * (-f / case.rho_a).exp()).abs().sum(1)
        errors.append(rows + (plan.sum(1) - b * (-g / case.rho_b).exp()).abs().sum(1))
    return torch.stack(errors)


def overflowing():
    """Two problems, of which the potentials of the second exceed float32, but not its marginals."""
    case = random_case("large", 2, 5, 4, max_iter=1)
    scale = torch.tensor([1.0, 1e37]).double()
    masses = {"log_a": case.log_a - 50, "log_b": case.log_b - 50}
    return replace(case, x=case.x * scale[:, None, None], epsilon=scale, **masses)


def mixed(kind):
    """Problems with padding, of which the last is empty and two have forbidden pairs."""
    if kind != "given":
        return random_vector_case(kind, kind, batch=4, n=5, m=4, dim=3, max_iter=3, **LENGTHS)
    case = random_case("mixed", 4, 5, 4, max_iter=3, **LENGTHS)
    cost = case.x.clone()
    cost[:2, 2, 1] = math.inf
    return replace(case, x=cost)


def malformed(case, field, value):
    """``case`` with a bad number in the first valid entry of problem 1."""
    tensor = getattr(case, field).clone()
    index = 1
    if case.cu_a is not None and field != "epsilon":
        index = int((case.cu_b if field == "log_b" else case.cu_a)[1])
    tensor[index].view(-1)[0] = value
    return replace(case, **{field: tensor})


def own_entries(case):
    """Where the inputs that have gradients are valid entries of problem 1, and where padding."""
    sides = {}
    for name, log_mass, offsets in (
        ("log_a", case.log_a, case.cu_a),
        ("log_b", case.log_b, case.cu_b),
    ):
        valid = log_mass != -math.inf
        number = torch.arange(len(case.epsilon))[:, None]
        if offsets is not None:
            number = torch.bucketize(torch.arange(len(log_mass)), offsets[1:], right=True)
        sides[name] = valid & (number == 1), ~valid
    (own_a, padding_a), (own_b, padding_b) = sides.values()
    if case.y is not None:
        return sides | {"x": sides["log_a"], "y": sides["log_b"]}
    own = own_a[:, :, None] & own_b[:, None, :]
    return sides | {"x": (own, padding_a[:, :, None] | padding_b[:, None, :])}


def gradients_of_unused(backend, kind, gradient):
    """Gradients where problem 1 is malformed, and its upstream gradients are 0."""
    name = kind.removeprefix("packed ")
    case = malformed(mixed(name), "x", math.nan).to(torch.float32)
    case = packed(case) if kind != name else case
    problem = case.problem(gradient, backend)
    names = [name for name in ("x", "y", "log_a", "log_b") if getattr(problem, name) is not None]
    inputs = {name: getattr(problem, name).detach().requires_grad_() for name in names}
    solution = autograd.solve(problem._replace(**inputs))
    loss = solution.value[[0, 2, 3]].sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    return case, dict(zip(names, gradients, strict=True))


def assert_unused_is_zero(backend, kind, gradient):
    """The gradients of a malformed problem whose outputs are not used are 0."""
    case, gradients = gradients_of_unused(backend, kind, gradient)
    for name, (own, _) in own_entries(case).items():
        assert gradients[name].isfinite().all(), name
        assert not gradients[name][own].any() and gradients[name].any(), name


def gradients_with_and_without_masses(module, case, gradient):
    """The gradients of a module of a backend, with all of them and without those of the masses."""
    problem = case.to(torch.float32).problem(gradient)
    solution = module.forward(problem)
    assert gradient == "implicit" or not solution.residual.any()
    saved = solution.f, solution.g, solution.w, solution.z, solution.n_iter
    upstream = torch.ones_like(solution.value), 2 * torch.ones_like(solution.value)
    if gradient == "unroll":
        upstream += torch.ones_like(solution.f), torch.ones_like(solution.g)
    else:
        upstream += None, None
    arguments = *upstream, problem, *saved, True, problem.y is not None
    return module.backward(*arguments), module.backward(*arguments, need_masses=False)


def assert_masses_are_optional(module, gradient):
    """Gradients of masses that are not needed are None, and the others the same."""
    for kind in ("given", "cosine"):
        full, partial = gradients_with_and_without_masses(module, mixed(kind), gradient)
        assert partial[2:] == (None, None) and None not in full[2:]
        for expected, found in zip(full[:2], partial[:2], strict=True):
            assert (expected is None) == (found is None)
            assert found is None or torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
