"""Inputs and outputs inside of objects: which classes are opened, and the user's names of what is in them."""

from __future__ import annotations

import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import cached_property
from numbers import Number
from types import EllipsisType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxmerge.errors import FxmergeError

BASIC = (Tensor, Number, torch.SymInt, torch.SymFloat, torch.SymBool, str, type(None))
"""What an object may hold as an input or output of its own: what torch.export takes."""

STATIC = (bytes, Enum, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format, range, slice, type)
"""What an object may hold beside, which is part of its structure."""


class _Context(NamedTuple):
    """The structure of an opened object: the names of its attributes that hold values, and the others."""

    attributes: tuple[str, ...]
    keys: tuple[Any, ...]
    static: tuple[tuple[str, Any], ...]


def open_classes(value: Any, subject: str, error: type[FxmergeError], advice: str) -> None:
    """Makes torch see the tensors inside of objects: their classes are registered with its pytree.

    Dataclasses, classes of attrs and subclasses of dict are opened; what else may hold tensors is refused.

    Arguments:
        value: the inputs or outputs of a model.
        subject: what is said of the value, such as "Net returns".
        error: the class of the error.
        advice: what to do in place of it, as a sentence.

    Raises:
        FxmergeError: of the given class, if there is an object that cannot be opened.

    Example:
        >>> @dataclasses.dataclass
        ... class Pair:
        ...     first: Tensor
        ...     second: Tensor
        >>> open_classes(Pair(torch.ones(1), torch.ones(2)), "Net returns", FxmergeError, "")
        >>> [tuple(leaf.shape) for leaf in pytree.tree_leaves(Pair(torch.ones(1), torch.ones(2)))]
        [(1,), (2,)]
    """
    while True:
        closed = [leaf for leaf in pytree.tree_leaves(value) if not _is_leaf(leaf)]
        if not closed:
            return
        for leaf in closed:
            kind = type(leaf)
            if not _can_open(leaf):
                more = " Convert arrays by torch.from_numpy." if isinstance(leaf, np.ndarray) else ""
                raise error(f"{subject} a {kind.__name__}, and fxmerge cannot see tensors inside of it. {advice}{more}")
            if kind not in pytree.SUPPORTED_NODES:
                _register(kind)


def can_open(value: Any) -> bool:
    """Whether a value is an object that torch opens, or could open."""
    return type(value) in pytree.SUPPORTED_NODES or _can_open(value)


def _is_leaf(value: Any) -> bool:
    return isinstance(value, (*BASIC, *STATIC, EllipsisType)) or (isinstance(value, (set, frozenset)) and not value)


def _can_open(value: Any) -> bool:
    kind = type(value)
    return dataclasses.is_dataclass(kind) or hasattr(kind, "__attrs_attrs__") or isinstance(value, dict)


def _register(kind: type[Any]) -> None:
    def flatten_with_keys(value: Any) -> tuple[list[tuple[pytree.KeyEntry, Any]], _Context]:
        attributes = _attributes(value)
        held = {name: own for name, own in attributes.items() if isinstance(own, BASIC) or not _is_leaf(own)}
        items = dict(value) if isinstance(value, dict) else {}
        static = tuple((name, own) for name, own in attributes.items() if name not in held)
        children: list[tuple[pytree.KeyEntry, Any]] = [(pytree.GetAttrKey(name), own) for name, own in held.items()]
        children += [(pytree.MappingKey(key), own) for key, own in items.items()]
        return children, _Context(tuple(held), tuple(items), static)

    def flatten(value: Any) -> tuple[list[Any], _Context]:
        children, context = flatten_with_keys(value)
        return [child for _, child in children], context

    def unflatten(children: Iterable[Any], context: _Context) -> Any:
        values = list(children)
        # What __init__ has made of its arguments is restored as it was, and not made again.
        made: Any = object.__new__(kind) if not issubclass(kind, dict) else kind.__new__(kind)
        for name, own in [*zip(context.attributes, values, strict=False), *context.static]:
            object.__setattr__(made, name, own)
        store = OrderedDict.__setitem__ if isinstance(made, OrderedDict) else dict.__setitem__
        for key, own in zip(context.keys, values[len(context.attributes) :], strict=True):
            store(made, key, own)
        return made

    pytree.register_pytree_node(
        kind,
        flatten,
        unflatten,
        serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
        to_dumpable_context=list,
        from_dumpable_context=lambda c: _Context(tuple(c[0]), tuple(c[1]), tuple((name, own) for name, own in c[2])),
        flatten_with_keys_fn=flatten_with_keys,
    )


def _attributes(value: Any) -> dict[str, Any]:
    """What an object holds, without what it derives when asked."""
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    own = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    own |= getattr(value, "__dict__", {})
    return {n: v for n, v in own.items() if not isinstance(getattr(type(value), n, None), cached_property)}


def _slots(kind: type) -> Sequence[str]:
    slots = kind.__dict__.get("__slots__", ())
    return [name for name in ([slots] if isinstance(slots, str) else slots) if name not in ("__dict__", "__weakref__")]


def input_names(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """The user's names of all inputs, in the order of the leaves of (args, kwargs).

    Example:
        >>> def forward(x, graph): ...
        >>> input_names(forward, (torch.ones(1),), {"graph": {"edges": [torch.ones(2)]}})
        ['x', "graph['edges'][0]"]
    """
    positional = argument_names(forward, len(args))
    names = []
    for (_, entry, *rest), _ in pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))[0]:
        first = entry.key if isinstance(entry, pytree.MappingKey) else positional[entry.idx]  # type: ignore[attr-defined]
        names.append(f"{first}{pytree.keystr(tuple(rest))}")
    return names


def argument_names(forward: Callable[..., Any], count: int) -> list[str]:
    """What forward calls its first positional arguments; `args_1` is the second one that `*args` takes."""
    parameters = parameters_of(forward)
    plain = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "arg")
    return [*plain, *(f"{rest}_{i}" for i in range(count - len(plain)))]


def parameters_of(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a function; none where Python cannot tell them."""
    try:
        return list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return []


def dynamic_shapes(value: Any, of: Callable[[Any], Any]) -> Any:
    """What torch.export wants as dynamic shapes: `of` every leaf, where objects are lists of what they hold."""
    kind = pytree._get_node_type(value)
    if kind not in pytree.SUPPORTED_NODES:
        return of(value)
    if kind in pytree.BUILTIN_TYPES:

        def is_own(v: Any) -> bool:
            return pytree._get_node_type(v) not in pytree.BUILTIN_TYPES

        return pytree.tree_map(lambda v: dynamic_shapes(v, of), value, is_leaf=is_own)
    return [dynamic_shapes(child, of) for child in pytree.SUPPORTED_NODES[kind].flatten_fn(value)[0]]
