"""All variants of the Triton kernels to compile: tuned tiles with their compile-time constants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton.language as tl

from optical.kernels import gradients, plan_products, tuning
from optical.kernels.onchip import adjoint, solve, unrolled
from optical.kernels.streamed import adjoint as streamed_adjoint
from optical.kernels.streamed import (
    single_launch,
    stepwise,
    unrolled_backward,
    unrolled_replay,
)
from optical.kernels.tokens import masses
from optical.kernels.tokens import norms as token_norms

KINDS = {"given": 0, "cosine": 1, "sqeuclidean": 2, "dot": 3}


@dataclass(frozen=True)
class Configuration:
    """A kernel with its compile-time constants and launch options.

    Attributes:
        kernel: the Triton function.
        tile, kind, dtype, options: labels that identify the rows of the table.
        constants: values of the constexpr parameters; the precision "exact" is replaced by
            that of the target.
        warps, stages: launch options of Triton.
    """

    kernel: Any
    tile: str
    kind: str
    dtype: str
    constants: dict[str, Any]
    warps: int
    stages: int
    options: str = ""

    @property
    def name(self) -> str:
        """The kernel's name in the table."""
        return self.kernel.fn.__name__.removesuffix("_kernel")


def identity(c: Configuration) -> tuple[str, ...]:
    """The key of a configuration's rows without the target."""
    return c.name, c.tile, c.kind, c.dtype, c.options


def configurations() -> Iterator[Configuration]:
    """Every kernel with every tile of the tuned tables and the options that change its code."""
    yield from _onchip_solvers()
    yield from _onchip_adjoints()
    yield from _vector_gradients()
    for kind, dtype in (("given", "fp32"), ("cosine", "bf16"), ("cosine", "fp32")):
        yield from _streamed(kind, dtype)
        yield from _streamed_unrolled(kind, dtype)
    yield from _half_precision()
    yield from _vector_kernels()


def _onchip_solvers() -> Iterator[Configuration]:
    plain = {"PACKED": False, "START": False, "GENERAL": False, "ANNEAL": False}
    every = {"PACKED": False, "START": True, "GENERAL": True, "ANNEAL": True, "STEPS": 1}
    kernel = solve.resident_kernel
    for size, tile in tuning.TILES.items():
        name = f"{size}x{size}"
        roomy = tuning.ROOMY[size]
        options = plain | {"STEPS": tuning.STEPS}
        yield _tiled(kernel, name, tile, "given", "fp32", **options)
        yield _tiled(kernel, name, tile, "cosine", "bf16", **options)
        yield _tiled(kernel, name, roomy, "cosine", "fp32", **options)
        yield _tiled(kernel, name, roomy, "cosine", "bf16", "every", **every)
    for tile in tuning.OBLONG:
        name, options = f"{tile.rows}x{tile.columns}", plain | {"STEPS": tuning.STEPS}
        yield _tiled(kernel, name, tile, "given", "fp32", **options)
        yield _tiled(kernel, name, tile, "cosine", "bf16", **options)
        yield _tiled(kernel, name, tile, "cosine", "bf16", "tol", **(plain | {"STEPS": 1}))


def _onchip_adjoints() -> Iterator[Configuration]:
    """The solvers of the implicit gradient and the reversed iterations of the unrolled one."""
    for size, tile in tuning.UNROLLED.items():
        name = f"{size}x{size}"
        for kind, dtype in (("given", "fp32"), ("cosine", "bf16")):
            options: dict[str, Any] = {"PACKED": False}
            if size in tuning.ADJOINT:
                yield _tiled(adjoint.adjoint_kernel, name, tile, kind, dtype, **options)
            options |= {"START": False, "POTENTIALS": True, "NEED_X": True}
            options |= {"NEED_Y": kind != "given", "BLOCK_G": 32}
            options |= {"DOT_DTYPE": tl.bfloat16, "DOT_PRECISION": "ieee", "ROWS": tile.rows}
            yield _tiled(unrolled.unrolled_kernel, name, tile, kind, dtype, **options)


