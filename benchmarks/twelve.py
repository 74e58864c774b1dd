"""Twelve networks of twelve tasks: what is left of them on one trunk with twelve heads.

A small version of the main experiment of MuDSC (arXiv 2403.01753), which merges networks of twelve Taskonomy tasks.
Here, eight networks each learn three or four classes of Fashion-MNIST, and four learn as many of scikit-learn's digits,
enlarged to the size of Fashion-MNIST. Each task begins with the class after the last one of the task before; after the
last class comes the first. The scaled performance of a network on a task is its accuracy there, divided by that of the
parent of that task. All but the parents saw the same unlabelled training images, 167 of each task. With `loaders`, each
parent has those of its own task; else they are mixed. BatchNorm statistics are estimated anew on these images.

The control is the trunk of one parent as it is, with new last layers that are fitted to the outputs of all parents. Its
rows are the mean over all parents' trunks, and the trunk that is best on the test images. All controls are made by one
call, and each counts an equal part of its seconds.

    python benchmarks/twelve.py [--short] [--seed 0] [--cache FOLDER] [--markdown FILE]

Needs what `benchmarks/tasks.py` needs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from heads import QUIET, Row, accuracy, percent, plain, trained, with_head
from invariance import machine, table
from tasks_suite import images
from tasks_suite.images import CLASSES
from tasks_suite.problem import CHUNK
from tasks_suite.suite import NETWORKS
from tasks_suite.training import cache_folder, default_cache
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge
from fxmerge import Align, Recipe, Zip
from fxmerge.demo import Split, count_parameters, load_split

NETWORK, STEPS = "resnet20-1-bn", 400
SHORT, SHORT_STEPS = "digits-vgg-bn", 60
FASHION, DIGITS, SHORT_DIGITS = 8, 4, 3
"""How many tasks there are of each data set."""
IMAGES = 167
"""How many calibration images there are of each task, 2,004 of twelve."""
TEST = 5_000
"""How many of Fashion-MNIST's 10,000 test images are used: about 1,750 for each task."""

Networks = Sequence[nn.Module]


# ------------------------------------------------------------------------------------ tasks


@dataclass(frozen=True)
class Task:
    """A few classes that one network learns to tell apart.

    Attributes:
        name: the data set's letter, the first class and the last one.
        classes: how many there are.
        train: images to learn from, with classes counted from 0.
        test: images to be judged on, likewise.
    """

    name: str
    classes: int
    train: Split
    test: Split


def tasks_of(letter: str, count: int, train: Split, test: Split) -> Iterator[Task]:
    """Tasks of three and four classes in turn."""
    first = 0
    for number in range(count):
        classes = [(first + n) % CLASSES for n in range(3 + number % 2)]
        name = f"{letter} {classes[0]}-{classes[-1]}"
        yield Task(name, len(classes), renumbered(train, classes), renumbered(test, classes))
        first += len(classes)


def renumbered(data: Split, classes: Sequence[int]) -> Split:
    """The images of some classes, with these counted from 0."""
    fits = data.labels.unsqueeze(1) == torch.tensor(classes)
    mine = fits.any(1)
    return Split(data.images[mine], fits[mine].int().argmax(1))


def enlarged(data: Split) -> Split:
    """Digits of the size of Fashion-MNIST."""
    return replace(data, images=F.interpolate(data.images, size=28, mode="bilinear"))


def all_tasks(*, short: bool) -> list[Task]:
    digits = load_split(0)
    if short:
        return list(tasks_of("D", SHORT_DIGITS, *digits))
    fashion = images.fashion()
    test = Split(fashion.test.images[:TEST], fashion.test.labels[:TEST])
    return [
        *tasks_of("F", FASHION, fashion.train, test),
        *tasks_of("D", DIGITS, *(enlarged(part) for part in digits)),
    ]


# ------------------------------------------------------------------------------------ parents and data


