"""Choosing alpha without labels: which criterion loses least against the alpha that labels would have chosen.

Pairs of networks are trained apart, on different classes (`disjoint`) or on all from two initialisations (`same`), and
merged with every candidate alpha. Every criterion ranks the merges by unlabelled calibration images; accuracy on
test images, per task and over all classes, tells what its choice loses against the best of the candidates. Three ways
of using the data are compared:

    all     the merges that `fxmerge.merge` returns are judged, on the images they were made of (every fourth batch)
    again   merges made without every fourth batch are judged on these; the chosen alpha is then used with all data
    part    as before, but the merge that was judged is kept

A margin keeps alpha = 0.5 unless the best candidate's error is below that of 0.5 by this share.

    python benchmarks/alpha.py [--short] [--networks NAME ...] [--seeds 3] [--margins 0 0.02] [--images N ...]
        [--results FILE] [--cache FOLDER] [--report]

Needs what `benchmarks/tasks.py` needs; with --short, and for networks on digits, scikit-learn only. Parents are
trained once and kept in the cache folder; every pair adds JSON lines to the results file and is then skipped.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from invariance import machine, table
from models.processes import Row, append_row, read_rows
from scipy.stats import spearmanr
from tasks_suite import images, training
from tasks_suite.criteria import CRITERIA, Shown
from tasks_suite.problem import Problem
from tasks_suite.suite import NETWORKS, PROBLEMS
from torch import Tensor, nn
from tqdm import tqdm

from fxmerge import demo
from fxmerge.capture import capture_program
from fxmerge.choose import CANDIDATES, DEFAULT, MARGIN
from fxmerge.matching.search import match
from fxmerge.rewriting.bake import bake
from fxmerge.rewriting.calibrate import batch_norm_statistics, recalibrate
from fxmerge.rewriting.combine import average
from fxmerge.run import Data, batch_inputs
from fxmerge.similarity.activations import similarities
from fxmerge.symmetry.group import analyse

DEMO = {f"demo-{arch}": arch for arch in demo.RECIPES}
SMALL = ("digits-mlp", "digits-vgg-bn")
LONG = (*SMALL, *DEMO, "mlp", "vgg-bn", "vit-fused")
HELD = 4
"""Every so many batches, one is judged on."""
USES = {"all": ("all", "all"), "again": ("part", "all"), "part": ("part", "part")}
"""For every way of using the data, of which merges the criterion and of which the accuracy is taken."""


# -------------------------------------------------------------------------- parents


def parents(network: str, setting: str, seed: int, cache: Path) -> tuple[nn.Module, nn.Module, Problem]:
    """A pair, trained unless it is in the cache, and the problem that both learned."""
    if network in DEMO:
        train, test = demo.load_split(seed)
        directions = demo.class_directions(seed)
        a, b = (_demo_parent(DEMO[network], task, train, directions, seed, cache) for task in demo.TASKS)
        return a, b, images.ImageProblem(train, test, test, directions)  # No network is chosen by its validation.
    pair = training.parents_of(network, setting, seed)
    for task in training.missing(pair, cache):
        training.work(task, lambda stage, **found: None)
    a, b = (training.load(parent, cache) for parent in pair)
    return a, b, PROBLEMS[NETWORKS[network].data]()


def _demo_parent(
    arch: demo.Arch, task: range, data: demo.Split, directions: Tensor, seed: int, cache: Path
) -> nn.Module:
    recipe, path = demo.RECIPES[arch], cache / f"demo-{arch}-{seed}-{task.start}.pt"
    if not path.exists():
        number = demo.TASKS.index(task)
        bar = tqdm(disable=True)
        model = demo.train(recipe, data, task, directions, 2 * seed + number, recipe.epochs, bar)
        torch.save(model.state_dict(), path)
    model = recipe.build()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


# -------------------------------------------------------------------------- merges and what is seen of them


def run(network: str, setting: str, seed: int, count: int | None, cache: Path) -> list[Row]:
    """One row for every candidate: the criteria and the accuracies of its merges."""
    a, b, problem = parents(network, setting, seed, cache)
    pixels = torch.cat(list(problem.calibration()))[:count]
    batches = [batch for batch in pixels.split(max(len(pixels) // 16, 8)) if len(batch) > 1]
    held = batches[HELD - 1 :: HELD]
    parts = {"all": batches, "part": [x for n, x in enumerate(batches) if n % HELD != HELD - 1]}
    program = capture_program(a, (batches[0],), {})
    found, symmetry = analyse(program)
    states = dict(a.state_dict()), dict(b.state_dict())
    shown = Shown(found, symmetry, held)
    of_a = shown.of(states[0])
    rows: list[Row] = [
        {"network": network, "setting": setting, "seed": seed, "images": count, "alpha": alpha} for alpha in CANDIDATES
    ]
    for name, part in parts.items():
        data = Data(part, batch_inputs(a), progress=False)
        pairs = similarities(found, symmetry, states, data, ("model A", "model B"), [(0, 1)])
        correlation = {number: own[0, 1] for number, own in pairs.items()}
        for row in rows:
            matched = match(symmetry, *states, correlation, alpha=row["alpha"], seed=seed, progress=False)
            aligned = matched.permutation.apply(states[1])
            merged = bake(program, average((states[0], aligned), (0.5, 0.5), batch_norm_statistics(program)))
            recalibrate(merged, program, data)
            of_merged, of_b = shown.of(merged.state_dict()), shown.of(aligned)
            row[name] = {
                "errors": {title: error(of_merged, of_a, of_b) for title, error in CRITERIA.items()},
                "scores": problem.evaluate([merged]),
            }
    return rows


# -------------------------------------------------------------------------- what a choice loses


def report(rows: Sequence[Row], margins: Sequence[float]) -> str:
    """What every criterion, and every fixed alpha, loses in points of accuracy, the best first."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["network"], row["setting"], row["seed"], row["images"]].append(row)
    pairs = [sorted(group, key=lambda row: row["alpha"]) for group in groups.values()]
    lines = [
        _line(f"{title}, margin {margin:g}" if margin else title, use, pairs, title, margin)
        for title, use, margin in product(CRITERIA, USES, margins)
    ]
    lines += [_line(f"alpha = {alpha:g}", "", pairs, alpha, 0) for alpha in CANDIDATES]
    lines.sort(key=lambda line: float(line["lost per task"]) + float(line["lost jointly"]))
    return f"{len(pairs)} pairs\n\n{table(lines)}"


