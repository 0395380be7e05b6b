"""Fault injection: full disks, missing permissions, damaged files, concurrent processes, Ctrl-C."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from optical.backends import library
from optical.cli import main as cli
from optical.io.files import (
    CHECKSUMS,
    find_damaged,
    folder_lock,
    read_json,
    writable_folder,
    write_checksums,
    write_text,
)

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def mount(*options):
    command = ["mount", "-t", "tmpfs", "-o", *options]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path):
    """Mount a separate file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or not mount("size=300k", "tmpfs", str(folder)):
        pytest.skip(reason="this process may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def filled(disk, left):
    """Fill the disk until `left` bytes are free."""
    path = disk / "fill"
    path.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - left)))
    yield
    path.unlink()


@contextlib.contextmanager
def unprivileged():
    """Become a user without root's permissions, if the tests run as root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def python(code, *arguments, **options):
    """Start a process that runs ``code``; returns it and the first line that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **options,
    )
    return process, process.stdout.readline().strip()


# --- a full disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["words.txt", "words.txt.gz"])
def test_a_full_disk_leaves_the_old_file(disk, name):
    write_text(disk / name, "old\n")
    before = (disk / name).read_bytes()
    text = "".join(f"{i * 7919 % 1000003}\n" for i in range(100_000))
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\)") as error:
        write_text(disk / name, text)
    assert str(disk / name) in one_line(error)
    assert (disk / name).read_bytes() == before and os.listdir(disk) == [name]


def test_errors_of_a_file_size_limit_name_the_file(tmp_path):
    resource = pytest.importorskip("resource", reason="process limits need Unix")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    code = (
        "import sys; from optical.io.files import write_text; print('ready');"
        "write_text(sys.argv[1], 'x' * 5000)"
    )
    process, _ = python(code, tmp_path / "big.txt", preexec_fn=limit)
    err = process.communicate()[1]
    assert "big.txt cannot be written (File too large)" in err
    assert not os.listdir(tmp_path)


