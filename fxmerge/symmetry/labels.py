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
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from fxmerge.symmetry.units import NOTHING, Ids, UnitGraph, mix

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Labels:
    """What is known of one tensor: its unit columns and its inert columns.

    `parameter` is set while the tensor is no more than a rearrangement of that parameter's entries.
    """

    shape: Shape
    columns: tuple[Tensor, ...] = ()
    inert: tuple[Tensor, ...] = ()
    parameter: str | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def map(self, view: Callable[[Tensor], Tensor], shape: Shape) -> Labels:
        """The labels of a view that keeps every position: reshape, permute, expand."""
        return Labels(shape, _varying(map(view, self.columns)), _varying(map(view, self.inert)), self.parameter)

    def reshape(self, shape: Shape) -> Labels:
        return self if shape == self.shape else self.map(lambda c: reshape(c, shape), shape)

    def expand(self, shape: Shape) -> Labels:
        """The labels broadcast to `shape`, dimensions aligned at the right."""
        return self if shape == self.shape else replace(self.map(lambda c: c.expand(shape), shape), parameter=None)


def support(column: Tensor) -> tuple[int, ...]:
    """The dimensions on which a column depends."""
    return tuple(d for d, (n, s) in enumerate(zip(column.shape, column.stride(), strict=True)) if n > 1 and s != 0)


def axis_column(shape: Shape, dim: int) -> Tensor:
    """The column that numbers the positions along one dimension."""
    return spread(torch.arange(shape[dim]), shape, (dim,))


def spread(ids: Tensor, shape: Shape, dims: Sequence[int]) -> Tensor:
    """Lays `ids`, whose dimensions are `dims` of the result, out over `shape`."""
    return ids.reshape([shape[d] if d in dims else 1 for d in range(len(shape))]).expand(shape)


def inert(shape: Shape, dims: Iterable[int] | None = None) -> Labels:
    """A tensor without units, whose values differ along `dims` (by default all)."""
    dims = range(len(shape)) if dims is None else dims
    return Labels(shape, (), tuple(axis_column(shape, d) for d in dims if shape[d] > 1))


def constant(value: Tensor) -> Labels:
    """A constant: positions of equal value are alike, others are told apart."""
    if value.numel() == 0 or value.device.type == "meta":
        return inert(tuple(value.shape))
    value = shrink(value.detach().to("cpu"))
    dims = support(value)
    if not dims:
        return Labels(tuple(value.shape))
    values = np.unique(core(value, dims).resolve_conj().numpy(), return_inverse=True)[1]
    ids = torch.from_numpy(values.astype(np.int64))
    return Labels(tuple(value.shape), (), (spread(ids, tuple(value.shape), dims),))


def core(column: Tensor, dims: Sequence[int]) -> Tensor:
    """The column along `dims`, at the first position of every other dimension."""
    kept = [d for d in range(column.ndim) if d in dims]
    flat = column[tuple(slice(None) if d in dims else 0 for d in range(column.ndim))]
    return flat.permute([kept.index(d) for d in dims])


def shrink(column: Tensor) -> Tensor:
    """The same column with stride 0 along every dimension on which it is constant."""
    small = column
    for d, n in enumerate(column.shape):
        if n > 1 and column.stride(d) == 0:
            small = small.narrow(d, 0, 1)
    for d in support(small):
        first = small.narrow(d, 0, 1)
        # The last slice differs from the first in almost every column that depends on d at all.
        if torch.equal(first, small.narrow(d, -1, 1)) and bool((small == first).all()):
            small = first
    return small.expand(column.shape)


