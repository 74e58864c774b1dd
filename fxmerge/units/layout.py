"""Where the units of a symmetry lie on the axes of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxmerge.errors import UnitMapError

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class AxisLayout:
    """Where the units of a symmetry lie on one parameter axis.

    Attributes:
        parameter: the parameter's name; `aliases` are its other names.
        dim: the axis.
        dims: the dimensions of `slot`: the axis, and those whose rows have units of their own along it.
        slot: for every index, a number that stands for the unit there; -1 for nothing, at the end of rows that have
            fewer units than others.
        roles: for every class on the axis, its number and the slots of its units.
    """

    parameter: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dim: int
    dims: tuple[int, ...]
    slot: Ids
    roles: tuple[tuple[int, Ids], ...]

    @cached_property
    def classes(self) -> frozenset[int]:
        """The numbers of the classes on the axis."""
        return frozenset(number for number, _ in self.roles)

    @cached_property
    def index(self) -> Ids:
        """For every slot, its index along the axis."""
        where = self.dims.index(self.dim)
        along = np.arange(self.slot.shape[where]).reshape([-1 if d == where else 1 for d in range(self.slot.ndim)])
        index, holds = np.zeros(int(self.slot.max()) + 1, np.int64), self.slot >= 0
        index[self.slot[holds]] = np.broadcast_to(along, self.slot.shape)[holds]
        return index

    @cached_property
    def rows(self) -> Ids:
        """For every slot, the number of the first row in which it is."""
        dim = self.dims.index(self.dim)
        slots = np.moveaxis(self.slot, dim, -1).reshape(-1, self.slot.shape[dim])[::-1]
        rows = np.zeros(len(self.index), np.int64)
        number = np.broadcast_to(np.arange(len(slots))[::-1, None], slots.shape)
        rows[slots[slots >= 0]] = number[slots >= 0]
        return rows

    @property
    def even(self) -> bool:
        """Whether all rows are of one length, as those of a tensor must be."""
        return bool((self.slot >= 0).all())

    def source(self, images: tuple[Ids, ...]) -> Ids | None:
        """For every index after the permutation, the index along the axis before it; None if none moves."""
        before = np.arange(len(self.index))
        for number, slots in self.roles:
            before[slots[images[number]]] = slots
        if np.array_equal(before, np.arange(len(before))):
            return None
        source: Ids = self.index[before[self.slot]]
        return source

    def target(self, maps: Sequence[Ids], into: AxisLayout | None = None) -> Ids:
        """For every index, the index along the merged axis to which the unit there goes; several may go to one.

        Arguments:
            maps: for every class, the merged unit that each of its units goes into.
            into: the layout of the merged axis, as `resized` gives it; None if no class changes its width.
        """
        into = self if into is None else into
        after = np.arange(len(self.index)) if into is self else _pinned_slots(self, into)
        for (number, slots), (_, merged) in zip(self.roles, into.roles, strict=True):
            after[slots] = merged[maps[number]]
        target: Ids = into.index[after[self.slot]]
        return target

    def resized(self, widths: Sequence[int], kept: Sequence[Ids] | None = None) -> AxisLayout:
        """The layout of the axis where each class has another number of units.

        Units beyond those that the axis has come after the last one of their stretch: the axis of a flattened image
        (channels, pixels) gets whole channels.

        Arguments:
            widths: the new number of units of every class.
            kept: for every class, the units in whose places the first of the new ones stand, in ascending order; None
                for those with the smallest numbers.

        Raises:
            UnitMapError: if rows of the parameter have units of their own along the axis, and there are to be more of
                them.
        """
        if all(widths[number] == len(slots) for number, slots in self.roles):
            return self
        if len(self.dims) > 1:
            return self._with_shorter_rows(widths, kept)
        _, _, unit, _, role = self._entries(widths, kept)
        roles = [np.zeros(widths[number], np.int64) for number, _ in self.roles]
        for r, own in enumerate(roles):
            own[unit[role == r]] = np.flatnonzero(role == r)
        shape = (*self.shape[: self.dim], len(role), *self.shape[self.dim + 1 :])
        numbered = tuple((number, slots) for (number, _), slots in zip(self.roles, roles, strict=True))
        return AxisLayout(self.parameter, self.aliases, shape, self.dim, self.dims, np.arange(len(role)), numbered)

    def _with_shorter_rows(self, widths: Sequence[int], kept: Sequence[Ids] | None) -> AxisLayout:
        """The layout of an axis along which rows have units of their own, of which there are fewer. The axis is as long
        as the longest row; until all classes there are merged, others may be shorter. Rows in which none is left go."""
        if any(widths[number] > len(slots) for number, slots in self.roles):
            raise UnitMapError(
                f"Axis {self.dim} of {self.parameter!r} has units of its own in every row, of which there cannot be "
                f"more: the classes there have {[len(slots) for _, slots in self.roles]} units."
            )
        own = {n: np.arange(widths[n]) if kept is None else kept[n] for n, _ in self.roles}
        alive = np.ones(len(self.index), bool)
        for number, slots in self.roles:
            alive[np.delete(slots, own[number])] = False
        rows = np.moveaxis(self.slot, self.dims.index(self.dim), -1)
        left = alive[rows]
        length = int(left.sum(-1).max())
        gone = self._rows_left_out(rows, own)
        first = np.argsort(~left, axis=-1, kind="stable")[..., :length]
        shorter = np.where(np.take_along_axis(left, first, -1), np.take_along_axis(rows, first, -1), -1)
        after = np.append(np.cumsum(alive) - 1, -1)  # Of every slot that is left; the last is that of nothing.
        slot = after[shorter]
        shape = [*self.shape[: self.dim], length, *self.shape[self.dim + 1 :]]
        for i, d in enumerate(d for d in self.dims if d != self.dim):
            rest = tuple(j for j in range(gone.ndim) if j != i)
            stay = ~gone.all(axis=rest)
            slot, shape[d] = slot.compress(stay, axis=i), int(stay.sum())
        slot = np.moveaxis(slot, -1, self.dims.index(self.dim))
        roles = tuple((n, after[slots[own[n]]]) for n, slots in self.roles)
        return AxisLayout(self.parameter, self.aliases, tuple(shape), self.dim, self.dims, slot, roles)

    def _rows_left_out(self, rows: Ids, own: Mapping[int, Ids]) -> NDArray[np.bool_]:
        """Which rows no unit of a class is left in, as those of an expert that is merged into another one."""
        units, left = np.zeros(len(self.index), bool), np.zeros(len(self.index), bool)
        for number, slots in self.roles:
            units[slots], left[slots[own[number]]] = True, True
        inside = rows >= 0
        gone = np.asarray((units[rows] & inside).any(-1) & ~(left[rows] & inside).any(-1))
        if (gone[..., None] & inside & ~units[rows]).any():
            raise UnitMapError(
                f"Axis {self.dim} of {self.parameter!r} has pinned units in rows of which there would be fewer."
            )
        return gone

    def _entries(self, widths: Sequence[int], kept: Sequence[Ids] | None) -> Ids:
        """The indices of the resized axis in order, shape (5, indices): for each the index at which it stands or, with
        a 1, after which it comes; its unit; the rank of its role in the stretch; its role, -1 for what no class has."""
        pinned = self.index[_pinned(self)]
        parts = [np.stack([pinned, *np.zeros((3, len(pinned)), np.int64), np.full(len(pinned), -1)])]
        ends = _stretches([(number, self.index[slots]) for number, slots in self.roles])
        for role, ((number, slots), (end, rank)) in enumerate(zip(self.roles, ends, strict=True)):
            own = np.arange(min(len(slots), widths[number])) if kept is None else kept[number]
            units = np.arange(widths[number])
            after = units >= len(own)
            at = np.concatenate([self.index[slots[own]], np.full(int(after.sum()), end)])
            parts.append(np.stack([at, after, units, np.where(after, rank, 0), np.full(len(units), role)]))
        entries = np.concatenate(parts, axis=1)
        ordered: Ids = entries[:, np.lexsort(entries[::-1])]
        return ordered

    def boundary(self, index: int, widths: Sequence[int], kept: Sequence[Ids] | None = None) -> int:
        """How many indices of the resized axis come before one of this axis, which may be its end."""
        if all(widths[number] == len(slots) for number, slots in self.roles):
            return index
        return int((self._entries(widths, kept)[0] < index).sum())


def value_layout(number: Ids, unit: Ids, sizes: Sequence[int]) -> AxisLayout | None:
    """The layout of a dimension of a value, along which units lie as given.

    Arguments:
        number: for every position, the class of the unit there, -1 for none.
        unit: its number in the class.
        sizes: how many units each class has.

    Returns:
        None where a class does not show all of its units, each as often.
    """
    roles: list[tuple[int, Ids]] = []
    for n in np.unique(number[number >= 0]).tolist():
        at = np.flatnonzero(number == n)
        order = at[np.argsort(unit[at], kind="stable")]
        size = sizes[n]
        if len(at) % size or not np.array_equal(np.repeat(np.arange(size), len(at) // size), unit[order]):
            return None
        roles += [(n, own) for own in order.reshape(size, -1).T]
    return AxisLayout("", (), (len(number),), 0, (0,), np.arange(len(number)), tuple(roles))


def _pinned(axis: AxisLayout) -> list[int]:
    """The slots of an axis that no class has."""
    own = np.zeros(len(axis.index), bool)
    for _, slots in axis.roles:
        own[slots] = True
    pinned: list[int] = np.flatnonzero(~own).tolist()
    return pinned


def _pinned_slots(axis: AxisLayout, into: AxisLayout) -> Ids:
    """For every slot of an axis, the slot in a resized one; of what no class has, in the order of the axis."""
    slots = np.zeros(len(axis.index), np.int64)
    slots[_in_order(axis)] = _in_order(into)
    return slots


def _in_order(axis: AxisLayout) -> Ids:
    """The slots that no class has, as they come, row by row."""
    rows = np.moveaxis(axis.slot, axis.dims.index(axis.dim), -1)
    first = np.unique(rows[rows >= 0], return_index=True)[1]
    pinned = np.array(_pinned(axis), np.int64)
    ordered: Ids = pinned[np.argsort(first[pinned])]
    return ordered


def _stretches(roles: Sequence[tuple[int, Ids]]) -> list[tuple[int, int]]:
    """For every role, where the stretch of an axis ends that it lies in, and its rank among the roles there.

    Roles of one class whose indices overlap share a stretch, as the pixels of a channel do.
    """
    found = []
    for number, places in roles:
        shared = [(int(own[0]), int(own.max())) for n, own in roles if n == number and overlap(own, places)]
        found.append((max(end for _, end in shared), sorted(start for start, _ in shared).index(int(places[0]))))
    return found


def overlap(a: Ids, b: Ids) -> bool:
    """Whether the stretches from the first to the last of some indices have indices in common."""
    return bool(a.min() <= b.max() and b.min() <= a.max())


def add_axis(tensor: Tensor, layout: AxisLayout, target: Ids, size: int | None = None) -> Tensor:
    """Adds up, along one axis, what goes to one index (by rows, where rows have units of their own).

    Arguments:
        tensor: the parameter.
        layout: of the axis.
        target: for every index, the index to which it goes.
        size: the length of the axis afterwards; None leaves it as it is.
    """
    index = torch.from_numpy(target).to(tensor.device)
    shape = list(tensor.shape)
    shape[layout.dim] = shape[layout.dim] if size is None else size
    if len(layout.dims) > 1:
        total = tensor.new_zeros(shape)
        return total.scatter_add_(layout.dim, along_axis(index, layout).expand(tensor.shape), tensor)
    return tensor.new_zeros(shape).index_add_(layout.dim, index, tensor)


def along_axis(values: Tensor, layout: AxisLayout) -> Tensor:
    """A number for every entry of `layout.slot`, in the shape in which it broadcasts over the parameter."""
    return values.reshape([n if d in layout.dims else 1 for d, n in enumerate(layout.shape)])


def move_axis(tensor: Tensor, layout: AxisLayout, source: Ids) -> Tensor:
    """Takes, along one axis, every index from `source` (by rows, where rows have units of their own)."""
    index = torch.from_numpy(source).to(tensor.device)
    if len(layout.dims) == 1:
        return tensor.index_select(layout.dim, index)
    return torch.take_along_dim(tensor, along_axis(index, layout), layout.dim)
