"""What someone needs to repeat a run: versions of packages and of this project."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Versions of the packages that shape results, and the project's commit where it has one."""
    packages = ("optical", "torch", "transformers", "sentence-transformers", "tokenizers", "numpy")
    versions = {name: version(name) for name in packages}
    return {"python": sys.version.split()[0], "versions": versions, "commit": _commit()}


def version(package: str) -> str:
    """The version of an installed package, or "not installed"."""
    if package == "torch":
        # With the build, +cpu or +cu130, which the metadata may lack.
        return str(torch.__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    here = Path(__file__).parents[1]
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown (not a checkout)"
