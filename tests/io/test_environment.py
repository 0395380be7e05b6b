"""Recorded versions and commit, and the error for a missing optional package."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import optical
from optical.io import environment


def load_copy(root):
    """Load the module from a copy of the package below `root`."""
    path = root / "optical" / "io" / "environment.py"
    path.parent.mkdir(parents=True)
    shutil.copy(environment.__file__, path)
    spec = importlib.util.spec_from_file_location("environment_copy", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def new_repository(folder):
    """Create a repository with one commit and return the commit's abbreviated hash."""
    folder.mkdir()
    identity = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    for command in (("init", "--quiet"), (*identity, "commit", "--quiet", "--allow-empty", "-mx")):
        subprocess.run(["git", "-C", folder, *command], check=True)
    command = ["git", "-C", folder, "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_of_a_surrounding_repository_is_not_reported(tmp_path):
    new_repository(tmp_path / "user")
    copy = load_copy(tmp_path / "user" / ".venv" / "lib" / "site-packages")
    assert copy.environment()["commit"] == "unknown (not a checkout)"


def test_the_commit_of_a_repository_with_another_pyproject_is_not_reported(tmp_path):
    new_repository(tmp_path / "user")
    (tmp_path / "user" / "pyproject.toml").write_text('[project]\nname = "user"\n')
    assert load_copy(tmp_path / "user").environment()["commit"] == "unknown (not a checkout)"


def test_the_commit_of_a_folder_inside_another_repository_is_not_reported(tmp_path):
    new_repository(tmp_path / "user")
    checkout = tmp_path / "user" / "vendored"
    copy = load_copy(checkout)
    (checkout / "pyproject.toml").write_text('[project]\nname = "optical-ot"\n')
    assert copy.environment()["commit"] == "unknown (not a checkout)"


def test_the_commit_of_the_packages_own_checkout_is_reported(tmp_path, monkeypatch):
    commit = new_repository(tmp_path / "checkout")
    copy = load_copy(tmp_path / "checkout")
    (tmp_path / "checkout" / "pyproject.toml").write_text('[project]\nname = "optical-ot"\n')
    assert copy.environment()["commit"] == commit
    # As in a hook that Git runs for another repository.
    new_repository(tmp_path / "user")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "user" / ".git"))
    assert copy.environment()["commit"] == commit


def test_the_commit_that_pip_installed_from_is_reported(tmp_path, monkeypatch):
    copy = load_copy(tmp_path)
    record = tmp_path / "optical_ot-0.1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: optical-ot\nVersion: 0.1.0\n")
    origin = {"url": "https://example.org/x.git", "vcs_info": {"commit_id": "0123456789abcdef"}}
    (record / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(tmp_path)
    assert copy.environment()["commit"] == "0123456789ab"


def test_versions_of_installed_and_missing_packages():
    assert environment.version("optical") == optical.__version__
    assert environment.version("no-such-package") == "not installed"


def test_require_returns_the_module():
    assert environment.require("pathlib", "eval", "this test").Path is Path


def test_a_missing_package_is_reported_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError) as error:
        environment.require("bm25s", "eval", "BM25")
    assert str(error.value) == (
        'BM25 needs bm25s; install it with `pip install "optical-ot[eval]"`'
    )
