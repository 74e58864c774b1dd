"""Units that lie in blocks, where blocks of one model may become one: they go where their blocks go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np

from fxmerge.matching.assignment import Scores, assign, descendants, lift
from fxmerge.matching.gains import Known
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.units import Ids
from fxmerge.units.layout import overlap

Choose = Callable[[int, Ids, Ids], Ids]
"""(class, units of one block, places they may take) -> the place of each unit."""


def is_block(symmetry: Symmetry, number: int) -> bool:
    """Whether the units of a class are blocks, such as heads, in which others have a choice of their own."""
    return not set(descendants(symmetry, number)[1:]).isdisjoint(symmetry.choices)


def inside(symmetry: Symmetry, number: int) -> dict[int, Ids]:
    """For a class and all that are nested in it, the unit of the class in which each unit lies."""
    found = {number: np.arange(symmetry.units[number].size)}
    for n in descendants(symmetry, number)[1:]:
        parent, at = next((p, at) for p, at in symmetry.units[n].parents if p in found)
        found[n] = found[parent][at]
    return found


def carry(
    symmetry: Symmetry,
    number: int,
    place: Ids,
    places: Sequence[Ids],
    choose: Choose = lambda number, units, free: free,
) -> dict[int, Ids]:
    """Where the units of a class go, and those of all classes that are nested in it.

    Arguments:
        symmetry: the classes.
        number: the class.
        place: for each of its units, the unit in whose place it goes; several may go to one. Places beyond the units
            are new ones, if `whole_blocks` allows them.
        places: the same for all classes as it is now, for what lies in other classes, too.
        choose: tells which unit of a block takes which place of the block that it goes into; in their order by default.
    """
    images = {number: place}
    for n in descendants(symmetry, number)[1:]:
        c = symmetry.units[n]
        key = np.stack([*(at for _, at in c.parents), c.fixed], axis=1)
        rows, row = np.unique(key, axis=0, return_inverse=True)
        members = np.argsort(row.reshape(-1), kind="stable").reshape(len(rows), -1)
        above = [images.get(p, places[p])[rows[:, i]] for i, (p, _) in enumerate(c.parents)]
        goals = np.stack([*above, rows[:, -1]], axis=1)
        at = {tuple(r): own for r, own in zip(rows.tolist(), members, strict=True)}
        image = np.empty(c.size, np.int64)
        for own, goal in zip(members, goals.tolist(), strict=True):
            free = at.get(tuple(goal))
            if free is None:  # In a new block, behind all others.
                blocks = symmetry.units[c.parents[0][0]].size
                each = c.size // blocks
                free = c.size + (goal[0] - blocks) * each + own % each
            image[own] = choose(n, own, free)
        images[n] = image
    return images


def whole_blocks(symmetry: Symmetry, number: int) -> bool:
    """Whether there may be more units of a class than there are, each with all that is nested in it.

    The new ones come last, each class behind its own, so all that lies in one unit must come before all that lies in
    the next, in every class and along every axis; and classes must not lie across each other there.
    """
    root = {number: np.arange(symmetry.units[number].size)}
    for n in descendants(symmetry, number)[1:]:
        c = symmetry.units[n]
        if len(c.parents) > 1:
            return False
        ((parent, at),) = c.parents
        root[n] = root[parent][at]
        if not _ascends(root[n]) or not _ascends(at):
            return False
    if len(root) == 1:
        return True  # Where a unit shows several times, as a channel with its pixels, all of it shares one stretch.
    for axis in symmetry.layout:
        stretches = [(n, axis.index[slots]) for n, slots in axis.roles if n in root]
        across = ((a, b) for (m, a), (n, b) in combinations(stretches, 2) if m != n)
        if not all(_ascends(index) for _, index in stretches) or any(overlap(a, b) for a, b in across):
            return False
    return True


def _ascends(numbers: Ids) -> bool:
    return bool((np.diff(numbers) >= 0).all())


def similar_blocks(symmetry: Symmetry, number: int, models: int, gains: Mapping[int, Scores]) -> dict[int, Scores]:
    """How much all pairs of units gain from each other, of a class of blocks and of all that is nested in it.

    What two blocks gain is what their members gain from their best assignment (MuDSC, arXiv 2403.01753, section 4.3).

    Arguments:
        symmetry: the classes.
        number: the class of blocks.
        models: how many models there are.
        gains: for classes of the tree, of all pairs of units of all models, model after model.

    Returns:
        The gains of all classes of the tree, those of parents with what their members gain.
    """
    tree = descendants(symmetry, number)
    total = {n: own.copy() for n, own in gains.items()}
    for n in reversed(tree[1:]):
        for parent, _ in symmetry.units[n].parents:
            if parent in tree and n in total:
                size = symmetry.units[n].size
                own = symmetry.arranged(n, parent)
                lifted = lift(np.concatenate([own + m * size for m in range(models)]), total[n])
                total[parent] = total[parent] + lifted if parent in total else lifted
    return total


def merge_blocks(
    symmetry: Symmetry, number: int, labels: Ids, places: Sequence[Sequence[Ids]], gains: Known
) -> list[dict[int, Ids]]:
    """Where everything goes that lies in merged blocks: members are matched, one to one, with those of the first block
    that goes to the same place.

    Arguments:
        symmetry: the classes.
        number: the class of blocks.
        labels: for every model and block, the place that it goes to, shape (models, blocks).
        places: for every model and class, the places as they are now.
        gains: as `similar_blocks` gives them.

    Returns:
        For every model, the places of the class and of all that is nested in it.
    """
    first: dict[tuple[int, int], int] = {}
    moved = []
    for m, (place, now) in enumerate(zip(labels, places, strict=True)):

        def choose(n: int, units: Ids, free: Ids, m: int = m) -> Ids:
            own = units + m * symmetry.units[n].size
            if (n, int(free[0])) not in first:
                first.update({(n, int(p)): int(u) for p, u in zip(free, own, strict=True)})
                return free
            if len(units) == 1 or n not in gains:
                return free
            chosen = np.empty_like(free)
            known = np.array([first[n, int(p)] for p in free])
            chosen[assign(gains[n][np.ix_(known, own)])] = free
            return chosen

        moved.append(carry(symmetry, number, place, now, choose))
    return moved