def parent(network: str, steps: int, task: Task, number: int, cache: Path) -> nn.Module:
    """A network that has learnt a task, trained once and kept."""
    entry = replace(NETWORKS[network], steps=steps)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(task.train.labels), (entry.batch,), generator=generator)
        return task.train.images[chosen], task.train.labels[chosen]

    model = with_head(network, number, task.classes)
    return trained(model, entry, draw, number, cache, f"twelve-{network}", f"{task.name.replace(' ', '')}-{number}")


@dataclass(frozen=True)
class Calibration:
    """Unlabelled images, the same in both.

    Attributes:
        mixed: batches of all tasks in a random order.
        own: batches of each task.
    """

    mixed: list[Tensor]
    own: list[list[Tensor]]


def calibration(tasks: Sequence[Task], seed: int) -> Calibration:
    generator = torch.Generator().manual_seed(seed)
    own = [t.train.images[torch.randperm(len(t.train.images), generator=generator)[:IMAGES]] for t in tasks]
    mixed = torch.cat(own)
    order = torch.randperm(len(mixed), generator=generator)
    return Calibration(list(mixed[order].split(CHUNK)), [list(part.split(CHUNK)) for part in own])


# ------------------------------------------------------------------------------------ what is made of them

Branch = Callable[[Tensor], Tensor]
"""The trunk and one head: gives the scores of the classes of one task."""


@dataclass(frozen=True)
class Made:
    """What does all tasks.

    Attributes:
        branches: for each task.
        parameters: of all together.
    """

    branches: Sequence[Branch]
    parameters: int


def of_heads(network: nn.Module, count: int) -> Made:
    """A network with an output for each task."""
    branches: list[Branch] = [lambda x, number=number: network(x)[number] for number in range(count)]  # type: ignore[misc]
    return Made(branches, count_parameters(network))


def averaged(parents: Networks, data: Calibration) -> Made:
    own = [count_parameters(list(network.modules())[-1]) for network in parents]
    return Made(plain(parents, data.mixed), count_parameters(parents[0]) - own[0] + sum(own))


def merged(recipe: Recipe) -> Callable[[Networks, Calibration], Made]:
    return lambda parents, data: of_heads(fxmerge.merge_many(parents, data.mixed, recipe, run=QUIET), len(parents))


def merged_with_loaders(parents: Networks, data: Calibration) -> Made:
    recipe = Recipe(share="trunk")
    return of_heads(fxmerge.merge_many(parents, recipe=recipe, loaders=data.own, run=QUIET), len(parents))


def controls(parents: Networks, data: Calibration) -> list[Made]:
    """For each parent, its trunk as it is with new heads, which are fitted to what all parents give."""
    compared = fxmerge.compare({}, parents, data.mixed, calibration=data.mixed, share="trunk", run=QUIET)
    found = [network for name, network in compared.networks.items() if name.endswith("new readout")]
    return [of_heads(network, len(parents)) for network in found]


Method = Callable[[Networks, Calibration], Made]

OTHERS: dict[str, Method] = {
    "parents": lambda parents, data: Made(parents, sum(map(count_parameters, parents))),
    "plain average": averaged,
    "Git Re-Basin": merged(Recipe(match=Align(alpha=1, reference=0), fit=None, share="trunk")),
    "align, alpha 0.5": merged(Recipe(match=Align(), fit=None, share="trunk")),
    "ZipIt!": merged(Recipe(match=Zip(alpha=0), fit=None, share="trunk")),
    "MuDSC": merged(Recipe(match=Zip(), fit=None, share="trunk")),
}

WIDEST = "fxmerge, width 4"
OURS: dict[str, Method] = {
    "fxmerge": merged(Recipe(share="trunk")),
    "fxmerge, loaders": merged_with_loaders,
    "fxmerge, width 2": merged(Recipe(match=Zip(width=2.0), share="trunk")),
    WIDEST: merged(Recipe(match=Zip(width=4.0), share="trunk")),
}


# ------------------------------------------------------------------------------------ tables


