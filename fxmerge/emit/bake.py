"""A GraphModule with other parameters baked in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from fxmerge.program.captured import Program
from fxmerge.program.emission import duplicate


def bake(
    program: Program, state: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]] | None = None
) -> fx.GraphModule:
    """A copy of the program's module that holds the tensors of a state dict, which may have other shapes.

    Arguments:
        program: the program.
        state: the tensors.
        others: what else is in use, if that is known: parameters that lie in no memory of theirs are not copied. None
            copies all.
    """
    given = program.module.named_parameters(remove_duplicate=False)
    # What is replaced is not copied first.
    empty: dict[int, Any] = {id(p): nn.Parameter(p.new_empty(0), p.requires_grad) for name, p in given if name in state}
    module = duplicate(program.module, empty).eval()
    own = module.state_dict(keep_vars=True)
    used = None if others is None else {_memory(tensor) for each in others for tensor in each.values()}
    with torch.no_grad():
        for name, tensor in state.items():
            if isinstance(own[name], nn.Parameter):
                value = tensor.detach().to(own[name])
                whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
                own[name].data = value if used is not None and whole and _memory(value) not in used else value.clone()
                continue
            if own[name].shape != tensor.shape:
                own[name].data = torch.empty_like(tensor, dtype=own[name].dtype)
            own[name].copy_(tensor)
    _make_traceable(module)
    return module


def _memory(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


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
