"""Streams of several networks in the principal directions of all: the stage after they are in one basis."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations_with_replacement

from torch import Tensor

from fxmerge.bases import mixing
from fxmerge.matching.principal import joint_directions
from fxmerge.prepared import Prepared
from fxmerge.recipe import Average, Recipe
from fxmerge.symmetry.flow import Flow
from fxmerge.symmetry.truncation import Projection
from fxmerge.units.kind import Kind

logger = logging.getLogger(__name__)

LARGEST = 16_384
"""Of how many units of all models together principal directions are looked for: of more, the products alone take more
than 2 GiB."""


def joined(group: Prepared, recipe: Recipe, weights: Sequence[float]) -> Prepared:
    """Models with, for each of them, how its streams go into the directions in which most of all streams is left.

    A stream is a class that orthogonal matrices mix, and that lies in no blocks. Where there are no data, or a model
    does not count, streams stay as they were matched.

    Arguments:
        group: the models, in one basis.
        recipe: whose `match` is a `Zip`.
        weights: how much each model counts; their sum is one.
    """
    job, symmetry = group.job, group.unfrozen
    if symmetry is None or job.data is None or not isinstance(recipe.combine, Average) or min(weights) == 0:
        return group
    seen = {n for output in symmetry.free for n in output.classes.tolist()}
    streams = [
        n
        for n in sorted(mixing(symmetry) - seen)
        if symmetry.kind(n) in (Kind.CENTRED, Kind.ORTHOGONAL)
        and not symmetry.units[n].parents
        and len(symmetry.by_block(n)) == 1
    ]
    large = [n for n in streams if len(job.states) * symmetry.units[n].size > LARGEST]
    if large:
        names = ", ".join(repr(symmetry.names[n]) for n in large)
        logger.info("%s: directions that were matched are averaged; principal ones of so many would take long", names)
    streams = [n for n in streams if n not in large]
    if not streams:
        return group
    pairs = list(combinations_with_replacement(range(len(job.states)), 2))
    shown = group.similarities(symmetry, job.states, job.names, pairs, "cosine", streams)
    matrices: list[dict[int, Tensor]] = [{} for _ in job.states]
    with job.timed("matching bases"):
        for n in (n for n in streams if n in shown):
            for own, matrix in zip(matrices, joint_directions(shown[n], weights, symmetry.kind(n)), strict=True):
                own[n] = matrix
    consumed = frozenset(axis for axis, kind in group.flow.items() if kind is Flow.CONSUMES)
    return replace(group, projections=tuple(Projection(symmetry, consumed, own) for own in matrices if own))
