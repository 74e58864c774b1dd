"""Greedy agglomeration with minimum linkage, damping, and a limit to the merges inside of each model.

The result is that of searching the whole matrix for the most similar pair before every merge, ties included. Two
things make it fast. As in the generic algorithm of Müllner (arXiv 1109.2378), every unit knows the nearest of the
units after it, or a bound on how near that is. And merges that cannot influence each other are made together.
"""

from __future__ import annotations

import numpy as np

from fxmerge.matching.assignment import Scores
from fxmerge.symmetry.units import Ids

NEVER = -np.inf
"""The similarity of two units that must not be merged."""

MAX_BATCH = 256
"""The most merges that are made together, which bounds the memory for their rows."""


PADDING = 8
"""Entries between the rows of a matrix, without which entries of one column share few cache lines if the rows'
length is a power of two: writing a column then takes ten times as long."""

TILE = 64
"""Rows that are transposed at a time."""


def agglomerate(similarity: Scores, model: Ids, merges: int, limits: Ids, damping: float) -> tuple[Ids, Ids]:
    """Merges the most similar pair, again and again; of equals the first, by row and then by column.

    A merged unit stands where the first of its members stood. It is as similar to another unit as the less
    similar of the two that it is made of, times the damping; -inf forbids a merge, and is inherited.

    Arguments:
        similarity: of all pairs of units, shape (units, units). Only what is above the diagonal is read.
        model: the model of every unit, ascending; that of a merged unit is its first member's.
        merges: how many merges to make.
        limits: for every model, how many merges of two of its units may be made.
        damping: in [0, 1]; what the similarities of a merged unit are multiplied with. 0 forbids it further
            merges with units of the models of the two that it is made of.

    Returns:
        For every unit the first unit of those that it is merged with, which may be itself; and for every model
        the merges that were made of two of its units. If no allowed pair is left, fewer merges are made than asked.
    """
    state = _State(similarity, model)
    left = limits.copy()
    for m in np.flatnonzero(left <= 0).tolist():
        state.part(m)
    width = 1
    while merges:
        one, two = state.candidates(min(merges, width))
        if not len(one):
            break
        rows = np.minimum(state.links[one], state.links[two])
        if damping > 0:
            rows *= damping
            made = _independent(state.bound[one], rows)
        else:
            made = 1
            rows[:, (model == model[one]) | (model == model[two])] = NEVER
        within = np.where(model[one] == model[two], model[one], -1)
        for m in np.unique(within[within >= 0]).tolist():
            # The merge that reaches a limit is the last of its batch, since no other may follow.
            last = np.flatnonzero(within == m)[left[m] - 1 :]
            made = min(made, int(last[0]) + 1) if len(last) else made
        one, two, rows, within = one[:made], two[:made], rows[:made], within[:made]
        if made > 1:
            rows[:, one] = np.minimum(rows[:, one], rows[:, two]) * damping
        state.merge(one, two, rows)
        merges -= made
        # With a damping of 0, what one merge forbids depends on those before it.
        width = min(2 * made, MAX_BATCH) if damping > 0 else 1
        for m in within[within >= 0].tolist():
            left[m] -= 1
            if left[m] == 0:
                state.part(m)
    return state.first, limits - left


def symmetric(similarity: Scores) -> Scores:
    """What is above the diagonal, below it too, and -inf on it."""
    size = len(similarity)
    links: Scores = np.empty((size, size + PADDING))[:, :size]
    for start in range(0, size, TILE):
        end = start + TILE
        tile = np.triu(similarity[start:end, start:end], 1)
        links[start:end, start:end] = tile + tile.T
        links[start:end, end:] = similarity[start:end, end:]
        links[end:, start:end] = similarity[start:end, end:].T
    np.fill_diagonal(links, NEVER)
    return links


