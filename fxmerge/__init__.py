"""fxmerge merges independently trained PyTorch networks, training-free, for any architecture.

All public names are those of `fxmerge.public`. They are imported when the first of them is used: the command line
answers at once, since torch alone takes seconds to import.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxmerge.public import *

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """A public name, or a module of the package, on first use (PEP 562)."""
    if name == "__all__":
        return _public()
    if not name.startswith("__"):
        if importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        if name in _public():
            value = globals()[name] = getattr(importlib.import_module(f"{__name__}.public"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_public()})


def _public() -> list[str]:
    """The public names."""
    return sorted(name for name in vars(importlib.import_module(f"{__name__}.public")) if not name.startswith("_"))
