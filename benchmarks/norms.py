"""What the fit of gains and shifts of norms is worth: merges with it, and with all of them left at the average.

Only those are fitted that are not read by fitted layers alone (`fxmerge.refitting.gains`), such as those of group norms
before a ReLU, and the factors of branches.

    python benchmarks/norms.py [--short] [--networks NAME ...] [--cache FOLDER] [--markdown FILE]

Parents are the first pairs of `benchmarks/heads.py`: each has learnt five classes, and keeps a head of its own.
Needs what that needs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from heads import accuracies, heads, train
from many import arguments, show
from models.processes import Row
from tasks_suite.images import ImageProblem
from tasks_suite.suite import NETWORKS, PROBLEMS
from tasks_suite.training import cache_folder

import fxmerge
from fxmerge.refitting.layers import Layers

LONG = ("resnet20-1-gn", "convnext", "mixer", "vit-fused", "vit-separate")
SHORT = ("digits-vgg-gn",)


def merged(network: str, cache: Path) -> tuple[str, int]:
    """The mean of the accuracies on both tasks in percent, and how many layers were fitted."""
    problem = PROBLEMS[NETWORKS[network].data]()
    assert isinstance(problem, ImageProblem)
    a, b = (train(network, task, 0, problem, cache) for task in range(2))
    recipe = fxmerge.Recipe(share="trunk")
    found = fxmerge.merge(a, b, problem.calibration(), recipe, run=fxmerge.Run(progress=False))
    return f"{50 * sum(accuracies(heads(found), problem)):.1f}", len(fxmerge.report(found).layers)


def compare(networks: Sequence[str], cache: Path) -> list[Row]:
    """The lines of the table."""
    rows: list[Row] = []
    for network in networks:
        with patch("fxmerge.refitting.selection.find_gains", lambda *_: Layers((), {})):
            before, layers = merged(network, cache)
        after, more = merged(network, cache)
        rows.append({"network": network, "fitted gains": more - layers, "averaged": before, "fitted": after})
        print(rows[-1], flush=True)
    return rows


def main() -> int:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    networks = options.networks or (SHORT if options.short else LONG)
    with cache_folder(options.cache, short=options.short) as cache:
        rows = compare(networks, cache)
    show(options, "Accuracy in percent, mean of both tasks, gains and shifts averaged and fitted", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
