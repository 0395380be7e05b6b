"""Names that a package imports at their first use, so that importing the package stays light."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def on_demand(
    package: str, names: Mapping[str, tuple[str, ...]], wings: tuple[str, ...] = ()
) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package whose names are imported when they are first used.

    Args:
        package: name of the package.
        names: module inside the package -> the names that it provides.
        wings: modules of the package that are attributes of it, as after an import.

    Examples:
        >>> get = on_demand("json", {"decoder": ("JSONDecoder",)})
        >>> get("JSONDecoder").__module__
        'json.decoder'
    """
    homes = {name: module for module, listed in names.items() for name in listed}

    def attribute(name: str) -> Any:
        if name in wings:
            return importlib.import_module(f"{package}.{name}")
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return attribute