def test_a_command_on_a_full_disk_ends_in_one_line(disk, world, capsys):
    argv = ["lexicon", str(world / "bitext/en-sw.tsv"), "--output", str(disk / "table.tsv")]
    with filled(disk, 0):
        assert cli.main([*argv, "--least-count", "1"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err == [
        f"optical: error: {disk}/table.tsv cannot be written (No space left on device); "
        "nothing there has changed"
    ]
    assert cli.main([*argv, "--least-count", "1"]) == 0
    assert (disk / "table.tsv").stat().st_size


def test_a_token_store_resumes_after_a_full_disk(disk, world, tiny_models, monkeypatch):
    pytest.importorskip("sentence_transformers", reason="needs the extra `train`")
    from optical.models import token_store
    from optical.models.retriever import load_retriever

    model = load_retriever(tiny_models.teacher)
    texts = [f"the teacher buys bread number {i}" for i in range(64)]
    options = {"role": "document", "shard_texts": 8}
    with filled(disk, 40_000), pytest.raises(OSError, match="cannot be written") as error:
        token_store.write_vectors(model, texts, disk / "store", **options)
    assert str(disk) in one_line(error)
    finished = sorted(path.name for path in (disk / "store").glob("0*.json"))
    assert 0 < len(finished) < 8
    assert not list((disk / "store").glob(".*.tmp"))
    write, written = token_store.StoreWriter.write, []

    def recorded(self, number, *rest):
        written.append(f"{number:05d}.json")
        write(self, number, *rest)

    monkeypatch.setattr(token_store.StoreWriter, "write", recorded)
    token_store.write_vectors(model, texts, disk / "store", **options)
    assert not set(written) & set(finished) and len(written) + len(finished) == 8
    assert len(token_store.StoredVectors([disk / "store"], role="document")) == 64


def test_training_resumes_from_its_checkpoint_after_a_full_disk(disk, world, tiny_models):
    pytest.importorskip("sentence_transformers", reason="needs the extra `train`")
    from transformers import TrainerCallback

    from optical.training import recipes, runner

    assert mount("remount,size=20m", "tmpfs", str(disk))
    options = recipes.TeacherOptions(
        model=tiny_models.mixed, pairs=[str(world / "teacher.tsv")], document_length=24
    )

    def make():
        arguments = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 8}
        args = recipes.trainer_arguments(disk / "out", **arguments, disable_tqdm=True)
        return recipes.teacher(options, args)

    class Fill(TrainerCallback):
        def on_save(self, *args, **kwargs):
            (disk / "fill").write_bytes(bytes(shutil.disk_usage(disk).free - 20_000))

    trainer = make()
    trainer.add_callback(Fill())
    with pytest.raises(OSError, match=r"no room to write .* free some space") as error:
        runner.run(trainer, options, resume=False)
    assert str(disk / "out") in one_line(error)
    (disk / "fill").unlink()
    assert runner.last_checkpoint(disk / "out") == str(disk / "out" / "checkpoint-2")
    final = runner.run(make(), options, resume=True)
    assert (final / "model.safetensors").is_file() and find_damaged(final) is None


def test_a_failed_build_on_a_full_disk_is_reported_as_unavailable(disk, monkeypatch):
    if library.find_compiler() is None:
        pytest.skip(reason="no C++ compiler")
    monkeypatch.setattr(library, "cache_folder", lambda: disk)
    monkeypatch.setattr(library, "CPU_LIBRARY", "no-such-library.so")
    monkeypatch.setattr(library, "cpu_variants", lambda: [library.BASELINE])
    monkeypatch.setattr(library, "CPU_FLAGS", (*library.CPU_FLAGS, "-O0"))
    library.load_cpu.cache_clear()
    try:
        with filled(disk, 0):
            reason = library.load_cpu().reason
        assert reason and "\n" not in reason and "o space left" in reason
    finally:
        library.load_cpu.cache_clear()


# --- folders without permission -------------------------------------------------------------------


def test_a_folder_without_permission_is_refused():
    # Not pytest's own folder, which other users cannot enter.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        closed = Path(folder) / "closed"
        closed.mkdir(mode=0o555)
        with unprivileged():
            with pytest.raises(OSError, match=r"closed cannot be written \(Permission denied\)"):
                writable_folder(closed)
            with pytest.raises(OSError, match=r"a\.txt cannot be written \(Permission") as error:
                write_text(closed / "a.txt", "text")
            one_line(error)
            with pytest.raises(OSError, match=r"cannot be written \(Permission denied\)"):
                write_text(closed / "deeper" / "a.txt", "text")
        assert not list(closed.iterdir())


def test_a_read_only_disk_is_refused(disk, capsys):
    write_text(disk / "old.txt", "old\n")
    assert mount("remount,ro", str(disk))
    for write in (lambda: write_text(disk / "old.txt", "new"), lambda: writable_folder(disk)):
        with pytest.raises(OSError, match=r"cannot be written \(Read-only file system\)") as error:
            write()
        one_line(error)
    assert cli.main(["study", "--output", str(disk / "out")]) == 2
    assert "cannot be written (Read-only file system)" in capsys.readouterr().err
    assert (disk / "old.txt").read_text() == "old\n"


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    write_text(tmp_path / "file", "old\n")
    for path in (tmp_path / "file" / "a.txt", tmp_path / "file" / "b" / "a.txt"):
        with pytest.raises(OSError, match=r"a\.txt cannot be written") as error:
            write_text(path, "text")
        one_line(error)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"folder cannot be written \(Is a directory\)"):
        write_text(tmp_path / "folder", "text")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


# --- damaged files -------------------------------------------------------------------------------