def _varying(columns: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(c for c in map(shrink, columns) if support(c))


def reshape(column: Tensor, shape: Shape) -> Tensor:
    """`column.reshape(shape)`, made dense only along the view groups on which the column depends."""
    inner: list[int] = []
    narrow = column
    for old, new in view_groups(tuple(column.shape), shape):
        if any(d in support(column) for d in old):
            inner += [shape[d] for d in new]
        else:
            for d in old:
                narrow = narrow.narrow(d, 0, 1)
            inner += [1] * len(new)
    return narrow.reshape(inner).expand(shape)


def view_groups(old: Shape, new: Shape) -> list[tuple[range, range]]:
    """The finest runs of dimensions of `old` and of `new` that hold the same entries."""
    if math.prod(old) != math.prod(new):
        raise ValueError(f"a tensor of shape {old} cannot be viewed as {new}")
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b, m, n = i, j, 1, 1
        if i < len(old):
            m, i = old[i], i + 1
        elif j < len(new):
            n, j = new[j], j + 1
        while m != n:
            if m < n:
                m, i = m * old[i], i + 1
            else:
                n, j = n * new[j], j + 1
        groups.append((range(a, i), range(b, j)))
    return groups


# ------------------------------------------------------------------------------------ relate


@dataclass(frozen=True)
class Pairs:
    """Which units of two columns meet, as the connected components of their meetings."""

    a: Ids
    b: Ids
    a_part: Ids
    b_part: Ids
    a_count: Ids
    b_count: Ids
    complete: np.ndarray

    @property
    def independent(self) -> bool:
        return len(self.a_count) == 1 and bool(self.complete[0])


def _components(count: int, rows: Ids, cols: Ids) -> tuple[int, Ids]:
    graph = coo_matrix((np.ones(len(rows), np.int8), (rows, cols)), shape=(count, count))
    parts, part = connected_components(graph, directed=False)
    return int(parts), part.astype(np.int64)


def meet(a: Tensor, b: Tensor) -> Pairs | None:
    """The meetings of two columns of one shape, or None where they share no dimension."""
    dims_a, dims_b = support(a), support(b)
    shared = [d for d in dims_a if d in dims_b]
    if not shared:
        return None
    size = math.prod(a.shape[d] for d in shared)
    at = core(a, shared + [d for d in dims_a if d not in shared]).reshape(size, -1).numpy()
    bt = core(b, shared + [d for d in dims_b if d not in shared]).reshape(size, -1).numpy()
    a_ids, at_inv = np.unique(at, return_inverse=True)
    b_ids, bt_inv = np.unique(bt, return_inverse=True)
    at, bt = at_inv.reshape(size, -1), bt_inv.reshape(size, -1)
    na, nb = len(a_ids), len(b_ids)
    if at.shape[1] == bt.shape[1] == 1:
        pairs = np.unique(at[:, 0] * nb + bt[:, 0])
        parts, part = _components(na + nb, pairs // nb, na + pairs % nb)
        full_a = full_b = None
    else:
        # Through the positions, without listing the pairs: a unit - position - b unit.
        position = np.arange(size)[:, None]
        pa, pb = np.unique(at * size + position), np.unique(bt * size + position)
        rows = np.concatenate([pa // size, na + pb // size])
        cols = na + nb + np.concatenate([pa % size, pb % size])
        parts, part = _components(na + nb + size, rows, cols)
        places = np.bincount(part[na + nb :], minlength=parts)
        full_a = np.bincount(part[pa // size], minlength=parts), places
        full_b = np.bincount(part[na + pb // size], minlength=parts), places
    a_part, b_part = part[:na], part[na : na + nb]
    a_count, b_count = np.bincount(a_part, minlength=parts), np.bincount(b_part, minlength=parts)
    if full_a is None or full_b is None:
        complete = np.bincount(a_part[pairs // nb], minlength=parts) == a_count * b_count
    else:
        # A component is complete where every position sees all of its units on one side.
        complete = (full_a[0] == a_count * full_a[1]) | (full_b[0] == b_count * full_b[1])
    complete |= (a_count == 1) | (b_count == 1)
    return Pairs(a_ids, b_ids, a_part, b_part, a_count, b_count, complete)


def relate(units: UnitGraph, a: Tensor, b: Tensor, reason: str) -> str:
    """Records what two unit columns of one tensor say of each other.

    Returns:
        "a" if column b can be told from column a, "b" if a can be told from b, "" if both are needed.
    """
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return "a"
    met = meet(a, b)
    if met is None or met.independent:
        return ""
    one_a, one_b = met.a_count == 1, met.b_count == 1
    same_a = _contain(units, met.a, met.a_part, met.b[_first(met.b_part, one_b)], one_b)
    same_b = _contain(units, met.b, met.b_part, met.a[_first(met.a_part, one_a)], one_a & ~one_b)
    many = ~one_a & ~one_b
    if many.any():
        block = np.zeros(len(many), np.int64)
        block[many] = units.fresh(int(many.sum()), ("block", reason))
        for ids, part in ((met.a, met.a_part), (met.b, met.b_part)):
            units.include(ids[many[part]], block[part[many[part]]])
    broken = many & ~met.complete
    for ids, part in ((met.a, met.a_part), (met.b, met.b_part)):
        units.pin(ids[broken[part]], f"{reason}: units meet in an irregular pattern", final=False)
    # Where the finer column's units all equal the coarser one's, the coarser, smaller one says as much.
    if bool(one_b.all()):
        return "b" if same_a and len(support(b)) < len(support(a)) else "a"
    if bool(one_a.all()):
        return "a" if same_b and len(support(a)) < len(support(b)) else "b"
    return ""


def _first(part: Ids, where: np.ndarray) -> Ids:
    """For every component in `where`, the index of its only unit (0 for the others)."""
    first = np.zeros(len(where), np.int64)
    index = np.flatnonzero(where[part])
    first[part[index]] = index
    return first


def _contain(units: UnitGraph, child: Ids, part: Ids, parent: Ids, where: np.ndarray) -> bool:
    """In the components `where`, each child is a member of the component's parent.

    A child that is alone of its origin in its parent moves exactly as the parent does. True if all are.
    """
    child, part = child[where[part]], part[where[part]]
    if not len(child):
        return True
    kind = part * (len(units.starts) + 1) + units.origin(child)
    _, inverse, count = np.unique(kind, return_inverse=True, return_counts=True)
    lone = (count[inverse] == 1) & (parent[part] != NOTHING) & (child != NOTHING)
    units.equate(child[lone], parent[part[lone]])
    units.include(child[~lone], parent[part[~lone]])
    return bool(lone.all())


def relate_inert(units: UnitGraph, column: Tensor, factors: Sequence[Tensor], reason: str) -> bool:
    """Tells units apart that meet different inert positions; True if that pins every one of them."""
    dims = support(column)
    joint = joint_column([f for f in factors if any(d in dims for d in support(f))])
    if joint is None:
        return False
    shared = [d for d in dims if d in support(joint)]
    size = math.prod(column.shape[d] for d in shared)
    rows = core(joint, shared + [d for d in support(joint) if d not in shared]).reshape(size, -1).numpy()
    place = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1, 1)
    ids, unit = np.unique(core(column, shared + [d for d in dims if d not in shared]).numpy(), return_inverse=True)
    meetings, times = np.unique(unit.reshape(size, -1) * size + place, return_counts=True)
    # What a unit meets, and how often, as one number.
    seen = np.zeros(len(ids), np.uint64)
    np.add.at(seen, meetings // size, mix(meetings % size + mix(times).view(np.int64)))
    _, part, count = np.unique(seen, return_inverse=True, return_counts=True)
    if len(count) == 1:
        return False
    alone = count[part] == 1
    # A position elsewhere than along the column may tell rows of a parameter apart, rather than these units.
    units.pin(ids[alone], reason, final=set(support(joint)) <= set(dims))
    if not alone.all():
        block = units.fresh(len(count), ("block", reason))
        units.pin(block, reason)
        units.include(ids[~alone], block[part[~alone]])
    return bool(alone.all())


def joint_column(factors: Sequence[Tensor]) -> Tensor | None:
    """The common refinement of some columns: positions are alike if they are in all of them."""
    if len(factors) < 2:
        return factors[0] if factors else None
    dims = sorted({d for f in factors for d in support(f)})
    shape = tuple(factors[0].shape)
    code = np.zeros([shape[d] for d in dims], np.int64)
    for f in factors:
        ids = core(f, dims).numpy()
        code = np.unique(code, return_inverse=True)[1].reshape(code.shape) * (int(ids.max()) + 1) + ids
    return spread(torch.from_numpy(code), shape, dims)


# ------------------------------------------------------------------------ join, reduce, move, pin


def join(units: UnitGraph, x: Labels, y: Labels, reason: str) -> Labels:
    """The labels of `f(x, y)` for a pointwise f of two tensors of one shape."""
    keep_x, keep_y = [True] * len(x.columns), [True] * len(y.columns)
    for i, a in enumerate(x.columns):
        for j, b in enumerate(y.columns):
            finer = relate(units, a, b, reason)
            if finer == "a":
                keep_y[j] = False
                rows_apart(units, y, b, set(support(a)) - set(support(b)))
            elif finer == "b":
                keep_x[i] = False
                rows_apart(units, x, a, set(support(b)) - set(support(a)))
    for columns, keep, factors in ((x.columns, keep_x, y.inert), (y.columns, keep_y, x.inert)):
        for i, column in enumerate(columns):
            if relate_inert(units, column, factors, reason):
                keep[i] = False
    kept = tuple(c for c, k in zip(x.columns + y.columns, keep_x + keep_y, strict=True) if k)
    return Labels(x.shape, kept, prune(x.inert + y.inert))


def rows_apart(units: UnitGraph, x: Labels, column: Tensor, dims: set[int]) -> None:
    """Of a tensor whose column means other units at other places along `dims`: where the column is an axis of a
    parameter, and the places are an earlier axis of it, the rows of the latter are used apart."""
    axis = units.axis(np.unique(core(column, support(column)).numpy()))
    for rows in x.columns:
        along = support(rows)
        if axis is not None and along and dims.issuperset(along):
            ids = np.unique(core(rows, along).numpy())
            earlier = units.axis(ids)
            if earlier is not None and earlier[0] == axis[0] and earlier[1] < axis[1]:
                units.use_apart(ids, ids)


def prune(factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Inert columns without those that others imply."""
    full: dict[int, Tensor] = {}
    for f in factors:
        dims = support(f)
        if len(dims) == 1 and dims[0] not in full and len(core(f, dims).unique()) == f.shape[dims[0]]:
            full[dims[0]] = f
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
    order = f.argsort(stable=True)
    f, c = f[order], c[order]
    return bool(((f[1:] != f[:-1]) | (c[1:] == c[:-1])).all())


def reduce(units: UnitGraph, x: Labels, dims: Iterable[int], reason: str, *, keepdim: bool = False) -> Labels:
    """The labels after a symmetric reduction (sum, mean, max, norm) over `dims`."""
    gone = {d % x.ndim for d in dims} if x.ndim else set()
    columns = [c for c in (_reduce_column(units, c, gone, reason) for c in x.columns) if c is not None]
    factors = [f for f in (_reduce_inert(f, gone) for f in x.inert) if f is not None]
    shape = tuple(1 if d in gone else n for d, n in enumerate(x.shape))
    reduced = Labels(shape, tuple(_first_of(c, gone) for c in columns), tuple(_first_of(f, gone) for f in factors))
    if keepdim:
        return reduced
    kept = tuple(n for d, n in enumerate(shape) if d not in gone)
    index = tuple(0 if d in gone else slice(None) for d in range(x.ndim))
    return replace(reduced.map(lambda c: c[index], kept), parameter=None)


def _first_of(column: Tensor, dims: Iterable[int]) -> Tensor:
    for d in dims:
        column = column.narrow(d, 0, 1)
    return column


def _reduce_column(units: UnitGraph, column: Tensor, gone: set[int], reason: str) -> Tensor | None:
    dims = support(column)
    kept = [d for d in dims if d not in gone]
    if len(kept) == len(dims):
        return column
    size = math.prod(column.shape[d] for d in kept)
    rows = core(column, kept + [d for d in dims if d in gone]).reshape(size, -1).numpy()
    sets, row_set = np.unique(np.sort(rows, axis=1), axis=0, return_inverse=True)
    row_set = row_set.reshape(-1)
    # One entry per (set, unit), with how often the set holds the unit.
    flat = np.arange(len(sets))[:, None] * (int(sets.max()) + 1) + sets
    entry, times = np.unique(flat, return_counts=True)
    owner, unit = entry // (int(sets.max()) + 1), entry % (int(sets.max()) + 1)
    uneven = np.array([t.min() != t.max() for t in np.split(times, np.unique(owner, return_index=True)[1][1:])])
    shared = np.zeros(len(sets), bool)
    again = np.bincount(np.unique(unit, return_inverse=True)[1])[np.unique(unit, return_inverse=True)[1]] > 1
    np.logical_or.at(shared, owner, again)
    bad = uneven | shared
    units.pin(unit[bad[owner]], f"{reason}: reduced in overlapping or uneven groups")
    if len(sets) == 1:
        return None
    block = units.fresh(len(sets), ("block", reason))
    units.pin(block[bad], f"{reason}: reduced in overlapping or uneven groups")
    units.include(unit, block[owner])
    return spread(torch.from_numpy(block[row_set]), tuple(column.shape), kept)


def _reduce_inert(factor: Tensor, gone: set[int]) -> Tensor | None:
    dims = support(factor)
    kept = [d for d in dims if d not in gone]
    if len(kept) == len(dims) or not kept:
        return factor if kept else None
    size = math.prod(factor.shape[d] for d in kept)
    rows = core(factor, kept + [d for d in dims if d in gone]).reshape(size, -1).numpy()
    alike = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
    return shrink(spread(torch.from_numpy(alike.astype(np.int64)), tuple(factor.shape), kept))


def move(units: UnitGraph, x: Labels, op: Callable[[Tensor], Tensor], shape: Shape, reason: str) -> Labels:
    """The labels after a data movement: `op` is run on the columns themselves.

    Units that the movement leaves behind are told apart from those that it takes along.
    """
    columns = [op(column) for column in x.columns]
    for column, moved in zip(x.columns, columns, strict=True):
        before, after = core(column, support(column)), core(moved, support(moved))
        if after.numel() < before.numel():
            kept = np.unique(after.numpy())
            if len(kept) < len(np.unique(before.numpy())):
                units.segment(kept, reason)
                if x.parameter is not None:
                    units.use_apart(kept, np.full(len(kept), units.size, np.int64))
                    if not support(moved):
                        units.use(kept)
    return Labels(shape, _varying(columns), _varying(map(op, x.inert)), x.parameter)


def pin(units: UnitGraph, x: Labels, reason: str, dims: Iterable[int] | None = None) -> Labels:
    """Pins the units of the columns that depend on `dims` (by default all), and makes those dims inert."""
    pinned = set(range(x.ndim)) if dims is None else {d % x.ndim for d in dims}
    columns, factors = [], [axis_column(x.shape, d) for d in sorted(pinned) if x.shape[d] > 1]
    for column in x.columns:
        if pinned.isdisjoint(support(column)):
            columns.append(column)
        else:
            units.pin(np.unique(core(column, support(column)).numpy()), reason)
            factors.append(column)
    return replace(x, columns=tuple(columns), inert=prune((*x.inert, *factors)))
