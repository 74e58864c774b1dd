"""Groups of equal size of heads that are alike, and the order in which the heads of a group are neighbours."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from fxmerge.matching.assignment import Scores, descendants
from fxmerge.matching.head_bases import likeness
from fxmerge.matching.nested import carry, inside, merge_blocks
from fxmerge.matching.zip_search import ZipProblem
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.units import Ids
from fxmerge.units.layout import AxisLayout

Slot = tuple[str, int, int]
"""A parameter, a dimension, and an index along it."""


def equal_groups(similarity: Scores, size: int) -> Ids:
    """Groups of equal size, whose members are alike.

    The two that are most alike begin a group, which takes what is most like its members until it is full. Then members
    of two groups are exchanged as long as the similarities inside of groups rise by it.

    Arguments:
        similarity: of all pairs, shape (n, n); only what is above the diagonal is read.
        size: of each group; it divides n.

    Returns:
        The number of the group of each, in the order of the groups' first members.

    Example:
        >>> equal_groups(np.array([[1, 0.1, 0.9, 0.2], [0, 1, 0.3, 0.8], [0, 0, 1, 0.4], [0, 0, 0, 1]]), 2)
        array([0, 1, 0, 1])
    """
    n = len(similarity)
    alike = np.triu(similarity, 1)
    alike = alike + alike.T
    group, left = np.full(n, -1), np.ones(n, bool)
    for number in range(n // size):
        open_ = np.where(left[:, None] & left & ~np.eye(n, dtype=bool), alike, -np.inf)
        members = [int(open_.max(axis=1).argmax())]
        while len(members) < size:
            own = left.copy()
            own[members] = False
            members.append(int(np.where(own, alike[members].sum(axis=0), -np.inf).argmax()))
        group[members], left[members] = number, False
    while (pair := _exchange(alike, group)) is not None:
        group[list(pair)] = group[list(pair[::-1])]
    _, first, inverse = np.unique(group, return_index=True, return_inverse=True)
    numbers: Ids = np.argsort(np.argsort(first))[inverse]
    return numbers


def _exchange(alike: Scores, group: Ids) -> tuple[int, int] | None:
    """The two members of different groups whose exchange raises the similarities inside of groups most; None if no
    exchange does."""
    own = (group[:, None] == np.arange(group.max() + 1)).astype(float)
    to = alike @ own  # How much each is like all members of each group.
    here = to[np.arange(len(group)), group]
    gain = to[:, group] + to[:, group].T - here[:, None] - here - 2 * alike
    gain[group[:, None] == group] = 0
    best = int(gain.argmax())
    rises = gain.flat[best] > 1e-9 * (1 + np.abs(alike).sum())
    return divmod(best, len(group)) if rises else None


def neighbours(
    problem: ZipProblem, number: int, groups: int, products: Mapping[int, Scores] | None = None
) -> dict[int, Ids]:
    """An order of blocks in which those of a group are neighbours, and of what lies in them, so that the units of a
    group that are most alike have one rank in their blocks.

    Arguments:
        problem: what tells how alike units are, of one model.
        number: the class of blocks.
        groups: how many groups of equal size there are to be.
        products: for classes that lie in the blocks and have a basis of their own in each, the products of all pairs of
            units. They are compared in the bases in which they are most alike, and keep their order.

    Returns:
        For the class and all that are nested in it, the place of each unit: a permutation.
    """
    symmetry, size = problem.symmetry, problem.symmetry.units[number].size // groups
    products = products or {}
    similarity, gains = problem.pairs(number, without=products)
    if products:
        tree = set(descendants(symmetry, number))
        known = {n for n, own in problem.slices.items() if n in tree and (own or n in problem.correlation)}
        shares = problem.shares(number, known.union(products))
        based = {n: shares.pop(n) * likeness(own, units_of(symmetry, n, number)) for n, own in products.items()}
        similarity = sum(shares.values()) * similarity + sum(based.values())
    group = equal_groups(similarity.astype(np.float64), size)
    order = np.argsort(group, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    # All members of a group in the place of its first one.
    (merged,) = merge_blocks(symmetry, number, order[place // size * size][None], problem.places, gains)

    def choose(n: int, units: Ids, free: Ids) -> Ids:
        ranks: Ids = np.argsort(np.argsort(merged[n][units]))
        return free[ranks]

    return carry(symmetry, number, place, problem.places[0], choose)


def units_of(symmetry: Symmetry, number: int, block: int) -> Ids:
    """The units of a class that lie in each block of another one, shape (blocks, units of a block)."""
    arranged = symmetry.arranged(number, block)
    units: Ids = arranged.reshape(len(arranged), -1)
    return units


def translated(
    symmetry: Symmetry, number: int, other: Symmetry, number_there: int, images: Mapping[int, Ids]
) -> tuple[Ids, ...]:
    """An order of blocks and of what lies in them, in another symmetry of the same parameters, of which some units may
    be the units of two classes here.

    Arguments:
        symmetry: the symmetry that is asked for.
        number: its class of blocks.
        other: the symmetry of which the order is known.
        number_there: the class of these blocks in it.
        images: the order, as `neighbours` gives it.

    Returns:
        For every class of `symmetry`, the place of each unit.
    """
    pairs = counterparts(symmetry, range(len(symmetry.units)), other, images)
    blocks = inside(other, number_there)
    to = np.full(symmetry.units[number].size, -1)
    for n, block in inside(symmetry, number).items():
        for u, (m, v) in pairs[n].items():
            to[block[u]] = blocks[m][v]
    back = np.argsort(to)

    def choose(n: int, units: Ids, free: Ids) -> Ids:
        known = pairs[n]
        if not all(int(u) in known for u in units):
            return free
        at = {own: u for u, own in known.items()}
        goals = [at.get((m, int(images[m][v]))) for m, v in (known[int(u)] for u in units)]
        return free if None in goals or set(goals) != set(free.tolist()) else np.array(goals, np.int64)

    places = [np.arange(c.size) for c in symmetry.units]
    moved = carry(symmetry, number, back[images[number_there][to]], places, choose)
    return tuple(moved.get(n, place) for n, place in enumerate(places))


def counterparts(
    symmetry: Symmetry, numbers: Iterable[int], other: Symmetry, numbers_there: Iterable[int]
) -> dict[int, dict[int, tuple[int, int]]]:
    """For some classes, the units that lie in the same places as units of classes of another symmetry of the same
    parameters, each with the class and the unit there."""
    there = {slot: (n, u) for n in numbers_there for u, slot in _slots(other.layout, n)}
    return {n: {u: there[slot] for u, slot in _slots(symmetry.layout, n) if slot in there} for n in numbers}


def placed(symmetry: Symmetry, images: tuple[Ids, ...], other: Symmetry, numbers: Collection[int]) -> dict[str, Ids]:
    """Where some units of another symmetry of the same parameters go when the units of one go to some places.

    Arguments:
        symmetry: the symmetry.
        images: for every class of it, the place of each unit.
        other: the other symmetry.
        numbers: its classes that are asked for.

    Returns:
        For these by name, the place of each unit.
    """
    sources = {(axis.parameter, axis.dim): axis.source(images) for axis in symmetry.layout if len(axis.dims) == 1}
    found = {n: np.arange(other.units[n].size) for n in numbers}
    for n in numbers:
        for m, block in inside(other, n).items():
            at = {slot: block[u] for u, slot in _slots(other.layout, m)}
            for (name, dim, index), unit in at.items():
                source = sources.get((name, dim))
                if source is not None:
                    found[n][at.get((name, dim, int(source[index])), unit)] = unit
    return {other.names[n]: place for n, place in found.items()}


def _slots(layout: Sequence[AxisLayout], number: int) -> list[tuple[int, Slot]]:
    """The units of a class, each with every place on a parameter where it lies."""
    return [
        (u, (axis.parameter, axis.dim, int(axis.index[slot])))
        for axis in layout
        if len(axis.dims) == 1
        for n, slots in axis.roles
        if n == number
        for u, slot in enumerate(slots.tolist())
    ]
