"""REPAIR: each unit of a merged network gets the mean and the deviation that the parents' units have."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxmerge.evidence.moments import Moments
from fxmerge.processes import Processes
from fxmerge.refitting.gather import Counted, Teacher, Values, arguments, not_finite
from fxmerge.refitting.layers import Layer, Use

NEVER = 1e-6
"""The deviation of an output that does not vary."""


class Repair:
    """The means and deviations of a layer's outputs, and what they are shifted and scaled by.

    The targets are the weighted means of the parents' own (REPAIR, arXiv 2211.08403), which an average
    falls short of: the variance of a mean of two units is less than theirs unless they are equal.

    Arguments:
        layer: the layer.
        state: holds its coefficients.
        teachers: the parents.
    """

    def __init__(self, layer: Layer, state: Mapping[str, Tensor], teachers: Sequence[Teacher]) -> None:
        self.began = time.perf_counter()
        self.layer, self.centre = layer, layer.read(state)
        members = [layer.read(teacher.members, missing=1.0).to(self.centre) for teacher in teachers]
        own = [layer.read(teacher.state) for teacher in teachers]
        self.coefficients = [torch.where(m > 0, c / m, 0.0) for c, m in zip(own, members, strict=True)]
        self.known = [(m > 0).any(dim=1).double() for m in members]
        self.mine = Moments()
        self.theirs = [Moments() for _ in teachers]

    def add(self, values: Values, taught: Mapping[int, Values], counted: Counted) -> None:
        """Takes in a batch; see `LayerFit.add`."""
        for use in self.layer.uses:
            self.mine += _outputs(use, values, self.centre, counted.weight)
            for j, theirs in taught.items():
                self.theirs[j] += _outputs(use, theirs, self.coefficients[j], counted.weight * counted.shares[j])

    def total(self, processes: Processes) -> None:
        """Makes these the means and deviations over the batches of all processes."""
        self.mine, self.theirs = processes.total("outputs of a layer", (self.mine, self.theirs))

    def settle(self, state: dict[str, Tensor]) -> dict[str, float]:
        """Puts the new coefficients into a state dict, and tells by how much the outputs were scaled."""
        counts = [own.count * known for own, known in zip(self.theirs, self.known, strict=True)]
        total = torch.stack(counts).sum(0)
        share = [torch.where(total > 0, count / total, 0.0) for count in counts]
        mean, deviation = (
            torch.stack([s * value for s, value in zip(share, values, strict=True)]).sum(0)
            for values in zip(*((own.mean, own.deviation) for own in self.theirs), strict=True)
        )
        now, spread = self.mine.mean, self.mine.deviation
        if not bool(torch.isfinite(torch.stack([mean, deviation, now, spread])).all()):
            raise not_finite(self.layer)
        gain = torch.where((spread > NEVER) & (total > 0), deviation / spread, 1.0)
        coefficients = self.centre * gain[:, None]
        if all(use.biased for use in self.layer.uses):
            coefficients[:, -1] += torch.where(total > 0, mean - now * gain, 0.0)
        self.layer.write(state, coefficients)
        return {"gain": float(gain.mean()), "rows": self.mine.rows, "seconds": time.perf_counter() - self.began}


def _outputs(use: Use, values: Values, coefficients: Tensor, weight: float) -> Moments:
    """The moments of what some coefficients give at a use, shape (groups, outputs)."""
    x = use.features(arguments(use, values), None)
    return Moments.of((x @ coefficients.to(x)).double(), weight)
