"""docs/migrate.md: the code of each section agrees with the code that it replaces."""

import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGE = DOCS / "migrate.md"
ORACLES = {}


def sections():
    """The code of each section, by its heading."""
    text = PAGE.read_text(encoding="utf-8")
    found = {}
    for heading, body in re.findall(r"^## (.*?)$(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE):
        code = re.findall(r"^```python\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
        if code:
            (found[heading],) = code
    return found


def oracle(heading):
    """Register a test of a section, which receives the names that its code has defined."""

    def register(check):
        assert heading not in ORACLES
        ORACLES[heading] = check
        return check

    return register


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


def log_loop(cost, log_a, log_b, epsilon, count):
    """The textbook iteration in the log domain, on (batch, n, m)."""
    f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)
    for _ in range(count):
        f = -epsilon * torch.logsumexp((g[:, None, :] - cost) / epsilon + log_b[:, None], dim=2)
        g = -epsilon * torch.logsumexp((f[:, :, None] - cost) / epsilon + log_a[..., None], dim=1)
    exponent = (f[:, :, None] + g[:, None, :] - cost) / epsilon
    return (exponent + log_a[..., None] + log_b[:, None]).exp()


def test_every_section_with_code_has_an_oracle():
    assert set(ORACLES) == set(sections())


@pytest.mark.parametrize("heading", sections())
def test_the_code_agrees_with_the_code_that_it_replaces(heading):
    names = {}
    exec(compile(sections()[heading], heading, "exec"), names)
    ORACLES[heading](names)


@oracle("POT")
def compare_pot(names):
    ot = pytest.importorskip("ot", reason="needs the extra `bench`")
    M, a, b = names["M"], names["a"], names["b"]
    options = {"reg": 0.05, "stopThr": 1e-9, "numItermax": 10_000}
    for i in range(0, len(M), 4):
        close(names["plan"][i], ot.sinkhorn(a[i], b[i], M[i], **options), 1e-7)
        close(names["cost"][i], ot.sinkhorn2(a[i], b[i], M[i], **options), 1e-7)
        relaxed = ot.unbalanced.sinkhorn_unbalanced(
            a[i], b[i], M[i], reg_m=1.0, reg_type="kl", **options
        )
        close(names["relaxed"][i], relaxed, 1e-7)
    batch = ot.batch.solve_batch(M, reg=0.05, a=a, b=b, reg_type="kl", max_iter=1000, tol=1e-9)
    close(names["value"], batch.value, 1e-7)


@oracle("GeomLoss")
def compare_geomloss(names):
    geomloss = pytest.importorskip("geomloss", reason="needs the extra `bench`")
    x, y, a, b = (names[name].double() for name in ("x", "y", "a", "b"))

    def samples_loss(*clouds, p=2, **options):
        options = {"blur": 0.1, "scaling": 0.995, "backend": "tensorized"} | options
        return geomloss.SamplesLoss("sinkhorn", p=p, **options)(*clouds)

    close(names["loss"], samples_loss(x, y), 1e-3)
    close(names["relaxed"], samples_loss(a, x, b, y, reach=0.5), 1e-3)
    close(names["biased"], samples_loss(x, y, debias=False), 1e-3)
    close(names["distance"], samples_loss(x, y, p=1), 1e-3)
    F, G = samples_loss(x, y, debias=False, potentials=True)
    shift = (F - names["F"]).mean(1, keepdim=True)
    # Potentials of outlying points converge last in GeomLoss.
    assert (names["F"] + shift - F).abs().mean() < 5e-4
    assert (names["G"] - shift - G).abs().mean() < 5e-4


@oracle("OTT-JAX")
def compare_ott(names):
    x, y, epsilon, tau = (names[name] for name in ("x", "y", "epsilon", "tau"))
    # OTT's iteration for tau_a = tau and tau_b = 1: potentials without masses, damped by tau.
    cost = torch.cdist(x, y) ** 2
    f, g = torch.zeros(60).double(), torch.zeros(50).double()
    for _ in range(3000):
        # The damping applies to the potential without the masses.
        f = epsilon * (math.log(1 / 60) - tau * torch.logsumexp((g - cost) / epsilon, 1))
        g = epsilon * (math.log(1 / 50) - torch.logsumexp((f[:, None] - cost) / epsilon, 0))
    matrix = ((f[:, None] + g - cost) / epsilon).exp()
    close(names["matrix"], matrix, 1e-5)
    close(names["transported"], matrix @ y, 1e-4)
    assert names["converged"].item()
    if importlib.util.find_spec("ott") is not None:
        from ott.geometry.pointcloud import PointCloud
        from ott.problems.linear.linear_problem import LinearProblem
        from ott.solvers.linear.sinkhorn import Sinkhorn

        geometry = PointCloud(x.numpy(), y.numpy(), epsilon=epsilon)
        output = Sinkhorn(threshold=1e-6)(LinearProblem(geometry, tau_a=tau, tau_b=1.0))
        close(names["matrix"], torch.tensor(output.matrix.tolist()), 1e-4)


@oracle("Dustbins: SuperGlue and GeoTransformer")
def compare_dustbins(names):
    scores = names["scores"].detach().double().requires_grad_()
    dustbin = names["dustbin"].detach().double().requires_grad_()
    batch, n, m = scores.shape
    # The layer of SuperGlue: a row and a column of dustbins, masses in units of one keypoint.
    row, column = dustbin.expand(batch, 1, m), dustbin.expand(batch, n + 1, 1)
    couplings = torch.cat([torch.cat([scores, row], 1), column], 2)
    norm = -math.log(n + m)
    log_mu = torch.full((n + 1,), norm).double()
    log_nu = torch.full((m + 1,), norm).double()
    log_mu[-1] += math.log(m)
    log_nu[-1] += math.log(n)
    u, v = torch.zeros(batch, n + 1).double(), torch.zeros(batch, m + 1).double()
    for _ in range(100):
        u = log_mu - torch.logsumexp(couplings + v[:, None, :], dim=2)
        v = log_nu - torch.logsumexp(couplings + u[:, :, None], dim=1)
    log_plan = couplings + u[:, :, None] + v[:, None, :] - norm
    (-log_plan[:, 0, 0] - log_plan[:, 1, -1]).mean().backward()
    close(names["log_plan"], log_plan, 1e-4)
    close(names["scores"].grad, scores.grad, 1e-4)
    close(names["dustbin"].grad, dustbin.grad, 1e-4)
    if importlib.util.find_spec("transformers") is not None:
        from transformers.models.superglue import modeling_superglue

        layer = modeling_superglue.log_optimal_transport(scores, dustbin, iterations=100)
        close(names["log_plan"], layer, 1e-4)


@oracle("Gumbel-Sinkhorn, soft permutations and hyper-connections")
def compare_gumbel(names):
    logits = names["logits"].detach().double().requires_grad_()

    def loop(log_p):
        for _ in range(20):
            log_p = log_p - log_p.logsumexp(-1, keepdim=True)
            log_p = log_p - log_p.logsumexp(-2, keepdim=True)
        return log_p.exp()

    permutation = loop((logits + names["gumbel"].double()) / 0.5)
    permutation.square().sum().backward()
    close(names["permutation"], permutation, 1e-5)
    close(names["logits"].grad, logits.grad, 1e-4)
    mixing = names["mixing"]
    assert mixing.shape == (2, 128, 4, 4)
    close(mixing.sum(-2), torch.ones(2, 128, 4), 1e-5)


@oracle("Soft ranks and sorting")
def compare_ranks(names):
    values, ranks = names["values"], names["ranks"]
    hard = values[..., 0].argsort(1).argsort(1) + 1
    assert ((ranks - hard).abs().mean(1) < 2).all()
    # Unrolled iterations of the plain loop, as a soft rank is usually written.
    leaf = values.detach()[:4].double().requires_grad_()
    squashed = torch.sigmoid((leaf - leaf.mean(1, keepdim=True)) / leaf.std(1, keepdim=True))
    cost = (squashed - names["targets"][:4].double().mT) ** 2
    mass = torch.full((4, 50), 1 / 50).double().log()
    plan = log_loop(cost, mass, mass, 0.01, 500)
    expected = 50 * (plan @ names["positions"][:4].double())[..., 0]
    expected[:, :5].sum().backward()
    close(ranks[:4], expected, 1e-2)
    assert (values.grad[:4] - leaf.grad).norm() < 1e-2 * leaf.grad.norm()


@oracle("SwAV and DINO assignments")
def compare_swav(names):
    scores = names["scores"]
    q = (scores.double() / 0.05).exp().T  # as in SwAV: prototypes x samples
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    close(names["q"], (q * q.shape[1]).T, 1e-5)


@oracle("Couplings for flow matching")
def compare_couplings(names):
    x0, x1, result = names["x0"], names["x1"], names["result"]
    cost = torch.cdist(x0.double(), x1.double()) ** 2
    mass = torch.full((1, 128), 1 / 128).double().log()
    plan = log_loop(cost[None], mass, mass, 0.5, 5000)[0]
    assert (result.plan() - plan).abs().sum() < 1e-4
    rows, columns = names["rows"], names["columns"]
    assert rows.shape == columns.shape == (128,)
    assert torch.equal(names["pairs"][1], x1[columns])
    rows, columns = result.sample(100_000, generator=torch.Generator().manual_seed(1))
    drawn = torch.zeros(128, 128).index_put_((rows, columns), torch.tensor(1e-5), accumulate=True)
    drawn, expected = (p.view(16, 8, 16, 8).sum((1, 3)) for p in (drawn, plan.float()))
    assert (drawn - expected).abs().max() < 5e-3
    scipy = pytest.importorskip("scipy.optimize", reason="needs SciPy")
    _, matched = scipy.linear_sum_assignment(result.log_plan().numpy(), maximize=True)
    assert torch.equal(names["one_to_one"][1], x1[torch.as_tensor(matched)])


@oracle("Word mover's distance")
def compare_wmd(names):
    query, documents, lengths = (names[n] for n in ("query", "documents", "lengths"))
    ot = pytest.importorskip("ot", reason="needs the extra `bench`")
    for i in range(0, 300, 30):
        words = documents[i, : lengths[i]].double()
        cost = torch.cdist(query.double(), words)
        a, b = torch.full((7,), 1 / 7).double(), torch.full((len(words),), 1 / len(words)).double()
        expected = ot.sinkhorn2(a, b, cost, reg=0.5, method="sinkhorn_log", stopThr=1e-9)
        close(names["distance"][i], expected, 1e-4)
        assert names["distance"][i] > ot.emd2(a, b, cost) - 1e-5
    assert names["nearest"].shape == (10,)


@oracle("A hand-written loop")
def compare_loop(names):
    cost = names["cost"].detach().requires_grad_()
    log_a = torch.full((16, 30), 1 / 30, dtype=torch.float64).log()
    log_b = torch.full((16, 20), 1 / 20, dtype=torch.float64).log()
    loss = (log_loop(cost, log_a, log_b, 0.05, 50) * cost).sum()
    loss.backward()
    close(names["loss"], loss, 1e-10)
    close(names["cost"].grad, cost.grad, 1e-8)


@oracle("Unbalanced token alignment")
def compare_carot(names):
    ot = pytest.importorskip("ot", reason="needs the extra `bench`")
    source, target = names["source"].double(), names["target"].detach().double()
    a, b = torch.full((21,), 1 / 21).double(), torch.full((17,), 1 / 17).double()
    for i in range(8):
        cost = 1 - torch.cosine_similarity(source[i, :, None], target[i, None], dim=-1)
        plan = ot.unbalanced.sinkhorn_unbalanced(
            a, b, cost, reg=0.1, reg_m=0.5, reg_type="kl", stopThr=1e-9
        )
        close(names["loss"][i], (plan * cost).sum(), 1e-5)


# A new user searches the pages for these words.
TERMS = [
    *("dustbin", "SuperGlue", "GeoTransformer", "Gumbel", "rank", "sort", "barycenter", "Gromov"),
    *("WMD", "NumPy", "torch.compile", "torch.func", "checkpoint", "SwAV", "flow matching"),
    *("hyper-connections", "exact transport", "low-rank", "process group", "Windows", "CAROT"),
    *("second derivatives", "Migration", "jvp", "vmap"),
]


@pytest.mark.parametrize("term", TERMS)
def test_the_documentation_contains_what_a_new_user_searches_for(term):
    pages = [page for page in DOCS.glob("*.md") if term.lower() in page.read_text().lower()]
    assert pages


def test_the_conversion_from_geomloss_doubles_cost_epsilon_and_rho():
    sources = [*DOCS.rglob("*.md"), ROOT / "README.md", *(ROOT / "optical").rglob("*.py")]
    for path in sources:
        text = path.read_text(encoding="utf-8")
        for name, factor in re.findall(
            r"(epsilon|rho)[ =]*(\d+ \* )?(?:blur|reach) ?\*\* ?2", text
        ):
            assert factor == "2 * ", (path, name)
