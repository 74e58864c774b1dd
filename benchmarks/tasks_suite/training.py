"""Training the parents, each once: what is trained is kept in a folder and loaded from there."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from models.processes import Note, Row, run_all
from torch import nn

from tasks_suite.images import SHARES, ImageProblem
from tasks_suite.problem import Course, Learnt, Part
from tasks_suite.suite import NETWORKS, PROBLEMS, Entry

Parent = tuple[str, Learnt, int]
"""A network, what it is trained on, and the seed of its initialisation and of its batches, which is the number of its
share of the data as well."""

SETTINGS: dict[str, tuple[Part, Part]] = {
    "disjoint": ("a", "b"),
    "same": ("both", "both"),
    "few": ("a", "b"),
    "fewest": ("a", "b"),
}
"""What the two parents of a pair are trained on."""


def parents_of(network: str, setting: str, seed: int) -> tuple[Parent, Parent]:
    """The two parents of a pair; no two pairs of a setting share one."""
    part_a, part_b = SETTINGS[setting]
    return (network, part_a, 2 * seed), (network, part_b, 2 * seed + 1)


def default_cache() -> Path:
    """Where trained parents are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxmerge" / "tasks"


@contextmanager
def cache_folder(folder: Path, *, short: bool) -> Iterator[Path]:
    """The folder of trained networks; a scratch one where nothing is to be kept."""
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) if short else folder
        cache.mkdir(parents=True, exist_ok=True)
        yield cache


def path_of(parent: Parent, cache: Path) -> Path:
    """Where a parent is kept; it changes with the network and with how it is trained."""
    network, part, seed = parent
    entry = NETWORKS[network]
    recipe = (entry.data, entry.steps, entry.learning_rate, entry.batch, entry.weight_decay)
    recipe += (SHARES,) if part == "own" else ()
    digest = hashlib.sha256(repr((recipe, build(network, 0))).encode()).hexdigest()[:8]
    return cache / f"{network}-{digest}-{part}-{seed}.pt"


def build(network: str, seed: int) -> nn.Module:
    """A network with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[network].build()


def train(entry: Entry, model: nn.Module, problem: Course, part: Part, seed: int, steps: int) -> None:
    """Trains a model in place."""
    generator = torch.Generator().manual_seed(seed)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), entry.learning_rate, weight_decay=entry.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, entry.learning_rate, max(steps, 2))
    model.train()
    for _ in range(steps):
        inputs, targets = problem.batch(part, entry.batch, generator)
        loss = problem.objective(model(inputs), targets, part)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


def work(task: Row, note: Note) -> None:
    """Trains one parent and keeps it, in a process of its own."""
    network, part, seed, cache = task["network"], task["part"], task["seed"], Path(task["cache"])
    entry = NETWORKS[network]
    problem, model = PROBLEMS[entry.data](), build(network, seed)
    note("train", parameters=sum(p.numel() for p in model.parameters()))
    began = time.perf_counter()
    if part == "own":
        assert isinstance(problem, ImageProblem)
        train(entry, model, problem.share(seed), "both", seed, entry.steps)
    else:
        train(entry, model, problem, part, seed, entry.steps)
    seconds = time.perf_counter() - began
    note("evaluate", seconds=seconds)
    scores = problem.evaluate([model])
    kept = {"state": model.state_dict(), "seconds": seconds, "scores": scores}
    path = path_of((network, part, seed), cache)
    unfinished = path.with_suffix(f".{os.getpid()}")
    torch.save(kept, unfinished)
    unfinished.replace(path)
    note("done", scores=scores)


def missing(parents: Iterable[Parent], cache: Path) -> list[Row]:
    """The tasks of those parents that have not been trained yet, each once."""
    return [
        {"network": network, "part": part, "seed": seed, "cache": str(cache)}
        for network, part, seed in dict.fromkeys(parents)
        if not path_of((network, part, seed), cache).exists()
    ]


def read(parent: Parent, cache: Path) -> dict[str, Any]:
    """What is kept of a parent: its state dict, the seconds of its training, and its scores."""
    kept: dict[str, Any] = torch.load(path_of(parent, cache), weights_only=True)
    return kept


def first_pairs(network: str, settings: Sequence[str], cache: Path, timeout: float) -> dict[str, list[nn.Module]]:
    """For some settings the first pair of a network, trained now if it is not in the cache.

    Arguments:
        network: its name.
        settings: of `SETTINGS`.
        cache: folder of trained parents.
        timeout: seconds for the training of each parent.
    """
    pairs = {setting: parents_of(network, setting, 0) for setting in settings}
    for row in run_all(work, missing([own for pair in pairs.values() for own in pair], cache), 1, timeout, 6):
        print(f"trained {row['network']}: {row.get('failure', 'done')}", flush=True)
    return {setting: [load(own, cache) for own in pair] for setting, pair in pairs.items()}


def load(parent: Parent, cache: Path) -> nn.Module:
    """A trained parent, ready to be used."""
    model = build(parent[0], 0)
    model.load_state_dict(read(parent, cache)["state"])
    return model.eval()
