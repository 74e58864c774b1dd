"""The gains and shifts of norms that no fit of a layer makes up for."""

from __future__ import annotations

from collections.abc import Collection

from fxmerge.program.canonicalize import plan_folds
from fxmerge.program.captured import Program
from fxmerge.program.forms import gain_of
from fxmerge.refitting.layers import Layers, find_layers

IN_READERS = "the layers that read what it gives are fitted in its place"


def find_gains(program: Program, fitted: Collection[str]) -> Layers:
    """Finds the gains and shifts of layer, RMS, group and instance norms, and other factors of channels, to be fitted.

    What a norm gives is linear in its gain and shift, so that they are a layer with one feature, and a constant, for
    each channel. Where all that reads it are layers with weights and biases of their own for each channel, a fit of
    these is one of the gains too. Then the gains are left.

    Arguments:
        program: the captured program.
        fitted: the names of the parameters of the layers that are fitted.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fxmerge.program.capture import capture_program
        >>> norms = nn.LayerNorm(4), nn.LayerNorm(4)
        >>> net = nn.Sequential(nn.Linear(4, 4), norms[0], nn.Linear(4, 4), norms[1], nn.ReLU(), nn.Linear(4, 2))
        >>> program = capture_program(net, (torch.randn(3, 4),))
        >>> found = find_gains(program, ["0.weight", "0.bias", "2.weight", "2.bias", "5.weight", "5.bias"])
        >>> [(layer.parameters, tuple(layer.codes.shape)) for layer in found.all]
        [(('3.weight', '3.bias'), (4, 2, 1))]
        >>> found.left["1.weight"]
        'the layers that read what it gives are fitted in its place'
    """
    found, left = find_layers(program, gain_of), dict[str, str]()
    for move in plan_folds(program).moves:
        readers = {one.operand.parameter for layer in move.readers or () for one in layer.scalings}
        if move.takes_shift and readers <= set(fitted):
            left |= dict.fromkeys(move.site.parameters, IN_READERS)
    return Layers(tuple(layer for layer in found.all if left.keys().isdisjoint(layer.parameters)), left)
