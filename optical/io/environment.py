"""Package versions and the commit that a run records, and imports of optional packages."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

# Name on the package index; the import name is `optical`.
DISTRIBUTION = "optical-ot"
# Git sets these for hooks of the repository that it works in, which may not be ours.
_GIT_OVERRIDES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
_CHECKOUT = Path(__file__).resolve().parents[2]


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or name the extra that installs it.

    Args:
        module: module to import, such as "ir_measures".
        extra: extra of this distribution that installs it, such as "eval".
        purpose: subject of the error message, in the singular, such as "evaluation".

    Raises:
        ImportError: the module cannot be imported.

    Examples:
        >>> require("json", "eval", "this example").__name__
        'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{purpose} needs {module}; install it with `pip install "{DISTRIBUTION}[{extra}]"`'
        ) from error


def environment() -> dict[str, Any]:
    """Return what affects results: versions of Python and packages, the commit, and the machine."""
    packages = ("optical", "torch", "transformers", "sentence-transformers", "tokenizers", "numpy")
    versions = {name: version(name) for name in packages}
    found = {"python": sys.version.split()[0], "versions": versions, "commit": _commit()}
    return {**found, **machine()}


def machine() -> dict[str, Any]:
    """Return the name of the processor, PyTorch's threads, and the names of the GPUs."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": ", ".join(gpus),
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        named = re.search(r"^(?:model name|Model|cpu)\s*:\s*(.+)$", text, re.MULTILINE)
    except OSError:
        named = None
    return named[1].strip() if named else platform.processor() or platform.machine()


def version(package: str) -> str:
    """Return the version of an installed package, or "not installed"."""
    if package == "torch":
        import torch

        # Includes the build, such as +cpu or +cu130, which the metadata may lack.
        return str(torch.__version__)
    if package == "optical":
        # The metadata may belong to another copy than the imported one. Imported by name because
        # `optical.io` is below the package's face.
        return str(importlib.import_module("optical").__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Return the commit of this checkout, or the one that pip installed from."""
    return _checkout_commit() or _installed_commit() or "unknown (not a checkout)"


def _checkout_commit() -> str:
    """Return `git describe` of the checkout that holds this package, or "".

    An installed copy may lie inside an unrelated repository, for example in a virtual environment
    of a user's project. Only a repository whose top folder holds this package's ``pyproject.toml``
    counts.
    """
    try:
        project = (_CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
        if not re.search(r'^name = "optical(-ot)?"', project, re.MULTILINE):
            return ""
        if not os.path.samefile(_git("rev-parse", "--show-toplevel"), _CHECKOUT):
            return ""
        return _git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_CHECKOUT), *arguments]
    variables = {name: value for name, value in os.environ.items() if name not in _GIT_OVERRIDES}
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=10, check=True, env=variables
    )
    return process.stdout.strip()


def _installed_commit() -> str:
    """Return the commit that pip installed this copy from (PEP 610, direct_url.json), or ""."""
    try:
        installed = metadata.distribution(DISTRIBUTION)
        if Path(str(installed.locate_file("optical/io/environment.py"))).resolve() != (
            _CHECKOUT / "optical/io/environment.py"
        ):
            return ""
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
        return str(origin.get("vcs_info", {}).get("commit_id", ""))[:12]
    except (metadata.PackageNotFoundError, ValueError):
        return ""
