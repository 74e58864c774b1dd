"""torch-pruning: the groups of its dependency graph, read as permutation classes.

A group lists, for every channel of its root layer, the indices on other layers that have to be pruned with it.
What has to be pruned together has to be permuted together, so a unit is a set of channels that share an index
anywhere in the group. Units may be exchanged if they have as many indices as each other on every layer. Where a
group has layers with channel groups (grouped convolutions, group normalisation), the pruner prunes the same
offsets in each; so the channels at one offset are one unit. Groups that reach an output of the model are left out,
as the pruner's user has to leave them out by hand. The heads of attention, which its user has to name, are not named.

Which axes of a layer an index is on is found by pruning index 0 of a copy without storage.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from tools import Axis, Found, State, parameter_names

Ids = npt.NDArray[np.int64]

RATIO = 0.5
"""Share of the channels that the pruner removes, in the test of whether the pruned model runs."""


class Along(NamedTuple):
    """An axis of a tensor that holds the indices of a layer, several times over if `copies` is not 1."""

    tensor: str
    dim: int
    size: int
    copies: int


class Source(NamedTuple):
    """For every index of an axis after a permutation, the index before it."""

    tensor: str
    dim: int
    before: Ids


class Member(NamedTuple):
    """A layer of a group: its axes, and the pairs of an index and a channel of the root, sorted by channel."""

    axes: list[Along]
    pairs: Ids


def find(model: nn.Module, args: tuple[Any, ...]) -> Found:
    """The groups of the dependency graph."""
    graph = _graph(model, args)
    groups = [g for g in graph.get_all_groups() if not any(_is_output(graph, dep) for dep, _ in g)]
    generator = np.random.default_rng(0)
    sources = [s for s in (_permute(graph, model, group, generator) for group in groups) if s]
    names = set(parameter_names(model).values())

    def permute(state: Mapping[str, Tensor], chosen: Collection[int]) -> State:
        out = dict(state)
        for source in (s for number in chosen for s in sources[number]):
            out[source.tensor] = out[source.tensor].index_select(source.dim, torch.from_numpy(source.before))
        return out

    axes: frozenset[Axis] = frozenset((s.tensor, s.dim) for group in sources for s in group if s.tensor in names)
    return Found(len(sources), axes, permute)


def prune(model: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether half of all channels but the outputs' can be pruned so that the model still runs. It is changed."""
    import torch_pruning

    graph = _graph(model, args)
    ends = [dep.target.module for g in graph.get_all_groups() for dep, _ in g if _is_output(graph, dep)]
    before = sum(p.numel() for p in model.parameters())
    pruner = torch_pruning.pruner.BasePruner(
        model,
        args,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=[m for m in ends if isinstance(m, nn.Module)],
    )
    pruner.step()
    with torch.no_grad():
        model(*args)
    return sum(p.numel() for p in model.parameters()) < before


def _graph(model: nn.Module, args: tuple[Any, ...]) -> Any:
    import torch_pruning

    return torch_pruning.DependencyGraph().build_dependency(model, example_inputs=args, verbose=False)


def _is_output(graph: Any, dep: Any) -> bool:
    return not dep.target.outputs and graph.is_out_channel_pruning_fn(dep.handler)


