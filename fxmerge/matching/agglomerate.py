"""Greedy agglomeration with minimum linkage, damping, and a limit to the merges inside of each model.

The nearest neighbours are kept as in the generic algorithm of Müllner (arXiv 1109.2378): every unit knows the
nearest of the units after it, or a bound on how near that is, so that a merge costs a few vector operations in
place of a search of the whole matrix. The result is that of the search, ties included.
"""

from __future__ import annotations

import numpy as np

from fxmerge.matching.assignment import Scores
from fxmerge.symmetry.units import Ids

NEVER = -np.inf
"""The similarity of two units that must not be merged."""


def agglomerate(links: Scores, model: Ids, merges: int, limits: Ids, damping: float) -> tuple[Ids, Ids]:
    """Merges the most similar pair, again and again; of equals the first, by row and then by column.

    A merged unit stands where the first of its members stood. It is as similar to another unit as the less
    similar of the two that it is made of, times the damping; -inf forbids a merge, and is inherited.

    Arguments:
        links: the similarities of all pairs, symmetric, shape (units, units). It is overwritten.
        model: the model of every unit, ascending; that of a merged unit is its first member's.
        merges: how many merges to make.
        limits: for every model, how many merges of two of its units may be made.
        damping: what the similarities of a merged unit are multiplied with. 0 forbids it further merges with
            units of the models of the two that it is made of.

    Returns:
        For every unit the first unit of those that it is merged with, which may be itself; and for every model
        the merges that were made of two of its units. If no allowed pair is left, fewer merges are made than asked.
    """
    size = len(links)
    np.fill_diagonal(links, NEVER)
    left = limits.copy()
    first, alive = np.arange(size), np.ones(size, bool)
    # The nearest of the units after each, and how near it is; where stale, it may be another and not as near.
    nearest, bound, stale = np.zeros(size, np.int64), np.full(size, NEVER), np.zeros(size, bool)

    def look(i: int) -> None:
        after = links[i, i + 1 :]
        nearest[i] = i + 1 + after.argmax()
        bound[i] = links[i, nearest[i]]
        stale[i] = False

    def part(m: int) -> None:
        """Forbids all further merges inside of a model."""
        own = np.flatnonzero(alive & (model == m))
        links[np.ix_(own, own)] = NEVER
        stale[own[(model[nearest[own]] == m) & (bound[own] > NEVER)]] = True

    for i in range(size - 1):
        look(i)
    for m in np.flatnonzero(left <= 0).tolist():
        part(m)
    while merges:
        i = int(bound.argmax())
        if stale[i]:
            # Only here is the first of the nearest pairs sure: no earlier unit has as high a bound.
            look(i)
            continue
        if bound[i] == NEVER:
            break
        j = int(nearest[i])
        row = np.minimum(links[i], links[j])
        if damping > 0:
            row *= damping
        else:
            row[(model == model[i]) | (model == model[j])] = NEVER
        links[i], links[:, i], links[:, j] = row, row, NEVER
        alive[j], bound[j], stale[j] = False, NEVER, False
        first[first == j] = i

        # A unit before i may have found a nearer one, since damping raises what is negative.
        new, old = row[:i], bound[:i]
        nearer = (new > old) | ((new == old) & (nearest[:i] >= i) & ~stale[:i])
        lost = (nearest[:j] == i) | (nearest[:j] == j)
        lost[:i] &= ~nearer
        stale[:j] |= lost
        nearest[:i][nearer], bound[:i][nearer], stale[:i][nearer] = i, new[nearer], False
        look(i)

        merges -= 1
        if model[i] == model[j]:
            left[model[i]] -= 1
            if left[model[i]] <= 0:
                part(model[i])
    return first, limits - left
