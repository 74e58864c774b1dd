"""The verb that moves gains and shifts of normalizations into the layers around them."""

from __future__ import annotations

import logging

from torch import fx

from fxmerge.emit.bake import bake
from fxmerge.program import models
from fxmerge.program.canonicalize import fold_norms
from fxmerge.program.capture import Args, Kwargs, capture_program
from fxmerge.program.models import Model

logger = logging.getLogger(__name__)


def canonicalize(model: Model, args: Args = (), kwargs: Kwargs | None = None) -> fx.GraphModule:
    """Gives a network gains of one, by moving the gains and shifts of its normalizations into the layers around them.

    The function of the network in eval mode stays the same. Its continuous symmetries become more: rotations of
    channels commute with gains that are all one, and with no others. The mean that a layer norm subtracts needs no
    move, as it commutes with all rotations that keep the vector of ones.

    The gain and shift of a normalization go into the weights and biases of the layers that read it, if these are all
    that reads it. The scale of a batch norm, or of a branch, goes else into the layer whose output it scales, if
    nothing else reads that and what follows is more than an activation. A shift that no bias can take stays. Which ops
    are gains is found from the graph, so norms that are written out are treated as those of torch.

    Every move is checked in float64 on the example, and one that changes an output is undone, with a warning. The
    running statistics of a batch norm that was changed are zeros and ones. They are no longer those of its inputs, so
    training the result, or estimating statistics anew, gives another network than doing so with the model.

    Arguments:
        model: any nn.Module, GraphModule or ExportedProgram; it is not modified.
        args: example inputs, as the model's forward takes them.
        kwargs: example inputs by keyword.

    Returns:
        A GraphModule in eval mode. Its state dict has the names, shapes and dtypes of the model's and loads into the
        model's class. What was moved is logged.

    Raises:
        CaptureError: if the model cannot be captured as a graph.
        OptionError: if the model or its inputs are none, or the example inputs are missing.

    Example:
        >>> import torch, fxmerge
        >>> net = torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
        >>> gain, shift = torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])
        >>> net.load_state_dict({"0.weight": gain, "0.bias": shift, "1.weight": torch.eye(2), "1.bias": shift})
        <All keys matched successfully>
        >>> fxmerge.canonicalize(net, (torch.ones(1, 2),)).state_dict()["1.weight"]
        tensor([[2., 0.],
                [0., 3.]])
    """
    program = capture_program(model, args, kwargs)
    state, folds = fold_norms(program, models.tensors(program.module))
    for fold in folds:
        logger.info("moved %s", fold)
    return bake(program, state)
