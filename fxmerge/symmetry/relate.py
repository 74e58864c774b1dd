"""What two columns on one tensor say of each other, recorded in the unit graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import cast

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from fxmerge.symmetry.columns import core, joint_column, spread, support
from fxmerge.symmetry.units import NOTHING, Hashes, Ids, UnitGraph, distinct, mix, number_rows


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


def _increases(ids: Ids) -> bool:
    """Whether every number is larger than the one before: so it is for the units of one axis, by far most often."""
    return bool((ids[1:] > ids[:-1]).all())


def _components(count: int, rows: Ids, cols: Ids) -> tuple[int, Ids]:
    graph = coo_matrix((np.ones(len(rows), np.int8), (rows, cols)), shape=(count, count))
    parts, part = connected_components(graph, directed=False)
    return int(parts), part.astype(np.int64)


def _without_repeats(a: Tensor, b: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Both columns without slices along `dims` that repeat the one before: they tell nothing new of what meets."""
    for d in dims:
        n = a.shape[d]
        if n > 2 and all(torch.equal(c.select(d, -1), c.select(d, -2)) for c in (a, b)):
            new = torch.ones(n, dtype=torch.bool)
            new[1:] = False
            for c in (a, b):
                moved = core(c, (d, *(e for e in support(c) if e != d))).reshape(n, -1)
                new[1:] |= (moved[1:] != moved[:-1]).any(1)
            kept = new.nonzero().reshape(-1)
            a, b = (_select(c, d, kept) for c in (a, b))
    return a, b


def _select(column: Tensor, dim: int, kept: Tensor) -> Tensor:
    """The column at some positions along a dimension, with stride 0 where it had it."""
    shape = (*column.shape[:dim], len(kept), *column.shape[dim + 1 :])
    thin = column[tuple(slice(None) if d in support(column) else slice(0, 1) for d in range(column.ndim))]
    return (thin.index_select(dim, kept) if thin.shape[dim] > 1 else thin).expand(shape)


