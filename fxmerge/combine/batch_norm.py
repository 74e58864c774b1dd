"""BatchNorm statistics of a merged model: re-estimated over data, or pooled without any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxmerge.errors import LoaderError
from fxmerge.program.captured import Program
from fxmerge.program.run import Data, Runner
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


def alike(program: Program, names: tuple[str, str], nodes: Sequence[fx.Node], shared: Collection[str]) -> bool:
    """Whether statistics are shared, and of activations that depend on shared parameters alone."""
    if not set(names) <= set(shared):
        return False
    before = computed_alike(program, shared)
    return all(node.args[0] in before for node in nodes)


def _normalizes(node: fx.Node) -> bool:
    name = getattr(getattr(node.target, "_schema", None), "name", None)
    return name in _BATCH_NORM and all(isinstance(node.args[i], fx.Node) for i in (_MEAN, _VARIANCE))


class _Estimator(Runner):
    """Runs a model with the statistics of each batch, and keeps their cumulative average."""

    def __init__(self, program: Program, statistics: Mapping[str, Tensor], owner: Mapping[str, int]) -> None:
        super().__init__(program)
        self.statistics, self.owner = statistics, owner
        self.batch_of: int | None = None
        placeholders = program.graph.graph.find_nodes(op="placeholder")
        self.names = {n: name for n, (_, name) in zip(placeholders, self.sources, strict=True)}
        self.seen: Counter[str] = Counter()

    def run_node(self, n: fx.Node) -> Any:
        mean_name, variance_name = self._statistics_of(n)
        of = self.owner.get(mean_name)
        counts = None in (of, self.batch_of) or of == self.batch_of
        if mean_name not in self.statistics:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        x, weight, bias = args[:3]
        if x.numel() == x.shape[1]:
            raise LoaderError(
                f"BatchNorm statistics at graph node {n.name!r} cannot be estimated from a batch with one value per "
                f"channel (input shape {tuple(x.shape)}); use larger batches."
            )
        rows = x.numel() // x.shape[1] if counts else 0
        self.seen[mean_name] += rows
        y = functional.batch_norm(
            x,
            self.statistics[mean_name],
            self.statistics[variance_name],
            weight,
            bias,
            training=True,
            momentum=rows / max(self.seen[mean_name], 1),
            eps=next(a for a in reversed(args) if type(a) is float),
        )
        return (y, *(x.new_empty(0),) * 2) if isinstance(n.meta["val"], (tuple, list)) else y

    def _statistics_of(self, n: fx.Node) -> tuple[str, str]:
        if not _normalizes(n):
            return "", ""
        mean, variance = n.args[_MEAN], n.args[_VARIANCE]
        assert isinstance(mean, fx.Node) and isinstance(variance, fx.Node)
        return self.names.get(mean, ""), self.names.get(variance, "")


def recalibrate(
    module: nn.Module,
    program: Program,
    data: Data,
    shared: Collection[str] = (),
    owner: Mapping[str, int] | None = None,
) -> int:
    """Re-estimates the BatchNorm statistics of a module over a loader, in place.

    All layers together, as cumulative averages over the batches of each batch's mean and unbiased
    variance, in which a batch counts as its values per channel do; the rest of the model stays in eval mode.

    Arguments:
        module: a module with the parameter names of `program`; its running statistics are overwritten.
        program: the captured program that the module computes.
        data: calibration batches.
        shared: names of tensors that are equal in all models. Statistics among them stay, if all parameters before
            them are, too.
        owner: for statistics that are of one model alone, its number: of data that are of one model, they count its
            own only.

    Returns:
        The number of layers re-estimated; 0 if the model has none, in which case no data is read.
    """
    names = statistics_nodes(program)
    names = {pair: nodes for pair, nodes in names.items() if not alike(program, pair, nodes, shared)}
    if not names:
        return 0
    state = module.state_dict()
    statistics = {n: torch.zeros_like(state[n]) for pair in names for n in pair}
    estimator = _Estimator(program, statistics, owner or {})
    for estimator.batch_of, (args, kwargs) in data.owned("BatchNorm statistics"):
        estimator.call(state, args, kwargs)
    if not estimator.seen:
        raise LoaderError("The loader is empty: it gave no batch. Pass an iterable that can be iterated several times.")
    with torch.no_grad():
        for name, value in statistics.items():
            state[name].copy_(value)
    return len(names)
