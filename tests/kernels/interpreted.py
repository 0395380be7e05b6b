"""The interpreter patches the language anew in every nested call; once per kernel is enough."""

import types
from collections.abc import Callable
from typing import Any


def patch_once(replace_attribute: Callable[[Any, str, Any], Any]) -> None:
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
