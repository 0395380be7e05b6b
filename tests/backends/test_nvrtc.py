"""CUDA kernels without nvcc: launch configurations, driver calls and compilation by NVRTC."""

import ctypes
import math
import site
import threading
from pathlib import Path

import pytest
import torch

from optical.backends import nvrtc, structs
from optical.io import nvidia
from optical.io import nvrtc as compiler
from tests.backends.doubles import Compiler, Driver

FOLDER = Path(__file__).resolve().parents[2] / "csrc"
H100, OLDER, SMALL = (
    nvrtc.Device(227 << 10, 8),
    nvrtc.Device(163 << 10, 1),
    nvrtc.Device(99 << 10, 8),
)


def problem(n, m, **fields):
    balanced = {"rho_a": math.inf, "rho_b": math.inf, "omega": 1.0}
    return structs.ProblemStruct(batch=5, n=n, m=m, **balanced | fields)


def cubins(names, capability):
    return [f"{name} {capability[0]}{capability[1]}".encode() for name in names]


def kernels_on(driver, make=cubins):
    return nvrtc.Kernels(nvidia.Driver(driver, lambda: 3), make)


def call(driver, problem, backward=False):
    kernels = kernels_on(driver)
    if not backward:
        return kernels.optical_cuda_forward(
            ctypes.byref(problem), ctypes.byref(structs.SolutionStruct()), 7
        )
    return kernels.optical_cuda_backward(
        ctypes.byref(problem), ctypes.byref(structs.GradientStruct()), 11, 7
    )


def test_padded_problems_launch_once():
    driver = Driver()
    assert call(driver, problem(100, 128)) == 0
    size = nvrtc.shared_bytes(nvrtc.SQUARE, 2, 2, 0, None)
    assert driver.launches == [
        ("optical_forward_square 90", 5, 128, size, 7, None, nvrtc.SQUARE, 100),
    ]
    assert call(driver, problem(512, 512)) == 0
    assert driver.launches[-1][:3] == ("optical_forward_cluster 90", 40, 256)
    assert driver.launches[-1][5] == [8, 1, 1]


def test_small_problems_share_a_warp_only_in_the_forward_pass():
    driver = Driver()
    for n, m, name, warps in ((16, 9, "four", 2), (17, 3, "pair", 3), (33, 3, "warp", 5)):
        assert call(driver, problem(n, m)) == 0
        assert driver.launches[-1][:3] == (f"optical_forward_{name} 90", warps, 32)
    assert call(driver, problem(16, 9), backward=True) == 0
    assert driver.launches[-1][:3] == ("optical_backward_small 90", 5, 32)
    driver = Driver()
    assert call(driver, problem(20, 9, offset_a=1, offset_b=1)) == 0
    assert [launch[1] for launch in driver.launches] == [2, 3]


def test_half_precision_launches_the_fast_kernels():
    driver = Driver()
    for n, kind in ((32, "pair"), (64, "fast_warp"), (100, "fast_square"), (192, "fast_block")):
        fast = problem(n, min(n, 128), fast=1, max_iter=16)
        assert call(driver, fast) == 0
        assert driver.launches[-1][0] == f"optical_forward_{kind} 90"
        assert call(driver, fast, backward=True) == 0
        assert "fast" not in driver.launches[-1][0]
    assert call(driver, problem(64, 64, fast=1, max_iter=16)) == 0
    exact = nvrtc.shared_bytes(nvrtc.WARP, 1, 1, 0, None)
    assert driver.launches[-1][3] == exact + nvrtc.HALF_BYTES
    for fields in ({"max_iter": 15}, {"rho_a": 1.0}, {"omega": 1.5}, {"anneal_start": 1.0}):
        assert call(driver, problem(64, 64, **{"fast": 1, "max_iter": 16} | fields)) == 0
        assert driver.launches[-1][0] == "optical_forward_warp 90"
    # If the additional shared memory does not fit, the problem is solved exactly.
    small = Driver(shared=nvrtc.shared_bytes(nvrtc.SQUARE, 2, 2, 0, None))
    assert call(small, problem(128, 128, fast=1, max_iter=16)) == 0
    assert small.launches[-1][0] == "optical_forward_square 90"


def test_each_gradient_mode_launches_its_kernel():
    driver = Driver()
    for gradient, name in ((0, "backward"), (1, "backward"), (2, "unroll")):
        assert call(driver, problem(100, 100, gradient=gradient), backward=True) == 0
        assert driver.launches[-1][0] == f"optical_{name}_block 90"
    # Every name that LaunchConfig.kernel can return is defined.
    defined = nvrtc.kernel_definitions(FOLDER)
    for what, kinds in (
        ("forward", ("four", "pair", "warp", "square", "block", "cluster")),
        ("forward", ("fast_warp", "fast_square", "fast_block", "fast_cluster")),
        ("backward", ("small", "warp", "block", "cluster")),
        ("unroll", ("small", "warp", "block", "cluster")),
    ):
        assert {f"optical_{what}_{kind}" for kind in kinds} <= set(defined)


