"""Rules that users write: a faulty one is an error that names it, and is not replaced in silence."""

from __future__ import annotations

from typing import Any

from fxmerge.errors import OptionError
from fxmerge.symmetry.deferred import Deferred
from fxmerge.symmetry.labels import Labels
from fxmerge.symmetry.parts import Part
from fxmerge.symmetry.rules import lifting
from fxmerge.symmetry.rules.registry import Rule, Site

ADVICE = "Mend the rule, or let it return NotImplemented for calls that it does not serve."


def is_ours(rule: Rule) -> bool:
    """Whether a rule is one of the package."""
    return getattr(rule, "__module__", "").partition(".")[0] == __name__.partition(".")[0]


def apply(rule: Rule, site: Site, args: Any, kwargs: Any) -> Any:
    """What a user's rule gives; NotImplemented if it does not serve this call.

    Raises:
        OptionError: if the rule fails, or gives labels of another shape than the op's output has.
    """
    where = f"The rule for {site.target} at graph node {site.name!r}"
    try:
        value: Any = lifting.apply(rule, site, args, kwargs)
    except Exception as error:
        raise OptionError(f"{where} raises {type(error).__name__}: {error}. {ADVICE}") from error
    several = isinstance(site.shape, list)
    given = list(value) if several and isinstance(value, (list, tuple)) else [value]
    if value is NotImplemented or any(isinstance(v, (Deferred, Part)) for v in given):
        return value
    shapes = [tuple(shape) for shape in (site.shape if several else [site.shape])]
    if not all(isinstance(v, Labels) for v in given) or [tuple(v.shape) for v in given] != shapes:
        told = [f"labels of shape {tuple(v.shape)}" if isinstance(v, Labels) else repr(v) for v in given]
        wanted = ", ".join(map(str, shapes))
        raise OptionError(f"{where} gives {', '.join(told)}, and the op's output has shape {wanted}. {ADVICE}")
    return value
