"""A GraphModule with other parameters baked in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fxmerge.program.captured import Program
from fxmerge.program.emission import duplicate


def bake(program: Program, state: Mapping[str, Tensor]) -> fx.GraphModule:
    """A copy of the program's module that holds the tensors of a state dict, which may have other shapes."""
    module = duplicate(program.module).eval()
    own = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in state.items():
            if own[name].shape != tensor.shape:
                own[name].data = torch.empty_like(tensor, dtype=own[name].dtype)
            own[name].copy_(tensor)
    _make_traceable(module)
    return module


def _make_traceable(module: fx.GraphModule) -> None:
    """Fills tensors by torch's functions in place of their overloads, which take the same arguments.

    torch traces what it unpickles, and does not see a size that the graph computes inside of an overload's list.
    """
    fills = [
        node
        for node in module.graph.nodes
        if isinstance(node.target, OpOverload)
        and node.all_input_nodes
        and not any("Tensor" in str(argument.type) for argument in node.target._schema.arguments)
    ]
    for node in fills:
        node.target = getattr(torch, node.target._schema.name.removeprefix("aten::"), node.target)
    if fills:
        module.recompile()