def _independent(values: Scores, rows: Scores) -> int:
    """How many merges of falling similarity can be made together: until one of them makes a pair that is as similar.

    A pair of two units of which both are new can only be more similar than `rows` say if damping raises it,
    which is to 0 at most.
    """
    made = np.maximum.accumulate(np.maximum(rows.max(axis=1), 0))
    dependent = np.flatnonzero(values[1:] <= made[:-1])
    return int(dependent[0]) + 1 if len(dependent) else len(values)


class _State:
    """What is merged so far, and for every unit the nearest of those after it.

    Attributes:
        links: how similar any two merged units are; -inf if they must not be merged.
        first: for every unit, the first of those that it is merged with.
        nearest: for every unit, the nearest of the units after it; of equals the first.
        bound: how near that is.
        stale: where `nearest` may be gone, and `bound` be too high.
    """

    def __init__(self, similarity: Scores, model: Ids) -> None:
        size = len(similarity)
        self.links = symmetric(similarity)
        self.model, self.units = model, np.arange(size)
        self.first, self.nearest = self.units.copy(), np.zeros(size, np.int64)
        self.bound, self.stale = np.full(size, NEVER), np.zeros(size, bool)
        self._look(self.units[:-1])

    def _look(self, units: Ids) -> None:
        """Finds the nearest of the units after each of some."""
        for i in units.tolist():
            after = self.links[i, i + 1 :]
            near = int(after.argmax())
            self.nearest[i], self.bound[i] = i + 1 + near, after[near]
        self.stale[units] = False

    def part(self, m: int) -> None:
        """Forbids all merges inside of a model."""
        own = np.flatnonzero((self.model == m) & (self.first == self.units))
        self.links[np.ix_(own, own)] = NEVER
        self.stale[own[(self.model[self.nearest[own]] == m) & (self.bound[own] > NEVER)]] = True

    def candidates(self, most: int) -> tuple[Ids, Ids]:
        """The next pairs in the order of the merges, as long as each is not changed by those before; none if all
        that is left is forbidden."""
        enough = 2 * most
        fresh = self.bound[~self.stale]
        least = np.partition(fresh, -enough)[-enough] if len(fresh) > enough else NEVER
        self._look(np.flatnonzero(self.stale & (self.bound >= least)))
        order = np.argsort(-self.bound, kind="stable")[:enough]
        used: set[int] = set()
        one: list[int] = []
        two: list[int] = []
        for i, j, near in zip(order.tolist(), self.nearest[order].tolist(), self.bound[order].tolist(), strict=True):
            if i in used:
                continue  # it has been merged into a unit before it
            if j in used or near == NEVER or len(one) == most:
                break
            used |= {i, j}
            one.append(i)
            two.append(j)
        return np.array(one, np.int64), np.array(two, np.int64)

    def merge(self, one: Ids, two: Ids, rows: Scores) -> None:
        """Merges pairs; `rows` are the similarities of the merged units."""
        rows[:, two] = NEVER
        self.links[one], self.links[:, one], self.links[:, two] = rows, rows.T, NEVER
        into = self.units.copy()
        into[two] = one
        self.first = into[self.first]
        self.bound[two], self.stale[two] = NEVER, False

        # A unit may have found a nearer one, since damping raises what is negative, or have lost its nearest.
        ascending = np.argsort(one)
        new = np.where(one[ascending, None] > self.units, rows[ascending], NEVER)
        near = new.max(axis=0)
        found = np.flatnonzero((near >= self.bound) & (near > NEVER))
        at = one[ascending[new[:, found].argmax(axis=0)]]
        nearer = (near[found] > self.bound[found]) | ((self.nearest[found] >= at) & ~self.stale[found])
        found, at = found[nearer], at[nearer]
        gone = np.zeros(len(self.units), bool)
        gone[one] = gone[two] = True
        self.stale |= gone[self.nearest] & (self.bound > NEVER)
        self.nearest[found], self.bound[found], self.stale[found] = at, near[found], False
        self._look(one)