def _line(name: str, use: str, pairs: Sequence[Sequence[Row]], chooser: str | float, margin: float) -> dict[str, str]:
    judged, kept = USES[use or "all"]
    middle = CANDIDATES.index(DEFAULT)
    lost: dict[str, list[float]] = defaultdict(list)
    gained: dict[str, list[float]] = defaultdict(list)
    rank: dict[str, list[float]] = defaultdict(list)
    moved = 0
    for pair in pairs:
        if isinstance(chooser, str):
            errors = np.array([row[judged]["errors"][chooser] for row in pair])
            place = int(errors.argmin())
            place = place if errors[place] < (1 - margin) * errors[middle] else middle
        else:
            place = CANDIDATES.index(chooser)
        moved += place != middle
        for score in ("per_task", "joint"):
            own = 100 * np.array([row[kept]["scores"][score] for row in pair])
            lost[score].append(own.max() - own[place])
            gained[score].append(own[place] - own[middle])
            if isinstance(chooser, str) and np.ptp(errors) > 0 and np.ptp(own) > 0:
                rank[score].append(float(spearmanr(-errors, own)[0]))
    line = {"chosen by": name, "use": use}
    for score, title in (("per_task", "per task"), ("joint", "jointly")):
        gain = np.array(gained[score])
        line[f"lost {title}"] = f"{np.mean(lost[score]):.2f}"
        line[f"gained on 0.5 {title}"] = f"{gain.mean():+.2f} ± {gain.std() / len(gain) ** 0.5:.2f}"
        line[f"worst {title}"] = f"{gain.min():+.1f}"
        line[f"rank {title}"] = f"{np.mean(rank[score]):.2f}" if rank[score] else ""
    return line | {"not 0.5": f"{moved / len(pairs):.0%}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SMALL)}, and nothing is kept")
    parser.add_argument("--networks", nargs="+", choices=LONG, help="only these")
    parser.add_argument("--seeds", type=int, default=3, help="how many pairs of each network and setting")
    parser.add_argument("--margins", nargs="+", type=float, default=[0, MARGIN], help="margins to report")
    parser.add_argument("--images", nargs="+", type=int, default=[128, 0], help="calibration images; 0 for all")
    parser.add_argument("--results", type=Path, default=Path("alpha.jsonl"), help="one JSON line for each merge")
    parser.add_argument("--cache", type=Path, default=Path("alpha-parents"), help="folder of the trained parents")
    parser.add_argument("--report", action="store_true", help="run nothing, only report on the results file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        if options.short:
            options.cache, options.results, options.seeds = Path(scratch), Path(scratch) / "alpha.jsonl", 1
        names = options.networks or (SMALL if options.short else LONG)
        done = {(row["network"], row["setting"], row["seed"], row["images"]) for row in read_rows(options.results)}
        todo = [
            (name, setting, seed, count or None)
            for seed, name, setting, count in product(range(options.seeds), names, training.SETTINGS, options.images)
            if not (name in DEMO and setting == "same")
        ]
        if not options.report:
            options.cache.mkdir(parents=True, exist_ok=True)
            if any(name not in DEMO and NETWORKS[name].data == "fashion" for name, *_ in todo):
                images.check_installed()
        for pair in todo if not options.report else ():
            if pair not in done:
                for row in run(*pair, options.cache):
                    append_row(options.results, row)
        print(f"{machine()}; {report(read_rows(options.results), options.margins)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
