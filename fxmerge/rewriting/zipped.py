"""One state dict from several whose units are merged with each other: means of producers, sums of consumers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxmerge.rewriting.combine import average
from fxmerge.symmetry.flow import Flow
from fxmerge.symmetry.permutation import AxisLayout, add_axis, along_axis
from fxmerge.symmetry.propagate import Axis
from fxmerge.symmetry.units import Ids

Labels = Sequence[Sequence[Ids]]
"""For every model and class, the merged unit that each unit goes into."""


def zip_average(
    states: Sequence[Mapping[str, Tensor]],
    labels: Labels,
    layout: Sequence[AxisLayout],
    flow: Mapping[Axis, Flow],
    weights: Sequence[float],
    statistics: Sequence[tuple[str, str]],
) -> dict[str, Tensor]:
    """Merges the units of several models, which lie in blocks that are aligned already.

    Along axes that produce units, a merged unit is the weighted mean of its members of all models; along axes
    that consume them, the sum of its members of each model, of which the mean over the models is taken
    (the merge and unmerge matrices of ZipIt!, arXiv 2305.03053, equation 4).

    Arguments:
        states: state dicts with equal names and shapes.
        labels: for every model and class, the merged unit of each unit.
        layout: where the units lie on the parameters, rows before what lies apart by rows.
        flow: which axes consume.
        weights: one per state; they sum to one.
        statistics: names of running means and variances, which are merged as moments.

    Returns:
        New tensors in the dtype of the first state.
    """
    merged = average(states, weights, statistics)
    wide = [dict(s) for s in states]
    for mean, variance in statistics:
        for s in wide:
            s[variance] = s[variance] + s[mean].to(s[variance].dtype) ** 2
    by_name: dict[str, list[AxisLayout]] = {}
    for axis in layout:
        by_name.setdefault(axis.parameter, []).insert(0, axis)
    for name, axes in by_name.items():
        if not states[0][name].is_floating_point():
            continue
        total, counts = torch.zeros(()), torch.zeros(())
        for s, own, weight in zip(wide, labels, weights, strict=True):
            x = s[name].to(torch.promote_types(s[name].dtype, torch.float32)) * weight
            count = torch.full((), weight, dtype=x.dtype, device=x.device)
            for axis in axes:
                target = axis.target(own)
                x = add_axis(x, axis, target)
                if flow[name, axis.dim] is not Flow.CONSUMES:
                    ones = torch.ones((), dtype=x.dtype, device=x.device).expand(axis.slot.shape)
                    count = count * along_axis(_added(ones, axis, target), axis)
            total, counts = total.to(x) + x, counts.to(x) + count
        merged[name] = torch.where(counts > 0, total / counts, 0.0).to(states[0][name].dtype)
        for alias in axes[0].aliases:
            merged[alias] = merged[name]
    for mean, variance in statistics:
        if variance in by_name:
            merged[variance] = (merged[variance] - merged[mean].to(merged[variance].dtype) ** 2).clamp(min=0)
    return merged


def _added(values: Tensor, axis: AxisLayout, target: Ids) -> Tensor:
    """`add_axis` of one number for every entry of `axis.slot`."""
    dim = axis.dims.index(axis.dim)
    index = torch.from_numpy(target).to(values.device)
    return torch.zeros_like(values).scatter_add_(dim, index, values.contiguous())
