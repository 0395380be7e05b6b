"""Which devices the GPU backends serve, and the reasons they give. All devices are doubles."""

import ctypes
import re
import subprocess
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from optical.backends import cuda, library, nvrtc, registry, structs
from optical.backends.problem import example_problem
from optical.io import nvidia
from optical.io import nvrtc as compiler
from tests.backends.doubles import Compiler, Driver

FOLDER = Path(__file__).resolve().parents[2] / "csrc"
NVRTC = compiler.find()
NAMES = {(7, 5): "Tesla T4", (8, 6): "RTX 3090", (9, 0): "H200", (11, 0): "Thor"}


class Library:
    """A test double of the library that nvcc builds."""

    def __init__(self, status=0, error=b"", driver=13000, clusters=8):
        self.status, self.error, self.driver, self.clusters = status, error, driver, clusters
        self.probes, self.calls = 0, 0

    def optical_cuda_probe(self, answers):
        self.probes += 1
        answers[:] = [227 << 10, self.clusters, self.driver, 13000, 90]
        return self.status

    def optical_cuda_error(self):
        return self.error

    def optical_cuda_reach(self, pointer):
        problem, device = pointer._obj, nvrtc.Device(227 << 10, self.clusters)
        return nvrtc.choose_launch(problem.n, problem.m, 0, None, device) is not None

    def optical_cuda_forward(self, problem, solution, stream):
        self.calls += 1
        return self.status


def forget():
    for name in ("load", "_fits", "_installed", "_compiled"):
        getattr(getattr(cuda, name), "cache_clear", lambda: None)()
    nvidia.capability_obstacle.cache_clear()
    cuda._failures.clear()
    registry._triton_probes.clear()
    registry._warn_once.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """A machine whose PyTorch finds a CUDA device, where CPU tensors count as the device's."""
    queries = []

    def capability(device):
        queries.append(device)
        return machine.capability

    def missing(*ignored):
        raise library.BuildError("no compiled CUDA kernels are installed")

    machine = types.SimpleNamespace(capability=(9, 0), queries=queries, patch=monkeypatch.setattr)
    machine.patch(cuda, "DEVICE", "cpu")
    machine.patch(torch.version, "cuda", "13.0")
    machine.patch(torch.version, "hip", None)
    machine.patch(torch.cuda, "is_available", lambda: True)
    machine.patch(torch.cuda, "get_device_capability", capability)
    machine.patch(torch.cuda, "get_device_name", lambda device: NAMES[machine.capability])
    machine.patch(library, "open_installed", missing)
    machine.patch(compiler, "find", lambda: None)
    forget()
    yield machine
    forget()


def reason(n=3, m=4, **options):
    return cuda.supports(example_problem(torch.zeros(1, n, m), **options))


def tensor_on_a_device():
    """Make a fake tensor; a CUDA build of PyTorch would look for the driver of a real one."""
    absent = mock.patch.object(torch.cuda, "is_available", lambda: False)
    with absent, FakeTensorMode() as mode:
        return FakeTensor(mode, torch.empty(1, 3, 4, device="meta"), torch.device("cuda:0"))


TOO_OLD = "Tesla T4 has compute capability 7.5; the kernels need 8.0 or newer"


def test_an_old_device_is_refused_by_both_backends(machine):
    """And is asked for its capability once, not in each call."""
    machine.capability = (7, 5)
    for _ in range(3):
        assert reason() == TOO_OLD
        assert registry._triton_device_obstacle(0) == TOO_OLD
    assert machine.queries == [0]
    with pytest.raises(registry.BackendUnsupported, match=re.escape(TOO_OLD)):
        registry.choose("cuda", example_problem(torch.zeros(1, 3, 4)))


def test_auto_falls_back_on_an_old_device(machine):
    machine.capability = (7, 5)
    machine.patch(cuda, "DEVICE", "cuda")
    problem = example_problem(tensor_on_a_device())
    with pytest.warns(RuntimeWarning, match=re.escape(f"cuda: {TOO_OLD}; triton: {TOO_OLD}")):
        assert registry.choose("auto", problem).name == "reference"
    assert registry.choose("auto", problem, gradient=True).name == "reference"
    assert "Tesla T4" in registry.explain(problem.x)
    assert not registry.runs_triton(problem.x)  # nor the kernel that fills masses