def _vector_gradients() -> Iterator[Configuration]:
    for table, partial, dtypes in (
        (tuning.WHOLE, tuning.PARTIAL, ("bf16", "fp16")),
        (tuning.SINGLE, tuning.SINGLE_PARTIAL, ("fp32",)),
    ):
        for tile in (*table.values(), partial):
            for dtype in dtypes:
                yield _vector_gradient(tile, dtype)


def _streamed(kind: str, dtype: str) -> Iterator[Configuration]:
    """The streamed solvers, the implicit adjoint, and the products with the plan."""
    stream = {"PACKED": False}
    tile = tuning.STREAM
    for seen in (0, 1):
        options = stream | {"SPLIT": False, "REDUCE": seen, "ROWS": False, "FAST": False}
        yield _tiled(stepwise.walk_kernel, "64x64", tile, kind, dtype, f"seen={seen}", **options)
    options = stream | {"SPLIT": True, "REDUCE": 0, "ROWS": False, "FAST": False}
    yield _tiled(stepwise.walk_kernel, "64x64", tile, kind, dtype, "split", **options)
    options = stream | {"START": False, "BLOCK": tuning.VECTOR_BLOCK, "FAST": False}
    yield _tiled(single_launch.loop_kernel, "64x64", tile, kind, dtype, **options)
    tile = tuning.ADJOINT_STREAM[kind != "given" and dtype == "fp32"]
    options = stream | {"BLOCK": tile.rows, "VECTOR_BLOCK": tuning.VECTOR_BLOCK}
    name = f"{tile.rows}x{tile.columns}"
    yield _tiled(streamed_adjoint.adjoint_loop_kernel, name, tile, kind, dtype, **options)
    tile = tuning.PLAN_PRODUCT
    options = stream | {"IMPLICIT": True, "READ_COST": True}
    yield _tiled(plan_products.mass_gradient_kernel, "64x64", tile, kind, dtype, **options)
    options = stream | {"DOT_PRECISION": "exact", "BLOCK_G": 64}
    yield _tiled(plan_products.product_kernel, "64x64", tile, kind, dtype, **options)
    tile = tuning.PLAN
    name, options = f"{tile.rows}x{tile.columns}", stream | {"LOG": False}
    yield _tiled(plan_products.plan_kernel, name, tile, kind, dtype, **options)


def _streamed_unrolled(kind: str, dtype: str) -> Iterator[Configuration]:
    """The kernels of streamed unrolled gradients."""
    options: dict[str, Any] = {"PACKED": False}
    tile = tuning.STREAM
    yield _tiled(unrolled_replay.forth_kernel, "64x64", tile, kind, dtype, **options)
    yield _tiled(unrolled_replay.weight_kernel, "64x64", tile, kind, dtype, **options)
    for init in (True, False):
        back = options | {"COLUMNS": False, "POTENTIALS": True, "INIT": init}
        label = "begin" if init else ""
        yield _tiled(unrolled_backward.back_kernel, "64x64", tile, kind, dtype, label, **back)
    gradient_tile = tuning.SINGLE_PARTIAL if dtype == "fp32" else tuning.PARTIAL
    tile = tuning.ADJOINT_STREAM[False]
    if kind != "given":
        rows, warps = gradient_tile.rows, gradient_tile.warps
        columns, depth = gradient_tile.columns, gradient_tile.depth
        tile = tuning.Tile(rows, columns, depth, rows, warps, 1, 2)
    options |= {"COLUMNS": False, "BLOCK_G": gradient_tile.entries}
    options["DOT_DTYPE"] = tl.bfloat16 if dtype == "bf16" else tl.float32
    options["DOT_PRECISION"] = "exact" if dtype == "fp32" else "tf32"
    name = f"{tile.rows}x{tile.columns}"
    yield _tiled(unrolled_backward.unrolled_gradient_kernel, name, tile, kind, dtype, **options)


