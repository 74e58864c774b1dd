"""Ops that rearrange or assemble positions: the op itself is run on the columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxmerge.symmetry.columns import Shape, axis_column, compact, core, shrink, spread, support
from fxmerge.symmetry.labels import MAX_INERT, Labels, diagonals, move, prune
from fxmerge.symmetry.rules.registry import Site, rule
from fxmerge.symmetry.units import NOTHING, distinct


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "squeeze", "unsqueeze", lifts="views")
def view(at: Site, x: Labels, *args: Any) -> Labels:
    return diagonals(at.units, x.reshape(at.shape), at.name)


@rule("expand", "expand_as", "broadcast_to", lifts="aligns")
def expand(at: Site, x: Labels, *args: Any, **kwargs: Any) -> Labels:
    return x.expand(at.shape)


@rule(
    *("permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "numpy_T", "mT", "adjoint"),
    *("select", "slice", "narrow", "flip", "fliplr", "flipud", "roll", "rot90", "unfold"),
    *("repeat", "repeat_interleave", "tile", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
    *("native_channel_shuffle", "im2col", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
    *("replication_pad1d", "replication_pad2d", "replication_pad3d", "as_strided"),
    lifts="moves",
)
def movement(at: Site, x: Labels, *args: Any, **kwargs: Any) -> Labels:
    def op(column: Tensor) -> Tensor:
        moved: Tensor
        try:
            moved = at.target(column, *args, **kwargs)
        except (NotImplementedError, RuntimeError):  # No integer kernel; unit numbers are exact in float64.
            moved = at.target(column.double(), *args, **kwargs).long()
        return moved

    return move(at.units, x, op, at.shape, at.name)


@rule("diagonal")
def diagonal(at: Site, x: Labels, *args: Any, **kwargs: Any) -> Labels:
    """Two dimensions become one: what lies along them meets."""
    y = movement(at, x, *args, **kwargs)
    return at.join(y, y)


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_chunk", "unsafe_split", lifts="moves")
def split(at: Site, x: Labels, *args: Any, **kwargs: Any) -> list[Labels]:
    def piece(i: int) -> Callable[[Tensor], Tensor]:
        return lambda column: at.target(column, *args, **kwargs)[i]

    return [move(at.units, x, piece(i), shape, f"{at.name}[{i}]") for i, shape in enumerate(at.shape)]


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
    one unit, or equal constants, may come in through two of them; parts that are the same constant are alike.
    """

    def kind(column: Tensor) -> tuple[int, ...]:
        return tuple(d for d in support(column) if d not in dims)

    labels = _lend([at.labels(p) for p in parts], kind)

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
                pieces, base = [], 0
                for label, part in zip(labels, alike, strict=True):
                    piece = part[i] if i < len(part) else torch.full((1,) * label.ndim, fill).expand(label.shape)
                    small = compact(piece)
                    move_on = apart and any(d in support(piece) for d in dims)
                    pieces.append((small + base).expand(piece.shape) if move_on else piece)
                    base += int(small.max()) + 1 if small.numel() else 0
                built.append(build(pieces))
        return [c for c in built if support(c)]

    with_units: set[int] = set()
    columns = gather([x.columns for x in labels], NOTHING, apart=False)
    with_units |= {d for c in columns for d in support(c)}
    factors = gather([x.inert for x in labels], 0, apart=True)
    uniform: dict[object, int] = {}
    marks = [
        torch.full((1,) * x.ndim, uniform.setdefault(_value(p), len(uniform)))
        for p, x in zip(parts, labels, strict=True)
    ]
    factors.append(build([m.expand(x.shape) for m, x in zip(marks, labels, strict=True)]))
    return Labels(at.shape, tuple(columns), prune([f for f in factors if support(f)], columns))


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
    """The value of a constant part that has only one, else something equal to itself only."""
    if isinstance(part, Tensor) and part.numel() and bool((part == part.reshape(-1)[0]).all()):
        return part.reshape(-1)[0].item()
    return object()


@rule("cat", "concat", "concatenate")
def cat(at: Site, tensors: Sequence[Labels | Tensor], dim: int = 0) -> Labels:
    parts = [t for t in tensors if tuple(t.shape) != (0,)]
    dim %= len(at.shape)
    return assemble(at, parts, lambda columns: torch.cat(columns, dim), [dim])


@rule("stack")
def stack(at: Site, tensors: Sequence[Labels | Tensor], dim: int = 0) -> Labels:
    dim %= len(at.shape)
    one: Shape = (*at.shape[:dim], 1, *at.shape[dim + 1 :])
    return cat(at, [t.reshape(one) for t in tensors], dim)


@rule("constant_pad_nd", "pad")
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
            x = cat(Site(at.units, at.name, at.target, shape), parts, dim)
    return x


def _overwritten(
    at: Site, x: Labels | Tensor, source: Shape, dim: int, write: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Tells the units that an op writes over apart from those that it leaves as they are."""
    for column in at.labels(x).columns:
        along = {*support(column), dim}
        thin = column[tuple(slice(None) if d in along else slice(0, 1) for d in range(column.ndim))]
        left = write(thin, torch.full([n if d in along else 1 for d, n in enumerate(source)], -1))
        kept = distinct(left[left >= 0].numpy())
        if len(kept) < len(distinct(core(column, support(column)).numpy())):
            at.units.segment(kept, f"{at.name}: overwritten")


@rule("slice_scatter")
def scatter_slice(at: Site, x: Labels | Tensor, source: Labels | Tensor, dim: int = 0, *args: Any) -> Labels:
    def write(into: Tensor, part: Tensor) -> Tensor:
        written: Tensor = at.target(into, part, dim, *args)
        return written

    dim %= len(at.shape)
    _overwritten(at, x, tuple(source.shape), dim, write)
    return assemble(at, [x, source], lambda c: write(c[0], c[1]), [dim])


@rule("select_scatter")
def scatter_select(at: Site, x: Labels | Tensor, source: Labels | Tensor, dim: int, index: int) -> Labels:
    def write(into: Tensor, part: Tensor) -> Tensor:
        return torch.select_scatter(into, part.select(dim, 0), dim, index)

    dim %= len(at.shape)
    thin: Shape = (*at.shape[:dim], 1, *at.shape[dim + 1 :])
    _overwritten(at, x, thin, dim, write)
    return assemble(at, [x, source.reshape(thin)], lambda c: write(c[0], c[1]), [dim])
