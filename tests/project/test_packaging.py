"""Packaging: contents of wheel and source distribution, import cost, clean installs."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from optical.backends import library

ROOT = Path(__file__).resolve().parents[2]
# The inputs of a build. Building in a copy leaves the checkout clean and sees no stale files.
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "csrc", "kernels", "optical")


def fresh(code, folder=ROOT):
    """Run ``code`` in a new interpreter in ``folder`` and return its output."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def build_wheel(folder, environment):
    """Build a wheel from a copy of the sources; return its file name and the names inside."""
    source = folder / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    (source / "README.md").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel.name, zipfile.ZipFile(wheel).namelist()


def check_contents(names):
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"optical"}
    folder = ROOT / "kernels" / "triton"
    kernels = [path.relative_to(folder).as_posix() for path in folder.rglob("*.py")]
    csrc = [path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.[hc]*")]
    expected = {f"optical/kernels/{name}" for name in kernels}
    expected |= {f"optical/{name}" for name in csrc if name.endswith((".h", ".cpp", ".cuh", ".cu"))}
    package = [path for path in (ROOT / "optical").rglob("*.py") if "kernels" not in path.parts]
    package += (ROOT / "optical" / "phrasebook").rglob("*.tsv")
    expected |= {path.relative_to(ROOT).as_posix() for path in package}
    expected |= {"optical/py.typed", "optical/phrasebook/study.yaml"}
    assert expected <= set(names)
    assert len(names) == len(set(names))
    assert not [name for name in names if "__pycache__" in name or "/triton/" in name]


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "optical" / "kernels"
    assert not link.is_symlink() or link.readlink() == Path("../kernels/triton")
    found = fresh(
        "from importlib.util import find_spec; spec = find_spec('kernels');"
        "print(spec.origin if spec and spec.origin else '')"
    )
    assert not found.startswith(str(ROOT))


def test_the_kernels_are_found_as_part_of_the_package():
    found = fresh(
        "from importlib.util import find_spec; print(find_spec('optical.kernels').origin)"
    )
    assert Path(found).resolve() == ROOT / "kernels" / "triton" / "__init__.py"


def test_import_needs_torch_only_and_builds_nothing():
    loaded = fresh(
        "import sys, torch; before = set(sys.modules); import optical;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    ).split()
    outside = set(loaded) - set(sys.stdlib_module_names) - {"optical"}
    # torch loads parts of itself, and numpy, when they are first touched.
    assert outside <= {"torch", "torchgen", "functorch", "typing_extensions"}, outside
    state = fresh(
        "import optical; from optical.backends import library;"
        "print(library.load_cpu.cache_info().currsize)"
    )
    assert state == "0"


def test_setup_loads_the_library_module_without_torch():
    code = (
        "import importlib.util as u, sys; sys.modules['torch'] = None;"
        "s = u.spec_from_file_location('_library', 'optical/backends/library.py');"
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.source_folder().name);"
        "m.find_compiler(), m.find_nvcc(), m.driver_architectures()"
    )
    assert fresh(code) == "csrc"


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_its_sources(tmp_path):
    if library.find_compiler() is None:
        pytest.skip(reason="no C++ compiler")
    name, names = build_wheel(tmp_path, None)
    check_contents(names)
    assert f"optical/{library.CPU_LIBRARY}" in names
    assert "-py3-none-" in name
    assert not name.endswith("-any.whl")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(tmp_path / name) as wheel:
        wheel.extractall(unpacked)
    code = (
        "from optical.backends import library; print(library.load_cpu().library._name);"
        "import torch, optical; print(optical.sinkhorn(torch.rand(2, 3, 4), epsilon=1.).n_iter[0])"
    )
    loaded, count = fresh(code, unpacked).split("\n")
    assert Path(loaded) == unpacked / "optical" / library.CPU_LIBRARY
    assert count == "tensor(100, dtype=torch.int32)"


def test_without_a_compiler_the_wheel_is_pure(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    name, names = build_wheel(tmp_path, None)
    check_contents(names)
    assert f"optical/{library.CPU_LIBRARY}" not in names
    assert name.endswith("-py3-none-any.whl")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(tmp_path / name) as wheel:
        wheel.extractall(unpacked)
    found = fresh("from optical.backends import library; print(library.source_folder())", unpacked)
    assert Path(found) == unpacked / "optical" / "csrc"
    code = (
        "import torch, optical, warnings; warnings.simplefilter('ignore');"
        "result = optical.sinkhorn(torch.rand(2, 3, 4), epsilon=1.0);"
        "from optical.backends import registry;"
        "print(registry.choose('auto', result.problem).name)"
    )
    assert fresh(code, unpacked) == "reference"


# --- clean installs -------------------------------------------------------------------------------


def other_pythons():
    """The supported interpreters on this machine, the running one first."""
    found = [sys.executable]
    for minor in range(10, 15):
        command = shutil.which(f"python3.{minor}")
        if minor == sys.version_info.minor or command is None:
            continue
        done = subprocess.run([command, "-c", "import sys; print(sys.version_info[1])"],
                              capture_output=True, text=True)  # fmt: skip
        if done.stdout.strip() == str(minor):
            found.append(command)
    return found


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """A source distribution, and a wheel built from it, each in isolation."""
    pytest.importorskip("build", reason="needs the extra `dev`")
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution found for setuptools" in done.stdout + done.stderr:
        pytest.skip(reason="isolated builds need a package index, and there is none")
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_a_source_distribution_holds_what_a_wheel_is_built_from(distributions):
    sdist, wheel = distributions
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    for path in ("csrc/sinkhorn.h", "kernels/triton/__init__.py", "LICENSE", "CHANGELOG.md"):
        assert path in inside, path
    assert not [name for name in inside if name.endswith((".so", ".pyc")) or ".venv" in name]
    names = zipfile.ZipFile(wheel).namelist()
    check_contents(names)
    assert (f"optical/{library.CPU_LIBRARY}" in names) == (library.find_compiler() is not None)
    folder = f"{wheel.name.split('-py3')[0]}.dist-info"
    assert any(name.startswith(folder) and name.endswith("LICENSE") for name in names)


def install(python, wheel, folder):
    """Create an environment that holds only the wheel; return its interpreter."""
    subprocess.run([python, "-m", "venv", "--without-pip", str(folder)], check=True)
    inner = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(inner), "install", "--quiet"]
    done = subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], capture_output=True)
    assert done.returncode == 0, done.stderr
    return inner


