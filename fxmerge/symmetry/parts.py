"""Parts of one tensor that an op combines, where it does not matter which part is which: the halves of a gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxmerge.symmetry.labels import Labels, move, reduce, reduces_evenly
from fxmerge.symmetry.rules.registry import Site

aten = torch.ops.aten
COMMUTATIVE = frozenset(
    (aten.mul.Tensor, aten.add.Tensor, aten.maximum.default, aten.minimum.default, aten.logaddexp.default)
)
"""Ops of two tensors that may be exchanged."""


@dataclass(frozen=True)
class Part:
    """A rearrangement of a tensor, which is labelled where it is combined."""

    source: Labels
    op: Callable[[Tensor], Any]

    def then(self, op: Callable[[Any], Any]) -> Part:
        return Part(self.source, lambda column: op(self.op(column)))

    def labels(self, at: Site) -> Labels:
        """The labels of the part by itself."""
        shape = tuple(self.op(torch.zeros(()).expand(self.source.shape)).shape)
        return move(at.units, self.source, self.op, shape, at.name)


def parts(graph: fx.Graph, combines: Callable[[Any], bool], moves: Callable[[Any], bool]) -> set[fx.Node]:
    """The nodes that only rearrange a tensor for an op to which the order of its two operands does not matter.

    Arguments:
        combines: whether an op is such an op.
        moves: whether an op does no more than rearrange its first operand.
    """
    found: set[fx.Node] = set()
    for n in graph.nodes:
        if combines(n.target) and len(n.args) == 2 and not n.kwargs and all(isinstance(a, fx.Node) for a in n.args):
            found |= _parts(n, moves)
    return found


def _parts(op: fx.Node, moves: Callable[[Any], bool]) -> set[fx.Node]:
    a, b = cast(tuple[fx.Node, fx.Node], op.args)
    inside, todo, sources = {op}, {a, b}, set()
    while todo:
        # The latest first, so that all users of a node are known when it is reached.
        n = max(todo)
        todo.remove(n)
        if moves(n.target) and n.users.keys() <= inside and n.args and isinstance(n.args[0], fx.Node):
            inside.add(n)
            todo.add(n.args[0])
        else:
            sources.add(n)
    return inside - {op} if len(sources) == 1 and a is not b else set()


def combine(at: Site, a: Labels | Part, b: Labels | Part) -> Labels:
    """The labels of a function of two parts of one tensor that does not tell them apart.

    Where the units that it takes together are no blocks, the parts are told apart.
    """
    source = a.source if isinstance(a, Part) else a
    see = [x.op if isinstance(x, Part) else lambda column: column for x in (a, b)]

    def both(column: Tensor) -> Tensor:
        return torch.stack([op(column).expand(at.shape) for op in see], -1)

    last = len(at.shape)
    if all(reduces_evenly(both(column), [last]) for column in source.columns):
        return reduce(at.units, move(at.units, source, both, (*at.shape, 2), at.name), [last], at.name)
    first, second = (x.labels(at) if isinstance(x, Part) else x for x in (a, b))
    return at.join(first, second, at.shape)