def test_packed_problems_launch_once_per_possible_regime():
    driver = Driver()
    assert call(driver, problem(300, 300, offset_a=1, offset_b=1)) == 0
    numbers = [(launch[6], launch[5]) for launch in driver.launches]
    assert numbers == [
        (0, None),
        (1, None),
        (2, None),
        (3, None),
        (4, None),
        (5, [2, 1, 1]),
        (5, [4, 1, 1]),
        (5, [8, 1, 1]),
    ]


def test_kernels_are_loaded_once_and_together():
    driver, asked = Driver(), []

    def make(names, capability):
        asked.append(names)
        return cubins(names, capability)

    kernels = kernels_on(driver, make)
    packed = problem(40, 40, offset_a=1, offset_b=1)
    for _ in range(2):
        solution = structs.SolutionStruct()
        kernels.optical_cuda_forward(ctypes.byref(packed), ctypes.byref(solution), None)
    names = [f"optical_forward_{name}" for name in ("four", "pair", "warp")]
    assert asked == [[nvrtc.PROBE], names]
    assert len(driver.loaded) == 4 and len(driver.launches) == 6
    assert driver.modes[-1] == 0  # the mode of captures is restored
    queries = driver.queries
    kernels.optical_cuda_forward(ctypes.byref(packed), ctypes.byref(solution), None)
    assert driver.queries == queries  # the device is asked once


def test_a_thread_without_a_context_gets_the_one_of_its_device():
    driver = Driver()
    driver.context = None
    assert call(driver, problem(3, 3)) == 0
    assert driver.context == 13


def test_unsupported_sizes_and_failed_launches_are_reported():
    large = problem(700, 700)
    assert call(Driver(), large) == nvrtc.OUT_OF_REACH
    kernels = kernels_on(Driver())
    assert not kernels.optical_cuda_reach(ctypes.byref(large))
    assert kernels.optical_cuda_reach(ctypes.byref(problem(512, 512)))
    # Without clusters, a problem must fit in one block.
    ampere = kernels_on(Driver((8, 0), OLDER.shared))
    assert ampere.optical_cuda_reach(ctypes.byref(problem(128, 192)))
    assert not ampere.optical_cuda_reach(ctypes.byref(problem(256, 256)))
    driver = Driver()
    driver.status = 1
    kernels, small = kernels_on(driver), problem(3, 3)
    assert kernels.optical_cuda_error() == b""
    status = kernels.optical_cuda_forward(
        ctypes.byref(small), ctypes.byref(structs.SolutionStruct()), None
    )
    assert status == nvrtc.LAUNCH_FAILED
    assert kernels.optical_cuda_error() == b"CUDA_ERROR_1: the driver's own words"
    assert call(Driver(), structs.ProblemStruct(batch=0)) == 0


@pytest.mark.parametrize(("clusters", "longest"), [(8, 512), (4, 256), (2, 128), (1, 64)])
def test_a_slice_of_a_device_serves_what_its_clusters_hold(clusters, longest):
    """The device answers how many blocks a cluster may have; it is not derived from its name."""
    driver = Driver(clusters=clusters)
    kernels = kernels_on(driver)
    answers = (ctypes.c_int * 5)()
    assert kernels.optical_cuda_probe(answers) == 0
    assert answers[:2] == [H100.shared, clusters] and answers[4] == 90
    for n in (64, 128, 256, 512):
        assert kernels.optical_cuda_reach(ctypes.byref(problem(n, 512))) == (n <= longest)
    assert call(driver, problem(512, 512)) == (0 if clusters == 8 else nvrtc.OUT_OF_REACH)


def test_a_refused_module_is_reported_in_the_drivers_words():
    driver = Driver()
    driver.load_status = 209
    with pytest.raises(nvidia.DriverError, match="CUDA_ERROR_209: the driver's own words"):
        kernels_on(driver).optical_cuda_probe((ctypes.c_int * 5)())


def test_devices_with_little_shared_memory_support_128_x_128():
    assert nvrtc.choose_launch(128, 128, 1, None, SMALL) is not None


# ------------------------------------------------------------------------------------- compiling


def test_a_device_may_run_code_for_the_first_architecture_of_its_generation():
    known = Compiler(80, 86, 89, 90, 100, 120)
    for capability, expected in (
        ((8, 0), "80"),
        ((8, 9), "89"),
        ((9, 0), "90a"),  # wgmma and TMA
        ((10, 3), "100"),
        ((12, 1), "120"),
    ):
        assert compiler.architecture(known, capability) == expected
    message = r"NVRTC 12\.8 knows no GPU of compute capability 11\.0 \(its newest is 12\.0\)"
    with pytest.raises(compiler.CompileError, match=message):
        compiler.architecture(known, (11, 0))


def test_compiled_kernels_are_cached(tmp_path):
    compilations = []

    def make():
        compilations.append(1)
        return b"cubin"

    for _ in range(2):
        assert compiler.cached(make, "key", tmp_path) == b"cubin"
    assert compilations == [1]


