"""Why units do not move: for every unit, the first reason that was recorded for it."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from fxmerge.symmetry.units import NOTHING, Ids, UnitGraph, distinct


def concatenate(pairs: list[tuple[Ids, Ids]]) -> tuple[Ids, Ids]:
    """Facts about pairs of units, recorded in several arrays, as one."""
    none = [np.zeros(0, np.int64)]
    return np.concatenate([a for a, _ in pairs] or none), np.concatenate([b for _, b in pairs] or none)


def first_reasons(units: UnitGraph) -> tuple[list[str], Ids]:
    """Why each unit does not move.

    Returns:
        All reasons, in the order in which they were recorded, and for every unit the number of its own: the
        first one of it or of a unit equal to it, or else that of a member. Units without any have the number
        of the last, "nothing to exchange it with".
    """
    a, b = concatenate(units.equal)
    graph = coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(units.size,) * 2)
    count, unit = connected_components(graph, directed=False)
    child, parent = concatenate(units.member)
    code = distinct(unit[child].astype(np.int64) * count + unit[parent])
    child, parent = code // count, code % count
    reasons = list(dict.fromkeys(reason for _, reason in units.pinned))
    number = {reason: i for i, reason in enumerate(reasons)}
    why = np.full(count, len(reasons), np.int64)
    for ids, reason in reversed(units.pinned):
        why[unit[ids]] = number[reason]
    why[unit[NOTHING]] = len(reasons)
    while True:  # A block takes over the reason of its pinned member.
        open_ = (why[parent] == len(reasons)) & (why[child] < len(reasons))
        if not open_.any():
            return [*reasons, "nothing to exchange it with"], why[unit]
        why[parent[open_]] = why[child[open_]]
