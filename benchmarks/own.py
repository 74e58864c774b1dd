"""Where each model has data of its own: how much of what is learnt on them should be what that model gives, and how
much the mean of all (`LeastSquares(own=...)`).

The networks are of other sizes, or at least other seeds, than those of `benchmarks/tasks.py`, so that a default chosen
here is not chosen on the numbers that are reported there. One parent learns the first five, the other the last five
classes of Fashion-MNIST or of scikit-learn's digits.

    python benchmarks/own.py [--short] [--networks NAME ...] [--seeds 2] [--jobs 2]

Needs the files of Debian's package dataset-fashion-mnist (apt-get install dataset-fashion-mnist) and
`pip install -e '.[tasks]'`.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from statistics import mean

import torch
from invariance import machine, table
from models.processes import Note, Row, run_all
from tasks_suite import images
from tasks_suite.images import EMBEDDING
from tasks_suite.methods import with_state_of
from tasks_suite.networks import MLP, VGG, ConvNeXt, Mixer, ResNet20, group_norm
from tasks_suite.sequences import ViT
from tasks_suite.suite import PROBLEMS, Entry
from tasks_suite.training import train
from torch import nn

import fxmerge
from fxmerge import LeastSquares, Recipe, Run
from fxmerge.demo import recalibrated

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
FIRST_SEED = 100
"""No parent of the suite has this seed, or a later one."""

_NARROW = ((24,), (48,), (96,))

NETWORKS: dict[str, Entry] = {
    "digits, MLP": Entry(partial(MLP, 64, 96, EMBEDDING), "digits", 300, 3e-3),
    "digits, VGG, BatchNorm": Entry(partial(VGG, ((24,), (48,)), nn.BatchNorm2d, EMBEDDING), "digits", 120, 1e-2),
    "digits, VGG, GroupNorm": Entry(partial(VGG, ((24,), (48,)), group_norm, EMBEDDING), "digits", 120, 1e-2),
    "MLP": Entry(partial(MLP, 784, 256, EMBEDDING), "fashion", 1000, 1e-3),
    "VGG, BatchNorm": Entry(partial(VGG, _NARROW, nn.BatchNorm2d, EMBEDDING), "fashion", 500, 3e-3),
    "VGG, GroupNorm": Entry(partial(VGG, _NARROW, group_norm, EMBEDDING), "fashion", 500, 3e-3),
    "ResNet, BatchNorm": Entry(partial(ResNet20, 1, 2, nn.BatchNorm2d, EMBEDDING), "fashion", 500, 5e-3),
    "ResNet, GroupNorm": Entry(partial(ResNet20, 1, 2, group_norm, EMBEDDING), "fashion", 500, 5e-3),
    "ViT": Entry(partial(ViT, 28, 4, 48, 2, 4, EMBEDDING, fused=True), "fashion", 800, 2e-3),
    "ConvNeXt": Entry(partial(ConvNeXt, (24, 48), 2, EMBEDDING), "fashion", 400, 3e-3),
    "mixer": Entry(partial(Mixer, 28, 4, 48, 2, EMBEDDING), "fashion", 800, 2e-3),
}
SHORT = ("digits, MLP",)


def work(task: Row, note: Note) -> None:
    """Trains a pair of parents, and merges them with every share."""
    entry, seed = NETWORKS[task["network"]], FIRST_SEED + 2 * task["seed"]
    problem, parents = PROBLEMS[entry.data](), []
    note("train")
    for number, part in enumerate(("a", "b")):
        torch.manual_seed(seed + number)
        parents.append(entry.build())
        train(entry, parents[-1], problem, part, seed + number, entry.steps)  # type: ignore[arg-type]
    note("merge")
    found = {}
    for share in SHARES:
        recipe = Recipe(fit=LeastSquares(own=share))
        merged = fxmerge.merge(parents[0], parents[1], recipe=recipe, loaders=problem.apart(), run=Run(progress=False))
        network = recalibrated(with_state_of(parents[0], merged), problem.calibration())
        scores = problem.evaluate([network])
        found[str(share)] = scores["per_task"], scores["joint"]
    note("done", found=found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}, of one seed")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), help="only these")
    parser.add_argument("--seeds", type=int, default=2, help="pairs of each network")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    options = parser.parse_args()
    names = options.networks or (SHORT if options.short else list(NETWORKS))
    if any(NETWORKS[name].data == "fashion" for name in names):
        images.check_installed()
    seeds = range(1 if options.short else options.seeds)
    tasks = [{"network": name, "seed": seed} for seed in seeds for name in names]
    rows = list(run_all(work, tasks, options.jobs, 3600, 6))
    done = [row for row in rows if "found" in row]
    print(next((row["machine"] for row in done), machine()))
    lines = []
    for name in [*names, "mean"]:
        own = [row["found"] for row in done if name in (row["network"], "mean")]
        cells = {str(s): " / ".join(f"{100 * mean(f[str(s)][i] for f in own):.1f}" for i in (0, 1)) for s in SHARES}
        lines.append({"network": name, **cells} if own else {"network": name})
    print("\nAccuracy in percent, per task / joint, by the share of a model's own outputs\n")
    print(table([line for line in lines if len(line) > 1]))
    for row in rows:
        if "failure" in row:
            print(f"{row['network']}, seed {row['seed']}: {row['failure']}")
    return int(len(done) < len(rows))


if __name__ == "__main__":
    sys.exit(main())
