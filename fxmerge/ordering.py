"""Comparisons in which NaN never wins: an error or a score that is no number is the worst there is."""

from __future__ import annotations

import math


def error_of(value: float) -> float:
    """An error by which to compare, the smaller the better.

    Example:
        >>> min([math.nan, 2.0, 1.0], key=error_of)
        1.0
    """
    return math.inf if math.isnan(value) else value


def score_of(value: float) -> float:
    """A score or an objective by which to compare, the larger the better.

    Example:
        >>> max([math.nan, 2.0, 1.0], key=score_of)
        2.0
    """
    return -math.inf if math.isnan(value) else value
