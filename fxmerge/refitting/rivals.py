"""The parents beside the merged network: which of them comes nearest to what all of them answer together.

A network that keeps half of what each parent computes may know less than one of them does with a new readout: where
the parents have learnt much the same, or are too narrow to be halved. Fitting the last layers of the parents as well
costs next to nothing, since the parents run on all data anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from fxmerge.program import Program
from fxmerge.refitting.gather import LayerFit, Shares, Teacher
from fxmerge.refitting.layers import Layer
from fxmerge.refitting.moments import NEGLIGIBLE

Report = dict[str, dict[str, float]]
"""Numbers on the fit of each layer, by its name."""

MARGIN = 0.25
"""By what share the error of a parent with its last layers refitted must be below that of the merged network for it to
be preferred, where the parents say different things. A parent makes no error in what it says itself, and all of it in
what the others say, so that of two networks with equal errors the merged one serves the tasks better. The more the
parents say the same, the less that matters: the margin is in proportion to what a parent as it is misses of the mean
of all."""


@dataclass(frozen=True)
class Refitted:
    """What a refit gives.

    Attributes:
        state: the new state dict.
        layers: for every refitted layer by name: `before` and `after`, the squared error relative to the square of the
            targets; `held_out`, the same on rows apart from those of the fit; `ridge`, relative to the mean square of
            a feature; `rank`, how many directions of the features it leaves free, of `features`; `rows`, the number
            of equations; `seconds`.
        left: for parameters that some op multiplies with data and that were left as they were, the reason.
        parent: the number of the parent that the state is of, all but its last layers; None for the merged network.
        errors: the error held out of the last layers of the parents, and at None of the merged network; empty where
            they were not compared.
        error: that of the merged network, whatever the state is of; NaN if a last layer was not fitted.
    """

    state: dict[str, Tensor]
    layers: Report
    left: Mapping[str, str]
    parent: int | None = None
    errors: Mapping[int | None, float] = field(default_factory=dict)
    error: float = math.nan


def asked(shares: Shares) -> list[int]:
    """The parents that count."""
    return [j for j, share in enumerate(shares) if share > 0]


class Rivals:
    """The parents, each with its last layers fitted to what the merged network learns.

    They take part where each is asked on all data, and no parameter is used after the last layers: outputs of these
    are then in no units of a network's own.
    """

    def __init__(
        self,
        program: Program,
        last: Sequence[Layer],
        chosen: Sequence[Layer],
        parents: Sequence[Mapping[str, Tensor]],
        teachers: Sequence[Teacher],
        shares: Sequence[Shares],
    ) -> None:
        alike = all(
            torch.equal(layer.read(parent), layer.read(teacher.state))
            for layer in last
            for parent, teacher in zip(parents, teachers, strict=True)
        )
        comparable = alike and all(layer in chosen for layer in last) and not used_after(program, last)
        self.last, self.teachers = last if comparable else (), teachers
        self.states = {j: dict(own) for j, own in enumerate(parents) if all(j in asked(each) for each in shares)}
        self.told: dict[int, Report] = {j: {} for j in self.states}

    def enter(self, layers: Sequence[Layer], alike: Mapping[Shares, int], seed: int) -> dict[int, list[LayerFit]]:
        """The fits of some layers, by the parent."""
        due = [layer for layer in layers if layer in self.last]
        return {
            j: [LayerFit(layer, own, self.teachers, {}, (), alike, seed) for layer in due]
            for j, own in self.states.items()
        }

    def settle(self, fits: Mapping[int, Sequence[LayerFit]]) -> None:
        """Puts the fitted coefficients into the parents' state dicts."""
        for j, own in fits.items():
            for fit in own:
                self.told[j][fit.layer.name] = fit.settle(self.states[j])

    def choose(self, merged: Refitted) -> Refitted:
        """The merged network, unless a parent has a clearly smaller error."""
        if not self.last:
            return merged
        errors = {None: merged.error} | {j: mean_of(told, self.last, "held_out") for j, told in self.told.items()}
        best = min(errors, key=lambda j: errors[j])
        if best is None:
            return replace(merged, errors=errors)
        margin = MARGIN * min(mean_of(self.told[best], self.last, "before"), 1.0)
        if errors[None] - errors[best] <= margin * errors[None] + NEGLIGIBLE:
            return replace(merged, errors=errors)
        return Refitted(self.states[best], self.told[best], {}, best, errors, merged.error)


def mean_of(told: Report, last: Sequence[Layer], number: str) -> float:
    """The mean of a number over the last layers; NaN unless all were fitted."""
    found = [told.get(layer.name, {}).get(number, math.nan) for layer in last]
    return sum(found) / len(found) if found else math.nan


def used_after(program: Program, last: Sequence[Layer]) -> bool:
    """Whether a parameter is used after some layers."""
    nodes = {use.node for layer in last for use in layer.uses}
    held: set[fx.Node] = set()
    after: set[fx.Node] = set()
    for node in program.graph.graph.nodes:
        inputs = node.all_input_nodes
        if node in program.derived:
            if program.sources.get(node, ("", ""))[0] == "parameter" or not held.isdisjoint(inputs):
                held.add(node)
        elif any(n in after or n in nodes for n in inputs):
            if not held.isdisjoint(inputs):
                return True
            after.add(node)
    return False
