"""A GraphModule with other parameters baked in."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from fxmerge.program import Program


def bake(program: Program, state: Mapping[str, Tensor]) -> fx.GraphModule:
    """A copy of the program's module that holds the tensors of a state dict.

    Parameters that the graph does not use are kept too, so that the state dict of the result loads
    into the class of the original model.
    """
    module = copy.deepcopy(program.module).eval()
    own = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in state.items():
            if name in own:
                own[name].copy_(tensor)
            else:
                _attach(module, name, tensor)
    return module


def _attach(module: nn.Module, name: str, tensor: Tensor) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        child = getattr(module, part)
        assert isinstance(child, nn.Module)
        module = child
    module.register_buffer(leaf, tensor.detach().clone())
