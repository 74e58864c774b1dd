"""A merge that was interrupted goes on after its last finished stage, to the same result to the last bit."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxmerge
from fxmerge import Align, Average, Budget, LeastSquares, OptionError, OutputError, Recipe, Repair, Run, Zip
from fxmerge.stages import MANIFEST, Form, Kept, Stages
from tests.networks import Attentive, mlp, pictures, vectors
from tests.slow import slow

PLAIN = Form[dict[str, Tensor]](Kept, lambda kept: dict(kept.tensors))


class Interrupted(BaseException):
    """Stands for the end of the process."""


@dataclass
class Watch:
    """The stages that are computed; a run ends before it keeps the result of the one with the number `last`."""

    done: list[str] = field(default_factory=list)
    last: int | None = None

    def write(self, path: Path) -> None:
        if self.last is not None and len(self.done) == self.last:
            raise Interrupted
        self.done.append(path.stem)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    found, write = Watch(), Stages._write

    def watched(self: Stages, path: Path, *args: Any) -> None:
        found.write(path)
        write(self, path, *args)

    monkeypatch.setattr(Stages, "_write", watched)
    yield found


# -------------------------------------------------------------------------- whole merges


class Normalized(nn.Module):
    """Convolutions with BatchNorm and a residual connection."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.norm = nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.inner, self.again = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.again(self.inner(x)))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Repeating(nn.Module):
    """A layer that reads what it gave before, and an output layer that is tied to the first one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.cell, self.gain = nn.Linear(64, 12), nn.Linear(12, 12), nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.stem(x.flatten(1)))
        for _ in range(3):
            hidden = torch.tanh(self.cell(hidden)) * self.gain
        return hidden @ self.stem.weight


class Turning(nn.Module):
    """A layer of complex numbers between real ones."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.head = nn.Linear(64, 8), nn.Linear(8, 3)
        self.turn = nn.Parameter(torch.randn(8, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.stem(x.flatten(1))) * self.turn
        out: Tensor = self.head(hidden.abs())
        return out


def normalized(seed: int) -> nn.Module:
    net = Normalized(seed)
    for batch in pictures():
        net(batch)
    return net.eval()


def classes(seed: int, count: int) -> nn.Module:
    net = mlp(seed)
    net[-1] = nn.Linear(20, count)  # type: ignore[operator]
    return net


def merged(make: Callable[[int], nn.Module], data: list[Tensor], recipe: Recipe | None = None) -> Any:
    return lambda run: fxmerge.merge(make(0), make(1), data, recipe, run=run)


def batches() -> list[Tensor]:
    return [batch for one in vectors() for batch in one.chunk(2)]


BY_BASES = Zip(continuous=True)

MERGES: dict[str, Callable[[Run], fx.GraphModule]] = {
    "layers": merged(mlp, batches()),
    "several models": lambda run: fxmerge.merge_many([mlp(0), mlp(1), mlp(2)], batches(), run=run),
    "without data": lambda run: fxmerge.merge(mlp(0), mlp(1), example=batches()[0], run=run),
    "statistics": merged(normalized, pictures()),
    "statistics alone": merged(normalized, pictures(), Recipe(fit=None)),
    "repair": merged(normalized, pictures(), Recipe(fit=Repair())),
    "scores": merged(mlp, batches(), Recipe(fit=LeastSquares(outputs="logits"))),
    "a circle, and an output that is tied": merged(lambda seed: Repeating(seed).eval(), batches()),
    "complex numbers": merged(lambda seed: Turning(seed).eval(), batches()),
    "bases": merged(lambda seed: Attentive(seed).eval(), pictures(), Recipe(match=BY_BASES)),
    "the better one": merged(lambda seed: Attentive(seed).eval(), pictures(), Recipe(match=Zip(continuous="auto"))),
    "heads": lambda run: fxmerge.merge(classes(0, 10), classes(1, 5), loaders=[batches(), batches()], run=run),
    "a trunk within a distance": merged(mlp, batches(), Recipe(share=Budget(distance=0.5))),
    "a wider one": merged(mlp, batches(), Recipe(match=Zip(width=1.5))),
    "folded": lambda run: fxmerge.fold(Attentive(0).eval(), pictures(), 0.5, run=run),
    "aligned": lambda run: fxmerge.align(mlp(0), mlp(1), batches(), run=run),
    "one basis": merged(lambda seed: Attentive(seed).eval(), pictures(), Recipe(match=Align(continuous=True), fit=None)),
    "standardized": merged(mlp, batches(), Recipe(combine=Average((2, 1)), targets="standardized")),
}


def equal(one: fx.GraphModule, other: fx.GraphModule) -> None:
    """Both networks, their reports but for times, and their maps are the same."""
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name
    reports = [fxmerge.report(own).to_dict() for own in (one, other)]
    assert set(reports[0].pop("seconds")) == set(reports[1].pop("seconds"))
    for report in reports:
        for layer in report["layers"].values():
            layer.pop("seconds")
    assert repr(reports[0]) == repr(reports[1])


@pytest.mark.parametrize("name", MERGES)
def test_an_interrupted_merge_goes_on_to_the_same_result(name: str, tmp_path: Path, watch: Watch) -> None:
    """A run ends after every stage in turn, and the next one goes on from there."""
    make = MERGES[name]
    expected = make(Run())
    equal(make(Run(resume=tmp_path / "undisturbed")), expected)
    stages, watch.done = watch.done, []
    assert len(stages) >= 2
    for last in range(len(stages)):
        watch.last = last
        with pytest.raises(Interrupted):
            make(Run(resume=tmp_path / "work"))
    watch.last = None
    equal(make(Run(resume=tmp_path / "work")), expected)
    assert watch.done == stages, "a finished stage was computed again, or one was left out"
    equal(make(Run(resume=tmp_path / "work")), expected)
    assert watch.done == stages
