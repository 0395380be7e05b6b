"""OTT-JAX in a process of its own, driven by lines of JSON on standard input and output.

``python -m benchmarks.operator.ott_worker`` needs numpy, jax and ott-jax and nothing else, so its
interpreter may be another than that of the harness. One framework's threads, allocator and spinning
locks then never stand in another one's way, while the harness still lets all take turns.

Requests: ``{"do": "start", "inputs": FILE.npz, ...}``, ``{"do": "turn", "seconds": s}``,
``{"do": "solution", "output": FILE.npz}``, ``{"do": "peak"}``.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

# Before jax is imported. On a GPU, PyTorch works on the same device in the harness's process.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from ott.geometry import geometry
from ott.solvers import linear

from benchmarks.operator import meter

Arrays = tuple[jax.Array, ...]


def start(request: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The compiled calls of one case: what is timed, and all that it computes."""
    with np.load(request["inputs"]) as file:
        tokens = tuple(jnp.asarray(file[name]) for name in request["arguments"])
        a, b, absent = (jnp.asarray(file[name]) for name in ("a", "b", "absent"))
    padded = bool(request["padded"])
    count = request["max_iter"]
    iterations: dict[str, Any] = {"threshold": request["tol"], "max_iterations": count}
    if request["tol"] == 0:
        # Equal bounds make a loop of fixed length, which is how its authors say to batch it.
        iterations |= {"min_iterations": count, "inner_iterations": count}

    def solve_one(cost: jax.Array, a: jax.Array, b: jax.Array) -> Arrays:
        problem = geometry.Geometry(cost_matrix=cost, epsilon=request["epsilon"])
        out = linear.solve(problem, a, b, lse_mode=True, **iterations)
        return out.reg_ot_cost, out.f, out.g, out.matrix

    def outputs(*arguments: jax.Array) -> Arrays:
        cost = arguments[0] if len(arguments) == 1 else _cosine(*arguments)
        if padded and len(arguments) == 2:
            cost = jnp.where(absent, request["padding_cost"], cost)
        solved: Arrays = jax.vmap(solve_one)(cost, a, b)
        return solved

    def total(*arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = outputs(*arguments)[0]
        return value.sum(), value

    every = tuple(range(len(tokens)))
    forward = jax.jit(lambda *arguments: outputs(*arguments)[0])
    both = jax.jit(jax.value_and_grad(total, argnums=every, has_aux=True))
    timed = both if request["mode"] == "both" else forward
    whole = jax.jit(outputs)

    def solution() -> dict[str, np.ndarray]:
        value, f, g, plan = whole(*tokens)
        found = {"value": value, "f": f, "g": g, "plan": plan}
        if request["mode"] == "both":
            gradients = both(*tokens)[1]
            found |= {f"gradient_{i}": gradient for i, gradient in enumerate(gradients)}
        return {name: np.asarray(array) for name, array in found.items()}

    return {
        "run": lambda: jax.block_until_ready(timed(*tokens)),
        "solution": solution,
    }


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    x, y = (z / jnp.linalg.norm(z, axis=2, keepdims=True) for z in (x, y))
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return 1 - product("bnd,bmd->bnm", x, y)


def main() -> None:
    meter.keep_memory()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    calls: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "start":
            jax.config.update("jax_enable_x64", request["dtype"] == "float64")
            calls = start(request)
        elif request["do"] == "turn":
            answer["ms"] = meter.turn(calls["run"], request["seconds"])
        elif request["do"] == "solution":
            np.savez(request["output"], **calls["solution"]())
        elif request["do"] == "peak":
            calls["run"]()  # compilation takes memory that a later call does not need
            answer["peak_mb"] = meter.peak_megabytes(calls["run"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
