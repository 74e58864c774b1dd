"""Networks of different classes, each with a head of its own: what is left of them on one trunk.

One parent learns the first five classes of Fashion-MNIST and the other the last five, as in `benchmarks/tasks.py`; here
each has a head with five outputs. Every row is one network of about the size of a parent, but for the first, and for
those of another width. Accuracy is on test images, each task by its own head. Where BatchNorm statistics or layers are
estimated, it is over the same 2,000 unlabelled training images of both tasks. `benchmarks/tasks.py --partial` measures
the same pairs over where the trunk ends.

    python benchmarks/heads.py [--short] [--networks NAME ...] [--seeds 3] [--cache FOLDER] [--markdown FILE]

Needs what `benchmarks/tasks.py` needs.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from invariance import machine, table
from tasks_suite import images
from tasks_suite.images import EMBEDDING, ImageProblem
from tasks_suite.problem import CHUNK
from tasks_suite.suite import NETWORKS, PROBLEMS, Entry
from tasks_suite.training import cache_folder, default_cache
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxmerge
from fxmerge import Align, Average, Readout, Recipe, Run, Zip
from fxmerge.demo import recalibrated

LONG = ("resnet20-1-bn", "resnet20-1-gn", "vit-fused")
SHORT = ("digits-vgg-bn",)
CLASSES = 5
"""Of each task."""
QUIET = Run(progress=False)

Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]
"""Draws random inputs and their classes."""


# ------------------------------------------------------------------------------------ parents


def with_head(network: str, seed: int, classes: int = CLASSES) -> nn.Module:
    """A network of the suite with random weights, whose last layer gives the scores of some classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[network].build()
        (name, last) = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
        assert last.out_features == EMBEDDING
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Linear(last.in_features, classes))
    return model


def train(network: str, task: int, seed: int, problem: ImageProblem, cache: Path) -> nn.Module:
    """A parent that has learnt one of the two tasks, trained once and kept."""
    entry = NETWORKS[network]

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs, labels = problem.batch("ab"[task], entry.batch, generator)  # type: ignore[arg-type]
        return inputs, labels - CLASSES * task

    number = 2 * seed + task
    return trained(with_head(network, number), entry, draw, number, cache, f"heads-{network}", f"{task}-{seed}")


def trained(model: nn.Module, entry: Entry, draw: Draw, seed: int, cache: Path, prefix: str, suffix: str) -> nn.Module:
    """A network that has learnt to tell classes apart, trained in place once and kept in a file.

    Arguments:
        model: the network, with random weights.
        entry: how it is trained.
        draw: gives random inputs and their classes, counted from 0.
        seed: of what is drawn.
        cache: the folder of the file.
        prefix: how the name of the file begins; what tells one way of training from another comes after it.
        suffix: how the name of the file ends.
    """
    recipe = (entry.data, entry.steps, entry.learning_rate, entry.batch, entry.weight_decay, str(model))
    path = cache / f"{prefix}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]}-{suffix}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), entry.learning_rate, weight_decay=entry.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, entry.learning_rate, entry.steps)
    model.train()
    for _ in range(entry.steps):
        inputs, labels = draw(generator)
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    torch.save(model.state_dict(), path)
    return model.eval()


# ------------------------------------------------------------------------------------ what is made of them

Row = dict[str, str]
Networks = Sequence[nn.Module]
"""The network that does each task."""


def heads(merged: fx.GraphModule) -> Networks:
    return fxmerge.head(merged, 0), fxmerge.head(merged, 1)


def forked(recipe: Recipe) -> Callable[[nn.Module, nn.Module, list[Tensor]], Networks]:
    return lambda a, b, batches: heads(fxmerge.merge(a, b, batches, recipe, run=QUIET))


def common(a: nn.Module, b: nn.Module, batches: list[Tensor]) -> Networks:
    merged = fxmerge.merge(a, b, batches, run=QUIET)
    return merged, merged


