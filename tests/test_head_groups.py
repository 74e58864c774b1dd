"""Groups of heads that are alike, and orders in which they are neighbours."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from fxmerge.matching.head_groups import equal_groups


def inside(similarity: np.ndarray, group: np.ndarray) -> float:
    """What the similarities of all pairs in one group add up to."""
    return float(sum(similarity[i, j] for i, j in combinations(range(len(group)), 2) if group[i] == group[j]))


@pytest.mark.parametrize(("groups", "size"), [(1, 4), (2, 2), (4, 2), (3, 3), (2, 6), (8, 1)])
def test_planted_groups_are_found(groups: int, size: int) -> None:
    rng = np.random.default_rng(groups)
    planted = rng.permutation(np.repeat(np.arange(groups), size))
    similarity = np.where(planted[:, None] == planted, 0.9, 0.1) + 0.2 * rng.random((len(planted), len(planted)))
    found = equal_groups(similarity, size)
    assert np.array_equal(found[:, None] == found, planted[:, None] == planted)
    # Groups are numbered in the order of their first members.
    assert list(dict.fromkeys(found.tolist())) == list(range(groups))


@pytest.mark.parametrize("seed", range(8))
def test_groups_are_equal_and_no_exchange_makes_them_more_alike(seed: int) -> None:
    rng = np.random.default_rng(seed)
    similarity = rng.random((12, 12))
    group = equal_groups(similarity, 3)
    assert np.bincount(group).tolist() == [3, 3, 3, 3]
    best = inside(similarity, group)
    for i, j in combinations(range(12), 2):
        other = group.copy()
        other[[i, j]] = other[[j, i]]
        assert inside(similarity, other) <= best + 1e-9


def test_only_what_is_above_the_diagonal_counts() -> None:
    similarity = np.array([[9, 0.1, 0.9, 0.2], [5, 9, 0.3, 0.8], [-5, 7, 9, 0.4], [3, 3, 3, 9]])
    assert equal_groups(similarity, 2).tolist() == [0, 1, 0, 1]
