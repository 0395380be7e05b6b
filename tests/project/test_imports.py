"""Imports run one way, and importing the package loads nothing that it does not need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import optical

PACKAGE = Path(optical.__file__).parent
# A module may import those before it.
ORDER = [
    *("files", "folders", "settings", "provenance", "arguments", "native", "nvrtc", "kernels"),
    "iterations",
    "derivatives",
    *("reference", "costs", "dense", "problems", "cpu", "cuda", "backends"),
    *("ops", "checks", "inputs", "result"),
    *("functional", "losses", "objectives"),
    *(
        "runs",
        "texts",
        "lexicon",
        "alignment",
        "collections",
        "maxsim",
        "search",
        "index",
        "bm25",
        "evaluation",
        "significance",
    ),
    *(
        "bitext",
        "codeswitch",
        "encoder",
        "vectors",
        "training_pairs",
        "options",
        "transfer",
        "averaging",
        "export",
        "checkpoints",
        "training",
    ),
    *("arms", "config", "summary", "results", "figures", "report", "phrasebook"),
    *("fingerprints", "cells", "places", "measuring", "study", "selftest", "commands"),
    *("train_command", "cli"),
]
# Narrower than the order.
ONLY = {
    "phrasebook": {"files", "runs"},
    "testing": {"arguments", "ops", "problems"},
    "native": set(),
    "kernels": {"kernels", "arguments"},
    "nvrtc": set(),
    "selftest": {"arguments", "backends", "native", "provenance", "testing"},
}
PUBLIC = [
    "BackendUnsupported",
    "OTAlignmentLoss",
    "SinkhornResult",
    "Status",
    "__version__",
    "ot_alignment",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_vectors",
]
HEAVY = {
    "transformers", "sentence_transformers", "datasets", "tokenizers", "triton", "matplotlib",
    "scipy", "sklearn", "ir_measures", "ir_datasets", "yaml",
}  # fmt: skip


def sources():
    found = {path.stem: [path] for path in sorted(PACKAGE.glob("*.py"))}
    del found["__init__"]
    found["kernels"] = sorted((PACKAGE / "kernels").glob("*.py"))
    return found


SOURCES = sources()


def imported(path):
    """(module of the package, line) of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "optical" and len(parts) > 1 and parts[1] in SOURCES:
                yield parts[1], node.lineno
            elif parts[0] == "optical" and path.parent == PACKAGE and path.stem != "cli":
                # The package's own names would be a circle.
                assert parts[1:] == ["__version__"], f"{path.name}:{node.lineno}: imports {name}"


def test_the_order_names_every_module():
    assert set(ORDER) | {"testing"} == set(SOURCES)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", SOURCES)
def test_imports_run_one_way(module):
    before = ORDER[: ORDER.index(module)] if module in ORDER else []
    allowed = ONLY.get(module, set(before))
    for path in SOURCES[module]:
        for other, line in imported(path):
            assert other in allowed, f"{path.name}:{line}: {module} may not import {other}"


def test_public_names():
    assert optical.__all__ == PUBLIC
    assert all(hasattr(optical, name) for name in PUBLIC)


def test_importing_the_package_loads_torch_only():
    code = "import sys, optical; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())
    assert not done.stderr
