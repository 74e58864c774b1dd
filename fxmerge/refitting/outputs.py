"""Outputs of networks that learnt different tasks, made comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxmerge.errors import OptionError
from fxmerge.evidence.moments import Moments
from fxmerge.processes import ALONE, Processes
from fxmerge.program.captured import Program
from fxmerge.program.run import Data, Recorder
from fxmerge.refitting.gather import arguments, not_finite
from fxmerge.refitting.layers import Layer, find_layers
from fxmerge.refitting.output_error import used_elsewhere
from fxmerge.refitting.refit import written_out
from fxmerge.refitting.selection import last_layers


def standardized(
    program: Program, states: Sequence[Mapping[str, Tensor]], data: Data, processes: Processes = ALONE
) -> tuple[dict[str, Tensor], ...]:
    """Shifts and scales the last layers of networks, so that their outputs have mean zero and equal deviations.

    A network answers inputs of a task that it did not learn with what its own task made common. The mean of several
    networks' outputs then leans towards the answers that each gives most often, and towards the networks with large
    outputs. Each output of a last layer gets the mean zero over all data; all outputs of a layer are scaled by
    one number, so that their deviation is the mean of that of all networks.

    Arguments:
        program: the captured program.
        states: the state dicts of the networks.
        data: inputs of all tasks.
        processes: those that share the data.

    Returns:
        New state dicts.

    Raises:
        NonFiniteError: if an output is NaN or infinite.
        OptionError: if a last layer has no bias, or a parameter is used after it.
    """
    program = written_out(program)
    layers = find_layers(program)
    last = last_layers(program, layers)
    fixed = [layer.name for layer in last if not all(use.biased for use in layer.uses)]
    if not last or fixed or used_elsewhere(program, last):
        why = (
            f"{fixed[0]!r} has no bias that could shift its outputs"
            if fixed
            else "there is no last layer after which no parameter is used"
        )
        raise OptionError(f"Recipe.targets is 'standardized', but {why}; pass Recipe(targets='mean').")
    moved = tuple(dict(state) for state in states)
    found = [_moments(program, last, state, data, processes) for state in states]
    for i, layer in enumerate(last):
        common = torch.stack([own[i][1] for own in found]).mean()
        for state, own in zip(moved, found, strict=True):
            mean, deviation = own[i]
            coefficients = layer.read(state)
            coefficients[:, -1] -= mean
            layer.write(state, coefficients * (common / deviation if deviation > 0 else 1.0))
    return moved


def _moments(
    program: Program, last: Sequence[Layer], state: Mapping[str, Tensor], data: Data, processes: Processes
) -> list[tuple[Tensor, Tensor]]:
    """For every layer, the mean of each of its outputs, shape (groups, outputs), and the deviation of all."""
    coefficients = [layer.read(state) for layer in last]
    moments = [Moments(sums=torch.zeros_like(own[:, 0]), squares=torch.zeros_like(own[:, 0])) for own in coefficients]
    runner = Recorder(program, {n for layer in last for use in layer.uses for n in use.node.all_input_nodes})
    for args, kwargs in processes.share(data.batches("standardizing outputs")):
        runner.call(state, args, kwargs)
        for i, (layer, own) in enumerate(zip(last, coefficients, strict=True)):
            for use in layer.uses:
                y = use.features(arguments(use, runner.seen), None).double() @ own
                moments[i] += Moments.of(y)
    moments = processes.total("outputs", moments)
    for layer, found in zip(last, moments, strict=True):
        if not torch.isfinite(found.variance).all():
            raise not_finite(layer)
    return [(found.mean, found.variance.mean().sqrt()) for found in moments]
