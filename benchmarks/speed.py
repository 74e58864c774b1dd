"""Speed on one thread: inference of the symmetry, alignment in weight space, activation statistics.

Then what changes of basis add to inference and to matching, in CPU seconds: a model without gains is matched with its
copy in other units, with noise of half the size of its weights, by permutations alone and by changes of basis. "At
least" is what that cannot do without: every class's products, assignment and polar factor, each of them once. Last, one
Procrustes problem, on one thread and on two.

    python benchmarks/speed.py [--short]

Needs `pip install -e '.[zoo]'`.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from invariance import calibration, machine, table
from models import floors
from torch import Tensor

from fxmerge.evidence.activations import similarities
from fxmerge.matching.problem import nearest
from fxmerge.matching.search import match
from fxmerge.program.capture import capture_program
from fxmerge.program.run import Data, Runner, batch_inputs
from fxmerge.symmetry.group import analyse
from fxmerge.units.kind import Kind

REPEATS = 3


def seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The shortest of some runs."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def cpu_seconds(*works: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """The least CPU time of some runs of each work; the works take turns, since the speed of a machine varies."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, own in zip(works, times, strict=True):
            began = time.process_time()
            work()
            own.append(time.process_time() - began)
    return [min(own) for own in times]


def pair(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Two networks from different initialisations."""
    from torchvision.models import get_model

    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(get_model(name, weights=None).eval())
    return models[0], models[1]


def run(name: str) -> dict[str, str]:
    a, b = pair(name)
    batches = [x for x in calibration(torch.zeros(2, 3, 224, 224)) if isinstance(x, Tensor)]
    program = capture_program(a, (batches[0],))
    found, symmetry = analyse(program)
    states = (a.state_dict(), b.state_dict())
    data = Data(batches, batch_inputs(a), progress=False)
    runner = Runner(program)

    def forward() -> None:
        for args, kwargs in data.batches("forward"):
            for state in states:
                runner.call(state, args, kwargs)

    inference = seconds(lambda: analyse(program))
    alignment = seconds(lambda: match(symmetry, *states, {}, alpha=1.0, progress=False), 1)
    passes = seconds(forward, 2)
    statistics = seconds(lambda: similarities(found, symmetry, states, data, ("A", "B"), [(0, 1)]), 2)
    return {
        "model": name,
        "inference s": f"{inference:.2f}",
        "weight alignment of two random networks s": f"{alignment:.1f}",
        "forward passes s": f"{passes:.1f}",
        "activation statistics s": f"{statistics:.1f}",
        "ratio": f"{statistics / passes:.2f}",
    }


def kinds(name: str) -> dict[str, str]:
    """What changes of basis add to inference and to matching."""
    a, _ = pair(name)
    program = capture_program(a, (torch.zeros(2, 3, 224, 224),))
    inference = cpu_seconds(lambda: analyse(program, continuous=False), lambda: analyse(program), repeats=7)
    _, symmetry = analyse(program)
    generator, first = torch.Generator().manual_seed(0), a.state_dict()
    noisy = {n: t + t.std() / 2 * torch.randn(t.shape, generator=generator) for n, t in first.items()}
    second = symmetry.sample_permutation(generator).apply(noisy)

    def matched(continuous: bool) -> None:
        match(symmetry, first, second, {}, alpha=1.0, continuous=continuous, progress=False)

    matching = cpu_seconds(lambda: matched(False), lambda: matched(True), repeats=1)
    row = {"model": name, "dimension": f"{symmetry.dimension():,}"}
    for work, (without, within) in (("inference", inference), ("matching", matching)):
        row |= {f"{work} s": f"{without:.2f}", f"{work} with kinds s": f"{within:.2f}"}
        row[f"{work} ratio"] = f"{within / without:.2f}"
    least = [floors.matching(own, first, second) for own in (replace(symmetry, kinds=()), symmetry)]
    return row | {"matching, at least": f"{least[0]:.2f}", "with kinds, at least": f"{least[1]:.2f}"}


def procrustes(size: int) -> dict[str, str]:
    """The orthogonal matrix that fits a random one best."""
    scores = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (alone,) = cpu_seconds(lambda: nearest(scores, Kind.ORTHOGONAL), repeats=1)
    row = {"units": str(size), "CPU s, 1 thread": f"{alone:.1f}"}
    torch.set_num_threads(2)
    row["s, 2 threads"] = f"{seconds(lambda: nearest(scores, Kind.ORTHOGONAL), 1):.1f}"
    torch.set_num_threads(1)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the smallest models and problems only")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = ("resnet18",) if options.short else ("resnet18", "resnet50", "vit_b_16")
    print(f"{machine()}\n\n{table([run(name) for name in names])}\n")
    print(table([kinds("vit_b_32" if options.short else "vit_b_16")]) + "\n")
    print(table([procrustes(size) for size in ((512,) if options.short else (1024, 2048, 4096))]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