def _half_precision() -> Iterator[Configuration]:
    """The streamed solvers of precision="fast"."""
    tile = tuning.STREAM
    stream = {"PACKED": False}
    fast = stream | {"FAST": True}
    for rows in (True, False):
        options = fast | {"SPLIT": False, "REDUCE": 0, "ROWS": rows}
        label = "fast rows" if rows else "fast columns"
        yield _tiled(stepwise.walk_kernel, "64x64", tile, "cosine", "bf16", label, **options)
    yield _tiled(stepwise.keep_kernel, "64x64", tile, "cosine", "bf16", **stream)
    options = fast | {"START": False, "BLOCK": tuning.VECTOR_BLOCK}
    yield _tiled(single_launch.loop_kernel, "64x64", tile, "cosine", "bf16", "fast", **options)


def _vector_kernels() -> Iterator[Configuration]:
    """The elementwise kernels over potentials, costs and token vectors."""
    block = {"PACKED": False, "BLOCK": tuning.VECTOR_BLOCK}
    finish = block | {"START": False}
    turn = finish | {"ROWS": True, "INIT": False, "FAST": False}
    cost = {"IMPLICIT": True, "BLOCK_N": 32, "BLOCK_M": 64, "stride_m": 1}
    norms = {"KIND": 1, "PACKED": False, "SCALED": False, "BLOCK_T": 16, "BLOCK_D": 128}
    centre = {"PACKED": False, "BLOCK_T": 32, "BLOCK_D": 64}
    equal = {"MASK_A": True, "MASK_B": False, "LENGTHS_A": False, "LENGTHS_B": True}
    equal |= {"BLOCK": tuning.VECTOR_BLOCK}
    for kernel, tile, kind, dtype, constants in (
        (stepwise.finish_kernel, "lines", "", "fp32", finish),
        (stepwise.gather_kernel, "lines", "", "fp32", block),
        (stepwise.turn_kernel, "lines", "", "fp32", turn),
        (gradients.cost_gradient_kernel, "32x64", "given", "fp32", cost),
        (unrolled_replay.survey_kernel, "lines", "", "fp32", block | {"POTENTIALS": True}),
        (token_norms.norm_kernel, "16x128", "cosine", "bf16", norms),
        (token_norms.centre_kernel, "32x64", "sqeuclidean", "bf16", centre),
        (masses.equal_masses_kernel, "lines", "", "fp32", equal),
    ):
        yield Configuration(kernel, tile, kind, dtype, constants, 4, 3)


def _tiled(
    kernel: Any,
    name: str,
    tile: tuning.Tile,
    kind: str,
    dtype: str,
    options: str = "",
    **constants: Any,
) -> Configuration:
    """A configuration of a kernel over tiles; constants that it does not take are dropped."""
    constants |= {"KIND": KINDS[kind], "SCALED": kind == "cosine" and dtype == "fp32"}
    constants |= {"WIDE": False, "PRECISION": "exact" if dtype == "fp32" else "half"}
    constants |= {"BLOCK_N": tile.rows, "BLOCK_M": tile.columns, "BLOCK_D": tile.depth}
    constants |= {"PART": tile.part, "WARPS_N": tile.warps_n, "WARPS_M": tile.warps_m}
    constants |= {"NVIDIA": True}
    constants = {key: constants[key] for key in constants if key in kernel.arg_names}
    return Configuration(kernel, name, kind, dtype, constants, tile.warps, tile.stages, options)


def _vector_gradient(tile: tuning.GradientTile, dtype: str) -> Configuration:
    constants = {"KIND": 1, "PACKED": False, "IMPLICIT": True, "WHOLE": tile.whole}
    constants |= {"SCALED": dtype == "fp32", "WIDE": False}
    constants |= {"PRECISION": "exact" if dtype == "fp32" else "half"}
    constants |= {"DOT_DTYPE": tl.bfloat16 if dtype == "bf16" else tl.float32}
    constants |= {"DOT_PRECISION": "exact" if dtype == "fp32" else "tf32"}
    constants |= {"BLOCK_N": tile.rows, "BLOCK_M": tile.columns, "BLOCK_D": tile.depth}
    constants |= {"BLOCK_G": tile.entries}
    name = f"{tile.rows}x{tile.columns}x{tile.entries}"
    options = "whole" if tile.whole else "partial"
    kernel = gradients.vector_gradient_kernel
    return Configuration(kernel, name, "cosine", dtype, constants, tile.warps, tile.stages, options)