def test_triton_is_asked_once_whether_it_compiles(machine):
    asked = []
    probe = types.SimpleNamespace(obstacle=lambda device: asked.append(device) or "no C compiler")
    machine.patch(registry.importlib, "import_module", lambda name: probe)
    machine.patch(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(3):
        assert registry._triton_device_obstacle(0) == "no C compiler"
    assert asked == [0]


def test_triton_is_left_alone_in_a_capture_before_its_first_use(machine):
    """Its code cannot be loaded then; the CUDA kernels can, and PyTorch fills the masses."""
    x = tensor_on_a_device()
    probe = types.SimpleNamespace(obstacle=lambda device: None)
    machine.patch(registry.importlib, "import_module", lambda name: probe)
    machine.patch(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not registry.runs_triton(x)
    with pytest.raises(registry.BackendUnsupported, match=r"being captured.*make one call first"):
        registry.choose("triton", example_problem(x))
    machine.patch(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert registry.runs_triton(x)
    machine.patch(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert registry.runs_triton(x)


def test_an_installed_library_is_probed_once(machine):
    installed = Library()
    machine.patch(library, "open_installed", lambda *ignored: installed)
    for _ in range(3):
        assert reason() is None
    assert installed.probes == 1


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        (
            Library(4, b"cudaErrorNoKernelImageForDevice: no kernel image is available"),
            "_cuda.so does not run on this device (cudaErrorNoKernelImageForDevice: no kernel "
            "image is available)",
        ),
        (
            Library(4, b"cudaErrorInsufficientDriver: insufficient", driver=12040),
            "the NVIDIA driver supports CUDA 12.4, and _cuda.so was built with 13.0 "
            "(cudaErrorInsufficientDriver: insufficient)",
        ),
    ],
)
def test_a_library_that_does_not_run_is_a_reason(machine, installed, expected):
    machine.patch(library, "open_installed", lambda *ignored: installed)
    for _ in range(3):
        assert reason().startswith(expected)
        assert "NVRTC, the compiler of the CUDA builds of PyTorch, was not found" in reason()
    assert installed.probes == 1


def test_nvrtc_serves_where_the_installed_library_does_not_run(machine):
    kernels = Library()
    machine.patch(library, "open_installed", lambda *ignored: Library(4, b"no image"))
    machine.patch(cuda, "_compiled", lambda: kernels)
    assert reason() is None
    assert cuda.load().library is kernels


def test_a_device_that_nvrtc_does_not_know_is_refused(machine, tmp_path):
    """The driver, the compiler and the cache are real objects but for their libraries."""
    known = Compiler(80, 90)
    driver = nvidia.Driver(Driver((11, 0)), lambda: 0)
    machine.capability = (11, 0)
    machine.patch(library, "cache_folder", lambda: tmp_path)
    kernels = nvrtc.Kernels(driver, cuda.Cubins(known).compile)
    machine.patch(cuda, "_compiled", lambda: kernels)
    expected = "NVRTC 12.8 knows no GPU of compute capability 11.0 (its newest is 9.0)"
    for _ in range(2):
        assert expected in reason()


def test_a_kernel_that_does_not_compile_is_a_reason_from_then_on(machine, tmp_path, caplog):
    """In this process and, without another attempt, in the next one."""
    compiled = []

    def compile_kernel(found, folder, kernel, architecture):
        compiled.append(kernel)
        if kernel != nvrtc.PROBE:
            raise compiler.CompileError("NVRTC 12.8 failed: an error")
        return b"probe"

    def start():
        cubins = cuda.Cubins(Compiler(80, 90))
        kernels = nvrtc.Kernels(nvidia.Driver(Driver(), lambda: 0), cubins.compile)
        machine.patch(cuda, "_compiled", lambda: kernels)
        cuda.load.cache_clear()

    machine.patch(library, "cache_folder", lambda: tmp_path)
    machine.patch(nvrtc, "compile_kernel", compile_kernel)
    start()
    problem = example_problem(torch.zeros(1, 3, 4))
    assert cuda.supports(problem) is None
    with pytest.raises(compiler.CompileError, match="an error"):
        cuda.forward(problem)
    assert "NVRTC 12.8 failed: an error" in cuda.supports(problem)
    cuda._failures.clear()
    start()
    assert "an error (remembered in" in cuda.supports(problem)
    assert compiled == [nvrtc.PROBE, "optical_forward_four"]
    said = [record.message for record in caplog.records]
    assert said[0].startswith("optical compiles 1 of its CUDA kernels for sm_90a once, 5 to 30 s")


@pytest.mark.skipif(NVRTC is None, reason="NVRTC was not found")
def test_the_probe_of_a_device_is_compiled_by_nvrtc_and_kept(machine, tmp_path):
    """Everything is real but the driver; kernels of problems are compiled when they are needed."""
    machine.patch(compiler, "find", lambda: NVRTC)
    machine.patch(library, "cache_folder", lambda: tmp_path)
    loaded = []
    for driver in (Driver(), Driver()):
        machine.patch(ctypes, "CDLL", lambda name, driver=driver: driver)
        forget()
        assert reason() is None
        assert isinstance(cuda.load().library, nvrtc.Kernels)
        loaded += driver.loaded
    assert len(loaded) == 2 and loaded[0] == loaded[1] and loaded[0][:4] == b"\x7fELF"
    assert [path.suffix for path in tmp_path.iterdir()] == [".cubin"]


def test_devices_of_one_machine_are_told_apart(machine):
    """An A100 beside a T4: the library of one is no reason for the other."""
    capabilities = {0: (8, 0), 1: (7, 5)}
    machine.capability = (7, 5)
    machine.patch(torch.cuda, "get_device_capability", capabilities.get)
    machine.patch(library, "open_installed", lambda *ignored: Library(clusters=1))
    assert cuda.load(0).library is not None
    assert cuda.load(1) == library.Loaded(None, TOO_OLD)
    assert cuda.load(0).library is not None


@pytest.mark.parametrize(
    ("capability", "shared", "architecture", "largest"),
    [
        ((8, 0), 163, "80", 128),
        ((8, 6), 99, "86", 128),
        ((9, 0), 227, "90a", 512),
        ((12, 0), 99, "120", 256),
    ],
)
def test_every_generation_gets_its_code(
    machine, tmp_path, capability, shared, architecture, largest
):
    machine.capability = capability
    machine.patch(torch.cuda, "get_device_name", str)
    machine.patch(library, "cache_folder", lambda: tmp_path)
    compiled = []

    def compile_kernel(found, folder, kernel, architecture):
        compiled.append((kernel, architecture))
        return b"code"

    machine.patch(nvrtc, "compile_kernel", compile_kernel)
    driver = Driver(capability, shared << 10, 8 if capability >= (9, 0) else 1)
    cubins = cuda.Cubins(Compiler(80, 86, 89, 90, 100, 120))
    kernels = nvrtc.Kernels(nvidia.Driver(driver, lambda: 0), cubins.compile)
    machine.patch(cuda, "_compiled", lambda: kernels)
    assert reason(largest, largest) is None
    assert compiled == [(nvrtc.PROBE, architecture)]
    share = "the multiprocessors that may share one"
    if capability < (9, 0):
        share = "one multiprocessor; from compute capability 9.0 on, several share one"
    size = largest + 1
    assert reason(size, size) == f"a problem of {size} x {size} does not fit on {share}"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ({"hip": "6.2"}, "this PyTorch is built for AMD devices (ROCm 6.2)"),
        ({"cuda": None}, "is built without CUDA"),
    ],
)
def test_builds_of_pytorch_without_cuda_are_named(machine, version, expected):
    for name, value in version.items():
        machine.patch(torch.version, name, value)
    assert expected in reason()
    assert reason().endswith("; the CUDA kernels need an NVIDIA device")
    if "hip" in version:
        assert nvidia.capability_obstacle(0) is None  # Triton serves AMD devices


