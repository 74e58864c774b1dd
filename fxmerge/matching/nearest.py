"""Which of the blocks that stay is most like each of the others, where there is no room for how alike all pairs of
units are that lie in them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fxmerge.matching.assignment import Scores, assign, descendants
from fxmerge.matching.gains import Gains, Known
from fxmerge.matching.nested import similar_blocks
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.units import Ids


def with_blocks(symmetry: Symmetry, number: int, gains: Mapping[int, Gains]) -> Known:
    """The same; of classes that lie in the blocks and have others in them, with what these gain.

    Arguments:
        symmetry: the classes.
        number: the class of blocks.
        gains: of classes of the tree.
    """
    found: dict[int, Gains | Scores] = dict(gains)
    for n in _inside(symmetry, number):
        tree = descendants(symmetry, n)
        if len(tree) > 1:
            every = {k: np.arange(symmetry.units[k].size) for k in tree if k in gains}
            found |= similar_blocks(symmetry, n, 1, {k: gains[k][np.ix_(own, own)] for k, own in every.items()})
    return found


def nearest(symmetry: Symmetry, number: int, survivors: Ids, gains: Known) -> Ids:
    """For every block of one model the number, among some of them, of the one from which it gains most, as
    `similar_blocks` has it; of these, their own.

    A block gains no more from another one than from itself, and no more than if each unit in it is matched with the one
    that it gains most from. So most blocks need not be matched.

    Arguments:
        symmetry: the classes.
        number: the class of blocks.
        survivors: the units among which is chosen.
        gains: as `with_blocks` gives them.
    """
    labels = np.zeros(symmetry.units[number].size, np.int64)
    labels[survivors] = np.arange(len(survivors))
    members = {n: symmetry.arranged(n, number) for n in _inside(symmetry, number) if n in gains}
    for i in np.setdiff1d(np.arange(len(labels)), survivors).tolist():
        own = gains[number][np.ix_([i], survivors)][0] if number in gains else np.zeros(len(survivors))
        whole = sum(_from_themselves(gains[n], both[i].reshape(-1)) for n, both in members.items())
        most = -np.inf
        for place in np.argsort(-own, kind="stable").tolist():
            if own[place] + whole <= most:
                break
            units = [(gains[n], both[i], both[survivors[place]]) for n, both in members.items()]
            pairs = [g[np.ix_(one, other)] for g, a, b in units for one, other in zip(a, b, strict=True)]
            if own[place] + sum(float(pair.max(axis=1).sum()) for pair in pairs) > most:
                total = own[place] + sum(float(pair[np.arange(len(pair)), assign(pair)].sum()) for pair in pairs)
                if total > most:
                    labels[i], most = place, total
    return labels


def _from_themselves(gains: Gains | Scores, units: Ids) -> float:
    return gains.weight * len(units) if isinstance(gains, Gains) else float(gains[units, units].sum())


def _inside(symmetry: Symmetry, number: int) -> list[int]:
    """The classes that lie in the units of a class, not in others of these."""
    return [n for n in descendants(symmetry, number)[1:] if any(p == number for p, _ in symmetry.units[n].parents)]
