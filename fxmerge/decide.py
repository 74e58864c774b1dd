"""Which refit is returned, or which parent in its place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fxmerge.compare import error_of, score_of
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
    errors = [error_of(error) for error in errors_of(refits)]
    if score is None:
        number = errors.index(min(errors))
        return number, refits[number], []
    found: dict[tuple[Any, ...], tuple[int, Refitted]] = {}
    for number, refitted in enumerate(refits):
        for option in refitted.options:
            own = (number,) if option.parent is None else ()  # Parents are the same beside every refit.
            found.setdefault((option.parent, bool(option.layers), *own), (number, option))
    options = sorted(found.values(), key=lambda option: _rank(option[1], errors[option[0]]))
    if len(options) == 1:
        return *options[0], []
    told = [_scored(score, mergers[number], option) for number, option in options]
    best = max(range(len(told)), key=lambda i: score_of(told[i]["score"]))
    return *options[best], told


def errors_of(refits: Sequence[Refitted]) -> list[float]:
    """The errors by which merged networks are told apart: of outputs, if all were compared by these, else of last
    layers, NaN where these were not fitted."""
    by_outputs = all(refitted.compared == "outputs" for refitted in refits)
    return [refitted.errors[None] if by_outputs else refitted.error for refitted in refits]


def _rank(option: Refitted, error: float) -> tuple[int, float]:
    if option.parent is None:
        return 0, error
    return 2 if option.layers else 1, option.parent


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
        highest = max(score_of(one["score"]) for one in scores)
        merged = max(score_of(one["score"]) for one in scores if one["parent"] is None)
        logger.warning("%s is returned %s. Its score is %.6g, the merged network's %.6g.", name, how, highest, merged)
        return
    logger.warning(
        "%s is returned %s%s. Its %s miss %.3g of the square of all models' mean outputs, and those of the merged "
        "network %.3g%s. Pass or_parent=False for the merged network.",
        name,
        how,
        ", since the models answer alike" if refitted.alike else "",
        "outputs" if refitted.compared == "outputs" else "last layers, refitted,",
        refitted.errors[refitted.parent],
        refitted.errors[None],
        ", which is more than half of that" if refitted.alike else "",
    )
