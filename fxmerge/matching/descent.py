"""Coordinate descent: one coordinate is improved after the other, until no step helps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import numpy as np
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

MAX_SWEEPS = 100

TOLERANCE = 2e-4
"""A step that raises the objective by a smaller share than this is taken, but is no reason to try its
neighbours again."""


def rises(before: float, after: float) -> bool:
    """Whether an objective has risen by more than rounding; NaN is no gain.

    Example:
        >>> rises(1.0, 1.1), rises(1.0, 1.0), rises(1.0, float("nan"))
        (True, False, False)
    """
    return after > before + 1e-9 * abs(before)


def descend(
    coordinates: Iterable[int],
    objective: float,
    step: Callable[[int], float],
    neighbours: Callable[[int], set[int]],
    rng: np.random.Generator,
    bar: tqdm[None] | None = None,
) -> tuple[float, ...]:
    """Improves coordinates in random order, for as long as that helps.

    A coordinate is tried again only if one of its neighbours made a step of more than `TOLERANCE`.

    Arguments:
        coordinates: to be tried, such as classes of units or models.
        objective: what it is at the start.
        step: moves one coordinate, or leaves it where it is; returns the objective, which must not fall.
        neighbours: the coordinates whose best place may depend on one.
        rng: the source of the order.
        bar: shows every step that is tried.

    Returns:
        The objective at the start and after every step that raised it.

    Example:
        >>> position = [0, 0]
        >>> def step(i):
        ...     position[i] = min(position[i] + 1, 2)
        ...     return float(sum(position))
        >>> descend([0, 1], 0.0, step, lambda i: {i}, np.random.default_rng(0))
        (0.0, 1.0, 2.0, 3.0, 4.0)
    """
    trace, stale = [objective], set(coordinates)
    for _ in range(MAX_SWEEPS):
        if not stale:
            break
        for coordinate in rng.permutation(sorted(stale)).tolist():
            stale.discard(coordinate)
            if bar is not None:
                bar.update()
            after = step(coordinate)
            if after > trace[-1]:
                if after - trace[-1] > TOLERANCE * abs(trace[-1]):
                    stale |= neighbours(coordinate)
                trace.append(after)
    else:
        logger.warning("the search stopped after %d sweeps with steps still to be made", MAX_SWEEPS)
    return tuple(trace)
