"""Several processes make what one makes, and end together."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

import fxmerge
from fxmerge import LeastSquares, Recipe, Repair, Run, Zip, cli, io, processes
from fxmerge.processes import Processes
from tests import files
from tests.networks import Attentive, mlp
from tests.slow import but_slow
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


def _member(rank: int, folder: Path, work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.save(work(rank, *given), folder / f"{rank}.pt")


def _in_group(rank: int, size: int, group: str, work: Callable[[int], Any]) -> Any:
    dist.init_process_group("gloo", group, timedelta(seconds=PATIENCE), rank=rank, world_size=size)
    found = work(rank)
    dist.destroy_process_group()
    return found


class Team:
    """Processes that each do some work, given its rank; a process that ends early has no result."""

    def __init__(self, size: int, folder: Path, work: Callable[..., Any], *given: Any) -> None:
        self.size, self.folder = size, folder
        self.members = [SPAWN.Process(target=_member, args=(rank, folder, work, given)) for rank in range(size)]
        for member in self.members:
            member.start()

    def results(self) -> list[Any]:
        for member in self.members:
            member.join(PATIENCE)
            assert member.exitcode is not None, "a process does not end"
        paths = [self.folder / f"{rank}.pt" for rank in range(self.size)]
        return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


def in_group(size: int, folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """What processes of one group find."""
    return Team(size, folder, _in_group, size, f"file://{folder}/group", work).results()


def _all_told(names: tuple[str, ...], rank: int) -> dict[str, Told]:
    return {name: told(MERGES[name], Run(processes="auto")) for name in names}


@pytest.mark.parametrize(
    ("size", "names"), but_slow([(2, FIRST), (4, FIRST), (2, tuple(name for name in MERGES if name not in FIRST))])
)
def test_several_processes_make_what_one_makes(size: int, names: tuple[str, ...], tmp_path: Path) -> None:
    found = in_group(size, tmp_path, partial(_all_told, names))
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


def test_the_costly_tasks_are_dealt_out_first() -> None:
    owners = Processes(0, 3).deal([1, 1, 5, 4, 3, 3])
    loads = [sum(c for c, own in zip([1, 1, 5, 4, 3, 3], owners, strict=True) if own == rank) for rank in range(3)]
    assert sorted(loads) == [5, 6, 6]


# -------------------------------------------------------------------------- errors


class Failing:
    """A loader that fails in one process, the so manieth time that it is read."""

    def __init__(self, rank: int, time: int) -> None:
        self.failing, self.time, self.read = rank == 1, time, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.read += 1
        for number, batch in enumerate(rows(4)):
            if self.failing and self.read == self.time and number == min(self.time, 3):
                raise OSError("the disk is gone")
            yield batch


def _spoilt(rank: int) -> list[Tensor]:
    """Data of which one process has an infinite value in its share."""
    data = rows(4)
    data[3][0, 0, 0, 0] = torch.inf
    return data


def _errors(rank: int) -> list[tuple[str, str]]:
    run = Run(processes="auto")
    calls: list[Callable[[], Any]] = [
        *(lambda time=time: fxmerge.merge(mlp(0), mlp(1), Failing(rank, time), run=run) for time in range(2, 6)),
        lambda: fxmerge.merge(mlp(0), mlp(1), _spoilt(rank), run=run),
        lambda: fxmerge.merge(mlp(0), mlp(1 + rank), rows(4), run=run),
        lambda: fxmerge.merge(mlp(0), mlp(1), rows(4 + rank), run=run),
        lambda: fxmerge.merge(mlp(0), mlp(1), rows(4), run=Run(processes="auto", resume="stages")),
        lambda: fxmerge.merge(mlp(0), mlp(1), rows(4), Recipe(targets="standardized", share="trunk"), run=run),
    ]
    found = []
    for call in calls:
        with pytest.raises(Exception) as info:
            call()
        found.append((type(info.value).__name__, str(info.value)))
    told(MERGES["zip"], run)  # Errors are over, and the group is not.
    return found


def test_all_processes_end_with_the_error_of_one(tmp_path: Path) -> None:
    first, second = in_group(2, tmp_path, _errors)
    assert second[:4] == [("OSError", "the disk is gone")] * 4
    assert {kind for kind, _ in first[:4]} == {"ProcessError"}
    assert {text for _, text in first[:4]} == {"Process 1 has failed: OSError: the disk is gone."}
    assert first[4][0] == second[4][0] == "NonFiniteError"
    assert first[4][1] == "Process 1 has failed: " + second[4][1]
    for number, differs in ((5, "the weights of model B"), (6, "the calibration data")):
        assert first[number] == second[number]
        assert first[number][0] == "OptionError" and f"they differ in {differs}. Give" in first[number][1]
    assert first[7:] == second[7:]
    assert first[7] == ("OptionError", "Run.resume is of one process, and this run has several: leave resume out.")
    assert first[8][0] == "OptionError"


# -------------------------------------------------------------------------- the command line


EXCHANGES = 40
"""The command of `typed` has some more."""


def _command(
    rank: int, size: int, port: int, arguments: list[str], killed: tuple[int, int, float] | None = None
) -> int:
    """A command as torchrun starts it.

    Arguments:
        killed: the rank of a process that is killed, after how many exchanges, and how many seconds later.
    """
    if killed is not None and killed[0] == rank:
        left, exchange = iter(range(killed[1], -1, -1)), Processes._exchange

        def counted(self: Processes, own: Callable[[], Any]) -> None:
            exchange(self, own)
            if not next(left, 1):
                threading.Timer(killed[2], os.kill, (os.getpid(), signal.SIGKILL)).start()

        Processes._exchange = counted  # type: ignore[method-assign]
    processes.PATIENCE = timedelta(seconds=PATIENCE / 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    return cli.main(arguments)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@pytest.fixture
def typed(tmp_path: Path) -> list[str]:
    """A command that merges two networks with data."""
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        paths.append(str(tmp_path / f"{seed}.safetensors"))
        io.save(files.deep()[0].state_dict(), Path(paths[-1]))
    return [
        "merge",
        *paths,
        "--arch",
        "tests.files:deep",
        "--data",
        "tests.files:batches",
        "--out",
        str(tmp_path / "out"),
    ]


def _weights(folder: Path) -> dict[str, Tensor]:
    return dict(io.load(folder / "model.safetensors"))


@pytest.mark.slow
def test_the_command_line_makes_what_it_makes_alone(typed: list[str], tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    assert cli.main([*typed[:-1], str(alone)]) == 0
    assert Team(2, tmp_path, _command, 2, _free_port(), typed).results() == [0, 0]
    torch.testing.assert_close(_weights(tmp_path / "out"), _weights(alone), rtol=1e-6, atol=1e-6)
    assert cli.main(["verify", typed[-1]]) == 0
    # The target is there, which only the first process sees.
    assert Team(2, tmp_path, _command, 2, _free_port(), typed).results() == [4, 4]
    assert Team(2, tmp_path, _command, 2, _free_port(), [*typed, "--resume", "--force"]).results() == [1, 1]


@pytest.mark.parametrize("seed", but_slow(range(4)))
def test_a_killed_process_ends_the_others(seed: int, typed: list[str], tmp_path: Path) -> None:
    """It is killed at a random moment after a random exchange."""
    draw = random.Random(seed)
    killed, moment = draw.randrange(2), (draw.randrange(EXCHANGES), draw.uniform(0.0, 0.02))
    team = Team(2, tmp_path, _command, 2, _free_port(), typed, (killed, *moment))
    assert team.results()[1 - killed] == 6
    assert team.members[killed].exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert killed == 0 or not list(tmp_path.glob(".out.*"))  # Of the first process, the next run clears away.


@pytest.mark.slow
def test_torchrun_starts_the_command(typed: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fxmerge", *typed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is written. README.md in it is the model card.") == 1
    assert cli.main(["verify", typed[-1]]) == 0
    assert subprocess.run(command, capture_output=True, timeout=4 * PATIENCE).returncode == 1  # The target is there.
