"""BatchNorm without data: running variances that fit averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.combine.batch_norm import statistics_nodes
from fxmerge.program.captured import Program
from fxmerge.program.forms import Form, argument, bind, form_of
from fxmerge.units.unit_map import UnitMap

State = Mapping[str, Tensor]

SAME = 1e-4
"""Weights are the same if averaging changes their squares by less than this share."""


def folded(
    program: Program,
    states: Sequence[State],
    into: Program,
    merged: State,
    units: UnitMap,
    combine: Callable[[str, Sequence[State]], Tensor],
) -> dict[str, Tensor]:
    """Scales the running variances behind layers as the averaging of their weights has scaled the outputs.

    A mean of weights that differ is shorter than they are, and its outputs vary less than theirs: normalized by their
    variances, signals fade. How much less is estimated from the weights alone, as the model folding of arXiv 2502.10216
    does for the merged channels of one network. The estimate is right for inputs that vary alike and independently:
    of these, a weighted sum has a variance in proportion to the sum of the squares of the weights. The variance of the
    models' means is one of their weights, and left out; but where all have the same weights, it is one of their data.
    Inputs that become one merged unit are taken to be the same.

    Arguments:
        program: the captured program.
        states: the state dicts that were merged, in units that match.
        into: the program of the merged network.
        merged: what was made of them, with variances that are pooled.
        units: where the units of the models go.
        combine: merges the tensors of one name in the same way, but for running variances the mean is taken.

    Returns:
        `merged` with other variances, for every normalization of what a layer gives.
    """
    known, same = _normalized(program), _normalized(into)
    found = dict(merged)
    for name, layer in same.items():
        squares = [
            {name: known[name].squares(_read(known[name], own, units, m)).to(own[name])} for m, own in enumerate(states)
        ]
        expected = combine(name, squares).double()
        shrunk = torch.where(expected > 0, layer.squares(merged[layer.parameter]).to(expected) / expected, 1.0)
        unchanged = (shrunk - 1).abs() < SAME
        estimated = torch.where(unchanged, merged[name].double(), combine(name, states).double() * shrunk)
        found[name] = estimated.to(merged[name])
    return found


def _read(layer: _Layer, state: State, units: UnitMap, model: int) -> Tensor:
    """The weights of a layer of one model that reads merged units, and gives units of its own."""
    weights = state[layer.parameter]
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    return units.gather(layer.parameter, wide, model, only="consumed")[0]


def _normalized(program: Program) -> dict[str, _Layer]:
    """The layers whose outputs are normalized, by the names of the running variances."""
    return {
        variance: layer
        for (_, variance), nodes in statistics_nodes(program).items()
        if len(nodes) == 1 and (layer := _layer(program, nodes[0].args[0])) is not None
    }


@dataclass(frozen=True)
class _Layer:
    """A node that multiplies data with a parameter, and gives one channel for each output."""

    parameter: str
    form: Form
    at: int
    call: Mapping[str, Any]

    def squares(self, parameter: Tensor) -> Tensor:
        """The sum of the squares of the weights of every output."""
        term, out = self.form.terms[self.at], self.form.terms[2]
        weights = self.form.view(self.form.operands[self.at], parameter, self.call)
        kept = [c for c in out if c in term]
        summed = [d for d, c in enumerate(term) if c not in out]
        squares = weights.square().sum(summed, dtype=torch.float64) if summed else weights.double().square()
        left = [c for c in term if c in out]
        return squares.permute([left.index(c) for c in kept]).reshape(-1)


def _layer(program: Program, node: Any) -> _Layer | None:
    """What a node is as a layer; None if it is none whose outputs are its second dimension."""
    form = form_of(node) if isinstance(node, fx.Node) else None
    if form is None:
        return None
    arguments = bind(node)
    sources = [program.sources.get(argument(arguments, name), ("", "")) for name in form.operands]
    of_parameters = [i for i, (kind, _) in enumerate(sources) if kind == "parameter"]
    if len(of_parameters) != 1:
        return None
    (at,) = of_parameters
    channels = [d for d, c in enumerate(form.terms[2]) if c in form.terms[at]]
    if not form.views and channels != [1]:
        return None
    return _Layer(sources[at][1], form, at, fx.map_arg(arguments, lambda n: n.meta.get("val")))