def test_checksums_find_changed_and_missing_files(tmp_path):
    for name in ("a.bin", "deeper/b.bin", "c.txt"):
        write_text(tmp_path / name, name)
    assert find_damaged(tmp_path) is None
    write_checksums(tmp_path, ("*.bin",))
    assert set(read_json(tmp_path / CHECKSUMS)) == {"a.bin", "deeper/b.bin"}
    assert find_damaged(tmp_path) is None
    (tmp_path / "c.txt").write_text("edited by hand")
    assert find_damaged(tmp_path) is None
    (tmp_path / "deeper/b.bin").write_text("deeper/b.bim")
    assert find_damaged(tmp_path) == "deeper/b.bin"
    (tmp_path / "deeper/b.bin").unlink()
    assert find_damaged(tmp_path) == "deeper/b.bin"
    (tmp_path / CHECKSUMS).write_text('{"a.bin": ')
    assert find_damaged(tmp_path) == CHECKSUMS


@pytest.mark.parametrize("has_checksums", [True, False])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_errors_of_a_damaged_model_name_the_file(tiny_models, tmp_path, damage, has_checksums):
    pytest.importorskip("sentence_transformers", reason="needs the extra `train`")
    from optical.models.retriever import load_retriever

    folder = tmp_path / "model"
    shutil.copytree(tiny_models.teacher, folder)
    assert set(read_json(folder / CHECKSUMS)) == {"model.safetensors"}
    load_retriever(folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    # In the header, so that no reader accepts the file.
    data[20] ^= 0xFF
    weights.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    if not has_checksums:
        (folder / CHECKSUMS).unlink()
    message = r"model\.safetensors is damaged" if has_checksums else "cannot be loaded"
    with pytest.raises(ValueError, match=rf"model .*model: {message}") as error:
        load_retriever(folder)
    one_line(error)


def test_errors_of_a_damaged_token_store_name_its_index(tiny_models, tmp_path):
    pytest.importorskip("sentence_transformers", reason="needs the extra `train`")
    from optical.models.retriever import load_retriever
    from optical.models.token_store import StoredVectors, write_vectors

    model = load_retriever(tiny_models.teacher)
    store = write_vectors(model, ["the child sees fish"], tmp_path, role="document")
    index = store / "index.json"
    index.write_text(index.read_text()[:20])
    message = r"index\.json is damaged .*remove it, and the same command creates it again"
    with pytest.raises(ValueError, match=message) as error:
        StoredVectors([store], role="document")
    one_line(error)
    index.unlink()
    write_vectors(model, ["the child sees fish"], tmp_path, role="document")
    assert len(StoredVectors([store], role="document")) == 1


class Bomb:
    """Write a file when unpickled, which a downloaded model must not be able to do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_model_cannot_run_code(tiny_models, tmp_path):
    pytest.importorskip("sentence_transformers", reason="needs the extra `train`")
    import torch

    from optical.models.retriever import load_retriever

    ran = tmp_path / "ran"
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_models.mixed, pickled)
    (pickled / "model.safetensors").unlink()
    (pickled / CHECKSUMS).unlink()
    torch.save({"weight": Bomb(ran)}, pickled / "pytorch_model.bin")
    # The weights-only reader refuses the pickle; the full reader below runs it.
    with pytest.raises(pickle.UnpicklingError):
        torch.load(pickled / "pytorch_model.bin", weights_only=True)
    with pytest.raises(ValueError, match=r"model .*pickled: cannot be loaded") as error:
        load_retriever(pickled)
    one_line(error)
    assert not ran.exists()

    coded = tmp_path / "coded"
    shutil.copytree(tiny_models.teacher, coded)
    modules = json.loads((coded / "modules.json").read_text())
    modules[0]["type"] = "evil.Evil"
    (coded / "modules.json").write_text(json.dumps(modules))
    (coded / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises((ValueError, ImportError)):
        load_retriever(coded)
    assert not ran.exists()
    torch.load(pickled / "pytorch_model.bin", weights_only=False)
    assert ran.exists()


# --- two processes on one folder -----------------------------------------------------------------

HOLD = (
    "import sys, time; from optical.io.files import folder_lock\n"
    "with folder_lock(sys.argv[1]): print('ready', flush=True); time.sleep(600)"
)


def test_a_second_process_is_refused_with_the_holder_of_the_lock(tmp_path, capsys):
    pytest.importorskip("fcntl", reason="this system has no fcntl locks")
    process, first = python(HOLD, tmp_path)
    try:
        assert first == "ready"
        with (
            pytest.raises(ValueError, match="is working in this folder") as error,
            folder_lock(tmp_path),
        ):
            pass
        assert f"process {process.pid} on " in one_line(error)
        assert cli.main(["study", "--output", str(tmp_path)]) == 2
        assert f"process {process.pid} on " in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "costs.json").exists()
    finally:
        process.kill()
        process.communicate()
    # The lock ended with the killed process.
    with folder_lock(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
    assert not (tmp_path / ".lock").exists()


def test_training_in_a_locked_folder_is_refused(world, tiny_models, tmp_path):
    pytest.importorskip("sentence_transformers", reason="needs the extra `train`")
    pytest.importorskip("fcntl", reason="this system has no fcntl locks")
    from optical.training import recipes, runner

    options = recipes.TeacherOptions(
        model=tiny_models.mixed, pairs=[str(world / "teacher.tsv")], document_length=24
    )
    process, _ = python(HOLD, tmp_path)
    try:
        trainer = recipes.teacher(options, recipes.trainer_arguments(tmp_path, max_steps=1))
        with pytest.raises(ValueError, match="is working in this folder"):
            runner.run(trainer, options, resume=True)
        assert not (tmp_path / "run.json").exists()
    finally:
        process.kill()
        process.communicate()


WRITE_STORE = """
import sys
from optical.models.retriever import load_retriever
from optical.models.token_store import write_vectors
model = load_retriever(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
texts = [f"the child sees fish number {i}" for i in range(300)]
write_vectors(model, texts, sys.argv[2], role="document", shard_texts=20)
"""


@pytest.mark.slow
def test_two_processes_write_one_store(tiny_models, tmp_path):
    from optical.models.token_store import StoredVectors

    both = [
        python(WRITE_STORE, tiny_models.teacher, tmp_path, stdin=subprocess.PIPE)[0]
        for _ in range(2)
    ]
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        err = process.communicate()[1]
        assert process.returncode == 0, err
    assert len(StoredVectors([tmp_path], role="document")) == 300
    assert not list(tmp_path.glob(".*.tmp"))


# --- Ctrl-C --------------------------------------------------------------------------------------

WRITE = """
import sys, time
from optical.io.files import atomic_text
with atomic_text(sys.argv[1]) as file:
    file.write("new\\n")
    file.flush()
    print("ready", flush=True)
    time.sleep(600)
"""


def test_ctrl_c_during_a_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old\n")
    process, first = python(WRITE, tmp_path / "a.txt")
    assert first == "ready" and len(os.listdir(tmp_path)) == 2
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate()[1]
    assert (tmp_path / "a.txt").read_text() == "old\n"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_ctrl_c_ends_a_command_that_is_reading(tmp_path):
    pipe = tmp_path / "a.run"
    os.mkfifo(pipe)
    (tmp_path / "qrels").write_text("q1 0 d1 1\n")
    command = [sys.executable, "-m", "optical.cli", "evaluate", str(pipe)]
    process = subprocess.Popen(
        [*command, "--qrels", str(tmp_path / "qrels")], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    # Opening succeeds once the command has opened the run for reading.
    writer = None
    while writer is None and process.poll() is None:
        with contextlib.suppress(OSError):
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
    assert writer is not None and process.returncode == 130, err
    os.close(writer)
    assert err == "interrupted; nothing was written\n"
