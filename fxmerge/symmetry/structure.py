"""How the units of one class may move: the kinds of class, and how many choices a class has."""

from __future__ import annotations

from fxmerge.symmetry.classes import UnitClass

FREE, NESTED, PRODUCT, SPLIT, PINNED = "free", "nested", "product", "split", "pinned"


def structure(c: UnitClass) -> str:
    """The kind of a movable class."""
    if not c.parents:
        return SPLIT if c.fixed.any() else FREE
    return NESTED if len(c.parents) == 1 and not c.fixed.any() else PRODUCT


def combinations(c: UnitClass) -> tuple[int, int]:
    """How many combinations of parents and fixed positions a class has, and how many units are in each."""
    count = int(c.blocks.max()) + 1
    return count, c.size // count