def test_a_missing_device_is_explained(machine, monkeypatch):
    machine.patch(torch.cuda, "is_available", lambda: False)

    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    machine.patch(ctypes, "CDLL", absent)
    assert nvidia.missing_device() == (
        "no NVIDIA driver is installed (libcuda.so.1 cannot be loaded)"
    )

    class Old:
        status = 0

        def cuInit(self, flags):
            return self.status

        def cuDriverGetVersion(self, version):
            version._obj.value = 12020
            return 0

        def cuGetErrorName(self, status, text):
            text._obj.value = b"CUDA_ERROR_NO_DEVICE"
            return 0

        cuGetErrorString = cuGetErrorName

    old = Old()
    machine.patch(ctypes, "CDLL", lambda name: old)
    assert nvidia.missing_device() == (
        "the NVIDIA driver supports CUDA 12.2, and this PyTorch is built for 13.0; update the "
        "driver, or install PyTorch for an older CUDA"
    )
    old.status = 100
    assert "the NVIDIA driver finds no device (CUDA_ERROR_NO_DEVICE" in nvidia.missing_device()


def test_a_slice_of_a_device_is_named(machine):
    machine.patch(library, "open_installed", lambda *ignored: Library(clusters=2))
    assert reason(100, 512) is None
    assert reason(512, 512) == (
        "a problem of 512 x 512 does not fit on the 2 multiprocessors that may share one on this "
        "device, which is small or a slice (MIG); whole devices share 8"
    )
    assert reason(700, 700) == (
        "a problem of 700 x 700 does not fit on the multiprocessors that may share one"
    )


