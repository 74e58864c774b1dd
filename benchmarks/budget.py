"""One share of the units for all classes, or a budget: which result of as many parameters is nearer to its networks?

The networks are those of `benchmarks/own.py`: pairs that learnt disjoint halves of Fashion-MNIST or of scikit-learn's
digits, and that are in none of the other tables. One of each pair is folded to 0.7 and to 0.5 of its units, and the
pair is merged to 1.25, with heads apart. Then the same is done with a `Budget` of the parameters that this has. Told is
the distance of the outputs from those of the networks, as a share of their variance, on held-out images.

    python benchmarks/budget.py [--short] [--networks NAME ...] [--jobs 2] [--markdown FILE]

Needs what `benchmarks/tasks.py` needs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from invariance import machine, table
from models.processes import Note, Row, run_all
from own import FIRST_SEED, NETWORKS, SHORT
from tasks_suite import images
from tasks_suite.suite import PROBLEMS
from tasks_suite.training import train
from torch import Tensor, fx, nn

import fxmerge
from fxmerge import Budget, Recipe, Run, Zip
from fxmerge.demo import count_parameters

FOLDS, MERGES = (0.7, 0.5), (1.25,)
LONG = tuple(name for name in NETWORKS if name.startswith("digits") or name in ("ViT", "VGG, BatchNorm"))
QUIET = Run(progress=False)


def made(parents: list[nn.Module], data: list[Tensor], width: float | Budget, *, merge: bool) -> fx.GraphModule:
    if not merge:
        units_only = fxmerge.Recipe(match=fxmerge.Zip(continuous=False))  # As with a budget.
        return fxmerge.fold(parents[0], data, width, units_only, run=QUIET)
    return fxmerge.merge(parents[0], parents[1], data, Recipe(match=Zip(width=width), share="trunk"), run=QUIET)


def work(task: Row, note: Note) -> None:
    """Trains a pair of networks, and makes them smaller and larger."""
    entry, problem, parents = NETWORKS[task["network"]], PROBLEMS[NETWORKS[task["network"]].data](), list[nn.Module]()
    note("train")
    for number, part in enumerate(("a", "b")):
        torch.manual_seed(FIRST_SEED + number)
        parents.append(entry.build())
        train(entry, parents[-1], problem, part, FIRST_SEED + number, entry.steps)  # type: ignore[arg-type]
    rows, data = [], problem.calibration()
    for width, merge in (*((width, False) for width in FOLDS), *((width, True) for width in MERGES)):
        note(f"{'merge' if merge else 'fold'} to {width}")
        one = made(parents, data, width, merge=merge)
        share = count_parameters(one) / count_parameters(parents[0])
        budget = made(parents, data, Budget(parameters=share), merge=merge)
        told = {"network": task["network"], "": f"merge, {width}" if merge else f"fold, {width}"}
        for name, network in (("one share", one), ("budget", budget)):
            told[f"parameters, {name}"] = f"{count_parameters(network) / count_parameters(parents[0]):.2f}"
            told[f"distance, {name}"] = f"{fxmerge.report(network).errors['merged']:.4f}"
        rows.append(told)
    note("done", rows=rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), help="only these")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    names = options.networks or (SHORT if options.short else LONG)
    if any(NETWORKS[name].data == "fashion" for name in names):
        images.check_installed()
    results = list(run_all(work, [{"network": name} for name in names], options.jobs, 3600, 6))
    rows = [row for result in results for row in result.get("rows", ())]
    text = table(rows)
    print(text)
    for result in results:
        if "failure" in result:
            print(f"{result['network']}: {result['failure']}")
    if options.markdown:
        options.markdown.write_text(f"{machine()}\n\n{text}\n")
    return int(len(rows) < (len(FOLDS) + len(MERGES)) * len(names))


if __name__ == "__main__":
    sys.exit(main())
