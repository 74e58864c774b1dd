"""Which refit is returned, or which parent in its place."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from fxmerge.merger import Merger, Outputs
from fxmerge.refitting.rivals import Refitted
from fxmerge.score import Score, judged

logger = logging.getLogger(__name__)

Told = dict[str, Any]
"""What is told of a network that was scored."""


def decide(
    mergers: Sequence[Merger], refits: Sequence[Refitted], score: Score | None
) -> tuple[int, Refitted, list[Told]]:
    """What is returned of several refits: that with the smallest error, or of all options that with the highest score.

    Of equal scores it is the first: merged networks, that with the smaller error first, come before the models as they
    are, and these before models with last layers refitted.

    Returns:
        The number of the refit, what it gives, and what is told of the scores.
    """
    if score is None:
        number = min(range(len(refits)), key=lambda n: _error(refits[n]))
        return number, refits[number], []
    found: dict[tuple[Any, ...], tuple[int, Refitted]] = {}
    for number, refitted in enumerate(refits):
        for option in refitted.options:
            own = (number,) if option.parent is None else ()  # Parents are the same beside every refit.
            found.setdefault((option.parent, bool(option.layers), *own), (number, option))
    options = sorted(found.values(), key=_rank)
    if len(options) == 1:
        return *options[0], []
    told = [_scored(score, mergers[number], option) for number, option in options]
    best = max(range(len(told)), key=lambda i: told[i]["score"])
    return *options[best], told


def _error(refitted: Refitted) -> tuple[bool, float]:
    """The error of the last layers; if these were not fitted, which comes after any that were, that of the outputs."""
    unfitted = math.isnan(refitted.error)
    error = refitted.errors.get(None, math.inf) if unfitted else refitted.error
    return unfitted, math.inf if math.isnan(error) else error


def _rank(option: tuple[int, Refitted]) -> tuple[float, ...]:
    refitted = option[1]
    if refitted.parent is None:
        return 0, *_error(refitted)
    return 2 if refitted.layers else 1, refitted.parent


def _scored(score: Score, merger: Merger, option: Refitted) -> Told:
    network, refitted = merger.finish(option.state, calibrate=False), bool(option.layers)
    if option.parent is None:
        name = "the merged network"
    else:
        name = merger.job.names[option.parent] + (" with its last layers refitted" if refitted else "")
    with merger.job.timed("scoring"):
        value = judged(score, network, name)
    return {"parent": option.parent, "refitted": refitted, "method": merger.plan.method, "score": value}


def warn_of_parent(name: str, refitted: Refitted, outputs: Outputs, scores: Sequence[Told]) -> None:
    """Logs that a model is returned in place of a merge."""
    if refitted.layers:
        how = "with its last layers refitted"
    else:
        how = "as it is" if outputs == "mean" else "with its outputs standardized"
    if scores:
        highest = max(one["score"] for one in scores)
        merged = max(one["score"] for one in scores if one["parent"] is None)
        logger.warning("%s is returned %s. Its score is %.6g, the merged network's %.6g.", name, how, highest, merged)
        return
    logger.warning(
        "%s is returned %s%s. Its %s miss %.3g of the square of all models' mean outputs, and those of the merged "
        "network %.3g. Pass or_parent=False for the merged network.",
        name,
        how,
        "" if refitted.layers else ", since the models answer alike",
        "outputs" if refitted.compared == "outputs" else "last layers, refitted,",
        refitted.errors[refitted.parent],
        refitted.errors[None],
    )
