"""Worker process for OTT-JAX, controlled by JSON lines on standard input and output.

``python -m benchmarks.operator.ott_worker`` requires only numpy, jax and ott-jax, so it may run in
an interpreter other than that of the harness. The separate process also keeps the threads,
allocators and spin locks of JAX and PyTorch apart, while the harness alternates between providers.

Requests: ``{"do": "start", "inputs": FILE.npz, ...}``, ``{"do": "time", "seconds": s}``,
``{"do": "results", "output": FILE.npz}``, ``{"do": "peak"}``. ``jobs.OttJob`` sends them.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

# Must precede the import of jax. On a GPU, the harness process uses the same device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from ott.geometry import geometry
from ott.solvers import linear

from benchmarks.operator import meter

Arrays = tuple[jax.Array, ...]


def start(request: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Compile the calls of one task: "run" is timed, "results" returns all outputs by name."""
    with np.load(request["inputs"]) as file:
        leaves = tuple(jnp.asarray(file[name]) for name in request["leaves"])
        a, b, padding = (jnp.asarray(file[name]) for name in ("a", "b", "padding"))
    padded = bool(request["padded"])
    count = request["max_iter"]
    iterations: dict[str, Any] = {"threshold": request["tol"], "max_iterations": count}
    if request["tol"] == 0:
        # Equal bounds give a loop of fixed length, which the authors recommend for batching.
        iterations |= {"min_iterations": count, "inner_iterations": count}

    def solve_one(cost: jax.Array, a: jax.Array, b: jax.Array) -> Arrays:
        problem = geometry.Geometry(cost_matrix=cost, epsilon=request["epsilon"])
        out = linear.solve(problem, a, b, lse_mode=True, **iterations)
        return out.reg_ot_cost, out.f, out.g, out.matrix

    def solve_batch(*leaves: jax.Array) -> Arrays:
        cost = leaves[0] if len(leaves) == 1 else _cosine_cost(*leaves)
        if padded and len(leaves) == 2:
            cost = jnp.where(padding, request["padding_cost"], cost)
        outputs: Arrays = jax.vmap(solve_one)(cost, a, b)
        return outputs

    def total(*leaves: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = solve_batch(*leaves)[0]
        return value.sum(), value

    forward = jax.jit(lambda *leaves: solve_batch(*leaves)[0])
    argnums = tuple(range(len(leaves)))
    both = jax.jit(jax.value_and_grad(total, argnums=argnums, has_aux=True))
    timed = both if request["mode"] == "both" else forward
    all_outputs = jax.jit(solve_batch)

    def results() -> dict[str, np.ndarray]:
        arrays = dict(zip(("value", "f", "g", "plan"), all_outputs(*leaves), strict=True))
        if request["mode"] == "both":
            gradients = both(*leaves)[1]
            arrays |= {f"gradient_{i}": gradient for i, gradient in enumerate(gradients)}
        return {name: np.asarray(array) for name, array in arrays.items()}

    return {
        "run": lambda: jax.block_until_ready(timed(*leaves)),
        "results": results,
    }


def _cosine_cost(x: jax.Array, y: jax.Array) -> jax.Array:
    x, y = (z / jnp.linalg.norm(z, axis=2, keepdims=True) for z in (x, y))
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return 1 - product("bnd,bmd->bnm", x, y)


def main() -> None:
    meter.keep_freed_memory()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # prints of the libraries go to standard error, not among the answers
    calls: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "start":
            jax.config.update("jax_enable_x64", request["dtype"] == "float64")
            calls = start(request)
        elif request["do"] == "time":
            answer["ms"] = meter.milliseconds_per_call(calls["run"], request["seconds"])
        elif request["do"] == "results":
            np.savez(request["output"], **calls["results"]())
        elif request["do"] == "peak":
            calls["run"]()  # compilation needs memory that later calls do not
            answer["peak_mb"] = meter.peak_megabytes(calls["run"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
