"""rebasin: random permutations in place of those that its coordinate descent would find.

The permutations are its own, and it applies them itself. It does not move the running statistics of
normalisations: its README says to compute them anew from data after a merge. `carry` moves them with the
normalisation's weight, which is what a new computation gives if all else is right.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tools import Axis, Found, State, parameter_names

STATISTICS = ("running_mean", "running_var")


def find(model: nn.Module, args: tuple[Any, ...]) -> Found:
    """The permutations of the model's paths. The model is changed: it is in float64 afterwards."""
    from rebasin import PermutationCoordinateDescent

    graph = PermutationCoordinateDescent(model, model, args).pinit.model_graph
    permutations = [(p, infos) for p, infos in graph.permutation_to_info if len(p) > 1]
    names = parameter_names(model)
    axes: frozenset[Axis] = frozenset((names[id(i.parameter_b)], i.axis) for _, infos in permutations for i in infos)
    wrappers = {id(info.module): info.module for _, infos in permutations for info in infos}.values()
    prefixes = {id(m): f"{name}." for name, m in model.named_modules()}
    generator = torch.Generator().manual_seed(0)
    images = [torch.randperm(len(p), generator=generator) for p, _ in permutations]
    model.double()

    @torch.no_grad()
    def permute(state: Mapping[str, Tensor], chosen: Collection[int]) -> State:
        for name, tensor in model.named_parameters():
            tensor.data = state[name].clone()
        for number, (permutation, _) in enumerate(permutations):
            permutation.perm_indices = images[number] if number in chosen else torch.arange(len(images[number]))
        graph.apply_permutations()
        return {**state, **{name: tensor.data for name, tensor in model.named_parameters()}}

    def carry(state: State) -> State:
        out = dict(state)
        for wrapper in wrappers:
            for kind in STATISTICS:
                name = f"{prefixes[id(wrapper.module_b)]}{kind}"
                if name in out:
                    out[name] = out[name][wrapper.output_permutation.perm_indices]
        return out

    return Found(len(permutations), axes, permute, carry)
