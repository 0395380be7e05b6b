"""Small faults that the tests and the random calls must notice, for ``tests.stress.mutants``.

A fault replaces one snippet of one file. The snippet must occur there exactly once, which a test
checks. None of the faults crashes or changes a shape.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

LANGUAGES = ("python", "cpu", "cuda", "triton")


@dataclass(frozen=True)
class Fault:
    """A replacement that makes the package slightly wrong.

    Attributes:
        name: short name, the argument of ``--only``.
        language: "python", "cpu" (C++), "cuda" or "triton"; decides which commands run.
        path: file, relative to the repository root.
        before: snippet that occurs exactly once in the file, however its lines are broken.
        after: its replacement.
        meaning: effect of the fault.
        tests: test files most likely to notice, run first.
        kernels: for Triton, the kernel driver that reaches the file: "triton" or "streamed".
    """

    name: str
    language: str
    path: str
    before: str
    after: str
    meaning: str
    tests: tuple[str, ...] = ()
    kernels: str = "triton"

    def apply(self, root: Path) -> None:
        """Replace the snippet in the file below ``root``.

        Raises:
            ValueError: the snippet does not occur exactly once.
        """
        path = root / self.path
        text = path.read_text(encoding="utf-8")
        snippet = r"\s+".join(map(re.escape, self.before.split()))
        changed, count = re.subn(snippet, lambda _: self.after, text)
        if count != 1:
            raise ValueError(
                f"{self.name}: the snippet occurs {count} times in {self.path}; expected once"
            )
        path.write_text(changed, encoding="utf-8")


def _python(name: str, file: str, before: str, after: str, meaning: str, *tests: str) -> Fault:
    files = tuple(f"tests/{test}.py" for test in tests)
    return Fault(name, "python", f"optical/{file}.py", before, after, meaning, files)


def _cpu(name: str, file: str, before: str, after: str, meaning: str) -> Fault:
    return Fault(name, "cpu", f"csrc/cpu/{file}", before, after, meaning)


def _cuda(name: str, file: str, before: str, after: str, meaning: str) -> Fault:
    return Fault(name, "cuda", f"csrc/cuda/{file}", before, after, meaning)


def _triton(
    name: str, file: str, before: str, after: str, meaning: str, kernels: str = "triton"
) -> Fault:
    path = f"kernels/triton/{file}.py"
    return Fault(name, "triton", path, before, after, meaning, kernels=kernels)


PYTHON = (
    _python(
        "envelope-gradient",
        "backends/reference",
        "grad_cost = (gv + gl)[:, None, None] * masked.plan(f, g)",
        "grad_cost = 1.001 * (gv + gl)[:, None, None] * masked.plan(f, g)",
        "envelope gradients of the reference are a thousandth too large",
        "backends/test_reference",
    ),
    _python(
        "implicit-stiffness",
        "backends/reference",
        "coupling.sum(1) * z * stiffness_b",
        "coupling.sum(1) * z * stiffness_a",
        "implicit gradients of log b use the penalty of the rows",
        "backends/test_reference",
    ),
    _python(
        "relaxed-step",
        "backends/iterations",
        "alpha * g + beta_b * softmin)",
        "alpha * self.g0 + beta_b * softmin)",
        "over-relaxation of the columns extrapolates from the start, not from the last iterate",
        "backends/test_reference",
    ),
    _python(
        "padding-gradient",
        "backends/dense",
        "torch.where(_valid(log_a) & used, grad_x, 0.0)",
        "torch.where(_valid(log_a) & used, grad_x, 1e-6)",
        "padding tokens get a gradient of 1e-6",
        "backends/test_dense",
        "backends/test_reference",
    ),
    _python(
        "first-mass",
        "ot/masses",
        "torch.where(valid, -count.log(), -math.inf)",
        "torch.where(valid, -count.log() + 1e-4 * (torch.arange(valid.shape[1]) == 0), -math.inf)",
        "the mass of the first token of a masked text is 1e-4 of it too large",
        "ot/test_situations",
    ),
    _python(
        "packed-mass",
        "ot/masses",
        "return -offsets.diff().to(dtype).log()[problem]",
        "return -(offsets.diff() + 1e-4).to(dtype).log()[problem]",
        "the masses of packed tokens do not quite sum to 1",
        "ot/test_functional",
    ),
    _python(
        "neighbour-epsilon",
        "ot/validation",
        "temperatures = epsilon.detach()",
        "temperatures = epsilon.detach().roll(1)",
        "each problem is solved at the temperature of its neighbour",
        "ot/test_functional",
    ),
    _python(
        "divergence-halves",
        "losses/divergence",
        "(values[1] + values[2]) / 2",
        "(values[1] + values[2]) / 2.0002",
        "the divergence subtracts a ten-thousandth too little of the costs within the clouds",
        "losses/test_divergence",
    ),
    _python(
        "divergence-masses",
        "losses/divergence",
        "epsilon / 2 * excess**2",
        "epsilon / 2.002 * excess**2",
        "the term of unequal masses of the divergence is a thousandth too small",
        "losses/test_divergence",
    ),
    _python(
        "unrolled-potential",
        "ot/operator",
        "(grad_f, grad_g) if ctx.unrolled",
        "(grad_f, 1.001 * grad_g) if ctx.unrolled",
        "gradients that arrive at g are a thousandth too large",
        "ot/test_operator",
    ),
    _python(
        "maxsim-padding",
        "retrieval/maxsim",
        "vectors[:1].expand(width - len(vectors), -1)",
        "1e-6 * vectors[:1].expand(width - len(vectors), -1)",
        "padding of documents scores about 0 in place of a score that the maximum ignores",
        "retrieval/test_exact_search",
    ),
    _python(
        "token-shares",
        "losses/distillation",
        "(mass / total.where(total > 0, 1.0)).log()",
        "(mass / (total.where(total > 0, 1.0) + 1e-3)).log()",
        "the weights of the tokens of a text sum to a little less than 1",
        "losses/test_objectives",
        "losses/test_distillation",
    ),
    _python(
        "judged-queries",
        "retrieval/evaluation",
        "max(grades.values(), default=0) > 0",
        "max(grades.values(), default=0) > 1",
        "queries whose best document has grade 1 are left out",
        "retrieval/test_evaluation",
    ),
)

CPU = (
    _cpu(
        "cpu-gradient",
        "gradient.h",
        "factor[i] = S::all(upstream);",
        "factor[i] = S::all(upstream * (T)1.001);",
        "envelope gradients are a thousandth too large",
    ),
    _cpu(
        "cpu-padding-gradient",
        "gradient.h",
        "fill(at.grad_a, at.a.count, 0);",
        "fill(at.grad_a, at.a.count, (T)1e-6);",
        "padding rows get a mass gradient of 1e-6",
    ),
    _cpu(
        "cpu-implicit-relief",
        "gradient.h",
        "adjoint_gradient(work.col_mass, work.z, j, p.rho_b)",
        "adjoint_gradient(work.col_mass, work.z, j, p.rho_a)",
        "implicit gradients of log b use the penalty of the rows",
    ),
    _cpu(
        "cpu-last-column",
        "cost.h",
        "cost[lane] = row[col_index[j + lane] * between];",
        "cost[lane] = row[col_index[j + lane - (j + lane == m - 1 && j + lane > 0)] * between];",
        "the last column has the costs of the one before where columns are gathered",
    ),
    _cpu(
        "cpu-neighbour-epsilon",
        "solver.h",
        "((const T*)batch.epsilon)[index]",
        "((const T*)batch.epsilon)[index > 0 ? index - 1 : index]",
        "each problem is solved at the temperature of its neighbour",
    ),
    _cpu(
        "cpu-first-mass",
        "problem.h",
        "for (int64_t i = count; i < padded; ++i) mass[i] = 0;",
        "for (int64_t i = count; i < padded; ++i) mass[i] = 0; mass[0] *= (T)1.0001;",
        "the mass of the first row and of the first column is 1e-4 of it too large",
    ),
    _cpu(
        "cpu-step-before",
        "iteration.h",
        "(cost_ij - work.f_next[i])",
        "(cost_ij - work.f[i])",
        "in the log domain the columns see the row potentials of the step before",
    ),
    _cpu(
        "cpu-absorption",
        "solver.h",
        "if (scaled) iteration.absorb(); scaled = false;",
        "scaled = false;",
        "a rebuilt kernel forgets the scalings since the last one",
    ),
    _cpu(
        "cpu-stop",
        "solver.h",
        "const double tol = measure_input ? options.tol : -1;",
        "const double tol = measure_input ? 1.05 * options.tol : -1;",
        "runs stop at a residual 5% above the tolerance",
    ),
    _cpu(
        "cpu-safeguard",
        "anderson.h",
        "if (extrapolated && !(error <= last_error)) {",
        "if (extrapolated && !(error <= 1e6 * last_error)) {",
        "the safeguard of Anderson acceleration accepts mixtures that raise the residual",
    ),
    _cpu(
        "cpu-unrolled-mass",
        "unrolled.h",
        "L::store(bar_a + i, L::load(bar_a + i) - epsilon * received);",
        "L::store(bar_a + i, L::load(bar_a + i) - epsilon * received * (T)1.001);",
        "an unrolled half-step gives log a a thousandth too much",
    ),
)

CUDA = (
    _cuda(
        "cuda-gradient",
        "gradient.cuh",
        "flow * (up.total + slope",
        "flow * (1.001f * up.total + slope",
        "envelope gradients are a thousandth too large",
    ),
    _cuda(
        "cuda-padding-gradient",
        "gradient.cuh",
        "problem.valid_row(i) ? of_row[o] : 0.0f;",
        "problem.valid_row(i) ? of_row[o] : 1e-6f;",
        "padding rows get a mass gradient of 1e-6",
    ),
    _cuda(
        "cuda-last-column",
        "gradient.cuh",
        "= problem.cost(r, c);",
        "= problem.cost(r, c > 0 && grid.column(c) == problem.b.count - 1 ? c - 1 : c);",
        "the last column of the cost gradient is that of a neighbour in the registers",
    ),
    _cuda(
        "cuda-neighbour-epsilon",
        "workspace.cuh",
        "((const float*)problem.batch.epsilon)[problem.index]",
        "((const float*)problem.batch.epsilon)[problem.index > 0 ? problem.index - 1 : "
        "problem.index]",
        "each problem is solved at the temperature of its neighbour",
    ),
    _cuda(
        "cuda-first-mass",
        "workspace.cuh",
        "problem.row(MASS, o) = mass;",
        "problem.row(MASS, o) = mass * (grid.own_row(o) == 0 ? 1.0001f : 1.0f);",
        "the mass of the first row is 1e-4 of it too large",
    ),
    _cuda(
        "cuda-absorption",
        "solver.cuh",
        "problem.column(POTENTIAL, o) = problem.column(BASE, o) + work.epsilon_log(work.v[o] * "
        "unit_of_column);",
        "if (work.v[o] < 1024.0f) problem.column(POTENTIAL, o) = problem.column(BASE, o) + "
        "work.epsilon_log(work.v[o] * unit_of_column);",
        "a large scaling of a column is not absorbed into its potential",
    ),
    _cuda(
        "cuda-residual",
        "solver.cuh",
        "problem.row(POTENTIAL, o), work.rho_a",
        "problem.row(NEXT, o), work.rho_a",
        "the stopping rule takes the marginal of the step after",
    ),
    _cuda(
        "cuda-implicit-shift",
        "adjoint.cuh",
        "problem.column(SOLUTION, o) = problem.column(BEST, o) + shift;",
        "problem.column(SOLUTION, o) = problem.column(BEST, o);",
        "the solution of the adjoint system is shifted for the rows but not for the columns",
    ),
    _cuda(
        "cuda-unrolled-mass",
        "unrolled.cuh",
        "problem.row(BAR_MASS, o) -= work.target * received;",
        "problem.row(BAR_MASS, o) -= 1.001f * work.target * received;",
        "an unrolled half-step gives log a a thousandth too much",
    ),
)

TRITON = (
    _triton(
        "triton-gradient",
        "gradients",
        "grad = plan * (upstream + upstream_linear)",
        "grad = 1.001 * plan * (upstream + upstream_linear)",
        "envelope gradients are a thousandth too large",
    ),
    _triton(
        "triton-padding-gradient",
        "gradients",
        "tl.where((A != -INFINITY)[:, None], grad, 0.0)",
        "tl.where((A != -INFINITY)[:, None], grad, 1e-6)",
        "padding tokens get a gradient of 1e-6",
    ),
    _triton(
        "triton-last-column",
        "gradients",
        "g = tl.load(g_ptr + problem * m + columns, mask=columns < m, other=0.0)",
        "g = tl.load(g_ptr + problem * m + tl.where(columns == m - 1, 0, columns), mask=columns "
        "< m, other=0.0)",
        "the last column of the cost gradient uses the potential of the first",
    ),
    _triton(
        "triton-neighbour-epsilon",
        "onchip/solve",
        "epsilon = tl.load(epsilon_ptr + problem)",
        "epsilon = tl.load(epsilon_ptr + tl.maximum(problem - 1, 0))",
        "each problem is solved at the temperature of its neighbour",
    ),
    _triton(
        "triton-absorption",
        "onchip/solve",
        "G += tl.where(v > 0, tl.log2(v), 0.0)",
        "G += 0.0",
        "a rebuilt kernel forgets the scalings of the columns",
    ),
    _triton(
        "triton-penalty-series",
        "tiles",
        "tl.where(tl.abs(x) < 0.125, small_divergence, divergence)",
        "tl.where(tl.abs(x) < 0.9, small_divergence, divergence)",
        "the series of the penalty is used beyond the range where it converges fast",
    ),
    _triton(
        "triton-implicit-bracket",
        "gradients",
        "w[:, None] + z[None, :] - cost, 0.0)",
        "w[:, None] + z[None, :] - 1.001 * cost, 0.0)",
        "implicit gradients subtract a thousandth too much of the cost",
    ),
    _triton(
        "triton-unrolled-mass",
        "onchip/unrolled",
        "bar_a -= temperature * by_row",
        "bar_a -= 1.001 * temperature * by_row",
        "an unrolled half-step gives log a a thousandth too much",
    ),
    _triton(
        "streamed-relaxation",
        "streamed/potentials",
        "(1 - relaxation) * origin + beta * softmin)",
        "(1.001 - relaxation) * origin + beta * softmin)",
        "a streamed update keeps a thousandth of the potential of the step before",
        "streamed",
    ),
    _triton(
        "streamed-segments",
        "streamed/logsumexp",
        "total += tl.sum(tl.exp2(score - shift[:, None]), 1)",
        "total += 1.0001 * tl.sum(tl.exp2(score - shift[:, None]), 1)",
        "streamed sums are 1e-4 too large",
        "streamed",
    ),
)

FAULTS = PYTHON + CPU + CUDA + TRITON
