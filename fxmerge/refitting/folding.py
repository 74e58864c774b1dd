"""BatchNorm without data: running variances that fit averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fxmerge.program import Program
from fxmerge.refitting.layers import Layer, Use, find_layers
from fxmerge.rewriting.calibrate import statistics_nodes

State = Mapping[str, Tensor]

SAME = 1e-4
"""Weights are the same if averaging changes their squares by less than this share."""


def folded(
    program: Program,
    states: Sequence[State],
    merged: State,
    combine: Callable[[Sequence[State]], State],
) -> dict[str, Tensor]:
    """Scales the running variances behind layers as the averaging of their weights has scaled the outputs.

    A mean of weights that differ is shorter than they are, and its outputs vary less than theirs: normalized by their
    variances, signals fade. How much less is estimated from the weights alone, as the model folding of arXiv 2502.10216
    does for the merged channels of one network. The estimate is right for inputs that vary alike and independently:
    of these, a weighted sum has a variance in proportion to the sum of the squares of the weights. The variance of the
    models' means is one of their weights, and left out; but where all have the same weights, it is one of their data.

    Arguments:
        program: the captured program.
        states: the state dicts that were merged, in units that match.
        merged: what was made of them, with variances that are pooled.
        combine: merges state dicts in the same way, but for running variances the mean is taken.

    Returns:
        `merged` with other variances, for every normalization of what a layer gives.
    """
    behind = {use.node: layer for layer in find_layers(program).all for use in layer.uses if _gives_channels(use)}
    known = {
        variance: behind[nodes[0].args[0]]  # type: ignore[index]
        for (_, variance), nodes in statistics_nodes(program).items()
        if len(nodes) == 1 and nodes[0].args[0] in behind
    }
    squares = [{name: _squares(layer, s).to(s[name]) for name, layer in known.items()} for s in states]
    theirs = combine([{**s, **own} for s, own in zip(states, squares, strict=True)])
    means = combine(states)
    found = dict(merged)
    for name, layer in known.items():
        expected = theirs[name].double()
        shrunk = torch.where(expected > 0, _squares(layer, merged).to(expected) / expected, 1.0)
        same = (shrunk - 1).abs() < SAME
        estimated = torch.where(same, merged[name].double(), means[name].double() * shrunk)
        found[name] = estimated.to(merged[name])
    return found


def _gives_channels(use: Use) -> bool:
    """Whether the second dimension of a use's output is that of its layer's groups and outputs."""
    return bool(use.form.views) or use.form.terms[2].find(use.kinds.outputs) == 1 == len(use.kinds.outputs)


def _squares(layer: Layer, state: State) -> Tensor:
    """The sum of the squares of the weights of every output."""
    weights = layer.read(state)
    return (weights[:, :-1] if layer.uses[0].biased else weights).square().sum(1).reshape(-1)
