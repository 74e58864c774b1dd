"""Ops that rearrange or assemble positions: the op itself is run on the columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxmerge.symmetry import mixing, weighing
from fxmerge.symmetry.columns import Shape, axis_column, compact, core, shrink, spread, support
from fxmerge.symmetry.deferred import Deferred, Index
from fxmerge.symmetry.labels import MAX_INERT, Labels, diagonals, move, prune, reduce
from fxmerge.symmetry.rules.registry import Site, is_zero, rule
from fxmerge.symmetry.units import NOTHING, distinct


@rule(
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "squeeze", "unsqueeze"),
    lifts="views",
    mixes=True,
    weighs=True,
)
def view(at: Site, x: Labels, *args: Any) -> Labels:
    return diagonals(at.units, x.reshape(at.shape), at.name)


@rule("expand", "expand_as", "broadcast_to", lifts="aligns", mixes=True, weighs=True)
def expand(at: Site, x: Labels, *args: Any, **kwargs: Any) -> Labels:
    return x.expand(at.shape)


@rule(
    *("permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "numpy_T", "mT", "adjoint"),
    *("select", "slice", "narrow", "flip", "fliplr", "flipud", "roll", "rot90", "unfold"),
    *("repeat", "repeat_interleave", "tile", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
    *("native_channel_shuffle", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
    *("replication_pad1d", "replication_pad2d", "replication_pad3d", "as_strided", "fft_fftshift", "fft_ifftshift"),
    lifts="moves",
    mixes=True,
    weighs=True,
)
def movement(at: Site, x: Labels, *args: Any, **kwargs: Any) -> Labels:
    return move(at.units, x, on_columns(at.target, *args, **kwargs), at.shape, at.name)


def on_columns(target: Any, *args: Any, **kwargs: Any) -> Callable[[Tensor], Any]:
    """The op as it is run on the columns."""

    def op(column: Tensor) -> Any:
        try:
            return target(column, *args, **kwargs)
        except (NotImplementedError, RuntimeError):  # No integer kernel; unit numbers are exact in float64.
            return target(column.double(), *args, **kwargs).long()

    return op


@rule("im2col")
def windows(at: Site, x: Labels, *args: Any, **kwargs: Any) -> Labels:
    """A movement that fills in zeros: these are `NOTHING` in a column, and no number in an inert one."""
    return movement(at, replace(x, inert=_beside_zeros(x)), *args, **kwargs)


def _beside_zeros(x: Labels) -> tuple[Tensor, ...]:
    """The inert columns of x without the number 0, and one of ones: filling in zeros tells what is filled in apart."""
    ones = torch.ones((1,) * x.ndim, dtype=torch.int64).expand(x.shape)
    return (ones, *((compact(f) + 1).expand(x.shape) for f in x.inert))


@rule("diagonal")
def diagonal(at: Site, x: Labels, *args: Any, **kwargs: Any) -> Labels:
    """Two dimensions become one: what lies along them meets."""
    y = movement(at, x, *args, **kwargs)
    return at.join(y, y)


@rule(
    *("split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_chunk", "unsafe_split"),
    lifts="moves",
    mixes=True,
    weighs=True,
)
def split(at: Site, x: Labels, *args: Any, **kwargs: Any) -> list[Labels]:
    def piece(i: int) -> Callable[[Tensor], Tensor]:
        return lambda column: at.target(column, *args, **kwargs)[i]

    return [move(at.units, x, piece(i), shape, f"{at.name}[{i}]") for i, shape in enumerate(at.shape)]


MOVEMENTS = (view, movement, split)
"""The rules of the ops that do no more than rearrange their first operand."""


@rule("tril", "triu")
def triangle(at: Site, x: Labels, *args: Any, **kwargs: Any) -> Labels:
    """A product with a constant mask over the last two dimensions."""
    return at.join(x, at.target(torch.ones(x.shape[-2:]), *args, **kwargs))


def assemble(
    at: Site, parts: Sequence[Labels | Tensor], combine: Callable[[list[Tensor]], Tensor], dims: Sequence[int]
) -> Labels:
    """The labels of a tensor put together from parts by `combine`, which acts along `dims` only.

    A column of the result takes one column of each part; positions from a part that has none of its
    kind, and is not uniform along it, get the unit `NOTHING`. An inert column tells the parts apart, since
    one unit, or equal constants, may come in through two of them; parts that are the same tensor are alike.
    """

    parts = _under_one_name(at, parts, dims)
    filled = [p for p in parts if not is_zero(p)]
    at.mix(mixing.assembled, *filled, dims=dims)
    at.weigh(weighing.tied, *filled, dims=dims)

    def kind(column: Tensor) -> tuple[int, ...]:
        return tuple(d for d in support(column) if d not in dims)

    labels, keys = _lend([at.labels(p) for p in parts], kind), [_value(p) for p in parts]

    def build(pieces: list[Tensor]) -> Tensor:
        used = set(dims).union(*(support(p) for p in pieces))
        for d in range(pieces[0].ndim):
            if d not in used:
                pieces = [p.narrow(d, 0, 1) for p in pieces]
        return shrink(combine(pieces).expand(at.shape))

    def gather(columns: list[tuple[Tensor, ...]], fill: int, *, apart: bool) -> list[Tensor]:
        built = []
        for k in dict.fromkeys(kind(c) for part in columns for c in part):
            along = {*k, *dims}
            if apart and math.prod(at.shape[d] for d in along) > MAX_INERT and along.isdisjoint(with_units):
                built += [axis_column(at.shape, d) for d in along]
                continue
            alike = [[c for c in part if kind(c) == k] for part in columns]
            for i in range(max(map(len, alike))):
                pieces, base, bases = [], 0, dict[object, int]()
                for key, label, part in zip(keys, labels, alike, strict=True):
                    piece = part[i] if i < len(part) else torch.full((1,) * label.ndim, fill).expand(label.shape)
                    small = compact(piece)
                    move_on = apart and any(d in support(piece) for d in dims)
                    pieces.append((small + bases.setdefault(key, base)).expand(piece.shape) if move_on else piece)
                    base += int(small.max()) + 1 if small.numel() else 0
                built.append(build(pieces))
        return [c for c in built if support(c)]

    with_units: set[int] = set()
    columns = gather([x.columns for x in labels], NOTHING, apart=False)
    with_units |= {d for c in columns for d in support(c)}
    factors = gather([x.inert for x in labels], 0, apart=True)
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    marks = [torch.full((1,) * x.ndim, numbers[key]).expand(x.shape) for key, x in zip(keys, labels, strict=True)]
    factors.append(build(marks))
    return Labels(at.shape, tuple(columns), prune([f for f in factors if support(f)], columns))


def _under_one_name(at: Site, parts: Sequence[Labels | Tensor], dims: Sequence[int]) -> list[Labels | Tensor]:
    """Parts in which no unit has two names. Units that would have two change alike in all parts; those that lie along
    the dimensions where these are put together change neither their signs nor their scales."""
    columns = [c for p in parts if isinstance(p, Labels) for c in p.columns]
    ids = distinct(np.concatenate([np.zeros(0, np.int64), *(compact(c).numpy().reshape(-1) for c in columns)]))
    if len(distinct(at.units.first_names(ids))) == len(ids):
        return list(parts)

    def first(column: Tensor) -> Tensor:
        own = support(column)
        return spread(torch.from_numpy(at.units.first_names(core(column, own).numpy())), tuple(column.shape), own)

    named = {id(p): replace(p, columns=tuple(map(first, p.columns))) for p in parts if isinstance(p, Labels)}
    if all(set(dims).isdisjoint(support(c)) for c in columns):
        for part in (p for p in parts if isinstance(p, Labels)):
            at.weigh(weighing.tied, part, named[id(part)])
    else:
        at.weigh(weighing.still, *parts)
    return [named.get(id(p), p) for p in parts]


def _lend(parts: list[Labels], kind: Callable[[Tensor], tuple[int, ...]]) -> list[Labels]:
    """Gives a column that all parts with one of its kind share to the parts that are uniform along it: padding."""
    for k in {kind(c) for x in parts for c in x.columns} - {()}:
        columns = [c for x in parts for c in x.columns if kind(c) == k]
        shared = core(columns[0], k)
        if all(support(c) == k and torch.equal(core(c, k), shared) for c in columns):
            parts = [
                replace(x, columns=(*x.columns, spread(shared, x.shape, k)))
                if set(k).isdisjoint(d for c in (*x.columns, *x.inert) for d in support(c))
                else x
                for x in parts
            ]
    return parts


def _value(part: Labels | Tensor) -> object:
    """The value of a constant part that has only one, else which tensor it is: every node has labels of its own."""
    if isinstance(part, Tensor) and part.numel() and bool((part == part.reshape(-1)[0]).all()):
        return part.reshape(-1)[0].item()
    return "tensor", id(part)


@rule("cat", "concat", "concatenate", takes=True, mixes=True, weighs=True)
def cat(at: Site, tensors: Sequence[Labels | Deferred | Tensor], dim: int = 0) -> Labels | Index:
    numbers = [t for t in tensors if isinstance(t, Index)]
    if len(numbers) == len(tensors) and len({i.count for i in numbers}) == 1:
        one = replace(at, shape=(numbers[0].count, *at.shape))
        return Index.of(in_a_row(one, [i.hot for i in numbers], dim % len(at.shape) + 1))
    return in_a_row(at, [at.labels(t) if isinstance(t, Deferred) else t for t in tensors], dim)


def in_a_row(at: Site, tensors: Sequence[Labels | Tensor], dim: int) -> Labels:
    """The labels of tensors one behind another along a dimension."""
    dim %= len(at.shape)
    parts = [t for t in tensors if tuple(t.shape) != (0,)]
    return assemble(at, parts, lambda columns: torch.cat(columns, dim), [dim])


@rule("stack", mixes=True, weighs=True)
def stack(at: Site, tensors: Sequence[Labels | Tensor], dim: int = 0) -> Labels:
    dim %= len(at.shape)
    one: Shape = (*at.shape[:dim], 1, *at.shape[dim + 1 :])
    thin = {id(t): t.reshape(one) for t in tensors}
    return in_a_row(at, [thin[id(t)] for t in tensors], dim)


@rule("constant_pad_nd", "pad", mixes=True, weighs=True)
def pad(at: Site, x: Labels, widths: Sequence[int], *args: Any) -> Labels:
    """Constant padding is a cat with constants, a negative width a slice; other modes are movements."""
    mode, value = (args[0], (*args[1:], None)[0]) if args and isinstance(args[0], str) else ("constant", (*args, 0)[0])
    if mode != "constant":
        return movement(at, x, list(widths), *args)
    for i in range(len(widths) // 2):
        dim = x.ndim - 1 - i
        before, after = widths[2 * i], widths[2 * i + 1]
        if before < 0 or after < 0:
            kept = x.shape[dim] + min(before, 0) + min(after, 0)
            shape = (*x.shape[:dim], kept, *x.shape[dim + 1 :])
            x = move(at.units, x, partial(torch.narrow, dim=dim, start=max(-before, 0), length=kept), shape, at.name)
        if before > 0 or after > 0:
            # In one cat, so that the constants on both sides are alike.
            one = torch.full((1,) * x.ndim, float(value or 0))
            fill = [one.expand(*x.shape[:dim], max(n, 0), *x.shape[dim + 1 :]) for n in (before, after)]
            parts = [p for p in (fill[0], x, fill[1]) if p.shape[dim]]
            shape = (*x.shape[:dim], sum(p.shape[dim] for p in parts), *x.shape[dim + 1 :])
            x = in_a_row(Site(at.units, at.name, at.target, shape), parts, dim)
    return x


def write(
    at: Site,
    x: Labels | Tensor,
    source: Labels | Tensor,
    dims: Sequence[int],
    places: Tensor,
    first: int,
    *,
    replaces: bool,
) -> Labels:
    """The labels of x with a source written into it, or added up with it, at places that are constants.

    Arguments:
        dims: the dimensions of x that are indexed, in order.
        places: for every position of the source along its dimensions from `first` on, as many as this has, the place in
            x: its number over `dims`. The other dimensions of the source are those of x.
        replaces: whether x is lost where something is written; else it is one more of what is added up.
    """
    labels, shape = at.labels(x), at.shape
    sizes = tuple(shape[d] for d in dims)
    rest = [d for d in range(len(shape)) if d not in dims]
    flat = places.reshape(-1)
    if not len(flat):
        return labels
    count = torch.bincount(flat, minlength=math.prod(sizes))
    most = int(count.max())
    # For every place the positions of the source that are written there, and the number of all where there are fewer.
    order = flat.argsort(stable=True)
    table = torch.full((len(count), most), len(flat))
    table[flat[order], torch.arange(len(flat)) - (count.cumsum(0) - count)[flat[order]]] = order
    axes = [dims.index(d) if d in dims else len(dims) + 1 + rest.index(d) for d in range(len(shape))]

    along = range(first, first + places.ndim)

    def placed(column: Tensor) -> Tensor:
        depends = {*along, *support(column)}
        thin = column[tuple(slice(None) if d in depends else slice(0, 1) for d in range(column.ndim))]
        thin = thin.movedim(tuple(along), tuple(range(places.ndim)))
        others = thin.shape[places.ndim :]
        entries = torch.cat([thin.reshape(len(flat), *others), torch.zeros(1, *others, dtype=torch.int64)])
        # Zeros take on a column that is the same for all that is written.
        taken = torch.zeros_like(table) if set(support(column)).isdisjoint(along) else table
        return entries[taken].reshape(*sizes, most, *others).permute(*axes, len(dims)).expand(*shape, most)

    part = at.labels(source)
    added = Labels((*shape, most), part.columns, _beside_zeros(part)).map(placed, (*shape, most))
    added = reduce(at.units, added, [-1], at.name)
    if not replaces:
        return at.join(labels, added)
    mask = (count > 0).reshape([shape[d] if d in dims else 1 for d in range(len(shape))])
    _overwritten(at, labels, mask)
    whole = labels if labels.columns else x  # Units of a diagonal are not to be made twice.
    written = assemble(at, [whole, added], lambda columns: torch.where(mask, columns[1], columns[0]), dims)
    return at.join(written, written)


def _overwritten(at: Site, x: Labels, mask: Tensor) -> None:
    """Tells the units that are written over apart from those that are left somewhere."""
    for column in x.columns:
        left = torch.where(mask, -1, compact(column))
        kept = distinct(left[left >= 0].numpy())
        if len(kept) < len(distinct(core(column, support(column)).numpy())):
            at.units.segment(kept, f"{at.name}: overwritten")


@rule("col2im")
def fold(at: Site, x: Labels, size: Sequence[int], *windows: Sequence[int]) -> Labels:
    """What lies under each window is added up at the places that it was taken from."""
    *lead, channels, height, width = at.shape
    numbers = torch.arange(1.0, height * width + 1, dtype=torch.float64).reshape(1, 1, height, width)
    places = torch.ops.aten.im2col(numbers, *windows)[0].long()  # Those outside are all at a place 0 of their own.
    open_ = replace(at, shape=(*lead, channels, height * width + 1))
    parts = x.reshape((*lead, channels, *places.shape))
    added = write(
        open_, torch.zeros(()).expand(open_.shape), parts, [len(lead) + 1], places, len(lead) + 1, replaces=False
    )
    inside = (*lead, channels, height * width)
    return move(at.units, added, lambda c: c[..., 1:], inside, at.name).reshape(at.shape)


@rule("slice_scatter")
def scatter_slice(at: Site, x: Labels | Tensor, source: Labels | Tensor, dim: int = 0, *args: Any) -> Labels:
    dim %= len(at.shape)
    places = torch.ops.aten.slice(torch.arange(at.shape[dim]), 0, *args)
    return write(at, x, source, [dim], places, dim, replaces=True)


@rule("select_scatter")
def scatter_select(at: Site, x: Labels | Tensor, source: Labels | Tensor, dim: int, index: int) -> Labels:
    dim %= len(at.shape)
    return write(at, x, source, [dim], torch.arange(at.shape[dim])[index], dim, replaces=True)


@rule("diagonal_scatter")
def scatter_diagonal(
    at: Site, x: Labels | Tensor, source: Labels | Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Labels:
    """A diagonal is the last dimension of the source. Along it, two dimensions of x meet."""
    dim1, dim2 = (d % len(at.shape) for d in (dim1, dim2))
    dims = sorted((dim1, dim2))
    sizes = tuple(at.shape[d] for d in dims)
    places = torch.arange(math.prod(sizes)).reshape(sizes).diagonal(offset, dims.index(dim1), dims.index(dim2))
    return write(at, x, source, dims, places, len(at.shape) - 2, replaces=True)
