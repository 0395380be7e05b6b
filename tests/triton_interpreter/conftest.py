"""The interpreter patches the language anew in every nested call; once per kernel is enough."""

import types

import pytest

triton = pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def patched_once(monkeypatch):
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    monkeypatch.setattr(interpreter, "_patch_lang", lambda function: patch(everything))
    monkeypatch.setattr(
        interpreter.InterpretedFunction,
        "__call__",
        lambda self, *arguments, **options: self.rewrite()(*arguments, **options),
    )
