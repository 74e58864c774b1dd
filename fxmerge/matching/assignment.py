"""Linear assignment, alone and nested: units inside of pairs of parents, then the parents."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.units import Ids
from fxmerge.units.basis import centred_frame
from fxmerge.units.kind import Kind

Scores = NDArray[np.float64]


def assign(scores: Scores) -> Ids:
    """The column for every row that maximises the sum of the scores, each column once."""
    columns: Ids = linear_sum_assignment(scores, maximize=True)[1]
    return columns


def descendants(symmetry: Symmetry, number: int) -> list[int]:
    """A class and all that are nested in it, parents before children."""
    return [n for n in range(len(symmetry.units)) if n == number or number in symmetry.ancestors(n)]


def propose(symmetry: Symmetry, root: int, own: dict[int, Scores]) -> tuple[Ids, ...]:
    """The best move of a class and of all that are nested in it.

    For every pair of blocks the members' assignments are solved first, at any depth; what they gain
    is the score of the pair. This is the paper's group match (MuDSC, section 4.3, "group align").
    Classes outside of the tree stay where they are, so that a class tied across several parents is
    solved for one parent at a time.

    Arguments:
        symmetry: the group.
        root: the class at the root of the tree.
        own: for classes of the tree, the scores of all pairs (place, unit). Units of a class that a change of basis
            mixes stay in their order in each block. What two of its blocks can gain is the sum of the singular values
            of their scores, or of the absolute values of complex ones, which no change of basis changes.

    Returns:
        For every class of the symmetry, the place of each unit.
    """
    tree = descendants(symmetry, root)
    gain = dict(own)
    for n in reversed(tree):
        if n in gain:
            for parent, _ in symmetry.units[n].parents:
                if parent in tree:
                    lifted = lift(_members(symmetry, n, parent), gain[n], symmetry.kind(n))
                    gain[parent] = gain[parent] + lifted if parent in gain else lifted

    def choose(n: int, units: Ids, places: Ids) -> Ids:
        if n not in gain or units.shape[1] == 1 or symmetry.kind(n) > Kind.PERMUTATION:
            return places
        chosen = np.empty_like(places)
        for t in range(len(units)):
            whole = np.array_equal(places[t], units[t]) and np.array_equal(units[t], np.arange(len(gain[n])))
            unit = assign(gain[n] if whole else gain[n][np.ix_(places[t], units[t])])
            chosen[t, unit] = places[t]
        return chosen

    images = [np.arange(c.size) for c in symmetry.units]
    for n in tree:
        images[n] = symmetry.class_image(n, images, partial(choose, n))
    return tuple(images)


def _members(symmetry: Symmetry, number: int, parent: int) -> Ids:
    """The units of a class by parent, by what may not be exchanged, and by what may: see `Group.arranged`. Of a class
    whose planes are turned, the two units of a plane are the latter."""
    arranged = symmetry.arranged(number, parent)
    if not symmetry.kind(number).turns:
        return arranged
    first, second = symmetry.by_block(number).T
    partner = np.full(symmetry.units[number].size, -1)
    partner[first] = second
    own = arranged[:, partner[arranged[0, :, 0]] >= 0, 0]  # At one place in all parents.
    return np.stack([own, partner[own]], axis=-1)


def lift(arranged: Ids, gain: Scores, kind: Kind = Kind.PERMUTATION) -> Scores:
    """The best total gain of the members of every pair of blocks; `arranged` is (blocks, combinations, members).
    Members are matched one to one, or by the orthogonal matrices that their kind allows."""
    blocks, combinations, members = arranged.shape
    lifted = np.zeros((blocks, blocks))
    for c in range(combinations):
        if members == 1:
            lifted += gain[np.ix_(arranged[:, c, 0], arranged[:, c, 0])]
            continue
        for i in range(blocks):
            if kind > Kind.PERMUTATION:
                pairs = gain[arranged[i, c][:, None, None], arranged[:, c].T[None]].transpose(2, 0, 1)
                if kind.turns:
                    lifted[i] += np.hypot(pairs[:, 0, 0] + pairs[:, 1, 1], pairs[:, 1, 0] - pairs[:, 0, 1])
                    continue
                if kind == Kind.CENTRED:
                    lifted[i] += pairs.sum((1, 2)) / members
                    frame = centred_frame(members).numpy()
                    pairs = frame.T @ pairs @ frame
                lifted[i] += np.linalg.svd(pairs, compute_uv=False).sum(-1)
                continue
            for j in range(blocks):
                pair = gain[np.ix_(arranged[i, c], arranged[j, c])]
                lifted[i, j] += pair[np.arange(members), assign(pair)].sum()
    return lifted
