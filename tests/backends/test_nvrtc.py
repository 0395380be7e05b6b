"""CUDA kernels without nvcc: launch configurations, driver calls and compilation by NVRTC."""

import contextlib
import ctypes
import math
from pathlib import Path

import pytest

from optical.backends import nvrtc, structs

FOLDER = Path(__file__).resolve().parents[2] / "csrc"
H100, OLDER, SMALL = (
    nvrtc.Device(227 << 10, 8),
    nvrtc.Device(163 << 10, 1),
    nvrtc.Device(99 << 10, 8),
)


class Driver:
    """A test double of libcuda that records its calls."""

    def __init__(self, capability=(9, 0), shared=H100.shared):
        attribute = nvrtc.DeviceAttribute
        self.attributes = {
            attribute.COMPUTE_CAPABILITY_MAJOR: capability[0],
            attribute.COMPUTE_CAPABILITY_MINOR: capability[1],
            attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: shared,
        }
        self.shared = shared
        self.loaded, self.launches, self.status = [], [], 0

    def cuCtxGetDevice(self, device):
        device._obj.value = 0
        return 0

    def cuDeviceGetAttribute(self, value, name, device):
        value._obj.value = self.attributes[name]
        return 0

    def cuModuleLoadData(self, module, binary):
        self.loaded.append(binary)
        return 0

    def cuModuleGetFunction(self, function, module, name):
        function._obj.value = len(self.loaded)
        return 0

    def cuFuncSetAttribute(self, function, name, value):
        assert name == nvrtc.FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        assert value == self.shared
        return 0

    def cuLaunchKernelEx(self, config, function, addresses, extra):
        c = config._obj
        name = self.loaded[function.value - 1].decode()
        cluster = None
        if c.count:
            assert c.attributes[0].id == nvrtc.LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            cluster = list(c.attributes[0].value[:3])
        number = ctypes.c_int.from_address(addresses[len(addresses) - 1]).value
        first = structs.ProblemStruct.from_address(addresses[0])
        self.launches.append((name, c.gx, c.bx, c.shared, c.stream, cluster, number, first.n))
        return self.status


def problem(n, m, **fields):
    balanced = {"rho_a": math.inf, "rho_b": math.inf, "omega": 1.0}
    return structs.ProblemStruct(batch=5, n=n, m=m, **balanced | fields)


def call(driver, problem, backward=False):
    kernels = nvrtc.Kernels(driver, lambda name, architecture: f"{name} {architecture}".encode())
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


def test_kernels_are_loaded_once():
    driver = Driver()
    kernels = nvrtc.Kernels(driver, lambda name, architecture: b"x")
    for _ in range(2):
        small, solution = problem(3, 3), structs.SolutionStruct()
        kernels.optical_cuda_forward(ctypes.byref(small), ctypes.byref(solution), None)
    assert len(driver.loaded) == 1
    assert len(driver.launches) == 2


def test_unsupported_sizes_and_failed_launches_are_reported():
    large = problem(700, 700)
    assert call(Driver(), large) == nvrtc.OUT_OF_REACH
    kernels = nvrtc.Kernels(Driver(), lambda name, architecture: b"x")
    assert not kernels.optical_cuda_reach(ctypes.byref(large))
    assert kernels.optical_cuda_reach(ctypes.byref(problem(512, 512)))
    # Without clusters, a problem must fit in one block.
    ampere = nvrtc.Kernels(Driver((8, 0), OLDER.shared), lambda name, architecture: b"x")
    assert ampere.optical_cuda_reach(ctypes.byref(problem(128, 192)))
    assert not ampere.optical_cuda_reach(ctypes.byref(problem(256, 256)))
    driver = Driver()
    driver.status = 1
    assert call(driver, problem(3, 3)) == nvrtc.LAUNCH_FAILED
    assert call(Driver(), structs.ProblemStruct(batch=0)) == 0


def test_devices_with_little_shared_memory_support_128_x_128():
    assert nvrtc.choose_launch(128, 128, 1, None, SMALL) is not None


def test_compiled_kernels_are_cached(tmp_path):
    compilations = []

    def make():
        compilations.append(1)
        return b"cubin"

    for _ in range(2):
        cubin = nvrtc.cached(make, "key", tmp_path, contextlib.nullcontext())
        assert cubin == b"cubin"
    assert compilations == [1]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_cache_files_are_recompiled(tmp_path, damage):
    compilations = []

    def make():
        compilations.append(1)
        return bytes(range(256))

    def cached():
        return nvrtc.cached(make, "key", tmp_path, contextlib.nullcontext())

    cached()
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes({"cut": data[:-7], "flipped": data, "empty": b""}[damage])
    assert cached() == cached() == bytes(range(256))
    assert compilations == [1, 1] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kernel", ["optical_forward_pair", "optical_backward_warp"])
def test_nvrtc_compiles_a_kernel(kernel):
    compiler = nvrtc.find()
    if compiler is None:
        pytest.skip(reason="NVRTC was not found")
    assert nvrtc.compile_kernel(compiler, FOLDER, kernel, "90")[:4] == b"\x7fELF"


def test_an_nvrtc_error_is_reported_in_one_line(tmp_path):
    compiler = nvrtc.find()
    if compiler is None:
        pytest.skip(reason="NVRTC was not found")
    (tmp_path / "cuda").mkdir()
    (tmp_path / "sinkhorn.h").write_text("")
    (tmp_path / "cuda" / "kernels.cuh").write_text(
        "#error deliberately broken\nOPTICAL_FORWARD(pair, PairInWarp, 1)\n"
    )
    with pytest.raises(nvrtc.CompileError, match="deliberately broken") as caught:
        nvrtc.compile_kernel(compiler, tmp_path, "optical_forward_pair", "90")
    assert "\n" not in str(caught.value)
