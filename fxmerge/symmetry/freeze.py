"""Turning classes of a symmetry to the identity."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

import numpy as np

from fxmerge.symmetry.base import Group

G = TypeVar("G", bound=Group)


def moving_together(symmetry: Group, numbers: Iterable[int]) -> set[int]:
    """Some classes, and all in which they are nested or that are nested in them, directly or not."""
    found = set(numbers)
    ancestors = [symmetry.ancestors(n) for n in range(len(symmetry.units))]
    while True:
        more = {n for n, above in enumerate(ancestors) if n not in found and above & found}
        more |= {a for n in found for a in ancestors[n]} - found
        if not more:
            return found
        found |= more


def freeze(symmetry: G, numbers: Iterable[int], why: Callable[[str], str]) -> tuple[G, tuple[str, ...]]:
    """The symmetry in which some classes no longer move.

    What is nested in a class that does not move, does not move either, and a class is nested in others only
    through its units, so its parents cannot move without it.

    Arguments:
        symmetry: the symmetry to restrict.
        numbers: the classes that shall not move.
        why: the reason that is given for their axes, from the name of the class.

    Returns:
        The smaller symmetry, and the names of all classes that were taken from it.
    """
    gone = moving_together(symmetry, numbers)
    number = {n: i for i, n in enumerate(n for n in range(len(symmetry.units)) if n not in gone)}
    units = tuple(
        replace(c, parents=tuple((number[p], at) for p, at in c.parents))
        for n, c in enumerate(symmetry.units)
        if n in number
    )
    layout = tuple(replace(a, roles=tuple((number[n], s) for n, s in a.roles if n in number)) for a in symmetry.layout)
    stuck = {axis: dict(reasons) for axis, reasons in symmetry.stuck.items()}
    for a in symmetry.layout:
        for n, s in a.roles:
            if n in gone:
                reasons = stuck.setdefault((a.parameter, a.dim), {})
                reason = why(symmetry.names[n])
                reasons[reason] = np.union1d(reasons.get(reason, s[:0]), a.index[s])
    free = tuple(
        replace(o, classes=np.array([number.get(n, -1) for n in o.classes.tolist()], np.int64)) for o in symmetry.free
    )
    kinds = tuple(kind for n, kind in enumerate(symmetry.kinds) if n in number)
    layout = tuple(a for a in layout if a.roles)
    smaller = replace(symmetry, units=units, layout=layout, stuck=stuck, free=free, kinds=kinds)
    return smaller, tuple(symmetry.names[n] for n in sorted(gone))


def demote(symmetry: G, numbers: Iterable[int]) -> G:
    """The symmetry without classes that failed verification, and without what moves along with them."""
    smaller, names = freeze(symmetry, numbers, lambda name: f"{name} failed verification")
    return replace(smaller, demoted=(*symmetry.demoted, *names))
