"""Which units of a symmetry lie where in the values that a graph computes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxmerge.symmetry.base import Group
from fxmerge.symmetry.columns import core, support
from fxmerge.symmetry.propagation import AxisUnits, Propagation
from fxmerge.symmetry.reasons import concatenate
from fxmerge.symmetry.units import Ids
from fxmerge.units.layout import AxisLayout


def classes_along(found: Propagation, symmetry: Group) -> Callable[[str, Collection[int]], set[int]]:
    """Tells the classes whose units lie along some dimensions of a node's value, among others, by the node's name."""
    number, place = places_and_blocks(found, symmetry)

    def along(node: str, dims: Collection[int]) -> set[int]:
        labels = found.labels.get(node)
        shown = [shown_by(c, number, place) for c in (labels.columns if labels is not None else ())]
        return {int(n) for c in shown if not set(c.dims).isdisjoint(dims) for n in np.unique(c.number)} - {-1}

    return along


def units_along(found: Propagation, symmetry: Group) -> Callable[[str, int], tuple[Ids, Ids] | None]:
    """Tells the class, -1 for none, and the unit in it at every position along a dimension of a node's value, by the
    node's name; if they repeat along a dimension of any size, at the first positions. None if no units lie there, or
    if which ones depends on the size or on other dimensions too."""
    number, place = places_and_blocks(found, symmetry)
    values = {node.name: node.meta.get("val") for node in found.program.graph.graph.nodes}

    def along(node: str, dim: int) -> tuple[Ids, Ids] | None:
        labels = found.labels.get(node)
        shown = [shown_by(c, number, place) for c in (labels.columns if labels is not None else ())]
        shown = [c for c in shown if dim in c.dims]
        if not shown or any(c.dims != (dim,) for c in shown):
            return None
        own = once(torch.from_numpy(shown[0].code), [values[node].shape[dim]])
        return None if own is None else (shown[0].number[: len(own)], shown[0].place[: len(own)])

    return along


@dataclass(frozen=True)
class Shown:
    """What a column shows: along the dimensions on which that depends, the class and the unit in it."""

    dims: tuple[int, ...]
    number: Ids
    place: Ids

    @property
    def code(self) -> Ids:
        """Equal where the class and the unit are."""
        code: Ids = self.number * (int(self.place.max(initial=0)) + 1) + self.place
        return code


def shown_by(column: Tensor, number: Ids, place: Ids) -> Shown:
    """What a column shows. Units that the walk tells apart may be one unit of a class: what repeats along a dimension
    does not depend on it."""
    dims = support(column)
    ids = core(column, dims).numpy()
    shown = Shown(dims, number[ids], place[ids])
    code = shown.code
    still = [i for i in range(len(dims)) if bool((code == code.take([0], axis=i)).all())]
    at = tuple(0 if i in still else slice(None) for i in range(len(dims)))
    return Shown(tuple(d for i, d in enumerate(dims) if i not in still), shown.number[at], shown.place[at])


def once(ids: Tensor, sizes: Sequence[int | torch.SymInt]) -> Tensor | None:
    """The units along some dimensions, once where they repeat along a size that is only known to be a multiple of a
    number; None where they lie otherwise along a size that is not fixed, and elsewhere if that is another."""
    for dim, size in enumerate(sizes):
        if isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None:
            parts = ids.unflatten(dim, (-1, max(int(size.node.expr.as_coeff_Mul()[0]), 1)))
            ids = parts.select(dim, 0)
            if not torch.equal(parts, ids.unsqueeze(dim).expand_as(parts)):
                return None
    return ids


def places_of(found: Propagation, symmetry: Group) -> tuple[Ids, Ids]:
    """For every unit of the walk the class that it is in, -1 if in none, and its place in it."""
    number, place = _places(found, symmetry)
    return number[found.units.first], place[found.units.first]


def _places(found: Propagation, symmetry: Group) -> tuple[Ids, Ids]:
    """`places_of`, under the first names of the units."""
    number = np.full(found.units.size, -1)
    place = np.zeros(found.units.size, np.int64)
    for axis in symmetry.layout:
        raw, slot = _slots(found.axes[axis.parameter, axis.dim], axis)
        for n, slots in axis.roles:
            unit = np.full(len(axis.index), -1)
            unit[slots] = np.arange(len(slots))
            own = unit[slot] >= 0
            number[raw[own]], place[raw[own]] = n, unit[slot[own]]
    return number, place


def places_and_blocks(found: Propagation, symmetry: Group) -> tuple[Ids, Ids]:
    """`places_of`, and the same for blocks, such as heads, of which it is clear what lies in them."""
    number, place = _places(found, symmetry)
    child, parent = concatenate(found.units.member)
    for n, c in reversed(list(enumerate(symmetry.units))):
        own = number[child] == n
        block, member = parent[own], place[child[own]]
        clear = [_only(block, at[member]) for _, at in c.parents]
        several = np.bincount(
            np.concatenate([np.zeros(0, np.int64), *(raw for raw, _ in clear)]), minlength=len(number)
        )
        for (p, _), (raw, unit) in zip(c.parents, clear, strict=True):
            new = (several[raw] == 1) & (number[raw] < 0)
            number[raw[new]], place[raw[new]] = p, unit[new]
    return number[found.units.first], place[found.units.first]


def _only(block: Ids, unit: Ids) -> tuple[Ids, Ids]:
    """The blocks whose members all lie in one unit, and this unit."""
    pairs = np.unique(np.stack([block, unit]), axis=1)
    raw, first, count = np.unique(pairs[0], return_index=True, return_counts=True)
    return raw[count == 1], pairs[1][first[count == 1]]


def _slots(units: AxisUnits, axis: AxisLayout) -> tuple[Ids, Ids]:
    """The units of the walk that lie in one slot of an axis, and these slots; the symmetry may keep other rows
    apart than the walk, if it was read from a file."""
    dims = sorted({*units.dims, *axis.dims})

    def spread(array: Ids, own: tuple[int, ...]) -> Ids:
        return np.expand_dims(array, [i for i, d in enumerate(dims) if d not in own])

    code = np.unique(spread(units.ids, units.dims) * len(axis.index) + spread(axis.slot, axis.dims))
    raw, slot = code // len(axis.index), code % len(axis.index)
    _, inverse, count = np.unique(raw, return_inverse=True, return_counts=True)
    one = count[inverse] == 1
    return raw[one], slot[one]
