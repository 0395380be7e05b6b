"""Building and loading the compiled libraries: locks, hashes and reasons; see also test_cpu.py."""

import threading

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
