"""What the fit of gains and shifts of norms is worth: merges with it, and with all of them left at the average.

Only those are fitted that no layer makes up for (`fxmerge.refitting.gains`), such as of group norms before a ReLU.

    python benchmarks/norms.py [--short] [--networks NAME ...] [--cache FOLDER] [--jobs 2] [--markdown FILE]

Parents are those of `benchmarks/tasks.py` in its setting `disjoint`, first pairs. Needs what that needs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from many import arguments, show, trained
from models.processes import Row
from tasks_suite import training
from tasks_suite.methods import with_state_of
from tasks_suite.suite import NETWORKS, PROBLEMS

import fxmerge
from fxmerge.demo import recalibrated
from fxmerge.refitting.layers import Layers

LONG = ("resnet20-1-gn", "resnet20-2-gn", "vit-fused", "vit-separate", "convnext", "mixer")
SHORT = ("digits-vgg-gn",)


def merged(network: str, cache: Path) -> tuple[str, int]:
    """The accuracy per task in percent, and how many layers were fitted."""
    problem = PROBLEMS[NETWORKS[network].data]()
    a, b = (training.load(parent, cache) for parent in training.parents_of(network, "disjoint", 0))
    batches = problem.calibration()
    found = fxmerge.merge(a, b, batches, run=fxmerge.Run(progress=False))
    judged = recalibrated(with_state_of(a, found), batches)
    return f"{100 * problem.evaluate([judged])['per_task']:.1f}", len(fxmerge.report(found).layers)


def compare(networks: Sequence[str], cache: Path) -> list[Row]:
    """The lines of the table."""
    rows: list[Row] = []
    for network in networks:
        with patch("fxmerge.refitting.refit.find_gains", lambda *_: Layers((), {})):
            before, layers = merged(network, cache)
        after, more = merged(network, cache)
        rows.append({"network": network, "norms": more - layers, "averaged": before, "fitted": after})
        print(rows[-1], flush=True)
    return rows


def main() -> int:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    networks = options.networks or (SHORT if options.short else LONG)
    with trained(options, [p for network in networks for p in training.parents_of(network, "disjoint", 0)]) as cache:
        rows = compare(networks, cache)
    show(options, "Accuracy per task in percent, gains and shifts averaged and fitted", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
