"""Greedy agglomeration with minimum linkage, damping, and a limit to the merges inside of each model.

The result is that of searching the whole matrix for the most similar pair before every merge, ties included. Two
things make it fast. As in the generic algorithm of Müllner (arXiv 1109.2378), every unit knows the nearest of the
units after it, or a bound on how near that is. And merges that cannot influence each other are made together: damping
bounds how similar to any unit that can be which the most similar pair becomes, so that pairs of others that are more
similar than that are merged without looking at it.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxmerge.symmetry.units import Ids

Links = NDArray[np.floating[Any]]
"""How similar all pairs of units are; merges are worked out in its dtype."""

NEVER = -np.inf
"""The similarity of two units that must not be merged."""

CHUNK = 64
"""Merges of which the similarities are worked out together, which bounds the memory for them."""

PADDING = 8
"""Entries between the rows of a matrix, without which entries of one column share few cache lines if the rows'
length is a power of two: writing a column then takes ten times as long."""

TILE = 32
"""Rows that are transposed at a time."""


def agglomerate(similarity: Links, model: Ids, merges: int, limits: Ids, damping: float) -> tuple[Ids, Ids]:
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
        # With a damping of 0, what one merge forbids depends on those before it.
        one, two, near = state.candidates(merges if damping > 0 else 1, left, width, damping)
        made = len(one)
        if not made:
            break
        within = np.where(model[one] == model[two], model[one], -1)
        if not (near[1:made] > state.reach(near[0], damping)).all():
            made = state.independent(one[:made], two[:made], near[:made], damping)
        state.join(one[:made], two[:made])
        merges -= made
        left -= np.bincount(within[:made][within[:made] >= 0], minlength=len(left))
        if merges and made > max(CHUNK, len(model) // 4):  # A copy of fewer rows costs less than it saves later.
            kept, smaller = state.compact(one[:made], two[:made], damping)
            further, used = agglomerate(smaller, model[kept], merges, left, damping)
            return kept[further[np.searchsorted(kept, state.first)]], limits - left + used
        if merges:
            state.place(one[:made], two[:made], damping)
        width = min(2 * made, CHUNK)
        for m in np.unique(within[:made]).tolist():
            if m >= 0 and left[m] == 0:
                state.part(m)
    return state.first, limits - left


def symmetric(similarity: Links) -> Links:
    """What is above the diagonal, below it too, and -inf on it."""
    size = len(similarity)
    links: Links = np.empty((size, size + PADDING), similarity.dtype)[:, :size]
    for start in range(0, size, TILE):
        end = start + TILE
        tile = np.triu(similarity[start:end, start:end], 1)
        links[start:end, start:end] = tile + tile.T
        links[start:end, end:] = similarity[start:end, end:]
        links[end:, start:end] = similarity[start:end, end:].T
    np.fill_diagonal(links, NEVER)
    return links


class _State:
    """What is merged so far, and for every unit the nearest of those after it.

    Attributes:
        links: how similar any two merged units are; -inf if they must not be merged. What is not above the diagonal is
            there as soon as `whole` is true.
        first: for every unit, the first of those that it is merged with.
        nearest: for every unit, the nearest of the units after it; of equals the first.
        bound: how near that is.
        stale: where `nearest` may be gone, and `bound` be too high.
    """

    def __init__(self, similarity: Links, model: Ids) -> None:
        size = len(similarity)
        self.links, self.whole = similarity, False
        self.model, self.units = model, np.arange(size)
        self.first, self.nearest = self.units.copy(), np.zeros(size, np.int64)
        self.bound, self.stale = np.full(size, NEVER, similarity.dtype), np.zeros(size, bool)
        self._look(self.units[:-1])

    def reach(self, near: float, damping: float) -> float:
        """How similar to any unit what a merge makes is at most, if no pair is more similar than the merged one."""
        return float(self.links.dtype.type(max(near, 0.0)) * self.links.dtype.type(damping))  # Rounded as a link is.

    def _look(self, units: Ids) -> None:
        """Finds the nearest of the units after each of some."""
        for i in units.tolist():
            after = self.links[i, i + 1 :]
            near = int(after.argmax())
            self.nearest[i], self.bound[i] = i + 1 + near, after[near]
        self.stale[units] = False

    def _complete(self) -> None:
        """Makes the links this state's own, on both sides of the diagonal."""
        if not self.whole:
            self.links, self.whole = symmetric(self.links), True

    def part(self, m: int) -> None:
        """Forbids all merges inside of a model."""
        self._complete()
        own = np.flatnonzero((self.model == m) & (self.first == self.units))
        self.links[np.ix_(own, own)] = NEVER
        self.stale[own[(self.model[self.nearest[own]] == m) & (self.bound[own] > NEVER)]] = True

    def candidates(self, most: int, limits: Ids, width: int, damping: float) -> tuple[Ids, Ids, Links]:
        """The next pairs in the order of the merges, and how similar they are, as far as no merge changes the order.

        These are the ones that are known to be independent of each other, and at least `width`, or twice as many, of
        which that is still to be seen, but none after the one that reaches the limit of a model. There are none if
        all that is left is forbidden.
        """
        model, left = self.model.tolist(), limits.tolist()
        order = np.argsort(-self.bound, kind="stable")
        ahead = list(zip((-self.bound[order]).tolist(), order.tolist(), self.nearest[order].tolist(), strict=True))
        ahead.reverse()
        again: list[tuple[float, int, int]] = []  # those whose nearest was merged, with the nearest of the others
        taken = np.zeros(len(order), self.links.dtype)
        used: set[int] = set()
        found: list[tuple[int, int, float]] = []
        known, reach = 0, NEVER
        while len(found) < most and (ahead or again):
            first_again = not ahead or (again and again[0] < ahead[-1])
            distance, i, j = heapq.heappop(again) if first_again else ahead.pop()
            if -distance == NEVER:
                break
            if found and not known and -distance <= reach:
                known = len(found)
            if known and len(found) >= max(width, 2 * known):
                break
            if i in used:
                continue
            if self.stale[i]:
                self._look(self.units[i : i + 1])
                heapq.heappush(again, (-float(self.bound[i]), i, int(self.nearest[i])))
            elif j in used:
                after = self.links[i, i + 1 :] + taken[i + 1 :]
                near = int(after.argmax())
                heapq.heappush(again, (-float(after[near]), i, i + 1 + near))
            else:
                if not found:
                    reach = self.reach(-distance, damping)
                found.append((i, j, -distance))
                used |= {i, j}
                taken[i] = taken[j] = NEVER
                if model[i] == model[j]:
                    left[model[i]] -= 1
                    if not left[model[i]]:
                        break
        pairs = np.array([(i, j) for i, j, _ in found], np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1], np.array([near for _, _, near in found])

    def rows(self, one: Ids, two: Ids) -> Links:
        """How similar merged pairs are to all other units, undamped."""
        self._complete()
        return np.minimum(self.links[one], self.links[two])

    def independent(self, one: Ids, two: Ids, near: Links, damping: float) -> int:
        """How many merges of falling similarity can be made together: until one of them makes a pair that is as
        similar.

        A pair of two units of which both are new can only be more similar than to one that is not if damping raises
        it, which is to 0 at most.
        """
        made = 0.0
        for start in range(0, len(one), CHUNK):
            chunk = slice(start, start + CHUNK)
            rows = self.rows(one[chunk], two[chunk])
            most = np.maximum.accumulate(np.maximum(rows.max(axis=1) * damping, made))
            dependent = np.flatnonzero(near[start + 1 : start + 1 + CHUNK] <= most[: len(near) - start - 1])
            if len(dependent):
                return start + int(dependent[0]) + 1
            made = float(most[-1])
        return len(one)

    def join(self, one: Ids, two: Ids) -> None:
        """Notes merges of pairs."""
        into = self.units.copy()
        into[two] = one
        self.first = into[self.first]

    def compact(self, one: Ids, two: Ids, damping: float) -> tuple[Ids, Links]:
        """The units that are left by merges of pairs, and above the diagonal how similar they are."""
        kept = np.flatnonzero(self.first == self.units)
        at = np.searchsorted(kept, one)
        other, scale = kept.copy(), np.ones(len(kept), self.links.dtype)
        other[at], scale[at] = two, damping
        links = np.empty((len(kept), len(kept)), self.links.dtype)
        for start in range(0, len(kept), CHUNK):
            chunk = slice(start, start + CHUNK)
            rows = self.rows(kept[chunk], other[chunk]) * scale[chunk, None]
            links[chunk, start:] = np.minimum(rows.take(kept[start:], axis=1), rows.take(other[start:], axis=1))
            links[chunk, start:] *= scale[start:]
        return kept, links

    def place(self, one: Ids, two: Ids, damping: float) -> None:
        """Puts what merges make in the places of the first of each pair."""
        rows = self.rows(one, two)
        if damping > 0:
            rows *= damping
            rows[:, one] = np.minimum(rows[:, one], rows[:, two]) * damping
        else:
            rows[:, (self.model == self.model[one[0]]) | (self.model == self.model[two[0]])] = NEVER
        rows[:, two] = NEVER
        self.links[one], self.links[:, one], self.links[:, two] = rows, rows.T, NEVER
        self.bound[two], self.stale[two] = NEVER, False

        # A unit may have lost its nearest, or, since damping raises what is negative, have found a nearer one.
        low = np.flatnonzero((self.bound < 0) & (self.bound > NEVER))
        ascending = np.argsort(one)
        new = np.where(one[ascending, None] > low, rows[np.ix_(ascending, low)], NEVER)
        near = new.max(axis=0)
        at = one[ascending[new.argmax(axis=0)]]
        nearer = (near > self.bound[low]) | ((near == self.bound[low]) & (self.nearest[low] >= at) & ~self.stale[low])
        gone = np.zeros(len(self.units), bool)
        gone[one] = gone[two] = True
        self.stale |= gone[self.nearest] & (self.bound > NEVER)
        found = low[nearer]
        self.nearest[found], self.bound[found], self.stale[found] = at[nearer], near[nearer], False
        self._look(one)
