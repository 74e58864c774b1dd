"""Heads that are read through a repeat, with units of their own beyond it: what is read may then be fewer heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from fxmerge.program.forms import bind
from fxmerge.symmetry.columns import core, spread, support
from fxmerge.symmetry.labels import Labels
from fxmerge.symmetry.rules import Site
from fxmerge.symmetry.rules.movement import movement
from fxmerge.symmetry.units import NOTHING, Ids, UnitGraph, reached

REPEAT = torch.ops.aten.repeat_interleave.self_int


def repeats(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that repeat what lies along a dimension once, which does nothing, in order."""
    return [n for n in graph.find_nodes(op="call_function", target=REPEAT) if bind(n)["repeats"] == 1]


@dataclass(frozen=True, eq=False)
class Cut:
    """A repeat of heads: which heads they are, and where they lie.

    Attributes:
        group: the class of heads, by any number. All cuts of one class are of the same heads.
        dim: the dimension along which they lie.
        heads: for every position along it, the head.
    """

    group: int
    dim: int
    heads: Ids


@dataclass
class Cuts:
    """A rule for repeats, some of which are cuts: what comes out of a cut has units of its own.

    The labels are then of networks in which these repeats may have other numbers. An exchange of units on one side of a
    cut alone leaves no function unchanged.

    Attributes:
        cuts: for every repeat of a graph, in order, the cut; None for one that is none.
        blocks: for every class of heads, the units that stand for them: what lies in the heads before all its cuts lies
            in these.
        fresh: the units beyond the cuts.
    """

    cuts: Sequence[Cut | None]
    blocks: dict[int, Ids] = field(default_factory=dict)
    fresh: list[Ids] = field(default_factory=list)
    _units: UnitGraph | None = None

    def __call__(self, at: Site, x: Labels, repeats: Any, dim: Any = None, **rest: Any) -> Any:
        cut = self._cut(at.node)
        if cut is None:
            return movement(at, x, repeats, *([] if dim is None else [dim]), **rest)
        if self._units is not at.units:  # Each walk has units of its own.
            self._units, self.blocks, self.fresh = at.units, {}, []
        if cut.group not in self.blocks:
            self.blocks[cut.group] = at.units.fresh(int(cut.heads.max()) + 1, ("block", at.name))
        columns = tuple(self._beyond(at, c, cut) for c in x.columns)
        return replace(x, columns=columns, parameter=None)

    def _cut(self, node: fx.Node | None) -> Cut | None:
        nodes = [] if node is None else repeats(node.graph)
        return self.cuts[nodes.index(node)] if node in nodes else None

    def _beyond(self, at: Site, column: Tensor, cut: Cut) -> Tensor:
        """What is beyond a cut: a unit for each that is before it at each position of a head."""
        dims = support(column)
        if cut.dim not in dims:
            return column
        i = dims.index(cut.dim)
        ids = np.moveaxis(core(column, dims).numpy(), i, 0)
        rows = ids.reshape(len(ids), -1)
        block = np.broadcast_to(self.blocks[cut.group][cut.heads][:, None], rows.shape)
        own = rows != NOTHING
        at.units.include(rows[own], block[own])
        code = np.arange(len(rows))[:, None] * (int(rows.max()) + 1) + rows
        numbers, inverse = np.unique(code[own], return_inverse=True)
        fresh = np.full(rows.shape, NOTHING, np.int64)
        self.fresh.append(at.units.fresh(len(numbers), ("block", at.name)))
        fresh[own] = self.fresh[-1][inverse]
        moved = np.moveaxis(fresh.reshape(ids.shape), 0, i)
        return spread(torch.from_numpy(np.ascontiguousarray(moved)), tuple(column.shape), dims)

    def beyond(self) -> NDArray[np.bool_]:
        """For every unit of the last walk, whether it is one of those beyond cuts, or moves as one of these does or has
        one in it."""
        units = self._units
        assert units is not None
        return reached(units, self.fresh, units.member)
