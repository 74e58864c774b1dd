"""What other packages register by entry points: architectures, data, and rules of their ops."""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fxmerge.errors import OptionError, first_line

logger = logging.getLogger(__name__)

ARCHITECTURES = "fxmerge.architectures"
"""Functions from the NAME of `--arch prefix:NAME`, and settings by keyword, to a module, (module, args) or
(module, args, kwargs). The name of the entry point is the prefix."""

DATA = "fxmerge.data"
"""Functions from the NAME of `--data prefix:NAME` to an iterable of batches."""

RULES = "fxmerge.rules"
"""Modules that register rules as they are imported."""


def find(group: str, name: str) -> Any:
    """What a package registers under a name; None if there is nothing.

    Raises:
        OptionError: if it cannot be loaded, or several packages register it.
    """
    found = list(entry_points(group=group, name=name))
    if not found:
        return None
    if len(found) > 1:
        packages = " and ".join(sorted(map(_package, found)))
        raise OptionError(f"{name!r} is registered by the packages {packages}: uninstall all but one of them.")
    try:
        return found[0].load()
    except Exception as error:
        raise OptionError(
            f"{name!r} of the package {_package(found[0])} cannot be loaded: {first_line(error)}."
        ) from error


@cache
def load_rules() -> None:
    """Imports the modules of rules that packages register. One that fails is warned of: its ops have no rule then, and
    what they touch is found by trials or stays."""
    for point in entry_points(group=RULES):
        try:
            point.load()
        except Exception as error:
            logger.warning(
                "The rules that %r of the package %s registers cannot be loaded (%s: %s). Its ops are treated as ops "
                "without a rule: less may be merged.",
                point.name,
                _package(point),
                type(error).__name__,
                first_line(error),
            )


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
