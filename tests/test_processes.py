"""Several processes make what one makes, and end together."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

import fxmerge
from fxmerge import LeastSquares, Recipe, Repair, Run, Zip, cli, io
from fxmerge.processes import Processes
from tests import files
from tests.networks import Attentive, mlp, vectors
from tests.slow import but_slow, crossed
from tests.test_stages import Repeating, classes, normalized

PATIENCE = 60.0
"""How many seconds processes wait for each other at most."""

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload([__name__])

Merge = Callable[[Run], fx.GraphModule]


def images(count: int, rows: int = 6) -> list[Tensor]:
    """Batches of several sizes."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(rows + number % 3, 2, 8, 8, generator=g) for number in range(count)]


def attentive(seed: int) -> nn.Module:
    return Attentive(seed).eval()


def merged(make: Callable[[int], nn.Module], data: list[Tensor], recipe: Recipe | None = None) -> Merge:
    return lambda run: fxmerge.merge(make(0), make(1), data, recipe, run=run)


def rows(count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(8, 1, 8, 8, generator=g) for _ in range(count)]


MERGES: dict[str, Merge] = {
    "statistics": merged(normalized, images(7)),
    "attention": merged(attentive, images(5)),
    "zip": merged(mlp, rows(9), Recipe(match=Zip(width=1.5))),
    "few rows": merged(mlp, [batch[:2] for batch in rows(9)]),
    "sampled rows": merged(normalized, images(3, 300)),
    "one batch": merged(normalized, images(1, 40)),
    "statistics alone": merged(normalized, images(7), Recipe(fit=None)),
    "repair": merged(normalized, images(7), Recipe(fit=Repair())),
    "scores": merged(mlp, rows(9), Recipe(fit=LeastSquares(outputs="logits"))),
    "standardized": merged(mlp, rows(9), Recipe(targets="standardized")),
    "a circle, and an output that is tied": merged(lambda seed: Repeating(seed).eval(), rows(5)),
    "bases": merged(attentive, images(5), Recipe(match=Zip(continuous=True))),
    "heads": lambda run: fxmerge.merge(classes(0, 10), classes(1, 5), loaders=[rows(5), rows(2)], run=run),
    "folded": lambda run: fxmerge.fold(attentive(0), images(5), 0.5, run=run),
    "aligned": lambda run: fxmerge.align(mlp(0), mlp(1), rows(3), run=run),
}

FIRST = ("statistics", "attention", "zip")


class Told(NamedTuple):
    """What a process tells of a network."""

    state: dict[str, Tensor]
    images: Any
    layers: Any
    errors: Any


def told(merge: Merge, run: Run) -> Told:
    network = merge(run)
    found = fxmerge.report(network)
    layers = {name: {k: v for k, v in own.items() if k != "seconds"} for name, own in found.layers.items()}
    return Told(dict(network.state_dict()), found.images, layers, found.errors)


@cache
def of_one(name: str) -> Told:
    return told(MERGES[name], Run())


# -------------------------------------------------------------------------- processes


def _member(rank: int, size: int, folder: Path, work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    group = f"file://{folder}/group"
    dist.init_process_group("gloo", group, timedelta(seconds=PATIENCE), rank=rank, world_size=size)
    torch.save(work(rank, *given), folder / f"{rank}.pt")
    dist.destroy_process_group()


class Team:
    """Processes of one group that each do some work, given its rank; a process that ends early has no result."""

    def __init__(self, size: int, folder: Path, work: Callable[..., Any], *given: Any) -> None:
        self.size, self.folder = size, folder
        self.members = [SPAWN.Process(target=_member, args=(rank, size, folder, work, given)) for rank in range(size)]
        for member in self.members:
            member.start()

    def results(self) -> list[Any]:
        for member in self.members:
            member.join(PATIENCE)
            assert member.exitcode is not None, "a process does not end"
        paths = [self.folder / f"{rank}.pt" for rank in range(self.size)]
        return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


def _all_told(rank: int, names: list[str]) -> dict[str, Told]:
    return {name: told(MERGES[name], Run(processes="auto")) for name in names}


@pytest.mark.parametrize(
    ("size", "names"),
    [(2, FIRST)]
    + [
        pytest.param(2, tuple(n for n in MERGES if n not in FIRST), marks=pytest.mark.slow),
        pytest.param(4, FIRST, marks=pytest.mark.slow),
    ],
)
def test_several_processes_make_what_one_makes(size: int, names: tuple[str, ...], tmp_path: Path) -> None:
    found = Team(size, tmp_path, _all_told, list(names)).results()
    for name in names:
        expected = of_one(name)
        for own in found:
            torch.testing.assert_close(own[name].state, expected.state, rtol=1e-6, atol=1e-6)
            assert own[name].images == expected.images
            torch.testing.assert_close(own[name].errors, expected.errors, rtol=1e-6, atol=1e-6, equal_nan=True)
            assert list(own[name].layers) == list(expected.layers)
            for layer, numbers in expected.layers.items():
                assert own[name].layers[layer] == pytest.approx(numbers, rel=1e-4, abs=1e-6), layer
            for key, tensor in found[0][name].state.items():
                assert torch.equal(own[name].state[key], tensor)
