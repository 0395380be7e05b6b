"""The layout: wings of bounded size, one-way imports, faces that import, and light start-up."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import optical

PACKAGE = Path(__file__).resolve().parents[2] / "optical"
WINGS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
# The kernels keep their own layout, and a Triton kernel is one function however long it is.
PLAIN_WINGS = [wing for wing in WINGS if wing != "kernels"]
PUBLIC = [
    "BackendUnsupported",
    "OTAlignmentLoss",
    "SinkhornDivergence",
    "SinkhornResult",
    "Status",
    "__version__",
    "ot_alignment",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_vectors",
    "warmup",
]
HEAVY = {
    "transformers", "sentence_transformers", "datasets", "tokenizers", "accelerate", "triton",
    "matplotlib", "scipy", "sklearn", "ir_measures", "ir_datasets", "bm25s", "lancedb", "yaml",
}  # fmt: skip
# Packages that importing a wing may load beside PyTorch: the rest waits for the call that needs it.
LOADS = {"study": {"yaml"}, "kernels": {"triton"}}


def modules(wing):
    """The modules of a wing by their dotted name inside it, without its faces."""
    folder = PACKAGE / wing
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts): path
        for path in sorted(folder.rglob("*.py"))
        if path.name not in ("__init__.py", "__main__.py")
    }


@cache
def imports(wing):
    """For each module of a wing, the modules of the same wing that it imports."""
    prefix = f"optical.{wing}."
    rooms = modules(wing)
    result = {}
    for room, path in rooms.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path.name}:{node.lineno}: a relative import"
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
                names.add(node.module)
        inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        result[room] = (inside & rooms.keys()) - {room}
    return result


def floor(wing, room, above=()):
    assert room not in above, f"optical.{wing}: a circle of imports through {room}"
    below = imports(wing)[room]
    return 1 + max((floor(wing, other, (*above, room)) for other in below), default=0)


@pytest.mark.parametrize("wing", PLAIN_WINGS)
def test_wings_have_at_most_ten_modules_on_five_floors(wing):
    assert len(modules(wing)) <= 10
    assert max((floor(wing, room) for room in modules(wing)), default=0) <= 5


def test_there_are_at_most_thirteen_wings_and_no_loose_module():
    assert len(PLAIN_WINGS) <= 13
    assert sorted(path.name for path in PACKAGE.glob("*.py")) == ["__init__.py", "__main__.py"]


@pytest.mark.parametrize("wing", WINGS)
def test_modules_and_functions_are_short(wing):
    for path in modules(wing).values():
        source = path.read_text(encoding="utf-8")
        assert source.count("\n") <= 450, f"{path}: more than 450 lines"
        if wing == "kernels":
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 60, f"{path.name}: the body of {node.name} has {lines} lines"


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


@pytest.mark.parametrize("wing", WINGS)
def test_modules_begin_with_a_line_that_describes_them(wing):
    for path in [PACKAGE / wing / "__init__.py", *modules(wing).values()]:
        first = docstring(path).split("\n")[0]
        assert len(first) > 20 and first.endswith((".", ":")), f"{path}: {first!r}"
        assert not first.startswith("What "), f"{path}: {first!r}"


def test_public_names():
    assert optical.__all__ == PUBLIC
    assert all(hasattr(optical, name) for name in PUBLIC)


def loaded_by(statement):
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("wing", ["", *PLAIN_WINGS])
def test_importing_a_wing_loads_no_extra_that_it_does_not_declare(wing):
    module = f"optical.{wing}" if wing else "optical"
    assert not (HEAVY - LOADS.get(wing, set())) & loaded_by(f"import {module}")


@pytest.mark.parametrize("wing", [wing for wing in PLAIN_WINGS if wing != "training"])
def test_faces_offer_the_names_that_they_list(wing):
    face = __import__(f"optical.{wing}", fromlist=["__all__"])
    assert all(hasattr(face, name) for name in getattr(face, "__all__", ()))


def test_the_face_of_training_loads_its_names_on_demand():
    pytest.importorskip("sentence_transformers", reason='needs pip install "optical-ot[train]"')
    from optical import training

    assert all(
        getattr(training, name).__module__.startswith("optical.") for name in training.__all__
    )
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = training.absent
