"""A GraphModule with other parameters baked in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

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
    return module