def _permute(graph: Any, model: nn.Module, group: Any, generator: np.random.Generator) -> list[Source]:
    """One random permutation of a group's units, on all axes that it moves; empty if no units can be exchanged."""
    members = []
    for item in group:
        axes = _axes(model, item.dep)
        if axes:
            pairs = np.unique(np.stack([item.root_idxs, item.idxs], axis=1), axis=0)
            members.append(Member(axes, pairs[:, ::-1]))
    unit = _units(len(group[0].idxs), _channel_groups(graph, group), members)
    places: list[dict[int, list[int]]] = []
    for member in members:
        distinct: dict[int, dict[int, None]] = defaultdict(dict)
        for index, root in member.pairs.tolist():
            distinct[int(unit[root])][index] = None
        places.append({u: list(indices) for u, indices in distinct.items()})
    image = _exchange(unit, places, generator)
    sources = []
    for member, found in zip(members, places, strict=True):
        source = np.arange(1 + max(int(member.pairs[:, 0].max()), *(a.size // a.copies for a in member.axes)))
        for u, indices in found.items():
            source[found[image[u]]] = indices
        for axis in member.axes:
            # The weight of a grouped convolution has the input channels of one group only.
            one = source[: axis.size // axis.copies]
            before = np.concatenate([one + i * len(one) for i in range(axis.copies)])
            if (before != np.arange(len(before))).any():
                sources.append(Source(axis.tensor, axis.dim, before))
    return sources


def _axes(model: nn.Module, dep: Any) -> list[Along]:
    """The axes of a layer's tensors that a dependency prunes."""
    layer = dep.target.module
    if isinstance(layer, nn.Parameter):
        dim = dep.target.pruning_dim
        return [Along(parameter_names(model)[id(layer)], dim, layer.shape[dim], 1)]
    names = {id(m): name for name, m in model.named_modules()}
    if id(layer) not in names:  # an op between layers
        return []
    prefix = names[id(layer)] + "." if names[id(layer)] else ""
    before = layer.state_dict(keep_vars=True)
    hollow: dict[int, Any] = {id(t): _hollow(t) for t in before.values()}
    pruned = copy.deepcopy(layer, hollow)
    dep.handler.__self__.pruning_dim = dep.target.pruning_dim
    dep.handler(pruned, [0])
    after = pruned.state_dict()
    return [
        Along(prefix + name, dim, size, size - after[name].shape[dim])
        for name, tensor in before.items()
        for dim, size in enumerate(tensor.shape)
        if after[name].shape[dim] < size
    ]


def _hollow(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and kind, without storage."""
    hollow = torch.empty_like(tensor, device="meta")
    return nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow


def _channel_groups(graph: Any, group: Any) -> int:
    """Into how many groups the pruner divides the channels."""
    import torch_pruning

    counts = [1]
    for dep, _ in group:
        layer, pruner = dep.target.module, graph.get_pruner_of_module(dep.target.module)
        if torch_pruning.ops.module2type(layer) != torch_pruning.ops.OPTYPE.DEPTHWISE_CONV:
            is_out = graph.is_out_channel_pruning_fn(dep.handler)
            counts.append(pruner.get_out_channel_groups(layer) if is_out else pruner.get_in_channel_groups(layer))
    return max(counts)


def _units(count: int, channel_groups: int, members: list[Member]) -> Ids:
    """The unit of every channel of the root. Channel groups that do not divide the channels tie none."""
    channels = np.arange(count)
    offsets = channels if count % channel_groups else channels % (count // channel_groups)
    start, stop, total = [channels], [count + offsets], 2 * count
    for member in members:
        start.append(member.pairs[:, 1])
        stop.append(total + member.pairs[:, 0])
        total += int(member.pairs[:, 0].max()) + 1
    a, b = np.concatenate(start), np.concatenate(stop)
    unit: Ids = connected_components(coo_array((np.ones(len(a)), (a, b)), (total, total)), directed=False)[1][:count]
    return unit


def _exchange(unit: Ids, places: list[dict[int, list[int]]], generator: np.random.Generator) -> dict[int, int]:
    """Where each unit goes: random cycles of those that have as many channels and indices as each other."""
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for u, channels in zip(*np.unique(unit, return_counts=True), strict=True):
        kind = (int(channels), *(len(found.get(int(u), ())) for found in places))
        alike[kind].append(int(u))
    image: dict[int, int] = {}
    for units in alike.values():
        order = generator.permutation(units).tolist()
        image |= dict(zip(order, order[1:] + order[:1], strict=True))
    return image
