"""Bases in which heads agree."""

from __future__ import annotations

import numpy as np
import torch

from fxmerge.matching.head_bases import agreeing, likeness

HEADS, SIZE, ENTRIES = 6, 3, 20
UNITS = np.random.default_rng(0).permutation(HEADS * SIZE).reshape(HEADS, SIZE)
"""The units of each head, which lie anywhere."""


def rotation() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64))[0]


def rows(groups: int, noise: float) -> torch.Tensor:
    """What the units of heads give, where those of a group are equal but for noise, each in a basis of its own."""
    torch.manual_seed(0)
    found = torch.zeros(HEADS * SIZE, ENTRIES, dtype=torch.float64)
    for group in torch.arange(HEADS).view(groups, -1):
        shared = torch.randn(SIZE, ENTRIES, dtype=torch.float64)
        for head in group.tolist():
            own = shared + noise * torch.randn(SIZE, ENTRIES, dtype=torch.float64)
            found[UNITS[head]] = rotation() @ own
    return found


def test_heads_that_differ_by_a_rotation_are_alike() -> None:
    x = rows(2, 0.0)
    alike = likeness((x @ x.T).numpy(), UNITS)
    same = np.arange(HEADS)[:, None] // 3 == np.arange(HEADS) // 3
    np.testing.assert_allclose(alike[same], 1)
    assert alike[~same].max() < 0.9


def test_planted_rotations_are_undone() -> None:
    x = rows(2, 0.0)
    found = agreeing((x @ x.T).numpy(), UNITS, 3)
    turned = found @ x[torch.from_numpy(UNITS)]
    for first in (0, 3):
        torch.testing.assert_close(found[first], torch.eye(SIZE, dtype=torch.float64))
        torch.testing.assert_close(turned[first : first + 3], turned[first].expand(3, SIZE, ENTRIES))


def test_no_other_basis_of_one_head_agrees_more() -> None:
    """Every head but the first is in the best basis for the sum of the others."""
    x = rows(2, 1.0)
    found = agreeing((x @ x.T).numpy(), UNITS, 3)
    torch.testing.assert_close(found @ found.mT, torch.eye(SIZE, dtype=torch.float64).expand(HEADS, SIZE, SIZE))
    turned = found @ x[torch.from_numpy(UNITS)]
    for i in (1, 2, 4, 5):
        others = turned[i // 3 * 3 : i // 3 * 3 + 3].sum(0) - turned[i]
        cross = others @ turned[i].T
        assert float(torch.linalg.svdvals(cross).sum() - cross.trace()) < 1e-2 * float(cross.trace())
