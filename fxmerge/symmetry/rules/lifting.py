"""How rules are applied to operands whose labels are deferred: as they are, lifted over the units named, or settled."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxmerge.symmetry.columns import support
from fxmerge.symmetry.deferred import Chosen, Deferred, Index, Order, lead
from fxmerge.symmetry.labels import Labels, constant, move, reduce
from fxmerge.symmetry.labels import join as join_labels
from fxmerge.symmetry.rules.contraction import use_apart
from fxmerge.symmetry.rules.random import draws
from fxmerge.symmetry.rules.registry import LIFTS, TAKES, Rule, Site, Value
from fxmerge.symmetry.units import Ids, UnitGraph

Lifted = Index | Chosen


def apply(rule: Rule, at: Site, args: Any, kwargs: Any) -> Value:
    """What a rule says of operands some of which may be `Deferred`; NotImplemented if it does not serve this call."""
    if not any(_leaves((args, kwargs), Deferred)) or getattr(rule, TAKES, False):
        return rule(at, *args, **kwargs)
    how = "" if draws(at.target, args, kwargs) else getattr(rule, LIFTS, "")
    if how in ("copies", "views") and args[0].shape == at.shape and _holds(at, args[0]):
        return args[0]
    if how == "joins":
        named = _of_names(at, args, kwargs)
        if named is not NotImplemented:
            return named
    serves = (Index, Chosen) if how in ("views", "moves", "aligns") else Chosen if how else ()
    args, kwargs = settle(at, args, kwargs, but=serves)
    if serves and any(_leaves((args, kwargs), Deferred)):
        lifted = _lift(rule, how, at, args, kwargs)
        if lifted is not NotImplemented:
            return lifted
        args, kwargs = settle(at, args, kwargs)
    return rule(at, *args, **kwargs)


def settle(at: Site, args: Any, kwargs: Any, *, but: Any = ()) -> Any:
    """The arguments with labels in place of what is deferred."""

    def settled(x: Any) -> Any:
        return x.settle(at.units, at.name) if isinstance(x, Deferred) and not isinstance(x, but) else x

    return _map(settled, (args, kwargs))


def _leaves(value: Any, kind: Any) -> Iterator[Any]:
    return (x for x in pytree.tree_leaves(value, is_leaf=_is_operand) if isinstance(x, kind))


def _map(f: Callable[[Any], Any], value: Any) -> Any:
    return pytree.tree_map(f, value, is_leaf=_is_operand)


def _is_operand(x: Any) -> bool:
    return isinstance(x, (Labels, Deferred))


def _lift(rule: Rule, how: str, at: Site, args: Any, kwargs: Any) -> Value:
    """Applies a rule to the part of every unit alike, which is a dimension before all others.

    NotImplemented where it is unclear which number chose what.
    """
    operands: list[Lifted] = list(_leaves((args, kwargs), (Index, Chosen)))
    by = [x if isinstance(x, Index) else x.by for x in operands]
    moved = isinstance(operands[0], Index)
    if (how == "contracts" and not _fits(at, args, operands)) or any(b.source is not by[0].source for b in by):
        return NotImplemented
    places = [_places(rule, at, args, kwargs, x) for x in operands]
    unclear = any(p is None or not all(map(torch.equal, p, places[0] or ())) for p in places)
    if unclear and not moved:
        return NotImplemented
    several = isinstance(at.shape, list)
    shapes = [(by[0].count, *shape) for shape in (at.shape if several else [at.shape])]
    site = replace(at, shape=shapes if several else shapes[0], target=_over_first(at.target))
    ndim = len(at.shape) if how in ("joins", "aligns") else 0
    lifted_args = (_lifted_equation(*args), *args[1:]) if at.target._schema.name == "aten::einsum" else args

    def run(first: Callable[[Lifted], Labels], other: Callable[[Any], Any]) -> list[Labels]:
        def operand(x: Any) -> Any:
            return lead(first(x), max(ndim, x.ndim)) if isinstance(x, (Index, Chosen)) else other(x)

        result = rule(site, *_map(operand, lifted_args), **_map(operand, kwargs))
        return list(result) if several else [result]

    hots = run(lambda x: x.hot if isinstance(x, Index) else x.by.hot, _blank)
    if unclear or places[0] is None:
        found: list[Any] = [Index.of(h) for h in hots]
    else:
        found = [Index(h, by[0].source, p) for h, p in zip(hots, places[0], strict=True)]
    if not moved:
        for x in operands:
            if how == "contracts" and x.parts[0].parameter is not None:
                use_apart(at, x.parts[0], [0])
        fulls = run(lambda x: x.parts[0], lambda x: x)
        found = [simplest(at, Chosen(f, b)) for f, b in zip(fulls, found, strict=True)]
    return found if several else found[0]


def simplest(at: Site, x: Chosen) -> Chosen | Labels:
    """What is chosen, settled where the parts of the units are no longer of interest each by itself."""
    return x if x.is_tangled else x.settle(at.units, at.name)


def _over_first(target: Any) -> Any:
    """The op over all but the first dimension of its operand."""

    def lifted(column: Tensor, *args: Any, **kwargs: Any) -> Any:
        return torch.vmap(lambda c: target(c, *args, **kwargs))(column)

    lifted._schema = target._schema  # type: ignore[attr-defined]
    return lifted


def _lifted_equation(equation: str, operands: Sequence[Any], *args: Any) -> str:
    """An einsum in which the operands whose labels are deferred, and the output, have one more dimension."""
    left, _, out = equation.replace(" ", "").partition("->")
    letter = next(c for c in string.ascii_letters if c not in equation)
    terms = [letter + t if isinstance(x, Deferred) else t for t, x in zip(left.split(","), operands, strict=True)]
    return f"{','.join(terms)}->{letter}{out}"


def _fits(at: Site, args: Any, operands: list[Lifted]) -> bool:
    """Whether one more dimension before all others is one of a batch."""
    if at.target._schema.name == "aten::linear":
        return len(operands) == 1 and operands[0] is args[0]
    if at.target._schema.name == "aten::einsum":
        return "->" in args[0]
    most = max(len(a.shape) for a in args[:2])
    return most > 1 and all(x.ndim == most for x in operands)


def _holds(at: Site, x: Deferred) -> bool:
    """Whether the op's output can hold the numbers of an index, an order or counts."""
    value = None if at.node is None else at.node.meta.get("val")
    if isinstance(x, Chosen) or not isinstance(value, Tensor):
        return True
    numbers = torch.arange(x.most)
    return value.dtype != torch.bool and bool((numbers.to(value.dtype).long() == numbers).all())


