"""Streams of several networks in the principal directions of all."""

from __future__ import annotations

from itertools import combinations_with_replacement, permutations

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import Align, Recipe, Run, Zip
from fxmerge.matching.principal import joint_directions
from fxmerge.units.basis import random_matrices
from fxmerge.units.kind import Kind
from tests.slow import but_slow
from tests.test_bases import TABLE, error, original, planted

KINDS = [Kind.ORTHOGONAL, Kind.CENTRED]
QUICK = ["RMSNorm, gains", "LayerNorm, gains and biases"]


def products(streams: list[Tensor]) -> dict[tuple[int, int], Tensor]:
    """The mean products of all pairs of units, of streams of shape (rows, units)."""
    pairs = combinations_with_replacement(range(len(streams)), 2)
    return {(i, j): streams[i].T @ streams[j] / len(streams[i]) for i, j in pairs}


def drawn(count: int, rows: int, size: int) -> list[Tensor]:
    """Streams that have a part in common."""
    generator = torch.Generator().manual_seed(count)

    def random() -> Tensor:
        scales = torch.logspace(0, -1, size, dtype=torch.float64)
        return scales * torch.randn(rows, size, dtype=torch.float64, generator=generator)

    common = random()
    return [common + random() for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [100, 3])
def test_streams_that_agree_stay(kind: Kind, rows: int) -> None:
    (stream,) = drawn(1, rows, 8)
    for weights in ((0.5, 0.5), (0.9, 0.1)):
        for matrix in joint_directions(products([stream, stream]), weights, kind):
            assert torch.allclose(matrix, torch.eye(8, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_loses_the_least(kind: Kind) -> None:
    streams, weights, size = drawn(3, 400, 6), (0.5, 0.3, 0.2), 6
    if kind == Kind.CENTRED:
        streams = [x - x.mean(1, keepdim=True) for x in streams]

    def lost(matrices: list[Tensor]) -> float:
        """What is lost of all streams when each reads its own part of their mean."""
        mean = sum(w * x @ m.T for w, x, m in zip(weights, streams, matrices, strict=True))
        return sum(w * float((x - mean @ m).square().sum()) for w, x, m in zip(weights, streams, matrices, strict=True))

    found = joint_directions(products(streams), weights, kind)
    least = lost(found)
    assert least < 0.9 * lost([torch.eye(size, dtype=torch.float64)] * 3)
    whole = torch.cat([w**0.5 * x for w, x in zip(weights, streams, strict=True)], 1)
    width = size - (kind == Kind.CENTRED)
    exact = float(torch.linalg.svdvals(whole)[width:].square().sum())
    assert exact <= least * (1 + 1e-9) < exact * 1.001
    ones = torch.ones(size, dtype=torch.float64)
    if kind == Kind.CENTRED:
        assert all(torch.allclose(m @ ones, ones) and torch.allclose(m.T @ ones, ones) for m in found)
    total = sum(w * m @ m.T for w, m in zip(weights, found, strict=True))
    assert torch.allclose(total, torch.eye(size, dtype=torch.float64))


def test_the_order_of_models_does_not_matter() -> None:
    streams, weights = drawn(3, 50, 5), (0.5, 0.3, 0.2)
    found = joint_directions(products(streams), weights, Kind.ORTHOGONAL)
    for order in permutations(range(3)):
        again = joint_directions(products([streams[i] for i in order]), [weights[i] for i in order], Kind.ORTHOGONAL)
        for i, matrix in zip(order, again, strict=True):
            assert torch.allclose(found[i], matrix, atol=1e-9)


@pytest.mark.parametrize("name", but_slow([n for n in TABLE if n != "image of patches"], QUICK))
def test_a_planted_copy_merges_back(name: str) -> None:
    model, args, _ = original(name)
    few = [tuple(x[:1] for x in args)]
    recipe = Recipe(match=Zip(continuous=True, alpha=1), fit=None)
    merged = fxmerge.merge(model, planted(name, seed=5), few, recipe, inputs=lambda x: (x, {}), run=Run(progress=False))
    assert error(merged, model, args) < 1e-9


class Stream(nn.Module):
    """A network of which the stream uses few of its directions."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.norm, self.head = nn.Linear(3, 8, bias=False), nn.RMSNorm(8), nn.Linear(8, 4 + seed)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        turn = random_matrices(Kind.ORTHOGONAL, 1, 8, torch.Generator().manual_seed(seed))[0].float()
        projector = turn[:3].T @ turn[:3]
        with torch.no_grad():
            self.embed.weight.copy_(projector @ self.embed.weight)
            self.down.weight.copy_(projector @ self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        out: Tensor = self.head(self.norm(x + self.down(self.up(self.norm(x)).relu())))
        return out


def test_directions_of_one_model_alone_are_kept() -> None:
    models, x = (Stream(0).eval(), Stream(1).eval()), torch.randn(256, 3)
    errors = {}
    for match in (Zip(continuous=True), Align(continuous=True)):
        merged = fxmerge.merge(*models, [x], Recipe(match=match, fit=None))
        with torch.no_grad():
            outputs = merged(x)
            errors[type(match)] = sum(
                float((own - model(x)).square().mean()) for own, model in zip(outputs, models, strict=True)
            )
    assert errors[Zip] < 0.7 * errors[Align]


def test_a_model_that_does_not_count_changes_nothing() -> None:
    a, b, x = Stream(0).double().eval(), Stream(1).double().eval(), torch.randn(64, 3).double()
    b.head = nn.Linear(8, 4).double()
    for model in (a, b):  # Hidden units of one model may be merged with each other.
        model.down.weight.data.zero_()
    recipe = Recipe(match=Zip(continuous=True), combine=fxmerge.Average(weights=(1.0, 0.0)), fit=None)
    assert error(fxmerge.merge(a, b, [x], recipe), a, (x,)) < 1e-9