def meet(a: Tensor, b: Tensor) -> Pairs | None:
    """The meetings of two columns of one shape, or None where they share no dimension."""
    dims_a, dims_b = support(a), support(b)
    shared = [d for d in dims_a if d in dims_b]
    if not shared:
        return None
    a, b = _without_repeats(a, b, shared)
    size = math.prod(a.shape[d] for d in shared)
    at = core(a, shared + [d for d in dims_a if d not in shared]).reshape(size, -1).numpy()
    bt = core(b, shared + [d for d in dims_b if d not in shared]).reshape(size, -1).numpy()
    if at.shape[1] == bt.shape[1] == 1 and _increases(at[:, 0]) and _increases(bt[:, 0]):
        each, one = np.arange(size), np.ones(size, np.int64)
        return Pairs(at[:, 0], bt[:, 0], each, each, one, one, one.astype(bool))
    a_ids, at_inv = np.unique(at, return_inverse=True)
    b_ids, bt_inv = np.unique(bt, return_inverse=True)
    at, bt = at_inv.reshape(size, -1), bt_inv.reshape(size, -1)
    na, nb = len(a_ids), len(b_ids)
    if at.shape[1] == bt.shape[1] == 1:
        pairs = distinct(at[:, 0] * nb + bt[:, 0])
        parts, part = _components(na + nb, pairs // nb, na + pairs % nb)
        full_a = full_b = None
    else:
        # Through the positions, without listing the pairs: a unit - position - b unit.
        position = np.arange(size)[:, None]
        pa, pb = distinct(at * size + position), distinct(bt * size + position)
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
    if full_a is not None:
        complete &= _everywhere(at, bt, part[at[:, 0]])
    return Pairs(a_ids, b_ids, a_part, b_part, a_count, b_count, complete)


def _everywhere(at: Ids, bt: Ids, part: Ids) -> np.ndarray:
    """For every component, whether all its pairs meet at each place along the dimensions that one column has alone.

    Arguments:
        at: units of one column: shape (shared positions, places that are its own).
        bt: likewise of the other.
        part: the component of each shared position.
    """
    first = np.unique(part, return_index=True)[1]
    whole = np.zeros(int(part.max()) + 1, bool)
    for column in (at, bt):  # A column that does not depend on the shared position meets all there is.
        still = np.ones(len(whole), bool)
        np.logical_and.at(still, part, (column == column[first[np.unique(part, return_inverse=True)[1]]]).all(axis=1))
        whole |= still
    for p in np.flatnonzero(~whole):
        rows = part == p
        patterns = [np.unique(column[rows], axis=1).T for column in (at, bt)]
        whole[p] = all(
            len(distinct(a)) * len(distinct(b)) == len(np.unique(np.stack([a, b]), axis=1).T)
            for a, b in product(*patterns)
        )
    return whole


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
    if _increases(part):
        alone = np.ones(len(child), bool)
    else:
        kind = part * (len(units.starts) + 1) + units.origin(child)
        _, inverse, count = np.unique(kind, return_inverse=True, return_counts=True)
        alone = count[inverse] == 1
    lone = alone & (parent[part] != NOTHING) & (child != NOTHING)
    units.equate(child[lone], parent[part[lone]])
    units.include(child[~lone], parent[part[~lone]])
    return bool(lone.all())


def relate_inert(
    units: UnitGraph, column: Tensor, factors: Sequence[Tensor], reason: str, known: Sequence[Tensor] = ()
) -> bool:
    """Tells units apart that meet different inert positions; True if that pins every one of them.

    Arguments:
        known: inert columns to which the units are related already. Two units may meet the same positions in each
            inert column, and still not the same pairs of positions in two.
    """
    told = _told_apart(column, factors, known)
    if told is None:
        return False
    ids, part, along = told
    count = np.bincount(part)
    if len(count) == 1:
        return False
    alone = count[part] == 1
    # A position elsewhere than along the column may tell rows of a parameter apart, rather than these units.
    units.pin(ids[alone], reason, final=along)
    if not alone.all():
        block = units.fresh(len(count), ("fixed", reason))
        units.pin(block, reason)
        units.include(ids[~alone], block[part[~alone]])
    return bool(alone.all())


def _told_apart(
    column: Tensor, factors: Sequence[Tensor], known: Sequence[Tensor] = ()
) -> tuple[Ids, Ids, bool] | None:
    """The units of a column, which of them meet the same inert positions, and whether these are along the column only.

    None where no inert position is along the column.
    """
    dims = support(column)
    new, old = ([f for f in fs if any(d in dims for d in support(f))] for fs in (factors, known))
    if not new:
        return None
    joint = cast(Tensor, joint_column([rows_along(f, dims) for f in (*new, *old)]))
    shared = [d for d in dims if d in support(joint)]
    size = math.prod(column.shape[d] for d in shared)
    place = np.unique(core(joint, shared).reshape(size, 1).numpy(), return_inverse=True)[1].reshape(size, 1)
    ids, unit = np.unique(core(column, shared + [d for d in dims if d not in shared]).numpy(), return_inverse=True)
    part = np.unique(_seen(unit.reshape(size, -1), place), return_inverse=True)[1]
    return ids, part, all(set(support(f)) <= set(dims) for f in (*new, *old))


def rows_along(column: Tensor, dims: Sequence[int]) -> Tensor:
    """The column along those of some dimensions on which it depends: a number for all that lies at each place there."""
    kept, rest = ([d for d in support(column) if (d in dims) is is_kept] for is_kept in (True, False))
    if not rest:
        return column
    rows = core(column, kept + rest).reshape(math.prod(column.shape[d] for d in kept), -1).numpy()
    return spread(torch.from_numpy(number_rows(np.ascontiguousarray(rows))), tuple(column.shape), kept)


def _seen(unit: Ids, beside: Ids) -> Hashes:
    """What each unit, numbered from 0, meets, and how often, as one number."""
    span = int(beside.max()) + 1
    meetings, times = np.unique(unit * span + beside, return_counts=True)
    seen = np.zeros(int(unit.max()) + 1, np.uint64)
    np.add.at(seen, meetings // span, mix(meetings % span + mix(times).view(np.int64)))
    return seen


def relate_sets(
    units: UnitGraph, column: Tensor, others: Sequence[Tensor], factors: Sequence[Tensor], gone: set[int], reason: str
) -> Tensor | None:
    """Pins units that a reduction over some dimensions takes together, where they do not all meet the same in its sets.

    So it is where positions were chosen one by one: the sum of x[0, 1] and x[1, 0] is not that of x[0, 0] and x[1, 1].

    Returns:
        An inert column that tells the results apart, if any unit was pinned.
    """
    along = gone.intersection(support(column))
    others = [c for c in others if along.intersection(support(c))]
    factors = [f for f in factors if along.intersection(support(f))]
    beside = (*others, *factors)
    if not beside:
        return None
    # All that a unit meets at a place of its own is compared first: this is far less than every meeting.
    whole = _Sets.of(column, [rows_along(c, support(column)) for c in beside], gone)
    if not whole.irregular(np.zeros_like(whole.ids)).any():
        return None
    # Units that are told apart may meet others than each other.
    relate_inert(units, column, factors, reason)
    told = _told_apart(column, factors)
    part = np.zeros_like(whole.ids) if told is None else told[1][np.searchsorted(told[0], whole.ids)]
    for other in others:
        relate(units, column, other, reason)
        met = cast(Pairs, meet(column, other))
        one = met.a_part[np.searchsorted(met.a, whole.ids)]
        part = np.unique(part * len(met.a_count) + one, return_inverse=True)[1]
    if not whole.irregular(part).any():
        return None
    sets = _Sets.of(column, beside, gone)
    irregular = sets.irregular(part)
    if not irregular.any():
        return None
    units.pin(distinct(sets.ids[sets.member[irregular]]), f"{reason}: reduced in an irregular pattern")
    return spread(torch.from_numpy(number_rows(sets.rows)), tuple(column.shape), sets.kept)


@dataclass(frozen=True)
class _Sets:
    """What the units of a column meet in each set of positions that a reduction takes together.

    Attributes:
        kept: the dimensions that tell the sets apart.
        rows: for every set, what is at each of its positions, as a number.
        ids: the units.
        place, member, seen: for every unit of every set, the number of the set, that of the unit among `ids`, and a
            number for what it meets there.
    """

    kept: list[int]
    rows: Ids
    ids: Ids
    place: Ids
    member: Ids
    seen: Hashes

    @staticmethod
    def of(column: Tensor, beside: Sequence[Tensor], gone: set[int]) -> _Sets:
        joint = cast(Tensor, joint_column(beside))
        dims = sorted({*support(column), *support(joint)}, key=lambda d: (d in gone, d))
        kept = [d for d in dims if d not in gone]
        shape = math.prod(column.shape[d] for d in kept), -1
        at, met = (core(c, dims).reshape(shape).numpy() for c in (column, joint))
        met = np.unique(met, return_inverse=True)[1].reshape(at.shape)
        real = at != NOTHING
        ids, unit = np.unique(at[real], return_inverse=True)
        entries, entry = np.unique(np.nonzero(real)[0] * len(ids) + unit, return_inverse=True)
        seen = _seen(entry, met[real]) if len(ids) else np.zeros(0, np.uint64)
        rows = np.ascontiguousarray(at * (int(met.max()) + 1) + met)
        return _Sets(kept, rows, ids, entries // max(len(ids), 1), entries % max(len(ids), 1), seen)

    def irregular(self, part: Ids) -> np.ndarray:
        """Which units of which sets are in one part with others of the set that meet something else.

        Arguments:
            part: for every unit, the number of its part.
        """
        _, first, number = np.unique(
            self.place * len(self.ids) + part[self.member], return_index=True, return_inverse=True
        )
        varying = np.zeros(len(first), bool)
        varying[number[self.seen != self.seen[first[number]]]] = True
        return varying[number]