# Loads the library through the module's path, because torch is not installed there.
LOAD = """
import compileall, importlib.util as u, pathlib, sys, sysconfig
package = pathlib.Path(sysconfig.get_path("purelib")) / "optical"
assert compileall.compile_dir(package, quiet=1)
spec = u.spec_from_file_location("library", package / "backends" / "library.py")
library = u.module_from_spec(spec); spec.loader.exec_module(library)
print(library.load_cpu().require()._name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("python", other_pythons(), ids=os.path.basename)
def test_the_wheel_serves_every_python(distributions, tmp_path, python):
    if library.find_compiler() is None:
        pytest.skip(reason="no C++ compiler")
    inner = install(python, distributions[1], tmp_path / "env")
    done = subprocess.run([inner, "-W", "error", "-c", LOAD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = Path(done.stdout.strip())
    assert found.name == library.CPU_LIBRARY and tmp_path / "env" in found.parents


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [True, False], ids=["compiler", "no compiler"])
def test_an_installed_wheel_tests_itself(distributions, tmp_path, compiler):
    """Run the self-test in a new environment that borrows only torch from this one."""
    if library.find_compiler() is None:
        pytest.skip(reason="no C++ compiler")
    inner = install(sys.executable, distributions[1], tmp_path / "env")
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(
        str(Path(importlib.util.find_spec("torch").origin).parent.parent)
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    if not compiler:
        (packages / "optical" / library.CPU_LIBRARY).unlink()
        environment["CXX"] = "/nonexistent"
    code = (
        "import optical, torch; cost = torch.rand(2, 3, 4)\n"
        "for _ in range(3): optical.sinkhorn(cost, epsilon=1.0)"
    )
    done = subprocess.run([inner, "-c", code], env=environment, cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Without the library, one warning names the reason.
    assert done.stderr.count("no C++ compiler was found") == (not compiler)
    info = [inner, "-m", "optical.cli", "info", "--seconds", "5"]
    told = subprocess.run(info, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0 and "self-test passed" in told.stdout, told.stdout + told.stderr
    assert (str(packages) in told.stdout) == compiler


def test_an_editable_install_works_beside_the_clone(tmp_path):
    """A folder named like the package must not hide it: the parent folder of a clone has one."""
    (tmp_path / "optical").symlink_to(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", "import optical; print(optical.sinkhorn.__module__)"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "optical.ot.functional", done.stderr
