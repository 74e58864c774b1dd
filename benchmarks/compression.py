"""Folding beside structured pruning: one trained network made smaller, at equal floating-point operations.

Networks of `benchmarks/heads.py`, each trained on five classes of Fashion-MNIST. `fxmerge.fold` makes them smaller to a
width, with the 2,000 unlabelled training images or without data. torch-pruning removes channels to the same number of
operations, by the L1 norm of their weights and by the L2 norm of all that belongs to them (a group). BatchNorm is
estimated anew on the same images in all rows but those without data. Each network is also trained further for the same
few steps. Accuracy is on the test images of the five classes.

    python benchmarks/compression.py [--short] [--networks NAME ...] [--widths 0.9 0.7 0.5 0.3] [--steps 200]
        [--seeds 1] [--cache FOLDER] [--markdown FILE]

Needs what `benchmarks/tasks.py` needs, and for the rows of pruning `pip install torch-pruning`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from heads import CLASSES, LONG, QUIET, SHORT, Row, accuracies, percent, train
from invariance import machine, table
from tasks import default_cache
from tasks_suite import images
from tasks_suite.images import ImageProblem
from tasks_suite.suite import NETWORKS, PROBLEMS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fxmerge
from fxmerge.demo import count_parameters, recalibrated

WIDTHS = (0.9, 0.7, 0.5, 0.3)
RATE = 1e-3
"""The learning rate of the further training, for all networks alike."""

BISECTIONS = 12
"""How often the share of channels to prune is halved in on."""


def operations(model: nn.Module, x: Tensor) -> int:
    """The floating-point operations for one image."""
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(x)
    return counted.get_total_flops()


def folded(model: nn.Module, batches: Sequence[Tensor] | None, width: float, example: Tensor) -> nn.Module:
    return fxmerge.fold(model, batches, width, example=example, run=QUIET)


def pruned(model: nn.Module, power: int, group: bool, goal: int, example: Tensor) -> nn.Module | None:
    """What torch-pruning leaves at about a number of operations; None if it cannot prune the network."""
    import torch_pruning  # type: ignore[import-not-found,unused-ignore]

    def at(ratio: float) -> nn.Module:
        made = copy.deepcopy(model)
        last = [m for m in made.modules() if isinstance(m, nn.Linear)][-1]
        kind = torch_pruning.importance.GroupMagnitudeImportance if group else None
        importance = kind(p=power) if kind else torch_pruning.importance.MagnitudeImportance(p=power)
        torch_pruning.pruner.BasePruner(
            made, example, importance=importance, pruning_ratio=ratio, ignored_layers=[last]
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
    return best


def further(model: nn.Module, problem: ImageProblem, steps: int) -> nn.Module:
    """A copy that was trained a little further."""
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(made.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, max(steps, 2))
    made.train()
    for _ in range(steps):
        inputs, labels = problem.batch("a", 64, generator)
        loss = F.cross_entropy(made(inputs), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return made.eval()


def rows_of(network: str, widths: Sequence[float], steps: int, seed: int, cache: Path) -> list[Row]:
    problem = PROBLEMS[NETWORKS[network].data]()
    assert isinstance(problem, ImageProblem)
    model = train(network, 0, seed, problem, cache)
    batches = problem.calibration()
    example, whole = batches[0][:1], operations(model, batches[0][:1])
    score = lambda made: accuracies((made, model), problem)[0]  # noqa: E731
    rows = [_row(network, "the network", model, 1.0, score(model), score(further(model, problem, steps)), 0.0)]
    for width in widths:
        began = time.perf_counter()
        small = folded(model, batches, width, example)
        spent = time.perf_counter() - began
        goal = operations(small, example)
        methods: dict[str, Callable[[], nn.Module | None]] = {
            "fold": lambda small=small: small,  # type: ignore[misc]
            "fold, no data": lambda width=width: folded(model, None, width, example),  # type: ignore[misc]
        }
        if importlib.util.find_spec("torch_pruning"):
            for name, power, group in (("pruning, L1", 1, False), ("pruning, group L2", 2, True)):
                methods[name] = lambda p=power, g=group, goal=goal: _calibrated(  # type: ignore[misc]
                    pruned(model, p, g, goal, example), batches
                )
        for name, method in methods.items():
            began = time.perf_counter()
            made = method()
            took = spent if name == "fold" else time.perf_counter() - began
            if made is None:
                rows.append({"network": network, "width": f"{width}", "": name, "accuracy": "not possible"})
                continue
            share = operations(made, example) / whole
            found = _row(network, name, made, share, score(made), score(further(made, problem, steps)), took)
            rows.append({**found, "width": f"{width}"})
            print(", ".join(rows[-1].values()), flush=True)
    return rows


def _calibrated(model: nn.Module | None, batches: list[Tensor]) -> nn.Module | None:
    return None if model is None else recalibrated(model, batches)


def _row(
    network: str, name: str, model: nn.Module, share: float, accuracy: float, trained: float, seconds: float
) -> Row:
    return {
        "network": network,
        "width": "1",
        "": name,
        "operations": f"{share:.0%}",
        "parameters": f"{count_parameters(model):,}",
        "accuracy": percent([accuracy]),
        "trained further": percent([trained]),
        "s": f"{seconds:.0f}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}, one width, and nothing is kept")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), help="only these")
    parser.add_argument("--widths", nargs="+", type=float, default=list(WIDTHS), help="shares of the units")
    parser.add_argument("--steps", type=int, default=200, help="of the further training")
    parser.add_argument("--seeds", type=int, default=1, help="how many networks of each kind")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the trained networks")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    networks = options.networks or (SHORT if options.short else LONG)
    if any(NETWORKS[network].data == "fashion" for network in networks):
        images.check_installed()
    widths = [0.5] if options.short else options.widths
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) if options.short else options.cache
        cache.mkdir(parents=True, exist_ok=True)
        rows = []
        for network in networks:
            for seed in range(1 if options.short else options.seeds):
                rows += rows_of(network, widths, 20 if options.short else options.steps, seed, cache)
    text = table(rows)
    print(text)
    if options.markdown:
        options.markdown.write_text(f"{machine()}, {CLASSES} classes\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
