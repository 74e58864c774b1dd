"""The gains and shifts of norms that are not left to the layers that read them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from fxmerge.program.captured import Program
from fxmerge.program.channels import CASTS, DROPOUTS, MOVES, SIZES
from fxmerge.program.forms import gain_of, op_name
from fxmerge.refitting.layers import Layer, Layers, find_layers

IN_READERS = "the layers that read what it gives are fitted"

_LINEAR = MOVES | CASTS | DROPOUTS | {"mean", "sum"}
"""Ops with one operand that, in eval mode, are linear in it."""


def find_gains(program: Program, fitted: Sequence[Layer]) -> Layers:
    """Finds the gains and shifts of layer, RMS, group and instance norms, and other factors of channels, to be fitted.

    What a norm gives is linear in its gain and shift, so that they are a layer with one feature, and a constant, for
    each channel. Where fitted layers alone read it, these learn what is to come of it, and the gains are left.

    Arguments:
        program: the captured program.
        fitted: the layers that are fitted.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fxmerge.program.capture import capture_program
        >>> norms = nn.LayerNorm(4), nn.LayerNorm(4)
        >>> net = nn.Sequential(nn.Linear(4, 4), norms[0], nn.Linear(4, 4), norms[1], nn.ReLU(), nn.Linear(4, 2))
        >>> program = capture_program(net, (torch.randn(3, 4),))
        >>> found = find_gains(program, find_layers(program).all)
        >>> [(layer.parameters, tuple(layer.codes.shape)) for layer in found.all]
        [(('3.weight', '3.bias'), (4, 2, 1))]
        >>> found.left["1.weight"]
        'the layers that read what it gives are fitted'
    """
    readers = {use.node for layer in fitted for use in layer.uses}
    kept, left = list[Layer](), dict[str, str]()
    for layer in find_layers(program, gain_of).all:
        if all(_read_by(use.node, readers, program.derived) for use in layer.uses):
            left |= dict.fromkeys(layer.parameters, IN_READERS)
        else:
            kept.append(layer)
    return Layers(tuple(kept), left)


def _read_by(node: fx.Node, readers: Collection[fx.Node], derived: Collection[fx.Node]) -> bool:
    """Whether a node's value is read by some nodes alone, as it is or after ops that are linear."""
    users = [user for user in node.users if op_name(user) not in SIZES]
    return bool(users) and all(
        user in readers or (_is_linear(user, node, derived) and _read_by(user, readers, derived)) for user in users
    )


def _is_linear(user: fx.Node, node: fx.Node, derived: Collection[fx.Node]) -> bool:
    if op_name(user) in ("add", "sub"):
        return all(other is node or other in derived for other in user.all_input_nodes)
    return op_name(user) in _LINEAR
