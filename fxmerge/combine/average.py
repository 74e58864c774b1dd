"""One state dict from several: the weighted average of merged units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxmerge.shared import equal_names
from fxmerge.units.unit_map import UnitMap


def average(
    units: UnitMap,
    states: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    statistics: Sequence[tuple[str, str]],
    special: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Tensor]:
    """The weighted average of several models, in merged units.

    Arguments:
        units: where the units of the models go.
        states: state dicts with equal names and shapes.
        weights: one per state; they sum to one.
        statistics: names of running means and variances. A merged variance is that of all members together: the mean of
            their variances plus the variance of their means (law of total variance).
        special: other weights, for tensors by name.

    Returns:
        New tensors in the dtype of the first state; tensors that are not floating-point, or that are equal in all
        states and in which no units merge, are the first state's.
    """
    special, equal = special or {}, equal_names(states)
    merged = units.merge(states, weights, special)
    for mean, variance in statistics:
        if mean in equal and variance in equal and mean not in special:
            continue
        total = merged[mean].to(torch.promote_types(merged[mean].dtype, torch.float32))
        spread = []
        for m, state in enumerate(states):
            off = state[mean].to(total) - units.unmerge_tensor(mean, total, m)
            spread.append({variance: state[variance].to(total) + off**2})
        own = special.get(variance, weights)
        merged[variance] = units.merge_tensor(variance, spread, own).to(states[0][variance].dtype)
    return merged
