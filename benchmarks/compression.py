"""Folding beside structured pruning: one trained network made smaller, at equal floating-point operations.

Networks of `benchmarks/heads.py`, each trained on five classes of Fashion-MNIST, and a GPT and a Llama of
`benchmarks/tasks.py`, trained on Python's sources about doing many things at once. `fxmerge.fold` makes them smaller to
a width, with the 2,000 unlabelled training images (256 windows of text) or without data. It leaves out directions of
residual streams and of attention heads (which it is told by name), and merges units elsewhere; in the rows "units only"
it merges units everywhere. Both are the same for networks without such streams. torch-pruning removes channels to the
number of operations of the fold, by the L1 and by the L2 norm of all weights that belong to a channel (a group). It
cannot know which units are heads of attention; in the rows "heads named" it is told, as its examples for transformers
do. BatchNorm is estimated anew on the same images in all rows but those without data. Each network is also trained
further for the same few steps. Accuracy is on the test images of the five classes, or that of next characters of test
texts.

With --kv-heads, only heads of keys and values are merged, and all heads of queries are kept: see `kv_heads.py`.

Operations are those of layers with weights. The products of attention have none and are not counted.

    python benchmarks/compression.py [--short] [--kv-heads] [--networks NAME ...] [--widths 0.9 0.8 0.7 0.5]
        [--steps 200] [--seeds 1] [--cache FOLDER] [--markdown FILE]

Needs what `benchmarks/tasks.py` needs, and for the rows of pruning `pip install torch-pruning`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import kv_heads
import torch
from heads import CLASSES, LONG, QUIET, SHORT, Row, of_task, percent, train
from invariance import machine, table
from tasks_suite import images, training
from tasks_suite.images import ImageProblem
from tasks_suite.problem import Problem
from tasks_suite.sequences import Attention, RotaryBlock
from tasks_suite.suite import NETWORKS, PROBLEMS
from tasks_suite.text import TextProblem
from tasks_suite.training import cache_folder, default_cache
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fxmerge
from fxmerge.demo import count_parameters, recalibrated
from fxmerge.units.kind import Kind

WIDTHS = (0.9, 0.8, 0.7, 0.5)
RATE = 1e-3
"""The learning rate of the further training, for all networks alike."""

BISECTIONS = 12
"""How often the share of channels to prune is halved in on."""


PRUNING = {"pruning, L1": 1, "pruning, group L2": 2}
"""The power of the norm that channels are judged by."""
HEADS_NAMED = ", heads named"
WHOLE = "the network"


# ------------------------------------------------------------------------------------ what is learnt


class Task(Protocol):
    """What a network has learnt: where it comes from, how it learns further, and how good it is."""

    @property
    def problem(self) -> Problem:
        """The data."""

    def trained(self, seed: int) -> nn.Module:
        """The network, trained once and kept."""

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """The loss on a random batch."""

    def score(self, model: nn.Module) -> float:
        """The accuracy on test data."""


@dataclass(frozen=True)
class ImageTask:
    """The first five classes of images, by a head of five outputs. A `Task`."""

    network: str
    problem: ImageProblem
    cache: Path

    def trained(self, seed: int) -> nn.Module:
        return train(self.network, 0, seed, self.problem, self.cache)

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        inputs, labels = self.problem.batch("a", NETWORKS[self.network].batch, generator)
        return F.cross_entropy(model(inputs), labels)

    def score(self, model: nn.Module) -> float:
        return of_task(model, 0, self.problem)


@dataclass(frozen=True)
class TextTask:
    """The next characters of the first domain of texts. A `Task`; its networks are parents of `tasks.py`."""

    network: str
    problem: TextProblem
    cache: Path

    def trained(self, seed: int) -> nn.Module:
        parent = training.parents_of(self.network, "disjoint", seed)[0]
        for row in training.missing([parent], self.cache):
            training.work(row, _unnoted)
        return training.load(parent, self.cache)

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        inputs, targets = self.problem.batch("a", NETWORKS[self.network].batch, generator)
        return self.problem.objective(model(inputs), targets, "a")

    def score(self, model: nn.Module) -> float:
        return self.problem.evaluate([model])["task_a"]


def _unnoted(stage: str, **found: Any) -> None:
    """For work whose stages nobody follows."""


def task_of(network: str, cache: Path) -> Task:
    problem = PROBLEMS[NETWORKS[network].data]()
    if isinstance(problem, TextProblem):
        return TextTask(network, problem, cache)
    assert isinstance(problem, ImageProblem)
    return ImageTask(network, problem, cache)


# ------------------------------------------------------------------------------------ what is made of a network


def operations(model: nn.Module, x: Tensor) -> int:
    """The floating-point operations for one input."""
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(x)
    return counted.get_total_flops()


def folded(
    model: nn.Module, batches: Sequence[Tensor] | None, width: float, example: Tensor, *, units_only: bool = False
) -> nn.Module:
    recipe = fxmerge.Recipe(match=fxmerge.Zip(continuous=not units_only))
    widths = width if units_only else in_heads_too(model, width, example)
    return fxmerge.fold(model, batches, widths, recipe, example=example, run=QUIET)


def in_heads_too(model: nn.Module, width: float, example: Tensor) -> float | dict[str, float]:
    """The width of all classes of a network, by their names if some lie in heads: those keep theirs unless named."""
    classes = fxmerge.find_symmetry(fxmerge.canonicalize(model, (example,)), (example,)).classes
    blocks = {parent for c in classes for parent in c.parents}
    named = [c for c in classes if c.name not in blocks and c.structure != "pinned" and not c.kind.turns]
    inside = any(c.parents and c.kind > Kind.PERMUTATION for c in named)
    return {c.name: width for c in named} if inside else width


def pruned(model: nn.Module, batches: list[Tensor], power: int, named: bool, goal: int) -> nn.Module | None:
    """What torch-pruning leaves at about a number of operations; None if it cannot prune the network.

    Arguments:
        batches: what statistics of BatchNorm are estimated on.
        power: of the norm that channels are judged by.
        named: whether torch-pruning is told how many heads attention has.
        goal: the operations.
    """
    import torch_pruning  # type: ignore[import-not-found,unused-ignore]

    example = batches[0][:1]

    def at(ratio: float) -> nn.Module:
        made = copy.deepcopy(model)
        last = [m for m in made.modules() if isinstance(m, nn.Linear)][-1]
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=power)
        heads = heads_of(made) if named else {}
        torch_pruning.pruner.BasePruner(
            made, example, importance=importance, pruning_ratio=ratio, ignored_layers=[last], num_heads=heads
        ).step()
        made(example)
        return made

    low, high, best = 0.0, 1.0, None
    try:
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            made = at(middle)
            if operations(made, example) > goal:
                low = middle
            else:
                high, best = middle, made
    except Exception as error:  # Whatever a network that it was not made for raises.
        print(f"torch-pruning: {type(error).__name__}: {str(error)[:100]}", flush=True)
        return None
    return None if best is None else recalibrated(best, batches)


def heads_of(model: nn.Module) -> dict[nn.Module, int]:
    """How many heads every projection to queries, keys and values has."""
    attentions = [m for m in model.modules() if isinstance(m, Attention | RotaryBlock)]
    return {layer: m.heads for m in attentions for name, layer in m.named_children() if name in ("qkv", "q", "k", "v")}


def further(model: nn.Module, task: Task, steps: int) -> nn.Module:
    """A copy that was trained a little further."""
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(made.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, max(steps, 2))
    made.train()
    for _ in range(steps):
        loss = task.loss(made, generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return made.eval()


# ------------------------------------------------------------------------------------ tables


@dataclass(frozen=True)
class Measured:
    """A small network: its operations as a share of the whole's, its accuracy, and that after further training."""

    operations: float
    parameters: int
    accuracy: float
    further: float
    seconds: float