@dataclass(frozen=True)
class Result:
    """How well a method does.

    Attributes:
        name: of the method.
        accuracies: on each task.
        parameters: of what it makes.
        seconds: that it takes.
    """

    name: str
    accuracies: Sequence[float]
    parameters: int
    seconds: float

    def scaled(self, own: Sequence[float]) -> list[float]:
        """The scaled performances, given the accuracies of the parents on their own tasks."""
        return [value / best for value, best in zip(self.accuracies, own, strict=True)]


def judged(name: str, made: Made, tasks: Sequence[Task], seconds: float) -> Result:
    found = [
        accuracy(branch, task.test.images, task.test.labels) for branch, task in zip(made.branches, tasks, strict=True)
    ]
    result = Result(name, found, made.parameters, seconds)
    print(f"{name}: {statistics.fmean(found):.1%}, {seconds:.0f} s", flush=True)
    return result


def results(parents: Networks, tasks: Sequence[Task], data: Calibration, ours: dict[str, Method]) -> Iterator[Result]:
    """The result of every method; the first is that of the parents."""
    own: Sequence[float] = ()
    for name, method in OTHERS.items():
        result = _timed(name, method, parents, tasks, data)
        own = own or result.accuracies
        yield result
    yield from _of_controls(parents, tasks, data, own)
    for name, method in ours.items():
        yield _timed(name, method, parents, tasks, data)


def _timed(name: str, method: Method, parents: Networks, tasks: Sequence[Task], data: Calibration) -> Result:
    began = time.perf_counter()
    made = method(parents, data)
    return judged(name, made, tasks, time.perf_counter() - began)


def _of_controls(
    parents: Networks, tasks: Sequence[Task], data: Calibration, own: Sequence[float]
) -> tuple[Result, Result]:
    """The mean of all controls, and the one that is best on the test images."""
    began = time.perf_counter()
    made = controls(parents, data)
    seconds = (time.perf_counter() - began) / len(made)
    each = [
        judged(f"trunk of {task.name}, new heads", one, tasks, seconds) for one, task in zip(made, tasks, strict=True)
    ]
    mean = [statistics.fmean(values) for values in zip(*(one.accuracies for one in each), strict=True)]
    best = max(each, key=lambda one: statistics.fmean(one.scaled(own)))
    return (
        replace(each[0], name="one trunk, new heads: mean", accuracies=mean),
        replace(best, name=f"{best.name}: best"),
    )


def summary(found: Sequence[Result], parent: nn.Module) -> list[Row]:
    rows = []
    for one in found:
        scaled = one.scaled(found[0].accuracies)
        rows.append(
            {
                "": one.name,
                "scaled performance": percent([statistics.fmean(scaled)]),
                "lowest": percent([min(scaled)]),
                "accuracy": percent([statistics.fmean(one.accuracies)]),
                "parameters": f"{one.parameters / count_parameters(parent):.2f}",
                "s": f"{one.seconds:.0f}",
            }
        )
    return rows


def by_task(found: Sequence[Result], tasks: Sequence[Task]) -> list[Row]:
    return [
        {"": one.name} | {task.name: f"{100 * x:.1f}" for task, x in zip(tasks, one.accuracies, strict=True)}
        for one in found
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--short", action="store_true", help=f"three {SHORT} on digits, not the widest, and nothing is kept"
    )
    parser.add_argument("--seed", type=int, default=0, help="which twelve networks")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the trained parents")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    options = parser.parse_args()
    if not options.short:
        images.check_installed()
    network, steps = (SHORT, SHORT_STEPS) if options.short else (NETWORK, STEPS)
    tasks = all_tasks(short=options.short)
    with cache_folder(options.cache, short=options.short) as cache:
        first = options.seed * len(tasks)
        parents = [parent(network, steps, task, first + n, cache) for n, task in enumerate(tasks)]
    ours = {name: method for name, method in OURS.items() if not options.short or name != WIDEST}
    found = list(results(parents, tasks, calibration(tasks, options.seed), ours))
    text = f"{table(summary(found, parents[0]))}\n\nAccuracy in percent, by task:\n\n{table(by_task(found, tasks))}"
    print(text)
    if options.markdown:
        options.markdown.write_text(f"{machine()}\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
