"""Ops that look positions up: movements where the index is a constant, else the indexed dimensions are pinned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxmerge.symmetry import mixing, weighing
from fxmerge.symmetry.columns import Shape, core, shrink, support
from fxmerge.symmetry.deferred import Chosen, Deferred, Index, Order, look_up, sorted_by, take_along
from fxmerge.symmetry.labels import Labels, inert, move, pin, reduce
from fxmerge.symmetry.rules.lifting import simplest
from fxmerge.symmetry.rules.movement import assemble, write
from fxmerge.symmetry.rules.registry import Site, rule

Operand = Labels | Deferred | Tensor


@rule("index", "_unsafe_index", takes=True, mixes=True, weighs=True)
def index(at: Site, x: Operand, indices: Sequence[Operand | None]) -> Labels | Deferred:
    if not isinstance(x, Index):
        indices = [i.names() if isinstance(i, Order) and i.names_places else i for i in indices]
    named = [(d, i) for d, i in enumerate(indices) if isinstance(i, Index)]
    if len(named) == 1 and all(i is None for d, i in enumerate(indices) if d != named[0][0]):
        table = _named_part(at, at.labels(x), *named[0])
        if table is not None:
            return simplest(at, look_up(table, *named[0]))
    plain = [at.labels(i) if isinstance(i, Deferred) else i for i in indices]
    if not isinstance(x, Index):
        return _index(at, x if isinstance(x, Tensor) else at.labels(x), plain)
    if any(_is_mask(at, d) for d, i in enumerate(indices) if i is not None):
        return _index(at, at.labels(x), plain)
    if len(indices) == 1 and isinstance(indices[0], Order):
        ordered = sorted_by(at.units, x, indices[0])
        if ordered is not None:
            return ordered
    hot = _index(replace(at, shape=(x.count, *at.shape)), x.hot, [None, *plain], first=1)
    return Index.of(hot)


def _index(at: Site, x: Labels | Tensor, indices: Sequence[Labels | Tensor | None], first: int = 0) -> Labels:
    """`first` is how many dimensions there are before those that the op knows of."""
    if not any(isinstance(i, Labels) for i in indices):
        fixed = [i.to("cpu") if isinstance(i, Tensor) else None for i in indices]
        if sum(i is not None for i in fixed) > 1:  # Units along two dimensions may meet.
            at.weigh(weighing.still, x)
        return _chosen(at, x, lambda c: torch.ops.aten.index(c, fixed))
    labels = at.labels(x)
    dims = [d + first for d, i in enumerate(indices) if i is not None]
    at.mix(mixing.looked_up, labels, dims=dims)
    at.weigh(weighing.fixed, labels, dims=dims)
    chosen = {d: i for d, i in enumerate(_without_masks(indices)) if i is not None}
    found = torch.broadcast_shapes(*(i.shape for i in chosen.values()))
    if len(chosen) == 1:
        ((dim, by),) = chosen.items()
        looked_up = (*labels.shape[:dim], *found, *labels.shape[dim + 1 :])
        if at.shape != looked_up or _is_mask(at, dim - first):
            return _mask(at, labels, dim, at.labels(by))
    return _look_up(at, labels, chosen, tuple(found))


def _chosen(at: Site, x: Labels | Tensor, op: Callable[[Tensor], Tensor]) -> Labels:
    """What lies along several dimensions of x may meet at the positions that are chosen."""
    y = at.move(at.labels(x), op)
    return replace(at.join(y, y), parameter=y.parameter)


def _is_mask(at: Site, dim: int) -> bool:
    """Whether the index along a dimension may be one that takes the positions where it is true."""
    if at.target._schema.name not in ("aten::index", "aten::_unsafe_index"):
        return False
    chosen: Any = at.node.args[1][dim] if at.node is not None else None  # type: ignore[index]
    return not isinstance(chosen, fx.Node) or chosen.meta["val"].dtype in (torch.bool, torch.uint8)


def _mask(at: Site, x: Labels, dim: int, mask: Labels) -> Labels:
    """Of the positions along the dimensions of a mask, those that it names become one dimension."""
    reason, masked = f"{at.name}: indexed by data", range(dim, dim + mask.ndim)
    pin(at.units, mask, reason)
    kept = reduce(at.units, pin(at.units, x, reason, masked), masked, at.name)
    one = tuple(1 if d == dim else n for d, n in enumerate(at.shape))
    return at.join(kept.reshape(one).expand(at.shape), inert(at.shape, [dim]))


def _named_part(at: Site, table: Labels, dim: int, by: Index) -> Labels | None:
    """The part of a table that has an entry along `dim` for each unit that an index can name, None if there are too few
    entries."""
    size = table.shape[dim]
    if size <= by.count:
        return table if size == by.count else None
    shape = (*table.shape[:dim], by.count, *table.shape[dim + 1 :])
    return move(at.units, table, lambda c: c.narrow(dim, 0, by.count), shape, at.name)


@rule("index_select", takes=True, mixes=True, weighs=True)
def index_select(at: Site, x: Operand, dim: int, chosen: Operand) -> Labels | Deferred:
    return index(at, x, [None] * (dim % len(x.shape)) + [chosen])


@rule("one_hot", takes=True)
def one_hot(at: Site, x: Operand, classes: int = -1) -> Labels:
    """Numbers that name units become columns of these; others are compared with the number of each place."""
    if isinstance(x, Index) and 0 < x.count <= classes:
        hot = x.hot.map(lambda c: c.movedim(0, -1), (*x.shape, x.count))
        if classes == x.count:
            return hot
        return assemble(at, [hot, torch.zeros(*x.shape, classes - x.count)], lambda c: torch.cat(c, -1), [x.ndim])
    values = at.labels(x)
    return at.join(values.reshape((*values.shape, 1)), inert(at.shape, [len(at.shape) - 1]), at.shape)


@rule("embedding", takes=True, mixes=True, weighs=True)
def embedding(at: Site, weight: Operand, chosen: Operand, *args: Any, **kwargs: Any) -> Labels | Deferred:
    return index(at, weight, [chosen])


def _look_up(at: Site, x: Labels, chosen: Mapping[int, Labels | Tensor], found: Shape) -> Labels:
    """Some dimensions of x are replaced by those of the indices, `found`.

    Data that index a dimension pin it, and say where values differ. A constant that chooses places along one dimension
    of `found`, such as the number of each image or channel, moves its dimension there.
    """
    lines: dict[int, int] = {}
    for d, i in chosen.items():
        if isinstance(i, Tensor):
            places = shrink(i.expand(found) % x.shape[d])
            along = support(places)
            if len(along) == 1 and along[0] not in lines:
                lines[along[0]] = d
                shape = (*x.shape[:d], found[along[0]], *x.shape[d + 1 :])
                line = core(places, along)
                x = move(at.units, x, lambda c, d=d, i=line: c.index_select(d, i), shape, at.name)  # type: ignore[misc]
    data = [d for d in chosen if d not in lines.values()]
    x = reduce(at.units, pin(at.units, x, f"{at.name}: indexed by data", data), data, at.name, keepdim=True)
    first = min(chosen) if len(chosen) == max(chosen) - min(chosen) + 1 else 0
    rest = [d for d in range(x.ndim) if d not in chosen]
    order = [*rest[:first], *(lines.get(k) for k in range(len(found))), *rest[first:]]
    kept = [d for d in order if d is not None]
    y = x.map(lambda c: c.permute([*kept, *data]), tuple(x.shape[d] for d in (*kept, *data)))
    y = y.reshape(tuple(1 if d is None else x.shape[d] for d in order)).expand(at.shape)
    for d in data:
        i = at.labels(chosen[d])
        y = at.join(y, i.reshape((*i.shape, *(1,) * (len(rest) - first))))
    return y


@rule("gather", takes=True)
def gather(at: Site, x: Operand, dim: int, chosen: Operand, **kwargs: Any) -> Labels | Chosen:
    labels = at.labels(x)
    dim %= max(labels.ndim, 1)
    if isinstance(chosen, Index):
        table = _named_part(at, labels, dim, chosen) if labels.ndim else None
        if table is not None:
            read = (*at.shape[:dim], table.shape[dim], *at.shape[dim + 1 :])
            part = tuple(slice(0, n) for n in read)
            seen = move(at.units, table, lambda c: c[part], read, at.name)
            return simplest(at, take_along(seen, dim, chosen))
    chosen = at.labels(chosen) if isinstance(chosen, Deferred) else chosen
    if isinstance(chosen, Tensor):
        fixed = chosen.to("cpu")
        return _chosen(at, labels, lambda c: torch.gather(c, dim, fixed))
    # Of the other dimensions, only the first so many positions are read.
    read = (*at.shape[:dim], labels.shape[dim], *at.shape[dim + 1 :])
    part = tuple(slice(0, n) for n in read)
    seen = move(at.units, labels, lambda c: c[part], read, at.name)
    taken = reduce(at.units, pin(at.units, seen, f"{at.name}: indexed by data", [dim]), [dim], at.name, keepdim=True)
    return at.join(taken, chosen, at.shape)


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "index_reduce", takes=True)
def scatter(
    at: Site,
    x: Operand,
    dim: int,
    chosen: Operand,
    source: Operand | float = 0.0,
    *args: Any,
    **kwargs: Any,
) -> Labels | Index:
    """What is written into x along `dim`: at the places of units, at constant places, or at places given by data."""
    name = at.target._schema.name.removeprefix("aten::")
    copies = name in _COPIES and "reduce" not in kwargs
    if isinstance(chosen, Order) and copies and x.shape == chosen.shape and _numbers(source, chosen):
        return chosen.inverse()
    x, source = at.labels(x), at.labels(source)
    dim %= max(x.ndim, 1)
    if isinstance(chosen, Order) and chosen.names_places:
        chosen, name = chosen.names(), _ADDS[0]  # Of an order, no number is there twice.
    if isinstance(chosen, Index) and (name in _COPIES or name in _ADDS):
        placed = _scatter_to_units(at, x, dim, chosen, source, adds=name in _ADDS)
        if placed is not None:
            return placed
    if isinstance(chosen, Tensor) and x.ndim:
        whole = chosen.to("cpu")
        if chosen.ndim < x.ndim or "index_" in name:  # One place for all of a row.
            lines = [1 if d != dim else chosen.numel() for d in range(x.ndim)]
            whole = whole.reshape(lines).expand([n if d != dim else -1 for d, n in enumerate(x.shape)])
        written = _scatter_at(at, x, dim, whole, source, copies, kwargs.get("include_self", True))
        if written is not None:
            return written
    return _scatter_by_data(at, x, dim, at.labels(chosen), source)


_COPIES = ("scatter", "index_copy", "index_fill")
"""Ops that leave nothing of what they write over; the others add it up, or reduce it in another way."""
_ADDS = ("scatter_add", "index_add")
"""Ops that add up what they write."""


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
    """Of x, and of what is written into it along `dim`, the other dimensions move on.

    What is added is not pinned: it does not matter in which order.
    """
    reason = f"{at.name}: indexed by data"
    y = pin(at.units, x, reason, [dim])
    if at.target._schema.name == "aten::index_add" and source.ndim == x.ndim and source.shape[:dim] == x.shape[:dim]:
        told = chosen.reshape((*chosen.shape, *(1,) * (x.ndim - dim - 1)))
        added = at.reduce(at.join(source, told), [dim], keepdim=True)
        return at.join(at.join(y, added), inert(at.shape, [dim]))
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


def _numbers(source: Any, order: Order) -> bool:
    """Whether these are the numbers of the places in an order."""
    size = order.order.shape[0]
    return isinstance(source, Tensor) and torch.equal(source.long().cpu(), torch.arange(size))


def _scatter_to_units(at: Site, x: Labels, dim: int, by: Index, source: Labels, *, adds: bool) -> Labels | None:
    """What is written along `dim` at the places of the units that an index names; None where these are not all."""
    shape = (*x.shape[:dim], -1, *x.shape[dim + 1 :])
    if by.ndim < x.ndim:
        by = by.reshape((*(1,) * dim, *by.shape, *(1,) * (x.ndim - dim - 1)))
        by = by.expand(tuple(by.shape[dim] if n < 0 else n for n in shape))
    read = tuple(by.shape[dim] if n < 0 else n for n in shape)
    fits = source.ndim in (0, x.ndim) and all(n >= m for n, m in zip(source.shape, read, strict=False))
    if by.count != x.shape[dim] or by.shape != read or not fits:
        return None
    if source.ndim:
        part = tuple(slice(0, n) for n in read)
        source = move(at.units, source, lambda c: c[part], read, at.name)
    both = at.join(by.hot, source, by.hot.shape)
    if not adds and source.ndim:  # Of what is written to one place twice, the last is kept.
        both = pin(at.units, both, f"{at.name}: indexed by data", [dim + 1])
    placed = at.reduce(both, [dim + 1])
    order = (*range(1, dim + 1), 0, *range(dim + 1, x.ndim))
    return at.join(x, placed.map(lambda c: c.permute(order), x.shape))


@rule("index_put", "_unsafe_index_put", takes=True)
def index_put(
    at: Site, x: Operand, indices: Sequence[Operand | None], values: Operand, accumulate: bool = False
) -> Labels | Index:
    """What is written in an order, at constant places, where a mask of data is true, or at places given by data."""
    if len(indices) == 1 and isinstance(indices[0], Order) and not accumulate and x.shape[0] == indices[0].most:
        if _numbers(values, indices[0]) and len(x.shape) == 1:
            return indices[0].inverse()
        if indices[0].names_places:
            placed = _scatter_to_units(at, at.labels(x), 0, indices[0].names(), at.labels(values), adds=True)
            if placed is not None:
                return placed
        order = indices[0].order
        told = order.reshape((*order.shape, *(1,) * (len(at.shape) - 1)))
        written = at.join(at.labels(values), told, at.shape)
        return at.join(at.reduce(written, [0], keepdim=True).expand(at.shape), inert(at.shape, [0]))
    labels, source = at.labels(x), at.labels(values)
    if isinstance(values, Tensor) and not source.inert and not source.columns:
        source = Labels(())  # One value for all places.
    settled = [at.labels(i) if isinstance(i, Deferred) else i for i in indices]
    if not any(isinstance(i, Labels) for i in settled):
        dims, places, first = _places_of_indices(labels.shape, settled)
        placed = _write_at(at, labels, dims, places, first, source, not accumulate)
        if placed is not None:
            return placed
    chosen = [i for i in settled if i is not None]
    after = labels.ndim - len(settled) + 1 - len(chosen[0].shape)
    if len(chosen) == 1 and isinstance(chosen[0], Labels) and chosen[0].is_mask and source.ndim <= after:
        # Wherever it is true the same is written: pointwise.
        return at.join(at.join(labels, chosen[0].reshape((*chosen[0].shape, *(1,) * after))), source)
    return _put_by_data(at, labels, settled, source)


def _places_of_indices(shape: Shape, indices: Sequence[Labels | Tensor | None]) -> tuple[list[int], Tensor, int]:
    """The dimensions that constant indices stand for, the places over them, and where these lie in what is read."""
    full = cast(list[Tensor | None], _without_masks(indices))
    dims = [d for d, i in enumerate(full) if i is not None]
    sizes = [shape[d] for d in dims]
    places = torch.arange(math.prod(sizes)).reshape(sizes)[tuple(i for i in full if i is not None)]
    return dims, places, dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0


def _without_masks(indices: Sequence[Labels | Tensor | None]) -> list[Labels | Tensor | None]:
    """Indices with the numbers of the places in place of each constant mask."""
    full: list[Labels | Tensor | None] = []
    for i in indices:
        fixed = i.to("cpu") if isinstance(i, Tensor) else i
        is_mask = isinstance(fixed, Tensor) and fixed.dtype in (torch.bool, torch.uint8)
        full += fixed.nonzero(as_tuple=True) if is_mask else [fixed]  # type: ignore[union-attr]
    return full


def _put_by_data(at: Site, x: Labels, indices: Sequence[Labels | Tensor | None], source: Labels) -> Labels:
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
def masked_scatter(at: Site, x: Labels | Tensor, mask: Labels | Tensor, source: Labels | Tensor) -> Labels | Index:
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
