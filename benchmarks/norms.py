"""Whether the gains and shifts of norms are better fitted, or left at the average of the models'.

What a norm gives is linear in its gain and shift, so that they could be layers like any other: here a form for layer
and group norm is added to those of `fxmerge.program.forms`, and merges with and without it are compared.

    python benchmarks/norms.py [--short] [--networks NAME ...] [--cache FOLDER] [--jobs 2] [--markdown FILE]

Parents are those of `benchmarks/tasks.py` in its setting `disjoint`, first pairs. Needs what that needs.
"""

from __future__ import annotations

import string
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from many import arguments, show, trained
from models.processes import Row
from tasks_suite import training
from tasks_suite.methods import with_state_of
from tasks_suite.suite import NETWORKS, PROBLEMS
from torch import Tensor
from torch.nn import functional

import fxmerge
from fxmerge.demo import recalibrated
from fxmerge.program.forms import Arguments, Form, form

LONG = ("resnet20-1-gn", "resnet20-2-gn", "vit-fused", "vit-separate", "convnext", "mixer")
SHORT = ("digits-vgg-gn",)


def group_norm(call: Arguments) -> Form | None:
    """One coefficient and one shift for each channel, dimension 1."""

    def normalized(x: Tensor, call: Arguments) -> Tensor:
        return functional.group_norm(x, call["num_groups"], eps=call["eps"])

    places = string.ascii_lowercase[: call["input"].ndim - 1]
    term = f"{places[0]}C{places[1:]}"
    return Form(("input", "weight"), (term, "C", term), "bias", "C", {"input": normalized})


def layer_norm(call: Arguments) -> Form | None:
    """One coefficient and one shift for each entry of the last dimension."""
    if len(call["normalized_shape"]) != 1:
        return None

    def normalized(x: Tensor, call: Arguments) -> Tensor:
        return functional.layer_norm(x, call["normalized_shape"], eps=call["eps"])

    term = string.ascii_lowercase[: call["input"].ndim - 1] + "C"
    return Form(("input", "weight"), (term, "C", term), "bias", "C", {"input": normalized})


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
    averaged = {network: merged(network, cache) for network in networks}
    form("group_norm")(group_norm)
    form("layer_norm")(layer_norm)
    rows: list[Row] = []
    for network, (before, layers) in averaged.items():
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
