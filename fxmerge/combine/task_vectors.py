"""One state dict from a base and models fine-tuned from it, aligned to it: the base plus their combined task vectors.

A task vector is what fine-tuning added to the parameters: those of the model minus those of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fxmerge.combine.average import average
from fxmerge.recipe import TaskArithmetic, Ties
from fxmerge.units.unit_map import UnitMap

State = Mapping[str, Tensor]
Statistics = Sequence[tuple[str, str]]


def combine_task_vectors(
    part: TaskArithmetic | Ties, base: State, states: Sequence[State], weights: Sequence[float], at: Statistics
) -> dict[str, Tensor]:
    """The base plus the task vectors, combined as a part of a recipe says; arguments as for `task_arithmetic`."""
    if isinstance(part, TaskArithmetic):
        return task_arithmetic(base, states, weights, at, scale=part.scale)
    return ties(base, states, weights, at, density=part.density, scale=part.scale)


def task_arithmetic(
    base: State, states: Sequence[State], weights: Sequence[float], statistics: Statistics, *, scale: float
) -> dict[str, Tensor]:
    """The base plus `scale` times the sum of the task vectors (arXiv 2212.04089, section 2).

    Arguments:
        base: the state dict of the base.
        states: state dicts of the fine-tuned models, with the names and shapes of `base`, in its units.
        weights: one per state; they sum to one. Each task vector counts `len(states)` times its weight, so that
            with equal weights the sum is the paper's.
        statistics: names of running means and variances, which are pooled over `states` instead.
        scale: the paper's lambda.

    Returns:
        New tensors in the dtypes of `base`; tensors that are not floating-point are the base's.

    Example:
        >>> base, one, two = ({"w": torch.tensor(w)} for w in ([1.0, 1.0], [2.0, 1.0], [3.0, 0.0]))
        >>> task_arithmetic(base, [one, two], [0.5, 0.5], [], scale=0.5)
        {'w': tensor([2.5000, 0.5000])}
    """

    def total(vectors: Tensor) -> Tensor:
        factors = _column([w * len(states) for w in weights], vectors)
        return scale * (factors * vectors).sum(0)

    return _moved(base, states, weights, statistics, total)


def ties(
    base: State,
    states: Sequence[State],
    weights: Sequence[float],
    statistics: Statistics,
    *,
    density: float,
    scale: float,
) -> dict[str, Tensor]:
    """The base plus `scale` times the task vectors, trimmed and merged by sign (arXiv 2306.01708, algorithm 1).

    Of all entries of a task vector together, `round(density * entries)` of largest magnitude are kept, at least
    one. As many magnitudes as equal the smallest of these are kept too, so that the choice does not depend on
    the order of units. Of every entry the sign of the weighted sum is elected, and the result is the weighted
    mean of the kept values of that sign; it is zero where the sum is zero. Entries of tied parameters count once.

    Arguments and result are those of `task_arithmetic`; with equal weights, sum and mean are the paper's.

    Example:
        >>> base, one, two = ({"w": torch.tensor(w)} for w in ([1.0, 1.0, 1.0], [4.0, 3.0, 1.5], [3.0, 0.0, 0.0]))
        >>> ties(base, [one, two], [0.5, 0.5], [], density=0.67, scale=1.0)
        {'w': tensor([3.5000, 3.0000, 0.0000])}
    """
    names = _untied(base, {name for pair in statistics for name in pair})
    least = [_least_kept(base, state, names, density) for state in states]

    def merged(vectors: Tensor) -> Tensor:
        # Only ratios matter; equal weights become exactly one, so that they cannot blur a sum that is zero.
        factors = _column([w / max(weights) for w in weights], vectors)
        kept = torch.where(vectors.abs() >= _column(least, vectors), vectors, 0.0)
        elected = (factors * kept).sum(0).sign()
        counted = factors * ((kept.sign() == elected) & (kept != 0))
        count = counted.sum(0)
        return scale * torch.where(count > 0, (counted * kept).sum(0) / count, 0.0)

    return _moved(base, states, weights, statistics, merged)


def _moved(
    base: State,
    states: Sequence[State],
    weights: Sequence[float],
    statistics: Statistics,
    combine: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """The base plus, for every parameter, what `combine` makes of its task vectors, shape (models, *parameter)."""
    apart = [name for pair in statistics for name in pair]
    still = UnitMap.still(len(states))
    pooled = average(still, [{name: state[name] for name in apart} for state in states], weights, statistics)
    moved = {}
    for name, tensor in base.items():
        if name in pooled:
            moved[name] = pooled[name].to(tensor.dtype)
        elif not (tensor.is_floating_point() or tensor.is_complex()):
            moved[name] = tensor.clone()
        else:
            origin = _reals(tensor)
            total = origin + combine(torch.stack([_reals(state[name]) - origin for state in states]))
            whole = torch.view_as_complex(total.contiguous()) if tensor.is_complex() else total
            moved[name] = whole.to(tensor.dtype)
    return moved


def _reals(tensor: Tensor) -> Tensor:
    """The entries at least in float32; complex ones as pairs, because only real numbers have a sign."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return torch.view_as_real(wide.resolve_conj()) if wide.is_complex() else wide


def _column(values: Sequence[float], vectors: Tensor) -> Tensor:
    """One value for each model, to be broadcast over its task vector."""
    return torch.tensor(values, dtype=vectors.dtype, device=vectors.device).reshape(-1, *[1] * (vectors.ndim - 1))


def _untied(base: State, apart: set[str]) -> list[str]:
    """The first name of every parameter, but for those set apart."""
    first: dict[object, str] = {}
    for name, tensor in base.items():
        if name not in apart and (tensor.is_floating_point() or tensor.is_complex()):
            first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), name)
    return list(first.values())


def _least_kept(base: State, state: State, names: Sequence[str], density: float) -> float:
    """The smallest magnitude that is kept of a task vector."""
    magnitudes = [(_reals(state[name]) - _reals(base[name])).abs().reshape(-1) for name in names]
    entries = sum(len(m) for m in magnitudes)
    if not entries:
        return 0.0
    keep = max(1, round(density * entries))
    return float(torch.cat(magnitudes).kthvalue(entries - keep + 1).values)