def test_a_failed_launch_keeps_the_words_of_cuda(machine):
    installed = Library()
    machine.patch(library, "open_installed", lambda *ignored: installed)
    problem = example_problem(torch.zeros(1, 3, 4))
    assert cuda.supports(problem) is None
    installed.status, installed.error = 4, b"cudaErrorIllegalAddress: an illegal access"
    message = (
        "optical_cuda_forward failed with a launch that the device refused, "
        "cudaErrorIllegalAddress: an illegal access (batch=1, n=3, m=4)"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        cuda.forward(problem)


def test_a_device_that_does_not_answer_is_a_reason(machine):
    installed = Library()
    machine.patch(library, "open_installed", lambda *ignored: installed)
    installed.optical_cuda_reach = lambda pointer: -4
    installed.error = b"cudaErrorECCUncorrectable: uncorrectable ECC error"
    assert reason() == (
        "the CUDA device does not answer (cudaErrorECCUncorrectable: uncorrectable ECC error)"
    )


@pytest.fixture(scope="module")
def hollow(tmp_path_factory):
    """The CUDA library with the kernels' bodies left out, which nvcc compiles in seconds."""
    if library.find_nvcc() is None:
        pytest.skip(reason="nvcc was not found")
    folder = tmp_path_factory.mktemp("hollow")
    (folder / "cuda").mkdir()
    (folder / "sinkhorn.h").write_bytes((FOLDER / "sinkhorn.h").read_bytes())
    for path in (FOLDER / "cuda").iterdir():
        text = path.read_text(encoding="utf-8")
        if path.name == "kernels.cuh":
            # The definition of OPTICAL_FORWARD and OPTICAL_BACKWARD.
            text, count = re.subn(r"for_problem<G>\(batch, .*?\n *\}\);", "", text, flags=re.DOTALL)
            assert count == 2
        (folder / "cuda" / path.name).write_text(text, encoding="utf-8")
    target = folder / library.CUDA_LIBRARY
    command = library.nvcc_command(folder, library.find_nvcc(), ("80",))
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Wno-unused-parameter"]
    subprocess.run([*command, *strict, "-o", str(target)], check=True)
    return structs.with_argument_types(library.open_library(target, None))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_the_compiled_library_names_the_error_of_the_runtime(hollow, monkeypatch):
    """Not a size: without a driver, nothing is known about the device."""
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    with pytest.raises(library.BuildError, match="cudaError"):
        cuda.probe(hollow, 0)
    problem = structs.ProblemStruct(batch=1, n=4, m=4, rho_a=1, rho_b=1, omega=1)
    assert hollow.optical_cuda_reach(ctypes.byref(problem)) == -4
    status = hollow.optical_cuda_forward(
        ctypes.byref(problem), ctypes.byref(structs.SolutionStruct()), None
    )
    assert cuda.ERRORS[status] == "a launch that the device refused"
    assert cuda.error_text(hollow).startswith("cudaError")
    bad = structs.ProblemStruct(batch=-1)
    hollow.optical_cuda_forward(ctypes.byref(bad), ctypes.byref(structs.SolutionStruct()), None)
    assert cuda.error_text(hollow) == ""  # of the last call only
