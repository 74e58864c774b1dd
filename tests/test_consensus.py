"""Several models in one basis: planted copies with noise agree more when each is matched with all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import pytest
import torch
from torch import Tensor

from fxmerge import Symmetry
from fxmerge.matching import consensus
from fxmerge.matching.balance import balance
from fxmerge.matching.consensus import match_all
from tests.test_bases import original, planted

NAME = "RMSNorm, gains"


def noisy_copies(count: int) -> tuple[Symmetry, list[dict[str, Tensor]]]:
    """Copies of a network in other bases, each with noise of its own that is half as large as its weights."""
    model, _, symmetry = original(NAME)
    models = [model, *(planted(NAME, seed=seed, noise=0.5) for seed in range(1, count))]
    return symmetry, [balance(symmetry, m.state_dict()).apply(m.state_dict()) for m in models]


def agreement(symmetry: Symmetry, states: Sequence[Mapping[str, Tensor]], reference: int = 0) -> float:
    """The inner products of all pairs of models once they are in one basis, as shares of what they can be at most."""
    found = match_all(symmetry, states, {}, reference, alpha=1)
    assert found.keys() == set(range(len(states))) - {reference}
    placed = [dict(state) for state in states]
    for i, own in found.items():
        placed[i] = own.basis.apply(own.permutation.apply(states[i]))
    names = sorted({axis.parameter for axis in symmetry.layout})
    total = [
        float((a[name] * b[name]).sum() / (a[name].norm() * b[name].norm()))
        for a, b in combinations(placed, 2)
        for name in names
    ]
    return sum(total) / len(total)


def test_all_pairs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    symmetry, states = noisy_copies(4)
    together = agreement(symmetry, states)
    monkeypatch.setattr(consensus, "ROUNDS", 0)
    assert together > agreement(symmetry, states) + 1e-4


def test_copies_without_noise_are_one() -> None:
    symmetry, states = noisy_copies(1)
    generator = torch.Generator().manual_seed(0)
    states += [symmetry.sample(generator).basis.apply(states[0]) for _ in range(2)]
    states = [balance(symmetry, state).apply(state) for state in states]
    for reference in range(3):
        assert agreement(symmetry, states, reference) == pytest.approx(1, abs=1e-9)


def test_the_order_of_the_others_does_not_matter() -> None:
    symmetry, states = noisy_copies(4)
    first = match_all(symmetry, states, {}, 0, alpha=1)
    other = match_all(symmetry, [states[i] for i in (2, 3, 1, 0)], {}, 3, alpha=1)
    for here, there in ((1, 2), (2, 0), (3, 1)):
        for number, matrix in first[here].basis.matrices.items():
            torch.testing.assert_close(matrix, other[there].basis.matrices[number])
