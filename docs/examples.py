"""Shows examples of docstrings as code: griffe calls their sections "Examples", and fxmerge calls them "Example"."""

from __future__ import annotations

import re
from typing import Any

try:
    from griffe import Extension, Object
except ImportError:  # It comes with the extra `docs`; tests import this file without it.
    Extension = object  # type: ignore[assignment,misc]


class Examples(Extension):
    """Renames the sections before they are parsed."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
