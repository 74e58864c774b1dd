"""Merging on real data: networks trained apart, on different classes or from different seeds, and what is left of them.

In the setting `disjoint` one parent learns task A and the other task B: the first and the last five classes of
Fashion-MNIST, two kinds of sources in Python's own library, or two maps of noisy images, without the noise and of
edges. In the setting `same` both learn both tasks, from
two initialisations. Every method gives one network, in which BatchNorm statistics are re-estimated over the same
2,000 unlabelled training images; then it is tested on both tasks, and in the setting `same` the loss is followed on
the straight line from one parent to the other, re-estimating at every point. The setting `few` is `disjoint` with 200
images, 20 of each class, and 26 windows of text in place of 256; `fewest` is it with 50 images and 7 windows.

    python benchmarks/tasks.py [--short] [--networks NAME ...] [--settings NAME ...] [--methods NAME ...]
        [--seeds N] [--train] [--report] [--again METHOD ... | failed] [--results FILE] [--cache FOLDER] [--jobs 2]
        [--timeout 1800] [--memory 6] [--markdown FILE] [--plots FOLDER]
    python benchmarks/tasks.py --partial [--short] [--networks NAME ...] [--depths SHARE ...] [--cache FOLDER]
        [--markdown FILE] [--plots FOLDER]

The second form takes the networks that classify images, in the pairs of `benchmarks/heads.py`: each parent has a head
of five classes. Both are merged to one trunk with two heads, over how many of the layers and parameters the trunk has.
Each merge is made with one loader of images of both tasks, and with the images of its own task for each parent.

Needs the files of Debian's package dataset-fashion-mnist (apt-get install dataset-fashion-mnist) and
`pip install -e '.[tasks]'`. Parents are trained once and kept in the cache folder; every network, setting, seed and
method adds one JSON line to the results file; those that have a line are skipped.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from invariance import machine, table
from models.processes import Row, append_row, read_rows, run_all
from tasks_suite import images, judging, partial, training
from tasks_suite.methods import (
    APART,
    BY_ALPHA,
    DEFAULTS,
    METHODS,
    PLAIN,
    REFITS,
    SEARCHES,
    STANDARD,
    WEIGHTED,
    available,
)
from tasks_suite.page import page
from tasks_suite.report import VARIANTS, key, summary
from tasks_suite.suite import LONG, NETWORKS, SHORT
from tasks_suite.training import default_cache

SHORT_METHODS = ("ensemble", PLAIN, "Git Re-Basin", DEFAULTS)
PLANES = ("mlp", "resnet20-1-bn")
"""The networks around which a loss plane is drawn."""


TRADED = ("mlp", "resnet20-1-bn", "vit-fused", "convnext")
"""The networks of which the way from one task to the other is drawn."""

GRID = [name for alpha, name in BY_ALPHA.items() if alpha not in (0, 0.5, 1)]
ONLY_DISJOINT = {*GRID, *VARIANTS}
"""The methods that fill a grid, or that have tables of their own: for disjoint tasks only."""

WITH_FEW = {"ensemble", PLAIN, "MuDSC zip", *REFITS}
"""The methods of the setting with little data."""

FOR_MAPS = {*METHODS} - {*GRID, *APART, *STANDARD, *SEARCHES} | {BY_ALPHA[0.5], "MuDSC zip"}
"""The methods of networks that give maps: all data are of both tasks there, and outputs are not compared."""

PRELOAD = ("sklearn.datasets", "sklearn.model_selection", "tasks_suite.judging", "tasks_suite.training")


def pairs(networks: Iterable[str], settings: Sequence[str], seeds: int | None) -> list[tuple[str, str, int]]:
    """The network, setting and seed of every pair, first seeds first."""
    found = [
        (network, setting, seed)
        for network in networks
        for setting in settings
        for seed in range(NETWORKS[network].seeds if seeds is None else min(seeds, NETWORKS[network].seeds))
    ]
    return sorted(found, key=lambda pair: pair[2])


def train(chosen: Sequence[tuple[str, str, int]], options: argparse.Namespace) -> bool:
    """Trains those parents that are missing; whether all are there."""
    parents = [parent for pair in chosen for parent in training.parents_of(*pair)]
    todo = training.missing(parents, options.cache)
    done = run_all(training.work, todo, options.jobs, options.timeout, options.memory, PRELOAD)
    for number, row in enumerate(done, start=1):
        name = f"{row['network']} on {row['part']}, seed {row['seed']}"
        said = row.get("failure") or (
            f"{row['seconds']:.0f} s, task A {row['scores']['task_a']:.1%}, task B {row['scores']['task_b']:.1%}, "
            f"joint {row['scores']['joint']:.1%}"
        )
        print(f"[{number}/{len(todo)}] {name}: {said}", flush=True)
    return not training.missing(parents, options.cache)


def judge(tasks: list[Row], rows: dict[tuple[object, ...], Row], options: argparse.Namespace) -> None:
    """Runs the methods that have no row yet, and adds their rows."""
    again = set(options.again)
    todo = [
        task
        for task in tasks
        if key(task) not in rows or task["method"] in again or ("failed" in again and "failure" in rows[key(task)])
    ]
    done = run_all(judging.work, todo, options.jobs, options.timeout, options.memory, PRELOAD)
    for number, row in enumerate(done, start=1):
        row.pop("cache")
        rows[key(row)] = row
        append_row(options.results, row)
        name = ", ".join(map(str, key(row)))
        said = f"failed to {row['stage']}: {row['failure'][:120]}" if "failure" in row else _brief(row)
        print(f"[{number}/{len(todo)}] {name}: {said}", flush=True)


def _brief(row: Row) -> str:
    if "scores" not in row:
        return "done"
    text = f"per task {row['scores']['per_task']:.1%}, joint {row['scores']['joint']:.1%}"
    return text + (f", barrier {row['barrier']:.3f}" if "barrier" in row else "")


def applies(network: str, setting: str, method: str) -> bool:
    """Whether a method is measured on a network in a setting."""
    if NETWORKS[network].data == "dense":
        return setting == "disjoint" and method in FOR_MAPS
    return (setting != "same" or method not in ONLY_DISJOINT) and (setting not in judging.FEW or method in WITH_FEW)


def select(options: argparse.Namespace) -> tuple[list[tuple[str, str, int]], list[Row]]:
    """The pairs and the tasks that the options ask for."""
    networks = options.networks or (SHORT if options.short else LONG)
    chosen = pairs(networks, options.settings, options.seeds)
    methods = options.methods or (SHORT_METHODS if options.short else available())
    tasks: list[Row] = [
        {"network": network, "setting": setting, "seed": seed, "method": method, "measure": "merge"}
        for network, setting, seed in chosen
        for method in methods
        if applies(network, setting, method)
    ]
    if options.plots:
        planes = [pair for pair in chosen if pair[0] in PLANES and pair[1:] == ("same", 0)]
        tasks += [
            {"network": network, "setting": setting, "seed": seed, "method": DEFAULTS, "measure": "plane"}
            for network, setting, seed in planes
        ]
        traded = [pair for pair in chosen if pair[0] in TRADED and pair[1:] == ("disjoint", 0)]
        tasks += [
            {"network": network, "setting": setting, "seed": seed, "method": method, "measure": "tradeoff"}
            for network, setting, seed in traded
            for method in WEIGHTED
        ]
    return chosen, [{**task, "cache": str(options.cache)} for task in tasks]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}, and nothing is kept")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), help="only these")
    parser.add_argument("--settings", nargs="+", choices=list(training.SETTINGS), default=list(training.SETTINGS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="only these")
    parser.add_argument("--seeds", type=int, help="at most so many pairs of each network and setting")
    parser.add_argument("--train", action="store_true", help="only train the parents")
    parser.add_argument("--report", action="store_true", help="run nothing, only report on the results file")
    parser.add_argument("--partial", action="store_true", help="over where a common trunk ends, in place of all else")
    parser.add_argument("--depths", nargs="+", type=float, default=list(partial.DEPTHS), help="with --partial")
    parser.add_argument("--again", nargs="+", default=[], help="run these methods again; `failed` for all failures")
    parser.add_argument("--results", type=Path, default=Path("tasks.jsonl"), help="one JSON line for each result")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the trained parents")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for each process")
    parser.add_argument("--memory", type=float, default=6, help="GiB for each process")
    parser.add_argument("--markdown", type=Path, help="write the page to this file")
    parser.add_argument("--plots", type=Path, help="draw into this folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.short:
            options.cache, options.results = Path(scratch), Path(scratch) / "tasks.jsonl"
        return run_partial(options) if options.partial else run(options)


def run_partial(options: argparse.Namespace) -> int:
    """Measures and draws accuracy over where the trunk of two networks ends."""
    asked = options.networks or (SHORT if options.short else LONG)
    networks = [network for network in asked if NETWORKS[network].data in partial.IMAGES]
    if not networks:
        raise SystemExit(f"None of {', '.join(asked)} classifies images.")
    if any(NETWORKS[network].data == "fashion" for network in networks):
        images.check_installed()
    options.cache.mkdir(parents=True, exist_ok=True)
    points = []
    for point in partial.measure(networks, options.depths, options.cache):
        print(", ".join(point.row().values()), flush=True)
        points.append(point)
    text = table([point.row() for point in points])
    print(text)
    if options.plots:
        from tasks_suite.plots import draw_partial

        options.plots.mkdir(parents=True, exist_ok=True)
        draw_partial(points, options.plots)
    if options.markdown:
        options.markdown.write_text(f"{machine()}\n\n{text}\n")
    return 0


def run(options: argparse.Namespace) -> int:
    """Does what the options ask for; 0 if nothing went wrong."""
    chosen, tasks = select(options)
    if not options.report:
        if any(NETWORKS[network].data in ("fashion", "dense") for network, _, _ in chosen):
            images.check_installed()
        options.cache.mkdir(parents=True, exist_ok=True)
        if not train(chosen, options):
            return 1
        if options.train:
            return 0
    rows: dict[tuple[object, ...], Row] = {key(row): row for row in read_rows(options.results)}
    if not options.report:
        judge(tasks, rows, options)
    found = [rows[key(task)] for task in tasks if key(task) in rows]
    if options.plots:
        from tasks_suite.plots import draw

        options.plots.mkdir(parents=True, exist_ok=True)
        draw(found, options.plots)
    if options.markdown:
        options.markdown.write_text(page(found, options.plots))
    print(summary(found))
    return int(options.short and any("failure" in row for row in found))


if __name__ == "__main__":
    sys.exit(main())
