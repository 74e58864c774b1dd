"""What a user may set over the inference: axes that must not move, and rules for this call only."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch

from fxmerge.errors import OptionError
from fxmerge.symmetry import rules as registry
from fxmerge.symmetry.propagation import Axis

Pin = str | tuple[str, int]
"""A parameter by name or by a pattern such as "layer.*" (all of its axes), or one axis: ("layer.weight", 0), or
"layer.weight[0]"."""

Rules = Mapping[Any, Callable[..., Any]]
"""Rules by op: a name such as "mylib::op", an overload packet, or one overload."""

REQUESTED = "on request"
"""The reason given for axes that a user pinned."""


def pinned_axes(pin: Iterable[Pin], shapes: Mapping[str, Sequence[int]], aliases: Mapping[str, str]) -> list[Axis]:
    """The axes that a user's pins name.

    Arguments:
        pin: what the user gave.
        shapes: the shape of every parameter.
        aliases: every name of a parameter, mapped to its name in `shapes`.

    Returns:
        All axes of the parameters named, or those asked for, each once.

    Raises:
        OptionError: if a pin names no parameter, or a dimension that the parameter does not have.
    """
    axes: dict[Axis, None] = {}
    for item in [pin] if isinstance(pin, str) else pin:
        pattern, dim = _split(item)
        names = dict.fromkeys(aliases[name] for name in aliases if name == pattern or fnmatchcase(name, pattern))
        if not names:
            close = get_close_matches(pattern, aliases, n=3)
            hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"There are {_some(aliases)}."
            raise OptionError(f"pin names no parameter: {pattern!r}. {hint}")
        for name in names:
            ndim = len(shapes[name])
            if dim is not None and not -ndim <= dim < ndim:
                raise OptionError(
                    f"pin names dimension {dim} of {name!r}, which has {ndim} "
                    f"(shape {tuple(shapes[name])}); give one from 0 to {ndim - 1}."
                )
            axes |= dict.fromkeys((name, d) for d in range(ndim) if dim is None or d == dim % ndim)
    return list(axes)


def _split(item: Any) -> tuple[str, int | None]:
    """A pin as a pattern of names and a dimension, None for all."""
    if isinstance(item, str):
        found = re.fullmatch(r"(.+)\[(-?\d+)\]", item)
        return (found[1], int(found[2])) if found else (item, None)
    if isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], int):
        return item[0], item[1]
    raise OptionError(
        f"pin holds {item!r}; give a parameter's name, a pattern such as 'layer.*', or an axis such as "
        "('layer.weight', 0)."
    )


def _some(names: Iterable[str]) -> str:
    listed = [repr(n) for n in names]
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def overriding(rules: Rules | None) -> registry.Lookup:
    """The lookup of rules in which a user's own come before those of the registry.

    Raises:
        OptionError: if an op does not exist, or a rule is not callable.
    """
    own: dict[Any, Callable[..., Any]] = {}
    for op, function in (rules or {}).items():
        if not callable(function):
            raise OptionError(f"rules holds {function!r} for {op!r}; give a function of a site and the op's arguments.")
        own[_key(op)] = function

    def find(target: Any) -> Callable[..., Any] | None:
        name = getattr(getattr(target, "_schema", None), "name", None)
        return own.get(target) or own.get(name) or registry.find_rule(target)

    return find


def _key(op: Any) -> Any:
    """One overload as it is, anything else as the name of the op."""
    if isinstance(op, torch._ops.OpOverload):
        return op
    name = op._qualified_op_name if isinstance(op, torch._ops.OpOverloadPacket) else op
    if not isinstance(name, str):
        raise OptionError(f"rules holds a rule for {op!r}; give an op such as 'mylib::op' or torch.ops.mylib.op.")
    full = name if "::" in name else f"aten::{name}"
    if not torch._C._jit_get_schemas_for_operator(full):
        known = {schema.name for schema in torch._C._jit_get_all_schemas()}
        close = get_close_matches(full, known, n=3)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else "Import the library that registers it."
        raise OptionError(f"rules holds a rule for {name!r}, but there is no such op. {hint}")
    return full