def test_an_error_of_the_compiler_is_remembered(tmp_path):
    attempts = []

    def fail():
        attempts.append(1)
        raise compiler.CompileError("NVRTC 12.8 failed: an error")

    for _ in range(2):
        with pytest.raises(compiler.CompileError, match=r"12\.8 failed: an error"):
            compiler.cached(fail, "key", tmp_path)
    assert attempts == [1]
    assert "an error (remembered in " in compiler.known_failure("key", tmp_path)
    assert compiler.known_failure("another", tmp_path) is None

    def exhausted():
        attempts.append(1)
        raise compiler.CompilerFault("NVRTC 12.8 failed: out of memory")

    for _ in range(2):
        with pytest.raises(compiler.CompilerFault):
            compiler.cached(exhausted, "other", tmp_path)
    assert attempts == [1, 1, 1]


def test_kernels_are_compiled_in_parallel():
    barrier = threading.Barrier(3, timeout=30)

    def compile_one(name):
        barrier.wait()  # passes only if three are being compiled at once
        return name.encode()

    assert compiler.compile_all(compile_one, ["a", "b", "c"], 3) == [b"a", b"b", b"c"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_cache_files_are_recompiled(tmp_path, damage):
    compilations = []

    def make():
        compilations.append(1)
        return bytes(range(256))

    def cached():
        return compiler.cached(make, "key", tmp_path)

    cached()
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes({"cut": data[:-7], "flipped": data, "empty": b""}[damage])
    assert cached() == cached() == bytes(range(256))
    assert compilations == [1, 1] and list(tmp_path.iterdir()) == [path]


needs_nvrtc = pytest.mark.skipif(compiler.find() is None, reason="NVRTC was not found")


@needs_nvrtc
@pytest.mark.parametrize("kernel", ["optical_forward_pair", "optical_backward_warp"])
def test_nvrtc_compiles_a_kernel(kernel):
    assert nvrtc.compile_kernel(compiler.find(), FOLDER, kernel, "90a")[:4] == b"\x7fELF"


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_nvrtc_compiles_the_probe(architecture):
    cubin = nvrtc.compile_kernel(compiler.find(), FOLDER, nvrtc.PROBE, architecture)
    assert cubin[:4] == b"\x7fELF" and nvrtc.PROBE.encode() in cubin


@needs_nvrtc
def test_an_architecture_that_nvrtc_does_not_know_is_an_error_that_is_not_remembered():
    with pytest.raises(compiler.CompilerFault, match="invalid value for --gpu-architecture"):
        nvrtc.compile_kernel(compiler.find(), FOLDER, nvrtc.PROBE, "999")


@needs_nvrtc
def test_an_nvrtc_error_is_reported_in_one_line(tmp_path):
    (tmp_path / "cuda").mkdir()
    (tmp_path / "sinkhorn.h").write_text("")
    (tmp_path / "cuda" / "kernels.cuh").write_text(
        "#error deliberately broken\nOPTICAL_FORWARD(pair, PairInWarp, 1)\n"
    )
    with pytest.raises(compiler.CompileError, match="deliberately broken") as caught:
        nvrtc.compile_kernel(compiler.find(), tmp_path, "optical_forward_pair", "90a")
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, compiler.CompilerFault)


# --------------------------------------------------------------------------------------- finding


def test_nvrtc_is_looked_for_beside_pytorch_and_its_own_version_comes_first(tmp_path, monkeypatch):
    """Also in folders of ``pip --target``, of the user, and of conda."""
    target, conda = tmp_path / "target", tmp_path / "conda"
    for path in (
        target / "nvidia/cu13/lib/libnvrtc.so.13",
        target / "nvidia/cu13/lib/libnvrtc-builtins.so.13.0",
        target / "nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
        conda / "lib/libnvrtc.so.11.2",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.syspath_prepend(str(target))
    monkeypatch.setenv("CONDA_PREFIX", str(conda))
    for version, expected in (("13.0", "libnvrtc.so.13"), ("12.8", "libnvrtc.so.12")):
        monkeypatch.setattr(torch.version, "cuda", version)
        found = [path for path in compiler._candidates() if tmp_path in path.parents]
        assert found[0].name == expected and len(found) == 3
    beside = Path(torch.__file__).parents[1]
    monkeypatch.setattr(site, "getsitepackages", list)
    assert compiler._package_folders()[0] == beside


def test_the_second_library_of_nvrtc_is_loaded_first(tmp_path, monkeypatch):
    """The wheel of CUDA 13.0 does not find its builtins by itself."""
    names = ("libnvrtc-builtins.so.13.0", "libnvrtc.so.13")
    for name in (*names, "libnvrtc-builtins.alt.so.13.0"):
        (tmp_path / name).touch()
    opened = []
    monkeypatch.setattr(compiler, "_candidates", lambda: [tmp_path / "libnvrtc.so.13"])
    monkeypatch.setattr(ctypes, "CDLL", lambda path: opened.append(Path(path).name) or path)
    assert compiler.find.__wrapped__() == str(tmp_path / names[1])
    assert opened == list(names)
