"""The label calculus: columns of units on tensors, and the four operations that cover every op.

A *column* is an int64 tensor in the shape of the tensor it labels. It has stride 0 along the
dimensions on which it does not depend, so it costs the memory of its support only, and every view
op of torch moves it for free. An *inert* column names positions whose values differ without being
free to move: batch, space, tokens, constants. See README.md in this folder for a worked example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxmerge.symmetry import mixing
from fxmerge.symmetry.columns import Shape, axis_column, compact, core, reshape, shrink, spread, support
from fxmerge.symmetry.relate import relate, relate_inert, relate_sets
from fxmerge.symmetry.units import NOTHING, Ids, UnitGraph, distinct, mix, number, number_rows


@dataclass(frozen=True)
class Labels:
    """What is known of one tensor: its unit columns and its inert columns.

    `parameter` is set while the tensor is no more than a rearrangement of that parameter's entries; `is_mask` where the
    graph has it as a tensor of truth values; `is_zero` where it is a product with zeros; `uniform` where all of its
    entries are one number: it tells the parameters that this is computed from.
    """

    shape: Shape
    columns: tuple[Tensor, ...] = ()
    inert: tuple[Tensor, ...] = ()
    parameter: str | None = None
    is_mask: bool = False
    is_zero: bool = False
    uniform: frozenset[str] | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def map(self, view: Callable[[Tensor], Tensor], shape: Shape) -> Labels:
        """The labels of a view that keeps every position: reshape, permute, expand."""
        columns, inert = _varying(map(view, self.columns)), _varying(map(view, self.inert))
        return Labels(shape, columns, inert, self.parameter, uniform=self.uniform)

    def reshape(self, shape: Shape) -> Labels:
        return self if shape == self.shape else self.map(lambda c: reshape(c, shape), shape)

    def expand(self, shape: Shape) -> Labels:
        """The labels broadcast to `shape`, dimensions aligned at the right."""
        return self if shape == self.shape else replace(self.map(lambda c: c.expand(shape), shape), parameter=None)


def inert(shape: Shape, dims: Iterable[int] | None = None) -> Labels:
    """A tensor without units, whose values differ along `dims` (by default all)."""
    dims = range(len(shape)) if dims is None else dims
    return Labels(shape, (), tuple(axis_column(shape, d) for d in dims if shape[d] > 1))


def constant(value: Tensor, units: UnitGraph | None = None) -> Labels:
    """A constant: positions of equal value are alike, others are told apart.

    Where there are units to write to, a diagonal is one: see `diagonals`.
    """
    if value.numel() == 0 or value.device.type == "meta":
        return inert(tuple(value.shape))
    shape = tuple(value.shape)
    value = shrink(_comparable(compact(value.detach().to("cpu"))).expand(shape))
    dims = support(value)
    if not dims:
        return Labels(shape)
    values = np.unique(core(value, dims).numpy(), return_inverse=True)[1]
    labels = Labels(shape, (), (spread(torch.from_numpy(values.astype(np.int64)), shape, dims),))
    return labels if units is None else diagonals(units, labels, units.node)


def _comparable(value: Tensor) -> Tensor:
    """The values of a tensor in a type that numpy has: a wider one, or for packed numbers their bits."""
    value = value.resolve_conj().resolve_neg()
    for wide in (value.dtype, torch.complex64 if value.is_complex() else torch.float32):
        try:
            numbers = value.to(wide)
            numbers.numpy()
        except (TypeError, NotImplementedError, RuntimeError):
            continue
        return numbers
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.view(bits[value.itemsize])


def diagonals(units: UnitGraph, x: Labels, reason: str) -> Labels:
    """x, with new units along both dimensions of every inert column that has one number on a diagonal and another one
    beside it: if both dimensions move alike, it stays as it is."""
    for factor in x.inert:
        dims = support(factor)
        own = core(factor, dims)
        if len(dims) == 2 and own.shape[0] == own.shape[1]:
            same = torch.eye(len(own), dtype=torch.bool)
            if all(bool((own[where] == own[where][0]).all()) for where in (same, ~same)):
                both = torch.from_numpy(units.fresh(len(own), ("diagonal", reason)))
                lines = Labels(x.shape, tuple(spread(both, x.shape, (d,)) for d in dims))
                x = replace(x, inert=tuple(f for f in x.inert if f is not factor))
                x = replace(join(units, x, lines, reason), parameter=x.parameter)
    return x


def _varying(columns: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(c for c in map(shrink, columns) if support(c))


def join(units: UnitGraph, x: Labels, y: Labels, reason: str) -> Labels:
    """The labels of `f(x, y)` for a pointwise f of two tensors of one shape."""
    keep_x, keep_y = [True] * len(x.columns), [True] * len(y.columns)
    told: list[Tensor] = []
    for i, a in enumerate(x.columns):
        for j, b in enumerate(y.columns):
            finer = relate(units, a, b, reason)
            if finer == "a":
                keep_y[j] = False
                rows_apart(units, y, b, set(support(a)) - set(support(b)))
            elif finer == "b":
                keep_x[i] = False
                rows_apart(units, x, a, set(support(b)) - set(support(a)))
    for z, keep, factors in ((x, keep_x, y.inert), (y, keep_y, x.inert)):
        for i, column in enumerate(z.columns):
            if relate_inert(units, column, factors, reason, z.inert):
                # The units no longer move, but still tell positions apart that are inert alike.
                keep[i] = False
                told.append(column)
    kept = tuple(c for c, k in zip(x.columns + y.columns, keep_x + keep_y, strict=True) if k)
    return Labels(x.shape, kept, prune((*x.inert, *y.inert, *told), kept))


def rows_apart(units: UnitGraph, x: Labels, column: Tensor, dims: set[int]) -> None:
    """Of a tensor whose column means other units at other places along `dims`: where the column is an axis of a
    parameter, and the places are an earlier axis of it, the rows of the latter are used apart."""
    axis = units.axis(distinct(core(column, support(column)).numpy()))
    for rows in x.columns:
        along = support(rows)
        if axis is not None and along and dims.issuperset(along):
            ids = distinct(core(rows, along).numpy())
            earlier = units.axis(ids)
            if earlier is not None and earlier[0] == axis[0] and earlier[1] < axis[1]:
                units.use_apart(ids, ids)


MAX_INERT = 2**18
"""Entries up to which an inert column is kept as it is along dimensions without units."""


def prune(factors: Sequence[Tensor], columns: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    """Inert columns without those that others imply.

    Large ones are replaced by finer, smaller ones along the dimensions on which none of `columns` depends.
    """
    full: dict[int, Tensor] = {}
    with_units = {d for c in columns for d in support(c)}
    for f in factors:
        dims = support(f)
        if len(dims) == 1 and dims[0] not in full and len(core(f, dims).unique()) == f.shape[dims[0]]:
            full[dims[0]] = f
        if math.prod(f.shape[d] for d in dims) > MAX_INERT:
            for d in set(dims) - with_units:
                full.setdefault(d, axis_column(tuple(f.shape), d))
    kept: list[Tensor] = []
    for f in sorted(factors, key=lambda f: -len(support(f))):
        # Columns that number all positions along their dimensions imply, together, every column along these.
        if not full.keys() >= set(support(f)) and not any(_implies(g, f) for g in kept):
            kept.append(f)
    return (*full.values(), *kept)


def _implies(fine: Tensor, coarse: Tensor) -> bool:
    if fine.data_ptr() == coarse.data_ptr() and fine.stride() == coarse.stride():
        return True
    dims = support(fine)
    if not set(support(coarse)) <= set(dims):
        return False
    f, c = core(fine, dims).reshape(-1), core(coarse, dims).reshape(-1)
    if torch.equal(f, c):
        return True
    # Of all positions of one number in f, the table keeps the number in c of one of them.
    if int(f.max()) > 4 * len(f):
        f = f.unique(return_inverse=True)[1]
    table = torch.empty(int(f.max()) + 1, dtype=torch.int64)
    table[f] = c
    return torch.equal(table[f], c)


def reduce(units: UnitGraph, x: Labels, dims: Iterable[int], reason: str, *, keepdim: bool = False) -> Labels:
    """The labels after a symmetric reduction (sum, mean, max, norm) over `dims`."""
    gone = {d % x.ndim for d in dims} if x.ndim else set()
    columns, factors = [], [f for f in (_reduce_inert(f, gone) for f in x.inert) if f is not None]
    for i, column in enumerate(x.columns):
        irregular = relate_sets(units, column, (*x.columns[:i], *x.columns[i + 1 :]), x.inert, gone, reason)
        blocks, padded = _reduce_column(units, column, factors, gone, reason)
        columns += [] if blocks is None else [blocks]
        factors += [f for f in (irregular, padded) if f is not None]
    shape = tuple(1 if d in gone else n for d, n in enumerate(x.shape))
    reduced = Labels(shape, tuple(_first_of(c, gone) for c in columns), tuple(_first_of(f, gone) for f in factors))
    if keepdim:
        return reduced
    kept = tuple(n for d, n in enumerate(shape) if d not in gone)
    index = tuple(0 if d in gone else slice(None) for d in range(x.ndim))
    return replace(reduced.map(lambda c: c[index], kept), parameter=None)


def sum_over(units: UnitGraph, x: Labels, gone: set[int]) -> None:
    """Tells over which axes of a parameter a reduction goes."""
    if x.parameter is not None:
        for column in x.columns:
            if gone.issuperset(support(column)):
                units.sum(distinct(core(column, support(column)).numpy()))


def _first_of(column: Tensor, dims: Iterable[int]) -> Tensor:
    for d in dims:
        column = column.narrow(d, 0, 1)
    return column


@dataclass(frozen=True)
class _Rows:
    """What the rows of a column hold, where a row is all that lies along some dimensions at one place elsewhere.

    Attributes:
        kept: the dimensions of the column that are left.
        number: for every place along these, the number of its row; rows that hold the same units have one number.
        owner, unit: for every row, by number, the units in it, each once. Padding is in no row.
        times: how often each of these units is in its row, 0 where all units of the row are in it as often.
        bad: which rows share a unit with another one, or hold a unit more often here than there.
        nothing: for every place, how much of its row is padding.
    """

    kept: list[int]
    number: Ids
    owner: Ids
    unit: Ids
    times: Ids
    bad: NDArray[np.bool_]
    nothing: Ids


def _rows(column: Tensor, gone: set[int], *, ordered: bool = False) -> _Rows:
    """The rows along `gone`. Rows that hold the same units in another order are alike, unless `ordered`."""
    dims = support(column)
    kept = [d for d in dims if d not in gone]
    size = math.prod(column.shape[d] for d in kept)
    rows = core(column, kept + [d for d in dims if d in gone]).reshape(size, -1).numpy()
    place = mix(np.arange(rows.shape[1])) if ordered else np.uint64(0)
    first, row_set = number(mix(rows.view(np.uint64) ^ place).sum(axis=1))
    sets = rows[first]
    # One entry per (set, unit), with how often the set holds the unit.
    span = int(sets.max()) + 1
    entry, times = np.unique(np.arange(len(sets))[:, None] * span + sets, return_counts=True)
    owner, unit = entry // span, entry % span
    nothing = np.zeros(len(sets), np.int64)
    nothing[owner[unit == NOTHING]] = times[unit == NOTHING]
    owner, unit, times = (a[unit != NOTHING] for a in (owner, unit, times))
    # Sets of the same units are one row, however much padding there is beside.
    held = np.zeros(len(sets), np.uint64)
    np.add.at(held, owner, mix(unit))
    group = np.arange(len(sets)) if ordered else number(held)[1]
    least, most = np.full(len(sets), rows.shape[1]), np.zeros(len(sets), np.int64)
    np.minimum.at(least, owner, times)
    np.maximum.at(most, owner, times)
    member, first, inverse = np.unique(group[owner] * span + unit, return_index=True, return_inverse=True)
    uneven, varying, bad = np.zeros((3, int(group.max()) + 1), bool)
    if not ordered:
        uneven[group[most > least]] = True
        varying[group[owner[times != times[first][inverse.reshape(-1)]]]] = True
    bad |= uneven & varying
    owner, unit, times = member // span, member % span, times[first]
    times = np.where(uneven[owner], times, 0)
    again = np.unique(unit, return_inverse=True, return_counts=True)[1:]
    bad[owner[again[1][again[0]] > 1]] = True
    return _Rows(kept, group[row_set], owner, unit, times, bad, nothing[row_set])


def reduces_evenly(column: Tensor, dims: Iterable[int]) -> bool:
    """Whether the units that a reduction over `dims` takes together are blocks."""
    return set(dims).isdisjoint(support(column)) or not _rows(column, set(dims)).bad.any()


def _reduce_column(
    units: UnitGraph, column: Tensor, factors: Sequence[Tensor], gone: set[int], reason: str, *, ordered: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """The column of the blocks whose members are the units along `gone`, None if there is only one such block; and,
    where more of it is padding at some places than at others, an inert column that tells these apart.

    Arguments:
        factors: the inert columns of the result.
        ordered: whether places along `gone` that hold the same units in another order are other blocks.
    """
    if gone.isdisjoint(support(column)):
        return column, None
    if gone.issuperset(support(column)) and _holds_each_once(column):
        return None, None
    rows, shape = _rows(column, gone, ordered=ordered), tuple(column.shape)
    for times in distinct(rows.times[rows.times > 0]).tolist():  # Units that are there more often than others.
        units.segment(rows.unit[rows.times == times], reason)
    units.pin(rows.unit[rows.bad[rows.owner]], f"{reason}: reduced in overlapping or uneven groups")
    uneven = bool((rows.nothing != rows.nothing[0]).any())
    told = spread(torch.from_numpy(rows.nothing), shape, rows.kept) if uneven else None
    blocks = distinct(rows.owner)
    if len(blocks) < 2:
        return None, told
    block = np.full(len(rows.bad), NOTHING, np.int64)
    block[blocks] = units.fresh(len(blocks), ("block", reason))
    units.pin(block[rows.bad], f"{reason}: reduced in overlapping or uneven groups")
    units.include(rows.unit, block[rows.owner])
    result = spread(torch.from_numpy(block[rows.number]), shape, rows.kept)
    if rows.nothing.any():
        relate_inert(units, result, factors if told is None else [*factors, told], reason)
    return result, told


def _holds_each_once(column: Tensor) -> bool:
    ids = core(column, support(column)).numpy()
    return len(distinct(ids)) == ids.size


def _reduce_inert(factor: Tensor, gone: set[int]) -> Tensor | None:
    dims = support(factor)
    kept = [d for d in dims if d not in gone]
    if len(kept) == len(dims) or not kept:
        return factor if kept else None
    size = math.prod(factor.shape[d] for d in kept)
    rows = core(factor, kept + [d for d in dims if d in gone]).reshape(size, -1).numpy()
    return shrink(spread(torch.from_numpy(number_rows(np.ascontiguousarray(rows))), tuple(factor.shape), kept))


def move(units: UnitGraph, x: Labels, op: Callable[[Tensor], Tensor], shape: Shape, reason: str) -> Labels:
    """The labels after a data movement: `op` is run on the columns themselves.

    Units that the movement leaves behind are told apart from those that it takes along.
    """
    columns = [op(column) for column in x.columns]
    for column, moved in zip(x.columns, columns, strict=True):
        kept = distinct(core(moved, support(moved)).numpy())
        if len(kept) < len(distinct(core(column, support(column)).numpy())):
            units.segment(kept, reason)
            if x.parameter is not None:
                units.use_apart(kept, np.full(len(kept), units.size, np.int64))
                if not support(moved):
                    units.use(kept)
    y = Labels(shape, _varying(columns), _varying(map(op, x.inert)), x.parameter, uniform=x.uniform)
    units.record(mixing.moved, (x, y), {}, reason)
    return y


def pin(units: UnitGraph, x: Labels, reason: str, dims: Iterable[int] | None = None) -> Labels:
    """The labels for an op to which the places along `dims` (by default all) matter: these dims become inert.

    Units that lie along `dims` only are pinned. Units that lie along other dimensions too are told apart by their
    places along `dims`. A row of them, which is all places along `dims` at one place elsewhere, moves as a whole.
    """
    if 0 in x.shape:
        return x
    pinned = set(range(x.ndim)) if dims is None else {d % x.ndim for d in dims}
    places = [axis_column(x.shape, d) for d in sorted(pinned) if x.shape[d] > 1]
    columns, factors = [], [*places]
    for column in x.columns:
        along = set(support(column))
        if pinned.isdisjoint(along):
            columns.append(column)
        elif along <= pinned:
            units.pin(distinct(core(column, support(column)).numpy()), reason)
        elif relate_inert(units, column, places, reason, x.inert):
            factors.append(column)
        else:
            rows, padded = _reduce_column(units, column, places, pinned, reason, ordered=True)
            columns += [] if rows is None else [rows]
            factors += [] if padded is None else [padded]
    return Labels(x.shape, tuple(columns), prune((*x.inert, *factors), columns))
