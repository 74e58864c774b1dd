"""BatchNorm statistics of a merged model: where they are, and how much each model counts in them without data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, fx

from fxmerge.program.captured import Program
from fxmerge.shared import computed_alike, equal_names

_BATCH_NORM = ("aten::_native_batch_norm_legit_no_training", "aten::batch_norm")
_MEAN, _VARIANCE = 3, 4


def batch_norm_statistics(program: Program) -> list[tuple[str, str]]:
    """Names of the running mean and variance of every normalization by running statistics."""
    return list(statistics_nodes(program))


def by_batches_seen(
    statistics: Sequence[tuple[str, str]], states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, list[float]]:
    """How much each model counts in running statistics: by its weight and by how many batches it has seen.

    Arguments:
        statistics: names of running means and variances.
        states: the models.
        weights: of the models.

    Returns:
        Weights that sum to one, by the names of the statistics whose layers count batches.

    Example:
        >>> import torch
        >>> one, two = ({"num_batches_tracked": torch.tensor(count)} for count in (30, 10))
        >>> by_batches_seen([("running_mean", "running_var")], [one, two], [0.5, 0.5])
        {'running_mean': [0.75, 0.25], 'running_var': [0.75, 0.25]}
    """
    found: dict[str, list[float]] = {}
    for pair in statistics:
        counter = _counter(pair[0])
        seen = [w * float(state.get(counter, 0)) for w, state in zip(weights, states, strict=True)]
        if sum(seen) > 0:
            found |= {name: [n / sum(seen) for n in seen] for name in pair}
    return found


def batches_seen(
    statistics: Sequence[tuple[str, str]],
    states: Sequence[Mapping[str, Tensor]],
    owner: Mapping[str, int],
    aliases: Mapping[str, str],
) -> dict[str, Tensor]:
    """How many batches merged running statistics are of: those of all models together, so that they count that much
    where they are pooled or averaged again. Statistics and counts that all models have are of the same batches.

    Arguments:
        statistics: names of running means and variances.
        states: the models, in units that match.
        owner: for tensors that are of one model alone, its number.
        aliases: for every name of a tensor, the one by which `statistics` call it.

    Returns:
        New counts, in the dtype of the first model's, by their names.

    Example:
        >>> import torch
        >>> one, two = ({"num_batches_tracked": torch.tensor(n), "m": torch.tensor([1.0 * n])} for n in (30, 10))
        >>> batches_seen([("m", "m")], [one, two], {}, {"m": "m"})
        {'num_batches_tracked': tensor(40)}
    """
    found: dict[str, Tensor] = {}
    for mean, variance in statistics:
        counters = [c for name, first in aliases.items() if first == mean and (c := _counter(name)) in states[0]]
        if not counters:
            continue
        counts = [state[counters[0]] for state in states]
        same = equal_names([{n: state[n] for n in (mean, variance, counters[0])} for state in states])
        if counters[0] in owner:
            total = counts[owner[counters[0]]].clone()
        elif len(same) == len({mean, variance, counters[0]}):
            total = counts[0].clone()
        else:
            total = torch.stack([count.to(counts[0]) for count in counts]).sum(0).to(counts[0].dtype)
        found |= dict.fromkeys(counters, total)
    return found


def _counter(mean: str) -> str:
    """The name that torch gives to the count of batches beside a running mean."""
    return mean[: len(mean) - len(mean.rpartition(".")[2])] + "num_batches_tracked"


def statistics_nodes(program: Program) -> dict[tuple[str, str], list[fx.Node]]:
    """For every running mean and variance, by their names, the nodes that normalize by them."""
    found: dict[tuple[str, str], list[fx.Node]] = {}
    for node in program.graph.graph.nodes:
        if _normalizes(node):
            mean, variance = (program.sources.get(node.args[i], ("", "")) for i in (_MEAN, _VARIANCE))
            if mean[0] == variance[0] == "parameter":  # Others are computed: nothing is estimated anew.
                found.setdefault((mean[1], variance[1]), []).append(node)
    return found


def alike(program: Program, names: tuple[str, str], nodes: Sequence[fx.Node], agreed: Collection[str]) -> bool:
    """Whether statistics are equal in all models, and of activations that depend on parameters alone that are, too."""
    if not set(names) <= set(agreed):
        return False
    before = computed_alike(program, agreed)
    return all(node.args[0] in before for node in nodes)


def _normalizes(node: fx.Node) -> bool:
    name = getattr(getattr(node.target, "_schema", None), "name", None)
    return name in _BATCH_NORM and all(isinstance(node.args[i], fx.Node) for i in (_MEAN, _VARIANCE))
