"""The machine code of the CUDA kernels, the build of their library, and how it is found.

No test here needs a GPU.
"""

import csv
import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.machine_code import cuda as cuda_resources
from optical.backends import cuda, library, nvrtc, registry, structs
from optical.backends.problem import example_problem
from optical.io import nvidia

ROOT = Path(__file__).resolve().parents[2]
STRICT = ("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Wno-unused-parameter")

needs_nvcc = pytest.mark.skipif(library.find_nvcc() is None, reason="nvcc was not found")
DISASSEMBLER = cuda_resources.disassembler()
needs_nvdisasm = pytest.mark.skipif(DISASSEMBLER is None, reason="Triton has no nvdisasm")


def committed():
    with open(cuda_resources.TABLE, newline="") as file:
        return {(row["architecture"], row["kernel"]): row for row in csv.DictReader(file)}


FORWARD = ("four", "pair", "warp", "square", "block", "cluster")


def check_hot_loops(rows, kinds=FORWARD):
    """Check that hot loops spill no register and spend most instructions on multiply-adds."""
    loops = {row["kernel"] for row in rows if row.get("loop")}
    assert loops >= {f"optical_forward_{kind}" for kind in kinds}
    # Bounds of executed instructions per multiply-add. A warp of "pair" solves two problems, one of
    # "four" four.
    bounds = {"pair": 1.8, "four": 2.4}
    bounds |= {"warp": 1.5, "square": 1.5, "block": 2.0, "cluster": 2.5}
    half_bounds = {"fast_warp": 1.0, "fast_square": 1.0, "fast_block": 1.2, "fast_cluster": 1.5}
    for row in rows:
        kind = row["kernel"].removeprefix("optical_forward_")
        if kind in (*bounds, *half_bounds):
            # Half precision holds two copies of K in registers, which forces some spills.
            allowed = 24 if row["architecture"] == "80" else 16
            spilled = dict.fromkeys(half_bounds, allowed) | {"cluster": 2, "fast_warp": 36}
            assert int(row["ldl_stl"]) <= spilled.get(kind, 0), row
            floor = cuda_resources.ITERATION[kind.removeprefix("fast_")]
            assert int(row["taken"]) <= (bounds | half_bounds)[kind] * floor, row


def test_the_committed_table_is_complete_and_within_bounds():
    table = committed()
    architectures = {architecture for architecture, _ in table}
    # Complete architectures only: `python -m benchmarks.machine_code.cuda` replaces all their rows.
    assert architectures == set(library.CUDA_ARCHITECTURES)
    names = set(nvrtc.kernel_definitions(ROOT / "csrc"))
    for architecture in architectures:
        rows = [row for key, row in table.items() if key[0] == architecture]
        assert {row["kernel"] for row in rows} == names
        assert all(int(row["registers"]) <= 255 for row in rows)
        check_hot_loops(rows, (*FORWARD, "fast_warp", "fast_square"))


def test_the_page_quotes_the_table():
    page = (ROOT / "docs" / "dev" / "cuda.md").read_text(encoding="utf-8")
    problems = {"four": 4, "pair": 2}
    for kind in ("four", "pair", "warp", "square", "block", "cluster", "fast warp", "fast square"):
        row = committed()["90a", f"optical_forward_{kind.replace(' ', '_')}"]
        loop, taken = (round(int(row[name]) / problems.get(kind, 1)) for name in ("loop", "taken"))
        (line,) = re.findall(rf"^\| {kind},.* \| (\d+ \| \d+) \| [\d.]+ \|$", page, re.MULTILINE)
        assert line == f"{loop} | {taken}", kind


def test_the_page_quotes_the_predictions():
    page = (ROOT / "docs" / "dev" / "cuda.md").read_text(encoding="utf-8")
    for name, times in cuda_resources.predictions().items():
        (line,) = re.findall(rf"^\| {name} \|.*\| (\d+) … (\d+) \| no GPU \|$", page, re.MULTILINE)
        for written, time in zip(line, times, strict=True):
            assert abs(int(written) - time) <= max(1, 0.01 * time), (name, line, times)


