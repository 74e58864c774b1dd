"""Choosing alpha without labels: the candidate whose merge comes nearest to what its parents compute together.

The merges that are judged are those that could be returned, made of all calibration data. Judging others, made with
some data held out, hardly helped: from a part of the data the search ends elsewhere, and between neighbouring alphas
that matters as much as alpha. Nor does matching fit the data it sees as training would: it picks one element of
a finite group. `benchmarks/alpha.py` measures both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fxmerge.capture import Args, Kwargs
from fxmerge.compare import error_of, score_of
from fxmerge.program import Program
from fxmerge.run import Data, Runner

AUTO: Literal["auto"] = "auto"

Alpha = float | Mapping[str, float] | Literal["auto"]
"""One number for all classes, numbers for some classes by name, or `AUTO`."""

DEFAULT = 0.5
"""Where nothing says otherwise: of classes that are not named, and where no candidate is clearly better."""

CANDIDATES = (0.0, 0.25, 0.5, 0.75, 1.0)

MARGIN = 0.02
"""By what share the error of a candidate must be below that of `DEFAULT` to be preferred to it: smaller differences
are of where the searches happened to end. Anything up to 0.05 did about as well."""


def candidates_of(alpha: Alpha, names: Sequence[str]) -> tuple[float | dict[int, float], ...]:
    """What to match by: one alpha, or one for each class by its number; several of them if one is to be chosen.

    Example:
        >>> candidates_of({"0.weight[0]": 1}, ("0.weight[0]", "2.weight[0]"))
        ({0: 1, 1: 0.5},)
    """
    if isinstance(alpha, str):
        return CANDIDATES
    if isinstance(alpha, Mapping):
        return ({number: alpha.get(name, DEFAULT) for number, name in enumerate(names)},)
    return (alpha,)


def disagreement(
    program: Program,
    merged: Mapping[str, Tensor],
    parents: Sequence[Mapping[str, Tensor]],
    shares: Sequence[float],
    data: Data,
) -> float:
    """How far the outputs of a merged network are from the mean of its parents' outputs: the criterion for alpha.

    The mean squared difference, relative to the mean square of the target and averaged over the outputs.
    The target is what an ensemble answers. Where each parent knows only a task of its own, that is no good answer, but
    all merges miss it alike in what the parents disagree on, and the rest ranks them. Scale counts on purpose:
    a bad match makes outputs shrink, and with outputs standardised more accuracy was lost. Of the label-free
    criteria in `benchmarks/alpha.py` this was among the best, and it needs no idea of what the outputs mean.

    Arguments:
        program: the captured program.
        merged: the state dict to be judged.
        parents: state dicts of what was merged, in any order of their units.
        shares: how much each parent counts; they sum to one.
        data: calibration batches.

    Returns:
        0 for outputs equal to the target; infinite if they are not finite.
    """
    runner = Runner(program)
    errors: defaultdict[int, float] = defaultdict(float)
    sizes: defaultdict[int, float] = defaultdict(float)
    for args, kwargs in data.batches("choosing alpha"):
        own = _outputs(runner, merged, args, kwargs)
        each = [_outputs(runner, state, args, kwargs) for state in parents]
        for i, y in own.items():
            target = torch.stack([share * outputs[i] for share, outputs in zip(shares, each, strict=True)]).sum(0)
            errors[i] += float((y - target).square().sum(dtype=torch.float64))
            sizes[i] += float(target.square().sum(dtype=torch.float64))
    # An output that is zero throughout tells nothing.
    ratios = [errors[i] / size for i, size in sizes.items() if size != 0]
    mean = sum(ratios) / len(ratios) if ratios else 0.0
    return mean if math.isfinite(mean) else math.inf


def _outputs(runner: Runner, state: Mapping[str, Tensor], args: Args, kwargs: Kwargs) -> dict[int, Tensor]:
    """The outputs that are floating-point, by their place."""
    leaves = runner.outputs(state, args, kwargs)
    return {i: v.float() for i, v in enumerate(leaves) if isinstance(v, Tensor) and v.is_floating_point()}


def best(errors: Mapping[float, float]) -> float:
    """The candidate with the smallest error, if that is smaller than `DEFAULT`'s by `MARGIN`; else `DEFAULT`.

    Arguments:
        errors: the `disagreement` of every candidate's merge, `DEFAULT`'s among them.

    Example:
        >>> best({0.25: 0.40, 0.5: 0.60, 0.75: 0.41}), best({0.25: 0.59, 0.5: 0.60, 0.75: 0.7})
        (0.25, 0.5)
    """
    alpha = min(errors, key=lambda candidate: error_of(errors[candidate]))
    return alpha if error_of(errors[alpha]) < (1 - MARGIN) * error_of(errors[DEFAULT]) else DEFAULT


def highest(scores: Mapping[float, float]) -> float:
    """The candidate with the highest score, of equals `DEFAULT`.

    Example:
        >>> highest({0.25: 0.7, 0.5: 0.7, 0.75: 0.6}), highest({0.25: 0.7, 0.5: 0.6})
        (0.5, 0.25)
    """
    return max(scores, key=lambda candidate: (score_of(scores[candidate]), candidate == DEFAULT))
