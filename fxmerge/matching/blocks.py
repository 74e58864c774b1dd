"""Blocks of two models, matched one to one at any depth by what their members gain."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fxmerge.matching.assignment import Scores, assign, lift
from fxmerge.symmetry.units import Ids


def nest(levels: Sequence[Ids]) -> list[Ids]:
    """What lies in what: for every level, the numbers of the next level's blocks (of units, at the last) in each of
    its blocks, shape (blocks, members).

    Arguments:
        levels: for every level, outer blocks first, the number of the block of every unit.

    Raises:
        ValueError: if blocks of one level differ in size, or are not each inside of one block of the level before.
    """
    numbers = [np.unique(level, return_inverse=True)[1].reshape(-1) for level in levels]
    nested = []
    for outer, inner in pairwise([*numbers, np.arange(len(levels[0]))]):
        block = np.zeros(inner.max() + 1, np.int64)
        block[inner] = outer
        if not np.array_equal(block[inner], outer):
            raise ValueError("a block lies across several outer blocks")
        if len(np.unique(np.bincount(block))) > 1:
            raise ValueError("blocks of one level differ in size")
        nested.append(np.argsort(block, kind="stable").reshape(block.max() + 1, -1))
    return nested


def match_blocks(scores: Scores, nested: Sequence[Ids]) -> Ids:
    """Matches the innermost blocks of a model to those of another.

    Members are assigned inside of every pair of blocks first; what they gain is the score of the pair.
    This is the first half of the paper's group zip (MuDSC, section 4.3).

    Arguments:
        scores: of all pairs (unit of the other, unit of the model).
        nested: what lies in what, as `nest` tells.

    Returns:
        For every innermost block of the model, the block of the other.
    """
    gains = [scores]
    for members in reversed(nested):
        gains.append(lift(members[:, None], gains[-1]))
    place = np.empty(len(gains[-1]), np.int64)
    place[assign(gains[-1])] = np.arange(len(place))
    for members, gain in zip(nested[:-1], reversed(gains[1:-1]), strict=True):
        inner = np.empty(len(gain), np.int64)
        for block, other in enumerate(place):
            rows, columns = members[other], members[block]
            inner[columns[assign(gain[np.ix_(rows, columns)])]] = rows
        place = inner
    return place
