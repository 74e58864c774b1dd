"""Lists of numbers as text that a person can read and edit: "0:64", "0:12 each 64", "0:4, 6, 9:1:-2"."""

from __future__ import annotations

import re

import numpy as np

from fxmerge.symmetry.units import Ids

PIECE = re.compile(r"(-?\d+)(?::(-?\d+)(?::(-?\d+))?)?(?: each (\d+))?(?: times (\d+))?")


def write_ranges(numbers: Ids) -> str:
    """The shortest of the ways in which `read_ranges` understands these numbers.

    Example:
        >>> import numpy as np
        >>> write_ranges(np.array([0, 1, 2, 3, 8, 6, 4, 9]))
        '0:4, 8:2:-2, 9'
        >>> write_ranges(np.array([0, 0, 0, 1, 1, 1])), write_ranges(np.array([0, 1, 2, 0, 1, 2]))
        ('0:2 each 3', '0:3 times 2')
    """
    return ", ".join(_pieces(numbers))


def _pieces(numbers: Ids) -> list[str]:
    runs = _runs(numbers)
    if len(runs) == 1 or len(numbers) < 2:
        return [_run(*run) for run in runs]
    starts = np.flatnonzero(np.r_[True, numbers[1:] != numbers[:-1]])
    lengths = np.diff(np.r_[starts, len(numbers)])
    if lengths[0] > 1 and (lengths == lengths[0]).all():
        inner = _pieces(numbers[starts])
        if len(inner) == 1 and "e" not in inner[0]:
            return [f"{inner[0]} each {lengths[0]}"]
    again = np.flatnonzero(numbers == numbers[0])
    for period in again[again > 0].tolist():
        if len(numbers) % period == 0 and np.array_equal(numbers[period:], numbers[:-period]):
            inner = _pieces(numbers[:period])
            if len(inner) == 1:
                return [f"{inner[0]} times {len(numbers) // period}"]
            break
    return [_run(*run) for run in runs]


def _runs(numbers: Ids) -> list[tuple[int, int, int]]:
    """The numbers as (first, count, step), as many as possible in each."""
    runs = []
    values = numbers.tolist()
    i = 0
    while i < len(values):
        end, step = i + 1, 1
        if end < len(values):
            step = values[end] - values[i]
            while end < len(values) and values[end] - values[end - 1] == step:
                end += 1
        if end - i == 2 and step not in (0, 1):
            end, step = i + 1, 1  # Two numbers alone are no range; the second may begin one.
        runs.append((values[i], end - i, step))
        i = end
    return runs


def _run(first: int, count: int, step: int) -> str:
    if count == 1:
        return str(first)
    if step == 0:
        return f"{first} each {count}"
    return f"{first}:{first + count * step}" + (f":{step}" if step != 1 else "")


def read_ranges(text: str, limit: int) -> Ids:
    """The numbers that a text stands for.

    Arguments:
        text: pieces with commas between them. A piece is one number, or `first:stop` or `first:stop:step` as
            in `range`; ` each n` after it repeats every number, and ` times n` the whole piece.
        limit: how many numbers there may be at most.

    Raises:
        ValueError: if the text is not such a list, or longer.

    Example:
        >>> read_ranges("0:2 each 3, 7", 10).tolist()
        [0, 0, 0, 1, 1, 1, 7]
    """
    pieces, count = [], 0
    for part in text.split(",") if text.strip() else []:
        match = PIECE.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{part.strip()!r} is no range; write 3, 0:8, 0:8:2, '0:8 each 2' or '0:8 times 2'")
        first, stop, step, each, times = (None if g is None else int(g) for g in match.groups())
        if first is None or step == 0:
            raise ValueError(f"{part.strip()!r} has a step of 0")
        run = range(first, first + 1) if stop is None else range(first, stop, 1 if step is None else step)
        each, times = 1 if each is None else each, 1 if times is None else times
        count += len(run) * each * times
        if count > limit:
            raise ValueError(f"{text!r} has more than {limit} numbers")
        pieces.append(np.tile(np.repeat(np.arange(run.start, run.stop, run.step, dtype=np.int64), each), times))
    return np.concatenate([np.zeros(0, np.int64), *pieces])