@dataclass(frozen=True)
class Result:
    """What a method made of a network at a width; nothing was measured where it is not possible."""

    network: str
    seed: int
    width: float
    method: str
    measured: Measured | None

    def row(self) -> Row:
        told = {"network": self.network, "width": f"{self.width:g}", "": self.method}
        if self.measured is None:
            return {**told, "accuracy": "not possible"}
        return {
            **told,
            "operations": f"{self.measured.operations:.0%}",
            "parameters": f"{self.measured.parameters:,}",
            "accuracy": percent([self.measured.accuracy]),
            "trained further": percent([self.measured.further]),
            "s": f"{self.measured.seconds:.0f}",
        }


def results_of(
    network: str, widths: Sequence[float], steps: int, seed: int, cache: Path, *, kv: bool = False
) -> list[Result]:
    """All methods at all widths, after the network itself; those of key/value heads only, or all others."""
    task = task_of(network, cache)
    model, batches = task.trained(seed), task.problem.calibration()
    example = batches[0][:1]
    whole = operations(model, example)

    def result(width: float, method: str, make: Callable[[], nn.Module | None]) -> tuple[Result, nn.Module | None]:
        began = time.perf_counter()
        made = make()
        seconds = time.perf_counter() - began
        measured = None
        if made is not None:
            share, trained = operations(made, example) / whole, further(made, task, steps)
            measured = Measured(share, count_parameters(made), task.score(made), task.score(trained), seconds)
        found = Result(network, seed, width, method, measured)
        print(", ".join(found.row().values()), flush=True)
        return found, made

    results = [result(1, WHOLE, lambda: model)[0]]
    for width in widths:
        if kv:
            results += [result(width, *method)[0] for method in kv_heads.methods(model, batches, width).items()]
            continue
        one, small = result(width, "fold", partial(folded, model, batches, width, example))
        assert small is not None
        others = {
            "fold, units only": partial(folded, model, batches, width, example, units_only=True),
            "fold, no data": partial(folded, model, None, width, example),
            "fold, units only, no data": partial(folded, model, None, width, example, units_only=True),
        }
        results += [one, *(result(width, name, make)[0] for name, make in others.items())]
        goal = operations(small, example)
        results += [
            result(width, name, partial(pruned, model, batches, power, named, goal))[0]
            for name, (power, named) in prunings(model).items()
        ]
    return results


