"""Units that are chosen more often than others count more where they become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxmerge.units.layout import along_axis
from fxmerge.units.unit_map import UnitMap


def by_usage(
    units: UnitMap, states: Sequence[Mapping[str, Tensor]], counts: Mapping[int, Sequence[Tensor]]
) -> Sequence[Mapping[str, Tensor]]:
    """Scales units of several models, so that the mean of those that become one is their mean by usage.

    This is the frequency-weighted merging of MC-SMoE (arXiv 2310.01334). Where none of the units that become one was
    chosen, all count alike.

    Arguments:
        units: where the units go.
        states: state dicts, one for every model.
        counts: how often units of some classes were chosen, as `fxmerge.evidence.usage` tells it.

    Returns:
        The state dicts, with other values of floating-point parameters along axes that produce these units.

    Example:
        >>> import numpy as np
        >>> from fxmerge.units.layout import AxisLayout
        >>> rows = AxisLayout("weight", (), (2, 1), 0, (0,), np.arange(2), ((0, np.arange(2)),))
        >>> both = UnitMap(("weight[0]",), (rows,), frozenset(), ((np.array([0, 0]),),), (1,))
        >>> state = {"weight": torch.tensor([[1.0], [5.0]])}
        >>> both.merge(by_usage(both, [state], {0: [torch.tensor([3.0, 1.0])]}))["weight"]
        tensor([[2.]])
    """
    if not counts:
        return list(states)
    scaled = [dict(state) for state in states]
    for n, times in counts.items():
        goals = [torch.from_numpy(own[n]) for own in units.maps]
        goal, total = torch.cat(goals), torch.cat(list(times))
        members = torch.bincount(goal, minlength=units.widths[n])
        chosen = torch.zeros(units.widths[n], dtype=total.dtype).index_add_(0, goal, total)
        for state, own, to in zip(scaled, times, goals, strict=True):
            factor = torch.where(chosen[to] > 0, own * members[to] / chosen[to], 1.0)
            for axis in (axis for axis in units.layout if n in axis.classes):
                if state[axis.parameter].is_floating_point() and (axis.parameter, axis.dim) not in units.consumed:
                    along = torch.ones(len(axis.index), dtype=factor.dtype)
                    for slots in (slots for number, slots in axis.roles if number == n):
                        along[torch.from_numpy(slots)] = factor
                    value = state[axis.parameter]
                    along = along_axis(along[torch.from_numpy(axis.slot)], axis)
                    wide = torch.promote_types(value.dtype, torch.float32)
                    names = axis.parameter, *axis.aliases
                    state.update(dict.fromkeys(names, value * along.to(value.device, wide)))
    return scaled
