"""One state dict from several whose units are merged with each other: means of producers, sums of consumers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fxmerge.rewriting.combine import average
from fxmerge.shared import equal_names
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
    apart = {n for own in labels for n, unit in enumerate(own) if not np.array_equal(unit, np.arange(len(unit)))}
    equal, added = equal_names(states), set()
    equal -= {variance for mean, variance in statistics if mean not in equal}
    for name, axes in _by_name(layout).items():
        still = name in equal and apart.isdisjoint(n for axis in axes for n, _ in axis.roles)
        if still or not states[0][name].is_floating_point():
            continue
        added.add(name)
        total, counts = torch.zeros(()), torch.zeros(())
        for s, own, weight in zip(wide, labels, weights, strict=True):
            x, count = _added(s[name], axes, own, flow)
            total, counts = total.to(x) + weight * x, counts.to(x) + weight * count
        merged[name] = torch.where(counts > 0, total / counts, 0.0).to(states[0][name].dtype)
        for alias in axes[0].aliases:
            merged[alias] = merged[name]
    for mean, variance in statistics:
        if variance in added:
            merged[variance] = (merged[variance] - merged[mean].to(merged[variance].dtype) ** 2).clamp(min=0)
    return merged


def produced(
    state: Mapping[str, Tensor], labels: Sequence[Ids], layout: Sequence[AxisLayout], flow: Mapping[Axis, Flow]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One model, zipped only along the axes that produce units: its layers then give sums over the members of the
    merged units, from inputs in units of the model's own.

    Returns:
        The state dict, and for every parameter that it changes the number of members that each entry is a sum of.
    """
    sums, counts = dict(state), {}
    for name, axes in _by_name(layout).items():
        if state[name].is_floating_point():
            producing = [axis for axis in axes if flow[name, axis.dim] is not Flow.CONSUMES]
            sums[name], count = _added(state[name], producing, labels, flow)
            counts[name] = count.expand(state[name].shape)
    return sums, counts


def _by_name(layout: Sequence[AxisLayout]) -> dict[str, list[AxisLayout]]:
    """The axes of every parameter, what lies apart by rows before the rows."""
    found: dict[str, list[AxisLayout]] = {}
    for axis in layout:
        found.setdefault(axis.parameter, []).insert(0, axis)
    return found


def _added(
    x: Tensor, axes: Sequence[AxisLayout], labels: Sequence[Ids], flow: Mapping[Axis, Flow]
) -> tuple[Tensor, Tensor]:
    """A parameter with the members of each merged unit added up along some axes, and how many members of axes that
    produce each entry is a sum of."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    count = torch.ones((), dtype=x.dtype, device=x.device)
    for axis in axes:
        target = axis.target(labels)
        x = add_axis(x, axis, target)
        if flow[axis.parameter, axis.dim] is not Flow.CONSUMES:
            count = count * along_axis(_counted(count.new_ones(axis.slot.shape), axis, target), axis)
    return x, count


def _counted(ones: Tensor, axis: AxisLayout, target: Ids) -> Tensor:
    """`add_axis` of one for every entry of `axis.slot`."""
    dim = axis.dims.index(axis.dim)
    return torch.zeros_like(ones).scatter_add_(dim, torch.from_numpy(target).to(ones.device), ones)