def plain(networks: Networks, batches: list[Tensor]) -> Networks:
    """The mean of all trunks, with the head of each."""
    states, last = [n.state_dict() for n in networks], [name for name, _ in networks[0].named_parameters()][-2:]
    trunk = {
        name: torch.stack([state[name] for state in states]).mean(0) if own.is_floating_point() else own
        for name, own in states[0].items()
        if name not in last
    }
    made = []
    for network, own in zip(networks, states, strict=True):
        model = copy.deepcopy(network)
        model.load_state_dict(own | trunk)
        made.append(recalibrated(model, batches))
    return made


def control(weights: tuple[float, float]) -> Recipe:
    """The trunk of one parent as it is, with two heads that are fitted to what the parents give."""
    return Recipe(match=Align(), combine=Average(weights=weights), fit=Readout(), share="trunk")


METHODS: dict[str, Callable[[nn.Module, nn.Module, list[Tensor]], Networks]] = {
    "both parents (two networks)": lambda a, b, batches: (a, b),
    "plain average, two heads": lambda a, b, batches: plain((a, b), batches),
    "one common head": common,
    "trunk of A, two new heads": forked(control((1, 0))),
    "trunk of B, two new heads": forked(control((0, 1))),
    "MuDSC's zip, two heads": forked(Recipe(fit=None, share="trunk")),
    "fxmerge, two heads": forked(Recipe(share="trunk")),
    "fxmerge, two heads, width 1.25": forked(Recipe(match=Zip(width=1.25), share="trunk")),
    "fxmerge, two heads, width 1.5": forked(Recipe(match=Zip(width=1.5), share="trunk")),
}


def accuracies(networks: Networks, problem: ImageProblem) -> tuple[float, float]:
    """The accuracy on each task, among its five classes."""
    return of_task(networks[0], 0, problem), of_task(networks[1], 1, problem)


def of_task(network: Callable[[Tensor], Tensor], task: int, problem: ImageProblem) -> float:
    """The accuracy on one task, among its five classes."""
    mine = (problem.test.labels >= CLASSES * task) & (problem.test.labels < CLASSES * (task + 1))
    return accuracy(network, problem.test.images[mine], problem.test.labels[mine] - CLASSES * task)


@torch.no_grad()
def accuracy(network: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor) -> float:
    """How often the largest output is that of the class."""
    best = torch.cat([network(chunk).argmax(1) for chunk in inputs.split(CHUNK)])
    return float((best == labels).double().mean())


# ------------------------------------------------------------------------------------ tables


def percent(values: Sequence[float]) -> str:
    """The mean, and the standard error where there are several."""
    mean = f"{statistics.mean(values):.1%}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def by_method(networks: Sequence[str], seeds: int, cache: Path) -> list[Row]:
    rows = []
    for network in networks:
        problem = PROBLEMS[NETWORKS[network].data]()
        assert isinstance(problem, ImageProblem)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
        seconds = {}
        for seed in range(seeds):
            a, b = (train(network, task, seed, problem, cache) for task in range(2))
            for name, method in METHODS.items():
                began = time.perf_counter()
                made = method(a, b, problem.calibration())
                seconds[name] = time.perf_counter() - began
                found[name].append(accuracies(made, problem))
                print(f"{network}, seed {seed}, {name}: {found[name][-1]}", flush=True)
        for name, values in found.items():
            told = {"network": network, "": name, **_told([v[0] for v in values], [v[1] for v in values])}
            rows.append({**told, "s": f"{seconds[name]:.0f}"})
    return rows


def _told(of_a: Sequence[float], of_b: Sequence[float]) -> Row:
    mean = [(a + b) / 2 for a, b in zip(of_a, of_b, strict=True)]
    return {"task A": percent(of_a), "task B": percent(of_b), "mean": percent(mean)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}, one seed, and nothing is kept")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), help="only these")
    parser.add_argument("--seeds", type=int, default=3, help="how many pairs of each network")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the trained parents")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    networks = options.networks or (SHORT if options.short else LONG)
    if any(NETWORKS[network].data == "fashion" for network in networks):
        images.check_installed()
    with cache_folder(options.cache, short=options.short) as cache:
        seeds = 1 if options.short else options.seeds
        text = table(by_method(networks, seeds, cache))
    print(text)
    if options.markdown:
        options.markdown.write_text(f"{machine()}\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