def _blank(x: Any) -> Any:
    return Labels(tuple(x.shape)) if isinstance(x, (Labels, Tensor)) else x


class _Scratch(UnitGraph):
    """A unit graph to see where units go, under the names that they have."""

    def rename(self, ids: Ids) -> Ids:
        return ids


def _places(rule: Rule, at: Site, args: Any, kwargs: Any, x: Lifted) -> list[Tensor] | None:
    """At every position of each output, which number of its source chose what is there; None where that is unclear."""
    by = x if isinstance(x, Index) else x.by
    scratch = _Scratch()
    scratch.fresh(by.source.count, ("place",))
    if by.source.count > 1 and not support(by.place):
        return None
    column = (by.place + 1,) if support(by.place) else ()

    def operand(y: Any) -> Any:
        if y is x:
            return Labels(x.shape, column)
        return Labels(y.shape) if isinstance(y, Deferred) else _blank(y)

    result = rule(replace(at, units=scratch), *_map(operand, args), **_map(operand, kwargs))
    found = []
    for labels in result if isinstance(at.shape, list) else [result]:
        if len(labels.columns) != len(column) or len(scratch.pinned) > 1 or scratch.equal or scratch.member:
            return None
        found.append(labels.columns[0] - 1 if column else torch.zeros((), dtype=torch.int64).expand(labels.shape))
    return found


def _of_names(at: Site, args: Any, kwargs: Any) -> Value:
    """A pointwise op of numbers that name units: they may be compared with numbers, or looked up in a table of what the
    op gives for each. NotImplemented for all else."""
    args, kwargs = _map(lambda x: x.names() if isinstance(x, Order) and x.names_places else x, (args, kwargs))
    indices = list(_leaves((args, kwargs), Index))
    if not indices:
        return NotImplemented
    others = [a for a in (*args, *kwargs.values()) if isinstance(a, (Labels, Deferred, Tensor)) and a is not indices[0]]
    index, name = indices[0].expand(at.shape), at.target._schema.name
    if not others:
        numbers = torch.arange(index.count)
        table = at.target(*_map(lambda x: numbers if isinstance(x, Index) else x, args), **kwargs)
        if table.dtype != torch.bool and torch.equal(table.long(), numbers) and _holds(at, index):
            return index
        labels = lead(constant(table), len(at.shape))
        return reduce(at.units, join_labels(at.units, labels.expand(index.hot.shape), index.hot, at.name), [0], at.name)
    if name != "aten::eq" or len(others) > 1:
        return NotImplemented
    if isinstance(others[0], Index) and others[0].count == index.count:
        both = join_labels(at.units, index.hot, others[0].expand(at.shape).hot, at.name)
        return reduce(at.units, both, [0], at.name)
    if not isinstance(others[0], Tensor) or bool(((others[0] < 0) | (others[0] >= index.count)).any()):
        return NotImplemented
    asked = others[0].long().expand(at.shape)[None]
    return move(at.units, index.hot, lambda c: c.gather(0, asked)[0], at.shape, at.name)
