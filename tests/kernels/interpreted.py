"""A faster Triton interpreter: the language is patched once per kernel, not in nested calls."""

import types
from collections.abc import Callable
from typing import Any


def patch_once(replace_attribute: Callable[[Any, str, Any], Any]) -> None:
    """Patch ``triton.runtime.interpreter`` with ``setattr`` or a test's ``monkeypatch.setattr``."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    replace_attribute(interpreter, "_patch_lang", lambda function: patch(everything))
    replace_attribute(
        interpreter.InterpretedFunction,
        "__call__",
        lambda self, *arguments, **options: self.rewrite()(*arguments, **options),
    )