def prunings(model: nn.Module) -> dict[str, tuple[int, bool]]:
    """How a network is pruned: the power of the norm, and whether heads of attention are named."""
    if not importlib.util.find_spec("torch_pruning"):
        return {}
    unnamed = {name: (power, False) for name, power in PRUNING.items()}
    named = {f"{name}{HEADS_NAMED}": (power, True) for name, power in PRUNING.items()}
    return unnamed | named if heads_of(model) else unnamed


def means(results: Sequence[Result]) -> list[Row]:
    """Each method at each width: accuracies as a share of the whole network's, the mean over networks.

    Only those networks count for which every method is possible. Where heads of attention are named, that is the
    pruning that counts.
    """
    whole = {(r.network, r.seed): r.measured for r in results if r.method == WHOLE}
    found: dict[float, dict[str, dict[tuple[str, int], Measured]]] = {}
    for r in results:
        if r.method != WHOLE:
            of_method = found.setdefault(r.width, {}).setdefault(r.method.removesuffix(HEADS_NAMED), {})
            if r.measured is not None:
                of_method[r.network, r.seed] = r.measured
    rows = []
    for width, methods in found.items():
        common = sorted(set.intersection(*(set(each) for each in methods.values())))
        for method, each in methods.items() if common else ():
            pairs = [(each[key], whole[key]) for key in common]
            accuracies = [small.accuracy / large.accuracy for small, large in pairs if large]
            trained = [small.further / large.further for small, large in pairs if large]
            rows.append(
                {
                    "width": f"{width:g}",
                    "": method,
                    "networks": f"{len(common)} of {len(whole)}",
                    "operations": f"{statistics.mean(small.operations for small, _ in pairs):.0%}",
                    "accuracy": percent(accuracies),
                    "trained further": percent(trained),
                }
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}, one width, and nothing is kept")
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=[n for n, entry in NETWORKS.items() if entry.data != "dense"],
        help="only these",
    )
    parser.add_argument("--widths", nargs="+", type=float, help="shares of the units")
    parser.add_argument("--kv-heads", action="store_true", help="merge heads of keys and values only")
    parser.add_argument("--steps", type=int, default=200, help="of the further training")
    parser.add_argument("--seeds", type=int, default=1, help="how many networks of each kind")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the trained networks")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    usual, short = ((*LONG, "gpt", "llama"), SHORT) if not options.kv_heads else (kv_heads.NETWORKS, kv_heads.SHORT)
    networks = options.networks or (short if options.short else usual)
    if any(NETWORKS[network].data == "fashion" for network in networks):
        images.check_installed()
    widths = [0.5] if options.short else options.widths or (kv_heads.WIDTHS if options.kv_heads else WIDTHS)
    with cache_folder(options.cache, short=options.short) as cache:
        results = []
        for network in networks:
            for seed in range(1 if options.short else options.seeds):
                steps = 20 if options.short else options.steps
                results += results_of(network, widths, steps, seed, cache, kv=options.kv_heads)
    text = table([result.row() for result in results])
    mean = f"As a share of the whole network's, the mean over networks:\n\n{table(means(results))}"
    print(f"{text}\n\n{mean}")
    if options.markdown:
        options.markdown.write_text(f"{machine()}, {CLASSES} classes\n\n{text}\n\n{mean}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
