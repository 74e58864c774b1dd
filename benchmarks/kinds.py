"""Permutations against changes of basis: what transformers lose when they are merged, by how their units are matched.

Pairs of networks of `benchmarks/tasks.py`, trained there on two tasks apart (disjoint) or on both from two
initialisations (same). Every pair is merged by the default recipe, with `continuous=False` (permutations) and
`continuous=True` (changes of basis), averaged and refitted. "auto" is the refitted one of which the error on held-out
data is less. For the setting same, the loss is followed on the straight line from one parent to the other: a barrier
is how far it rises above the line between both ends, at most.

    python benchmarks/kinds.py [--short] [--networks NAME ...] [--settings NAME ...] [--more] [--seeds N]
                               [--cache FOLDER] [--markdown FILE]

`--more` tries what else may help after changes of basis: outputs fitted as scores of classes, attention fitted for the
products of its projections, the mean of matched
directions in place of principal directions, and more units.

Needs the files of Debian's package dataset-fashion-mnist and `pip install -e '.[tasks]'`. Parents are trained once and
kept in the cache folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from invariance import machine, table
from models.processes import Note, Row, run_all
from tasks_suite import training
from tasks_suite.judging import barrier, curve
from tasks_suite.methods import Pair, with_state_of
from tasks_suite.suite import NETWORKS, PROBLEMS

import fxmerge
from fxmerge import Align, LeastSquares, Recipe, Run, Zip

TRANSFORMERS = ("gpt", "gpt-tied", "llama", "vit-fused", "vit-separate", "mixer")
SETTINGS = ("disjoint", "same")
MORE = {
    "scores of classes": Recipe(match=Zip(continuous=True), fit=LeastSquares(outputs="logits")),
    "products": Recipe(match=Zip(continuous=True), fit=LeastSquares(products=True)),
    "products, scores of classes": Recipe(
        match=Zip(continuous=True), fit=LeastSquares(outputs="logits", products=True)
    ),
    "matched directions": Recipe(match=Align(continuous=True)),
    "1.25 times the units": Recipe(match=Zip(continuous=True, width=1.25)),
}
"""Recipes beside the default fit of bases."""

TIME = 1800
"""Seconds for each pair."""


def work(task: Row, note: Note) -> None:
    """One pair, in a process of its own."""
    problem = PROBLEMS[NETWORKS[task["network"]].data]()
    parents = training.parents_of(task["network"], task["setting"], task["seed"])
    a, b = (training.load(parent, Path(task["cache"])) for parent in parents)
    batches, run = problem.calibration(), Run(seed=task["seed"], progress=False)
    scores = {"parents": [problem.evaluate([own])["per_task"] for own in (a, b)]}
    scores["ensemble"] = [problem.evaluate([a, b])["per_task"]]
    errors = {}
    for name, continuous in (("permutations", False), ("bases", True)):
        for fitted, fit in (("averaged", None), ("refitted", "auto")):
            note(f"{name}, {fitted}")
            recipe = Recipe(match=Zip(continuous=continuous), fit=fit)
            merged = fxmerge.merge(a, b, batches, recipe, run=run)
            scores[f"{name}, {fitted}"] = [problem.evaluate([with_state_of(a, merged)])["per_task"]]
            errors[name] = fxmerge.report(merged).errors.get("merged")
    for name, recipe in MORE.items() if task["more"] else ():
        note(name)
        scores[name] = [problem.evaluate([fxmerge.merge(a, b, batches, recipe, run=run)])["per_task"]]
    best = min(("bases", "permutations"), key=lambda name: errors[name])
    scores["auto"] = scores[f"{best}, refitted"]
    barriers = {}
    if task["setting"] == "same":
        note("barriers")
        canonical = with_state_of(a, fxmerge.canonicalize(a, (batches[0],)))
        for name, start, moved in (
            ("none", a, b),
            ("permutations", a, fxmerge.align(b, a, batches, Recipe(match=Align()), run=run)),
            ("bases", canonical, fxmerge.align(b, a, batches, Recipe(match=Align(continuous=True)), run=run)),
        ):
            line = curve(problem, Pair(start, b, batches, ([], []), task["seed"]), with_state_of(a, moved))
            barriers[name] = barrier(line)
    note("done", scores=scores, barriers=barriers)


def tables(rows: list[Row]) -> str:
    """The accuracies per task in percent, and the barriers in nats."""
    accuracy, barriers = [], []
    for row in rows:
        names = {"network": row["network"], "setting": row["setting"], "seed": row["seed"]}
        shown = {name: " / ".join(f"{100 * s:.1f}" for s in own) for name, own in row.get("scores", {}).items()}
        accuracy.append({**names, **shown})
        if row.get("barriers"):
            barriers.append({**names, **{name: f"{value:.2f}" for name, value in row["barriers"].items()}})
    return table(accuracy) + ("\n\nBarriers:\n\n" + table(barriers) if barriers else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a small perceptron on digits only")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(TRANSFORMERS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--more", action="store_true", help="other recipes, too")
    parser.add_argument("--seeds", type=int, default=1, help="pairs of each network and setting")
    parser.add_argument("--cache", type=Path, default=training.default_cache(), help="folder of trained parents")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    arguments = parser.parse_args()
    networks = ["digits-mlp"] if arguments.short else arguments.networks
    print(machine(), flush=True)
    with training.cache_folder(arguments.cache, short=arguments.short) as cache:
        tasks: list[Row] = [
            {"network": network, "setting": setting, "seed": seed, "cache": str(cache), "more": arguments.more}
            for seed in range(arguments.seeds)
            for network in networks
            for setting in arguments.settings
        ]
        parents = [p for t in tasks for p in training.parents_of(t["network"], t["setting"], t["seed"])]
        for row in run_all(training.work, training.missing(parents, cache), arguments.jobs, TIME, 6):
            print(f"trained {row['network']}: {row.get('failure', 'done')}", flush=True)
        began, rows = time.perf_counter(), []
        for row in run_all(work, tasks, arguments.jobs, TIME, 6):
            rows.append(row)
            print(f"[{len(rows)}/{len(tasks)}] {time.perf_counter() - began:.0f} s", row.get("failure", ""), flush=True)
            print(tables([row]), flush=True)
    rows.sort(key=lambda row: tasks.index({key: row[key] for key in tasks[0]}))
    text = tables(rows)
    print(text)
    if arguments.markdown is not None:
        arguments.markdown.write_text(text + "\n", encoding="utf-8")
    return int(any("failure" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
