"""How much rows that are looked up count in the fit of a tied embedding (`fxmerge.refitting.tied.LOOKUPS`).

The constant is chosen here, on `llama-tied`, a network that no other benchmark reports: for each value, two pairs are
merged by the default recipe, by permutations and by changes of basis, and the squared errors of the outputs are told,
relative to what is learnt.

    python benchmarks/tied.py [--short] [--cache FOLDER] [--markdown FILE]

It takes about ten minutes. `--short` tries two values on networks that have learnt nothing.
Needs what `benchmarks/kinds.py` needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from invariance import machine, table
from models.processes import Row
from tasks_suite import training
from tasks_suite.suite import NETWORKS, PROBLEMS
from torch import nn

import fxmerge
from fxmerge import Recipe, Run, Zip

NETWORK = "llama-tied"
VALUES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
SETTINGS = ("disjoint", "same")

TIME = 1800
"""Seconds for the training of each parent."""


def errors(setting: str, continuous: bool, pair: Iterable[nn.Module], values: Sequence[float]) -> Row:
    """A line of the table: the error of the outputs for every value."""
    problem = PROBLEMS[NETWORKS[NETWORK].data]()
    a, b = pair
    row: Row = {"setting": setting, "match": "bases" if continuous else "permutations"}
    for value in values:
        with patch("fxmerge.refitting.tied.LOOKUPS", value):
            recipe = Recipe(match=Zip(continuous=continuous))
            merged = fxmerge.merge(a, b, problem.calibration(), recipe, run=Run(progress=False))
        row[str(value)] = f"{fxmerge.report(merged).errors['merged']:.4f}"
    print(row, flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="networks that have learnt nothing")
    parser.add_argument("--cache", type=Path, default=training.default_cache(), help="folder of trained parents")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    if options.short:
        untrained = [training.build(NETWORK, seed).eval() for seed in range(2)]
        rows = [errors("untrained", False, untrained, VALUES[:2])]
    else:
        rows = [
            errors(setting, continuous, pair, VALUES)
            for setting, pair in training.first_pairs(NETWORK, SETTINGS, options.cache, TIME).items()
            for continuous in (False, True)
        ]
    text = table(rows)
    print(text)
    if options.markdown is not None:
        options.markdown.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
