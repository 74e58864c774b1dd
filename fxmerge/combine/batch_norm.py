"""BatchNorm statistics of a merged model: where they are, and how much each model counts in them without data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, fx

from fxmerge.program.captured import Program
from fxmerge.shared import computed_alike

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
        counter = pair[0][: len(pair[0]) - len(pair[0].rpartition(".")[2])] + "num_batches_tracked"
        seen = [w * float(state.get(counter, 0)) for w, state in zip(weights, states, strict=True)]
        if sum(seen) > 0:
            found |= {name: [n / sum(seen) for n in seen] for name in pair}
    return found


def statistics_nodes(program: Program) -> dict[tuple[str, str], list[fx.Node]]:
    """For every running mean and variance, by their names, the nodes that normalize by them."""
    found: dict[tuple[str, str], list[fx.Node]] = {}
    for node in program.graph.graph.nodes:
        if _normalizes(node):
            mean, variance = (program.sources[node.args[i]] for i in (_MEAN, _VARIANCE))
            if mean[0] == variance[0] == "parameter":
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
