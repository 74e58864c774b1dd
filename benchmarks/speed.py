"""Speed on one thread: inference of the symmetry, alignment in weight space, activation statistics.

    python benchmarks/speed.py [--short]

Needs `pip install -e '.[zoo]'`.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from invariance import calibration, machine, table
from torch import Tensor

from fxmerge.evidence.activations import similarities
from fxmerge.matching.search import match
from fxmerge.program.capture import capture_program
from fxmerge.program.run import Data, Runner, batch_inputs
from fxmerge.symmetry.group import analyse

REPEATS = 3


def seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The shortest of some runs."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="only resnet18")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = ("resnet18",) if options.short else ("resnet18", "resnet50", "vit_b_16")
    print(f"{machine()}\n\n{table([run(name) for name in names])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
