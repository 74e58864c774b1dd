"""Which cases of a test every run tries, and which only `pytest -m slow` does.

Slow are further cases of what every run checks on some: more random architectures, larger networks, more language
models; and whole scenarios that take seconds, whose parts every run checks. A case of a kind of its own is not slow,
and neither is a message of an error.
"""

import os
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest


def slow(case: Any) -> Any:
    """A case of a parametrised test that only `pytest -m slow` tries; a tuple has a value for each argument."""
    return pytest.param(*case if isinstance(case, tuple) else (case,), marks=pytest.mark.slow)


def but_slow(cases: Iterable[Any], quick: int | Iterable[Any] = 1) -> list[Any]:
    """The cases, slow but for the first few, or but for some of them."""
    cases = list(cases)
    kept = cases[:quick] if isinstance(quick, int) else list(quick)
    assert all(case in cases for case in kept), f"{kept} are not all among the cases"
    return [case if case in kept else slow(case) for case in cases]


def crossed(*values: Iterable[Any]) -> list[Any]:
    """All combinations of some values of each of several arguments, slow but for a few in which every value occurs."""
    lists = [list(own) for own in values]
    longest = max(map(len, lists))
    kept = {tuple(i % len(own) for own in lists) for i in range(longest)}
    numbers = product(*(range(len(own)) for own in lists))
    cases = [(at, tuple(own[i] for own, i in zip(lists, at, strict=True))) for at in numbers]
    return [pytest.param(*case) if at in kept else slow(case) for at, case in cases]


def examples(draw: Callable[[int], Iterable[Any]], quick: int, count: int) -> list[Any]:
    """Drawn cases, slow but for the first few; with `FXMERGE_EXAMPLES=5000` in the environment, so many, none slow."""
    asked = os.environ.get("FXMERGE_EXAMPLES")
    return list(draw(int(asked))) if asked else but_slow(draw(count), quick)