def test_new_rows_of_an_architecture_replace_old_ones(tmp_path):
    table = tmp_path / "table.csv"
    for architecture, registers in (("90a", 1), ("80", 2), ("90a", 3)):
        row = {"architecture": architecture, "kernel": "k", "registers": registers}
        cuda_resources.write(table, architecture, [row])
    with open(table, newline="") as file:
        rows = [(row["architecture"], row["registers"]) for row in csv.DictReader(file)]
    assert rows == [("80", "2"), ("90a", "3")]


@needs_nvcc
@needs_nvdisasm
def test_hot_loops_compile_without_spills(tmp_path):
    kinds = ("four", "pair", "warp", "square")
    definitions = nvrtc.kernel_definitions(ROOT / "csrc")
    selected = " ".join(definitions[f"optical_forward_{kind}"] for kind in kinds)
    source = tmp_path / "selected.cu"
    source.write_text(f'#define OPTICAL_ONLY {selected}\n#include "kernels.cuh"\n')
    check_hot_loops(cuda_resources.rows("90a", tmp_path, source=source), kinds)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", library.CUDA_ARCHITECTURES)
def test_every_kernel_compiles_without_a_warning(architecture, tmp_path):
    _, output = cuda_resources.compile_kernels(architecture, tmp_path, *STRICT)
    assert set(cuda_resources.resources(output)) == set(nvrtc.kernel_definitions(ROOT / "csrc"))


@needs_nvcc
@pytest.mark.slow
def test_the_library_loads_without_a_device_and_refuses_problems(tmp_path):
    target = tmp_path / library.CUDA_LIBRARY
    library.build_cuda(ROOT / "csrc", target, library.find_nvcc(), ("90a",))
    calls = library.open_library(target, library.cuda_source_hash(ROOT / "csrc"))
    if torch.cuda.is_available():
        pytest.skip(reason="a CUDA device is present")
    problem = structs.ProblemStruct(batch=1, n=4, m=4, rho_a=1, rho_b=1, omega=1)
    assert structs.with_argument_types(calls).optical_cuda_reach(ctypes.byref(problem)) < 0
    status = calls.optical_cuda_forward(
        ctypes.byref(problem), ctypes.byref(structs.SolutionStruct()), None
    )
    assert cuda.ERRORS[status] == "a launch that the device refused"
    assert cuda.error_text(calls).startswith("cudaError")
    with pytest.raises(library.BuildError, match="other sources"):
        library.open_library(target, "0123456789abcdef")


@needs_nvcc
def test_a_failed_build_reports_its_first_error_in_one_line(tmp_path):
    (tmp_path / "cuda").mkdir()
    (tmp_path / "sinkhorn.h").write_text("")
    (tmp_path / "cuda" / "sinkhorn.cu").write_text("#error deliberately broken\n")
    with pytest.raises(library.BuildError, match="deliberately broken") as caught:
        library.build_cuda(tmp_path, tmp_path / "out.so", library.find_nvcc(), ("90a",))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.so").exists()


def test_an_installation_builds_for_the_devices_of_the_driver(monkeypatch):
    """PyTorch may be absent then. Old devices are left out; 9.0 gets its own instructions."""
    devices = [(7, 5), (8, 6), (9, 0), (8, 6), (12, 0)]

    class Driver:
        def cuInit(self, flags):
            return 0

        def cuDeviceGetCount(self, count):
            count._obj.value = len(devices)
            return 0

        def cuDeviceGetAttribute(self, value, name, device):
            value._obj.value = devices[device][
                name - nvidia.DeviceAttribute.COMPUTE_CAPABILITY_MAJOR
            ]
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert library.driver_architectures() == ("86", "90a", "120")


def test_cpu_tensors_are_refused_before_a_build(monkeypatch):
    def fail(device):
        raise AssertionError("looked for the library")

    monkeypatch.setattr(cuda, "load", fail)
    reason = registry.BACKENDS["cuda"].supports(example_problem(torch.zeros(1, 2, 2)))
    assert reason == "the tensors are on cpu; the CUDA kernels need a CUDA device"


def test_the_environment_selects_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("NVCC", "")
    assert library.find_nvcc() is None
    tool = tmp_path / "nvcc"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("NVCC", str(tool))
    assert library.find_nvcc() == [str(tool)]
    assert subprocess.run(library.find_nvcc()).returncode == 0
