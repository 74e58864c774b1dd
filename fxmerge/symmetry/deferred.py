"""Tensors whose labels wait for what consumes them: numbers that name units, and what is looked up by such numbers.

A number that an argmax gives names a unit: permute the units, and it becomes another number. It is labelled as the
one-hot vector that it stands for, whose dimension of units comes first. What nothing here serves is settled: read as
ordinary numbers, which pins the units that they name.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxmerge.symmetry.columns import Shape, axis_column, spread, support
from fxmerge.symmetry.labels import Labels, inert, join, pin, reduce
from fxmerge.symmetry.units import Ids, UnitGraph, distinct


class Deferred:
    """A tensor whose labels are not settled yet."""

    @property
    def parts(self) -> tuple[Labels, ...]:
        """The labels of which this one is made."""
        raise NotImplementedError

    @property
    def most(self) -> int:
        """A number that is larger than all of those that the tensor holds, if it holds whole numbers."""
        raise NotImplementedError

    @property
    def shape(self) -> Shape:
        return self.parts[0].shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def settle(self, units: UnitGraph, reason: str) -> Labels:
        """The labels as an op sees them that knows of nothing else."""
        return self.parts[0]


@dataclass(frozen=True, eq=False)
class Source:
    """Numbers that were found together, and how many there are."""

    count: int


@dataclass(frozen=True)
class Index(Deferred):
    """Whole numbers that name units.

    Attributes:
        hot: the labels of the numbers as one-hot vectors, of shape (units, *shape).
        source: where the numbers come from.
        place: a column that tells for each of them which number of the source it is.
    """

    hot: Labels
    source: Source
    place: Tensor

    @staticmethod
    def of(hot: Labels) -> Index:
        """Numbers that come from nowhere else."""
        shape = hot.shape[1:]
        count = max(torch.Size(shape).numel(), 1)
        return Index(hot, Source(count), torch.arange(count).reshape(shape))

    @property
    def parts(self) -> tuple[Labels, ...]:
        return (self.hot,)

    @property
    def shape(self) -> Shape:
        return self.hot.shape[1:]

    @property
    def count(self) -> int:
        """How many units the numbers can name."""
        return self.hot.shape[0]

    @property
    def most(self) -> int:
        return self.count

    @property
    def names_alike(self) -> bool:
        """Whether a number names the same unit wherever it stands."""
        return all(support(c) == (0,) for c in (*self.hot.columns, *self.hot.inert) if 0 in support(c))

    @property
    def is_complete(self) -> bool:
        """Whether each number of the source is there once."""
        return self.place.numel() == self.source.count == len(self.place.unique())

    def expand(self, shape: Shape) -> Index:
        """The numbers broadcast to `shape`, dimensions aligned at the right."""
        hot = lead(self.hot, len(shape)).expand((self.count, *shape))
        return Index(hot, self.source, self.place.expand(shape))

    def reshape(self, shape: Shape) -> Index:
        return Index(self.hot.reshape((self.count, *shape)), self.source, self.place.reshape(shape))

    def settle(self, units: UnitGraph, reason: str) -> Labels:
        return reduce(units, pin(units, self.hot, f"{reason}: index read as a number", [0]), [0], reason)


@dataclass(frozen=True)
class Chosen(Deferred):
    """What is looked up by an index: of `full`, of shape (units, *shape), at every position the unit that `by` names.

    As long as ops treat every unit's part alike, the parts may be labelled each by itself.
    """

    full: Labels
    by: Index

    @property
    def parts(self) -> tuple[Labels, ...]:
        return (self.full,)

    @property
    def shape(self) -> Shape:
        return self.full.shape[1:]

    @property
    def is_tangled(self) -> bool:
        """Whether the units looked up have units of their own, or are still entries of a parameter."""
        several = (c for c in (*self.full.columns, *self.full.inert) if len(support(c)) > 1 and 0 in support(c))
        return self.full.parameter is not None or any(True for _ in several)

    def settle(self, units: UnitGraph, reason: str) -> Labels:
        return reduce(units, join(units, self.full, self.by.hot, reason), [0], reason)


@dataclass(frozen=True)
class Order(Deferred):
    """The order in which an index is sorted: each of the numbers from 0 once.

    Attributes:
        hot: the labels of the numbers as one-hot vectors, of shape (numbers, places in the order). The column of the
            places comes first.
    """

    hot: Labels

    @property
    def order(self) -> Labels:
        """The labels of the places in the order."""
        return Labels(self.hot.shape[1:], (self.hot.columns[0][0],))

    @property
    def names_places(self) -> bool:
        """Whether what the numbers count is in an order that is not told, too."""
        return any(0 in support(c) for c in self.hot.columns)

    @property
    def most(self) -> int:
        return self.hot.shape[0]

    @property
    def parts(self) -> tuple[Labels, ...]:
        return (self.order,)

    def names(self) -> Index:
        """The numbers as names of what they count."""
        return Index.of(self.hot)

    def inverse(self) -> Index:
        """Where in the order each number is: numbers that name places in the order."""
        return Index.of(self.hot.map(torch.t, self.hot.shape))

    def settle(self, units: UnitGraph, reason: str) -> Labels:
        return self.names().settle(units, reason)


@dataclass(frozen=True)
class Counts(Deferred):
    """How often an index names each unit; with `ends`, the running sums of that."""

    counts: Labels
    of: Source
    ends: bool = False

    @property
    def most(self) -> int:
        return self.of.count + 1

    @property
    def parts(self) -> tuple[Labels, ...]:
        return (self.counts,)

    def settle(self, units: UnitGraph, reason: str) -> Labels:
        if not self.ends:
            return self.counts
        pin(units, self.counts, f"{reason}: order along the dimension")
        return inert(self.counts.shape)


def lead(x: Labels, ndim: int) -> Labels:
    """x, whose first dimension is that of units, with `ndim` dimensions after it, new ones of size 1 first."""
    return x.reshape((x.shape[0], *(1,) * (ndim - x.ndim + 1), *x.shape[1:]))


def sort(units: UnitGraph, x: Index, *, ascending: bool) -> tuple[Index, Order]:
    """A vector of numbers in order, and their order.

    Which places the numbers move to when units are permuted depends on the numbers. The places get units of their own,
    which follow the units that are named: if something tells the places apart, these are pinned.
    """
    size = x.shape[0]
    before = _untold(units, x)
    if before is None:
        pin(units, x.hot, f"{units.node}: order along the dimension", [1])
    named = [c for c in x.hot.columns if 0 in support(c)]
    ids = units.fresh(size, ("places", units.node))
    slots = spread(torch.from_numpy(ids), (x.count, size), (1,))
    kept = tuple(c for c in x.hot.inert if 0 in support(c))
    ordered = Index.of(Labels((x.count, size), (*named, slots), kept))
    follow = [distinct(c.select(1, 0).contiguous().numpy()) for c in named]
    follow += [] if before is None else [distinct(before[0])]
    units.follow(ids, follow, order=(x, ordered) if ascending and x.is_complete else None)
    square = (size, size)
    places = spread(torch.from_numpy(ids), square, (1,))
    if before is None:
        return ordered, Order(Labels(square, (places,), (axis_column(square, 0),)))
    number, row = (spread(torch.from_numpy(own), square, (0,)) for own in before)
    return ordered, Order(Labels(square, (places, number), (row,)))


def _untold(units: UnitGraph, x: Index) -> tuple[Ids, Ids] | None:
    """Of a vector of numbers whose places follow data already, the units of the places and the row of each; None for
    all others."""
    columns = [c for c in x.hot.columns if 1 in support(c)]
    if len(columns) != 1:
        return None
    ids = columns[0][0].contiguous().numpy()
    row = units.rows_followed(ids)
    return None if row is None else (ids, row)


def sorted_by(units: UnitGraph, x: Index, order: Order) -> Index | None:
    """The numbers in an order that is theirs, None if it may be another one."""
    for followed in units.followed:
        if followed.order is not None and np.array_equal(order.order.columns[0].contiguous(), followed.ids):
            numbers: Index = followed.order[0]
            ordered: Index = followed.order[1]
            if numbers.source is x.source and torch.equal(numbers.place, x.place):
                return ordered
    return None


def look_up(table: Labels, dim: int, by: Index) -> Chosen:
    """Dimension `dim` of a table, as long as there are units to be named, replaced by the dimensions of an index."""
    before, after = table.shape[:dim], table.shape[dim + 1 :]
    shape = (*before, *by.shape, *after)
    thin = (table.shape[dim], *before, *(1,) * by.ndim, *after)
    full = table.map(lambda c: c.movedim(dim, 0), (table.shape[dim], *before, *after)).reshape(thin)
    full = full.map(lambda c: c.expand(by.count, *shape), (by.count, *shape))
    return Chosen(full, by.reshape((*(1,) * dim, *by.shape, *(1,) * len(after))).expand(shape))


def take_along(table: Labels, dim: int, by: Index) -> Chosen:
    """Of a table in the shape of the index but along `dim`, at every position the entry that it names."""
    one = (table.shape[dim], *by.shape[:dim], 1, *by.shape[dim + 1 :])
    moved = table.map(lambda c: c.movedim(dim, 0), (one[0], *one[1 : dim + 1], *one[dim + 2 :])).reshape(one)
    full = moved.map(lambda c: c.expand(by.count, *by.shape), (by.count, *by.shape))
    return Chosen(full, by)
