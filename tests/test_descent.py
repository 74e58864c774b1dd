"""Coordinate descent over any coordinates."""

import logging
import math
from itertools import pairwise

import numpy as np
import pytest

from fxmerge.matching.descent import MAX_SWEEPS, descend, rises


def test_it_ends_where_no_step_helps() -> None:
    """A quadratic of two coordinates that depend on each other, one of them minimised exactly at each step."""
    at = [3.0, -2.0]

    def value() -> float:
        return -(at[0] ** 2 + at[1] ** 2 + at[0] * at[1])

    def step(i: int) -> float:
        before, old = value(), at[i]
        at[i] = -at[1 - i] / 2
        if rises(before, value()):
            return value()
        at[i] = old
        return before

    trace = descend([0, 1], value(), step, lambda i: {1 - i}, np.random.default_rng(0))
    assert trace[0] == -7.0
    assert all(later > earlier for earlier, later in pairwise(trace))
    assert trace[-1] == pytest.approx(0, abs=1e-3)


def test_only_neighbours_of_what_moved_are_tried_again() -> None:
    tried: list[int] = []

    def step(i: int) -> float:
        tried.append(i)
        return 2.0 if i == 1 else 1.0 if len(tried) == 1 else 2.0

    descend([0, 1, 2], 1.0, step, lambda i: {2}, np.random.default_rng(0))
    assert tried.count(0) == tried.count(1) == 1
    assert tried.count(2) <= 2


def test_small_gains_are_taken_and_wake_nobody() -> None:
    values = iter([1.0 + 1e-5])
    assert descend([0], 1.0, lambda i: next(values), lambda i: {0}, np.random.default_rng(0)) == (1.0, 1.0 + 1e-5)


def test_the_order_is_that_of_the_seed() -> None:
    def order(seed: int) -> list[int]:
        tried: list[int] = []

        def step(i: int) -> float:
            tried.append(i)
            return 0.0

        descend(range(20), 0.0, step, lambda i: set(), np.random.default_rng(seed))
        return tried

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(20))


def test_an_endless_search_is_told(caplog: pytest.LogCaptureFixture) -> None:
    now = [1.0]

    def step(i: int) -> float:
        now[0] *= 2
        return now[0]

    with caplog.at_level(logging.WARNING):
        trace = descend([0], 1.0, step, lambda i: {0}, np.random.default_rng(0))
    assert len(trace) == MAX_SWEEPS + 1
    assert "stopped after 100 sweeps" in caplog.text


def test_nothing_to_try_is_the_start() -> None:
    assert descend([], 5.0, lambda i: 6.0, lambda i: {i}, np.random.default_rng(0)) == (5.0,)


@pytest.mark.parametrize(("before", "after"), [(1.0, 1.0), (1.0, 1.0 + 1e-12), (1.0, math.nan), (-2.0, -2.0)])
def test_rounding_and_nan_are_no_gain(before: float, after: float) -> None:
    assert not rises(before, after)
