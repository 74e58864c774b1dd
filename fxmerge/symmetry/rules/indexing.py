"""Ops that look positions up: movements where the index is a constant, else the indexed dimensions are pinned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxmerge.symmetry.columns import Shape, core, shrink, support
from fxmerge.symmetry.labels import Labels, inert, move, pin, reduce
from fxmerge.symmetry.rules.movement import write
from fxmerge.symmetry.rules.registry import Site, rule

Index = Labels | Tensor


@rule("index", "_unsafe_index")
def index(at: Site, x: Labels | Tensor, indices: Sequence[Index | None]) -> Labels:
    if not any(isinstance(i, Labels) for i in indices):
        fixed = [i.to("cpu") if isinstance(i, Tensor) else None for i in indices]
        return _chosen(at, x, lambda c: torch.ops.aten.index(c, fixed))
    labels, dims = at.labels(x), [d for d, i in enumerate(indices) if i is not None]
    chosen = [at.labels(i) for i in indices if i is not None]
    found = torch.broadcast_shapes(*(i.shape for i in chosen))
    looked_up = (*labels.shape[: dims[0]], *found, *labels.shape[dims[0] + 1 :])
    # As many positions as there are may be looked up, or be all those that a mask of data took this time.
    if len(dims) == 1 and (at.shape != looked_up or looked_up == labels.shape):
        return _mask(at, labels, dims[0], chosen[0])
    return _look_up(at, labels, dims, chosen)


def _chosen(at: Site, x: Labels | Tensor, op: Callable[[Tensor], Tensor]) -> Labels:
    """What lies along several dimensions of x may meet at the positions that are chosen."""
    y = at.move(at.labels(x), op)
    return replace(at.join(y, y), parameter=y.parameter)


def _mask(at: Site, x: Labels, dim: int, mask: Labels) -> Labels:
    """Of the positions along the dimensions of a mask, those that it names become one dimension."""
    reason, masked = f"{at.name}: indexed by data", range(dim, dim + mask.ndim)
    pin(at.units, mask, reason)
    kept = reduce(at.units, pin(at.units, x, reason, masked), masked, at.name)
    one = tuple(1 if d == dim else n for d, n in enumerate(at.shape))
    return at.join(kept.reshape(one).expand(at.shape), inert(at.shape, [dim]))


@rule("index_select")
def index_select(at: Site, x: Labels | Tensor, dim: int, chosen: Index) -> Labels:
    return index(at, x, [None] * (dim % len(x.shape)) + [chosen])


@rule("embedding")
def embedding(at: Site, weight: Labels | Tensor, chosen: Index, *args: Any, **kwargs: Any) -> Labels:
    return index(at, weight, [chosen])


def _look_up(at: Site, x: Labels, dims: Sequence[int], chosen: Sequence[Labels]) -> Labels:
    """`dims` of x, indexed by data, are replaced by the dimensions of the indices, which say where values differ."""
    x = pin(at.units, x, f"{at.name}: indexed by data", dims)
    rank = max(len(i.shape) for i in chosen)
    first = dims[0] if list(dims) == list(range(dims[0], dims[-1] + 1)) else 0
    after = len(at.shape) - first - rank
    rest = tuple(1 if first <= d < first + rank else n for d, n in enumerate(at.shape))
    y = reduce(at.units, x, dims, at.name).reshape(rest).expand(at.shape)
    for i in chosen:
        y = at.join(y, i.reshape((*i.shape, *(1,) * after)))
    return y


@rule("gather")
def gather(at: Site, x: Labels | Tensor, dim: int, chosen: Index, **kwargs: Any) -> Labels:
    labels = at.labels(x)
    dim %= max(labels.ndim, 1)
    if isinstance(chosen, Tensor):
        fixed = chosen.to("cpu")
        return _chosen(at, labels, lambda c: torch.gather(c, dim, fixed))
    # Of the other dimensions, only the first so many positions are read.
    read = (*at.shape[:dim], labels.shape[dim], *at.shape[dim + 1 :])
    part = tuple(slice(0, n) for n in read)
    seen = move(at.units, labels, lambda c: c[part], read, at.name)
    taken = reduce(at.units, pin(at.units, seen, f"{at.name}: indexed by data", [dim]), [dim], at.name, keepdim=True)
    return at.join(taken, chosen, at.shape)


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "index_reduce")
def scatter(
    at: Site,
    x: Labels | Tensor,
    dim: int,
    chosen: Index,
    source: Labels | Tensor | float = 0.0,
    *args: Any,
    **kwargs: Any,
) -> Labels:
    """What is written into x along `dim`, at constant places, or at places given by data."""
    x, source = at.labels(x), at.labels(source)
    dim %= max(x.ndim, 1)
    if isinstance(chosen, Tensor) and x.ndim:
        copies = at.target._schema.name in _COPIES and "reduce" not in kwargs
        whole = chosen.to("cpu")
        if chosen.ndim < x.ndim or "index_" in at.target._schema.name:  # One place for all of a row.
            lines = [1 if d != dim else chosen.numel() for d in range(x.ndim)]
            whole = whole.reshape(lines).expand([n if d != dim else -1 for d, n in enumerate(x.shape)])
        written = _scatter_at(at, x, dim, whole, source, copies, kwargs.get("include_self", True))
        if written is not None:
            return written
    return _scatter_by_data(at, x, dim, at.labels(chosen), source)


_COPIES = ("aten::scatter", "aten::index_copy", "aten::index_fill")
"""Ops that leave nothing of what they write over; the others add it up, or reduce it in another way."""


def _scatter_at(
    at: Site, x: Labels, dim: int, chosen: Tensor, source: Labels, copies: bool, include_self: bool
) -> Labels | None:
    """What is written to constant places, given by a tensor of as many dimensions as x."""
    chosen = shrink(torch.arange(x.shape[dim])[chosen])
    # Along all other dimensions, what is written is all that there is, and to the same places.
    dims = [d for d in range(x.ndim) if d == dim or d in support(chosen) or chosen.shape[d] < x.shape[d]]
    sizes = [x.shape[d] for d in dims]
    places = torch.arange(math.prod(sizes)).reshape(sizes).gather(dims.index(dim), core(chosen, dims))
    if source.ndim == x.ndim:
        shape = tuple(chosen.shape)
        if source.shape != shape:
            source = move(at.units, source, lambda c: c[tuple(map(slice, shape))], shape, at.name)
        rest = [d for d in range(x.ndim) if d not in dims]
        source = source.map(lambda c: c.permute([*dims, *rest]), tuple(shape[d] for d in (*dims, *rest)))
    return _write_at(at, x, dims, places, 0, source, copies, include_self)


def _write_at(
    at: Site,
    x: Labels,
    dims: Sequence[int],
    places: Tensor,
    first: int,
    source: Labels,
    copies: bool,
    include_self: bool = True,
) -> Labels | None:
    """What `fxmerge.symmetry.rules.movement.write` gives; None where one of several values for a place is lost."""
    if copies:
        if source.ndim == 0:
            places, first = places.unique(), 0
        if len(places.unique()) < places.numel():
            return None
    rest = [n for d, n in enumerate(x.shape) if d not in dims]
    source = source.expand((*rest[:first], *places.shape, *rest[first:]))
    return write(at, x, source, dims, places, first, replaces=copies or not include_self)


def _scatter_by_data(at: Site, x: Labels, dim: int, chosen: Labels, source: Labels) -> Labels:
    """Of x, and of what is written into it along `dim`, the other dimensions move on."""
    reason = f"{at.name}: indexed by data"
    y = pin(at.units, x, reason, [dim])
    written = [source] if chosen.ndim < x.ndim else [source, chosen]
    pin(at.units, chosen, reason, [dim] if chosen.ndim == x.ndim else None)
    for part in written:
        if part.ndim == x.ndim:
            part = reduce(at.units, pin(at.units, part, reason, [dim]), [dim], at.name, keepdim=True)
            if any(n not in (1, m) for n, m in zip(part.shape, x.shape, strict=True)):
                part = replace(pin(at.units, part, reason), shape=x.shape, columns=(), inert=())
                y = pin(at.units, y, reason)
        y = at.join(y, part)
    return at.join(y, inert(at.shape, [dim]))


@rule("index_put", "_unsafe_index_put")
def index_put(
    at: Site, x: Labels | Tensor, indices: Sequence[Index | None], values: Labels | Tensor, accumulate: bool = False
) -> Labels:
    """What is written at constant places, where a mask of data is true, or at places given by data."""
    labels, source = at.labels(x), at.labels(values)
    if isinstance(values, Tensor) and not source.inert:
        source = Labels(())  # One value for all places.
    chosen = [i for i in indices if i is not None]
    if not any(isinstance(i, Labels) for i in chosen):
        dims, places, first = _places_of_indices(labels.shape, indices)
        written = _write_at(at, labels, dims, places, first, source, not accumulate)
        if written is not None:
            return written
    after = labels.ndim - len(indices) + 1 - len(chosen[0].shape)
    if len(chosen) == 1 and isinstance(chosen[0], Labels) and chosen[0].is_mask and source.ndim <= after:
        # Wherever it is true the same is written: pointwise.
        return at.join(at.join(labels, chosen[0].reshape((*chosen[0].shape, *(1,) * after))), source)
    return _put_by_data(at, labels, indices, source)


def _places_of_indices(shape: Shape, indices: Sequence[Index | None]) -> tuple[list[int], Tensor, int]:
    """The dimensions that constant indices stand for, the places over them, and where these lie in what is read."""
    full: list[Any] = []
    for i in indices:
        is_mask = isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
        full += i.to("cpu").nonzero(as_tuple=True) if is_mask else [i if i is None else i.to("cpu")]  # type: ignore[union-attr]
    dims = [d for d, i in enumerate(full) if i is not None]
    sizes = [shape[d] for d in dims]
    places = torch.arange(math.prod(sizes)).reshape(sizes)[tuple(full[d] for d in dims)]
    return dims, places, dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0


def _put_by_data(at: Site, x: Labels, indices: Sequence[Index | None], source: Labels) -> Labels:
    """As a scatter: the leading dimensions, which are indexed, stay, and the others move on."""
    reason = f"{at.name}: indexed by data"
    chosen = [at.labels(i) for i in indices if i is not None]
    for i in chosen:
        pin(at.units, i, reason)
    # An index of numbers stands for one dimension, a mask for as many as it has.
    count = max(len(indices), *(i.ndim for i in chosen))
    if any(i is None for i in indices) or source.shape[source.ndim - x.ndim + count :] != x.shape[count:]:
        count = x.ndim
    y = pin(at.units, x, reason, range(count))
    lead = range(source.ndim - x.ndim + count)
    written = reduce(at.units, pin(at.units, source, reason, lead), lead, at.name)
    return at.join(at.join(y, written), inert(at.shape, range(count)))


@rule("masked_scatter")
def masked_scatter(at: Site, x: Labels | Tensor, mask: Index, source: Labels | Tensor) -> Labels:
    """The entries of the source, in their order, are put where the mask is true."""
    labels, source = at.labels(x).expand(at.shape), at.labels(source)
    if isinstance(mask, Tensor):
        chosen = mask.to("cpu").expand(at.shape)
        count = int(chosen.sum())
        entries = source.reshape((math.prod(source.shape),))
        return index_put(at, labels, [chosen], move(at.units, entries, lambda c: c[:count], (count,), at.name))
    for operand in (labels, mask, source):
        pin(at.units, operand, f"{at.name}: indexed by data")
    return inert(at.shape)
