"""Building and loading the compiled libraries: locks, hashes and reasons; see also test_cpu.py."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from optical.backends import library


def test_the_build_lock_waits_and_excludes_threads(tmp_path):
    inside, overlaps = [], []

    def work(name):
        with library.build_lock(tmp_path):
            inside.append(name)
            overlaps.append(len(inside) > 1)
            threading.Event().wait(0.01)
            inside.remove(name)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == [False] * 8
    assert not list(tmp_path.iterdir())  # the lock file is removed


def test_build_locks_of_different_names_do_not_exclude_each_other(tmp_path):
    with library.build_lock(tmp_path, ".a.lock"), library.build_lock(tmp_path, ".b.lock"):
        assert {path.name for path in tmp_path.iterdir()} == {".a.lock", ".b.lock"}
    assert not list(tmp_path.iterdir())


def test_hashes_depend_on_the_sources_of_each_library(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cuda").mkdir()
    for name in ("sinkhorn.h", "cpu/kernel.cpp", "cuda/kernels.cuh"):
        (tmp_path / name).write_text("")
    hashes = (library.cpu_source_hash, library.cuda_source_hash)
    for changed, affected in (
        ("sinkhorn.h", (True, True)),
        ("cpu/kernel.cpp", (True, False)),
        ("cuda/kernels.cuh", (False, True)),
    ):
        before = [source_hash(tmp_path) for source_hash in hashes]
        (tmp_path / changed).write_text("// changed")
        after = [source_hash(tmp_path) for source_hash in hashes]
        assert tuple(x != y for x, y in zip(before, after, strict=True)) == affected


def test_a_failure_to_load_is_a_reason():
    def fail():
        raise library.BuildError("no compiler")

    loaded = library.attempt(fail, "it cannot be built")
    assert loaded == library.Loaded(None, "no compiler")
    with pytest.raises(RuntimeError, match="no compiler"):
        loaded.require()

    def full():
        raise OSError("disk full")

    assert library.attempt(full, "it cannot be built").reason == "it cannot be built (disk full)"
    assert library.attempt(lambda: "library", "").require() == "library"


ROOT = Path(__file__).resolve().parents[2]
# A build within a second or two, in an empty cache and without an installed library.
QUICK = (
    "from optical.backends import library\n"
    "library.CPU_LIBRARY = 'no-such-library.so'\n"
    "library.CPU_FLAGS = (*library.CPU_FLAGS[:1], '-O0', *library.CPU_FLAGS[2:])\n"
    "library.cpu_variants = lambda: [library.BASELINE]\n"
)


def run_quick(tmp_path, script="library.load_cpu().require()", **environment):
    command = [sys.executable, "-c", QUICK + script]
    environment = (
        os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)} | environment
    )
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(library.find_compiler() is None, reason="no C++ compiler")
def test_the_first_use_says_that_it_compiles(tmp_path):
    assert not run_quick(tmp_path, "import optical").stderr  # nothing at import
    first = run_quick(tmp_path)
    lines = first.stderr.splitlines()
    assert lines[0].startswith("optical compiles its CPU kernels once, about half a minute")
    assert lines[1].startswith("optical has compiled in ") and lines[1].endswith(" s")
    assert len(lines) == 2 and first.returncode == 0
    assert not run_quick(tmp_path).stderr


@pytest.mark.skipif(library.find_compiler() is None, reason="no C++ compiler")
def test_waiting_for_another_process_is_said(tmp_path):
    folder = tmp_path / "optical"
    folder.mkdir(mode=0o700)
    with library.build_lock(folder):
        command = [sys.executable, "-c", QUICK + "library.load_cpu().require()"]
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        line = process.stderr.readline()
    assert line.startswith("optical waits for another process that compiles in ")
    assert process.wait(timeout=300) == 0
    process.stderr.close()


def test_the_lock_that_is_free_is_silent(caplog):
    with library._said_if_long("too long", 0.05):
        pass
    time.sleep(0.1)
    assert not caplog.records
    with library._said_if_long("too long", 0.01):
        time.sleep(0.1)
    assert [record.message for record in caplog.records] == ["too long"]


def test_an_open_quote_in_cxx_is_a_sentence(tmp_path):
    script = (
        "import torch, optical\n"
        "print(library.load_cpu().reason)\n"
        "print(optical.sinkhorn(torch.rand(1, 2, 2), epsilon=1.0).value.isfinite().all().item())\n"
    )
    result = run_quick(tmp_path, script, CXX="g++ 'open")
    assert 'CXX is "g++ \'open"; expected a command without open quotes' in result.stdout
    assert result.stdout.endswith("True\n") and "Traceback" not in result.stderr
