"""Speed of the zip on one thread, beside the published code and a literal transcription of it.

For two models: pairs of like units in noise ("twins"), units that have nothing in common ("random"), and hidden units
of two networks that were trained on scikit-learn's digits ("trained"). The published code searches the whole matrix of
similarities for every merge; `tests/published_zip.py` takes the same steps, and both must give the same merged units,
entry for entry. With a clone of https://github.com/gstoica27/ZipIt, its own function runs beside them, in the same
precision.

    python benchmarks/zipping.py [--short] [--published CLONE]

Run it where `pip install -e '.[test]'` was run, which also makes `tests` importable.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before numpy is imported, which reads it.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from invariance import machine, table
from sklearn.datasets import load_digits
from torch import nn

from fxmerge.matching.zipping import zip_groups, zip_units
from tests.published_zip import published_zip

UNITS = (256, 512, 1024, 2048)
LITERAL = 1024
"""Units of one model above which the literal transcription is not run: it takes minutes."""

HEADS = 8
STEPS = 100
"""How long networks are trained, on all images at once."""


def similarity(kind: str, units: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    rng = np.random.default_rng(0)
    if kind == "trained":
        features = np.concatenate([trained(seed, units) for seed in (0, 1)])
    else:
        features = rng.normal(size=(2 * units, 200))
    if kind == "twins":
        features[units:] += features[:units]
    correlation = np.corrcoef(features)
    return np.triu(correlation) + np.triu(correlation, 1).T


def trained(seed: int, units: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What the hidden units of a small network say to all digits: shape (units, images)."""
    digits = load_digits()
    x, y = torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target)
    torch.manual_seed(seed)
    hidden, last = nn.Linear(x.shape[1], units), nn.Linear(units, 10)
    optimizer = torch.optim.Adam([*hidden.parameters(), *last.parameters()])
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(last(hidden(x).relu()), y).backward()
        optimizer.step()
    return hidden(x).detach().double().T.numpy()


CODE = "matching_functions.py"
"""Where the zip is in the repository of ZipIt!"""

Published = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def published(clone: Path) -> Published:
    """The zip of ZipIt!, from a clone of its repository."""
    spec = importlib.util.spec_from_file_location("matching_functions", clone / CODE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Published = module.match_tensors_zipit
    return function


def run(
    kind: str, units: int, blocks: int | None, budget: float, damping: float, beside: Published | None
) -> dict[str, str]:
    links = similarity(kind, units)
    times = []
    for _ in range(5 if units <= LITERAL else 2):
        began = time.process_time()
        if blocks:
            found = zip_groups(links, 2, np.arange(units) // (units // blocks), budget=budget, damping=damping)
        else:
            found = zip_units(links, 2, budget=budget, damping=damping)
        times.append(time.process_time() - began)
    row = {
        "units": f"2 x {units}",
        "similarity": kind,
        "blocks": str(blocks or ""),
        "budget": f"{budget:g}",
        "damping": f"{damping:g}",
        "s": f"{min(times):.4f}",
    }
    if units <= LITERAL:
        began = time.process_time()
        labels, _ = published_zip(links, 2, budget, damping, blocks)
        literal = time.process_time() - began
        same = np.array_equal(labels, found.labels)
        row |= {"literal s": f"{literal:.2f}", "times": f"{literal / min(times):.0f}"}
        if beside and not blocks:
            metric = {"cossim": torch.from_numpy(links.copy())}
            began = time.process_time()
            _, unmerge = beside(metric, a=damping, b=budget)
            seconds = time.process_time() - began
            same &= np.array_equal(unmerge.argmax(1).numpy(), found.labels.reshape(-1))
            row |= {"published s": f"{seconds:.2f}", "times published": f"{seconds / min(times):.0f}"}
        row["same"] = "yes" if same else "NO"
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="only 512 and 2048 units, with the default options")
    parser.add_argument("--published", type=Path, metavar="CLONE", help="a clone of the repository of ZipIt!")
    options = parser.parse_args()
    if options.published and not (options.published / CODE).is_file():
        parser.error(f"{options.published} has no {CODE}: give the folder of a clone of github.com/gstoica27/ZipIt")
    beside = published(options.published) if options.published else None
    torch.set_num_threads(1)
    rows = []
    for units in UNITS if not options.short else (512, 2048):
        for kind in ("random", "trained", "twins"):
            for budget, damping in ((1.0, 0.5),) if options.short else ((1.0, 0.5), (0.125, 0.3), (1.0, 1.0)):
                rows.append(run(kind, units, None, budget, damping, beside))
        rows.append(run("random", units, HEADS, 1.0, 0.5, beside))
    print(f"{machine()}; seconds of CPU time\n\n{table(rows)}")
    return int(any(row.get("same") == "NO" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
