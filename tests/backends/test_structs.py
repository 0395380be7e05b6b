"""The ctypes structures: fields and codes of sinkhorn.h, and a place for every field of Problem."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from optical.backends import structs
from optical.backends.problem import GRADIENTS, KINDS, Problem, example_problem

HEADER = (Path(__file__).resolve().parents[2] / "csrc" / "sinkhorn.h").read_text(encoding="utf-8")
CODE = re.sub(r"//.*", "", HEADER)
C_TYPES = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "double": ctypes.c_double}


def header_fields(name):
    """(name, ctypes type) of each field of a structure in sinkhorn.h."""
    (body,) = re.findall(rf"typedef struct {{([^}}]*)}} {name};", CODE)
    fields = []
    for declaration in filter(str.strip, body.split(";")):
        ctype, names = re.fullmatch(r"\s*(?:const )?(\w+)\s*(.*)", declaration, re.DOTALL).groups()
        for field in names.split(","):
            pointer = "*" in field or names.startswith("*")
            fields.append((field.strip(" *\n"), ctypes.c_void_p if pointer else C_TYPES[ctype]))
    return fields


@pytest.mark.parametrize(
    ("name", "struct"),
    [
        ("optical_problem", structs.ProblemStruct),
        ("optical_solution", structs.SolutionStruct),
        ("optical_gradient", structs.GradientStruct),
    ],
)
def test_fields_are_those_of_the_header(name, struct):
    assert list(struct._fields_) == header_fields(name)


def test_codes_are_those_of_the_header():
    constants = {name: int(code) for name, code in re.findall(r"OPTICAL_(\w+) = (\d+)", CODE)}
    for codes, names in ((structs.KIND_CODES, KINDS), (structs.GRADIENT_CODES, GRADIENTS)):
        assert codes == {name: constants[name.upper()] for name in names}
    dtypes = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16"}
    dtypes[torch.bfloat16] = "BF16"
    assert {dtype: constants[name] for dtype, name in dtypes.items()} == structs.DTYPE_CODES


X, Y = torch.rand(2, 3, 4), torch.rand(2, 5, 4)
OFFSETS = torch.tensor([0, 3, 6])
# A value of each field of Problem that differs from the one in `base` below.
CHANGED = {
    "x": X.clone(),
    "y": Y.clone(),
    "kind": "dot",
    "cu_a": OFFSETS,
    "cu_b": OFFSETS,
    "log_a": torch.zeros(2, 3),
    "log_b": torch.zeros(2, 5),
    "epsilon": torch.ones(2),
    "f0": torch.zeros(2, 3),
    "g0": torch.zeros(2, 5),
    "max_iter": 7,
    "tol": 0.1,
    "rho_a": 2.0,
    "rho_b": 3.0,
    "omega": 1.5,
    "anderson": 4,
    "anneal_start": 1.0,
    "anneal_ratio": 0.25,
    "gradient": "unroll",
    "low_memory": True,
    "precision": "fast",
}


@pytest.mark.parametrize("field", [name for name in Problem._fields if name != "backend"])
def test_every_field_of_a_problem_reaches_the_structure(field):
    base = example_problem(X, Y, "cosine")
    changed = base._replace(**{field: CHANGED[field]})
    before, after = (bytes(structs.problem_struct(problem, 3, 5)) for problem in (base, changed))
    assert before != after


@pytest.mark.parametrize("struct", [structs.SolutionStruct, structs.GradientStruct])
def test_structures_of_addresses_are_filled_by_name(struct):
    tensors = {name: torch.zeros(1) for name, _ in struct._fields_}
    filled = structs.address_struct(struct, tensors)
    for name, tensor in tensors.items():
        assert getattr(filled, name) == tensor.data_ptr()
    missing = structs.address_struct(struct, dict.fromkeys(tensors))
    assert not any(getattr(missing, name) for name in tensors)


def test_sizes_and_strides_of_padded_and_packed_problems():
    wide = torch.rand(2, 3, 9)[:, :, :4]
    padded = structs.problem_struct(example_problem(wide, Y, "cosine"), 3, 5, 2)
    assert (padded.batch, padded.n, padded.m, padded.dim, padded.num_threads) == (2, 3, 5, 4, 2)
    assert (padded.x_stride_batch, padded.x_stride_row, padded.x_stride_entry) == (27, 9, 1)
    assert (padded.y_stride_batch, padded.y_stride_column) == (20, 4)
    flat = example_problem(wide, Y, "cosine")._replace(
        x=torch.rand(6, 4), y=torch.rand(6, 4), cu_a=OFFSETS, cu_b=OFFSETS
    )
    packed = structs.problem_struct(flat, 3, 3)
    assert (packed.x_stride_batch, packed.x_stride_row, packed.y_stride_batch) == (0, 4, 0)
    cost = torch.rand(2, 4, 3).mT
    given = structs.problem_struct(example_problem(cost), 3, 4)
    assert (given.x_stride_batch, given.x_stride_row, given.x_stride_entry) == (12, 1, 3)
    assert (given.dim, given.y, given.y_stride_column) == (0, None, 0)
