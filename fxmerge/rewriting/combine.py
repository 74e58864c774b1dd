"""One state dict from several, aligned: the weighted average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxmerge.rewriting.calibrate import pool
from fxmerge.shared import equal_names


def average(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float], statistics: Sequence[tuple[str, str]]
) -> dict[str, Tensor]:
    """The weighted average of aligned models.

    Arguments:
        states: state dicts with equal names and shapes.
        weights: one per state; they sum to one.
        statistics: names of running means and variances, which are pooled as moments instead.

    Returns:
        New tensors in the dtype of the first state; tensors that are not floating-point, or that are equal in all
        states, are the first state's.
    """
    merged, equal = {}, equal_names(states)
    for name, tensor in states[0].items():
        if name in equal or not (tensor.is_floating_point() or tensor.is_complex()):
            merged[name] = tensor.clone()
            continue
        wide = torch.promote_types(tensor.dtype, torch.float32)
        total = torch.stack([w * s[name].to(wide) for w, s in zip(weights, states, strict=True)]).sum(0)
        merged[name] = total.to(tensor.dtype)
    for mean, variance in statistics:
        if mean in equal and variance in equal:
            continue
        pooled = pool([s[mean] for s in states], [s[variance] for s in states], weights)
        merged[mean], merged[variance] = (p.to(states[0][mean].dtype) for p in pooled)
    return merged
