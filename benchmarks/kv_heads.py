"""From multi-head to grouped-query attention: key/value heads of trained networks folded, beside their mean pooling.

The rows of `compression.py --kv-heads`. Grouped-query attention (arXiv 2305.13245) shares one head of keys and values
among several heads of queries; that paper converts a network by the mean of the keys and values of neighbouring heads,
and trains it further. `fxmerge.fold` chooses which heads to merge, brings their dimensions into one order, and fits
layers to what the network computes. Both are measured with and without that fit, on the same data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from unittest import mock

import numpy as np
from heads import QUIET
from torch import Tensor, nn

import fxmerge
import fxmerge.kv_heads
from fxmerge.matching.assignment import descendants
from fxmerge.matching.zip_search import ZipProblem
from fxmerge.recipe import Zip
from fxmerge.units.layout import Ids

NETWORKS = ("gpt", "llama", "vit-separate")
SHORT = ("digits-vit",)
WIDTHS = (0.5, 0.25)


def converted(
    model: nn.Module, batches: Sequence[Tensor], width: float, *, matched: bool, fitted: bool, bases: bool = False
) -> nn.Module:
    """A network with fewer key/value heads.

    Arguments:
        model: the network.
        batches: unlabelled inputs.
        width: the share of the heads that is left.
        matched: whether heads that are alike are merged; else neighbours are, with their dimensions as they are.
        fitted: whether layers are fitted to what the network computes.
        bases: whether the dimensions of heads are matched by changes of basis, and not in their order only.
    """
    recipe = fxmerge.Recipe(match=Zip(continuous=bases), fit="auto" if fitted else None)
    with nullcontext() if matched else _in_their_order():
        return fxmerge.fold(model, batches, {"kv heads of *": width}, recipe, run=QUIET)


def _in_their_order() -> AbstractContextManager[object]:
    """Leaves heads, and what lies in them, in the order that they have."""

    def as_they_are(problem: ZipProblem, number: int, *_: object) -> dict[int, Ids]:
        units = problem.symmetry.units
        return {n: np.arange(units[n].size) for n in descendants(problem.symmetry, number)}

    return mock.patch.object(fxmerge.kv_heads, "neighbours", as_they_are)


def methods(model: nn.Module, batches: Sequence[Tensor], width: float) -> dict[str, Callable[[], nn.Module]]:
    """What makes a network with fewer key/value heads, by the names of rows."""
    make = partial(converted, model, batches, width)
    return {
        "fold, bases matched": partial(make, matched=True, fitted=True, bases=True),
        "fold, bases matched, no fit": partial(make, matched=True, fitted=False, bases=True),
        "fold": partial(make, matched=True, fitted=True),
        "fold, no fit": partial(make, matched=True, fitted=False),
        "mean of neighbours, the same fit": partial(make, matched=False, fitted=True),
        "mean of neighbours": partial(make, matched=False, fitted=False),
    }
