"""Layers whose outputs are read by a softmax alone, such as the routers of experts, found by the graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxmerge.program.channels import CASTS, SIZES
from fxmerge.program.forms import bind, op_name
from fxmerge.refitting.layers import Layer, Use


def router_layers(layers: Sequence[Layer]) -> list[Layer]:
    """Finds the layers of which every output is a score among those of its row, for a softmax and for choices.

    Such a layer is free to add a number to all scores of a row, and scores that are far below others count for nothing,
    so that the squared error of its outputs is a poor measure. That of the probabilities counts.

    Arguments:
        layers: those to choose from.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fxmerge.program.capture import capture_program
        >>> from fxmerge.refitting.layers import find_layers
        >>> class Mixture(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.router, self.experts = nn.Linear(4, 3), nn.Linear(4, 3)
        ...     def forward(self, x):
        ...         return (self.router(x).softmax(-1) * self.experts(x)).sum(-1)
        >>> program = capture_program(Mixture(), (torch.randn(5, 4),))
        >>> [layer.name for layer in router_layers(find_layers(program).all)]
        ['router.weight']
    """
    return [layer for layer in layers if layer.codes.shape[0] == 1 and all(map(_is_for_softmax, layer.uses))]


def _is_for_softmax(use: Use) -> bool:
    dim = use.outputs_dim
    return dim is not None and _ends(use.node, dim) == {"softmax"}


def _ends(node: fx.Node, dim: int) -> set[str]:
    """What becomes of scores along a dimension: "softmax", and "other" for all but choices by their order, which is
    that of the probabilities."""
    found = set[str]()
    for user in node.users:
        name, own = op_name(user), bind(user) if op_name(user) else {}
        along = own.get("dim") in (dim, dim - node.meta["val"].ndim)
        if name in CASTS:
            found |= _ends(user, dim)
        elif name in ("softmax", "_softmax") and along:
            found.add("softmax")
        elif name in ("topk", "sort") and along:
            for values in (result for result in user.users if result.args[1] == 0):
                found |= _ends(values, dim)
        elif name not in SIZES and not (name in ("argmax", "argsort") and along):
            found.add("other")
    return found
