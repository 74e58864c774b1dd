"""How the units of one class may move: the kinds of class, and how many choices a class has."""

from __future__ import annotations

import numpy as np

from fxmerge.symmetry.classes import UnitClass

FREE, NESTED, PRODUCT, SPLIT, PINNED = "free", "nested", "product", "split", "pinned"


def structure(c: UnitClass) -> str:
    """The kind of a movable class."""
    if not c.parents:
        return SPLIT if c.fixed.any() else FREE
    return NESTED if len(c.parents) == 1 and not c.fixed.any() else PRODUCT


def combinations(c: UnitClass) -> tuple[int, int]:
    """How many combinations of parents and fixed positions a class has, and how many units are in each."""
    key = np.stack([*(at for _, at in c.parents), c.fixed], axis=1)
    count = len(np.unique(key, axis=0))
    return count, c.size // count
