"""Label-free measures of how much of two parents is in their merge. All are errors: smaller is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxmerge.similarity.activations import _rows, _Tapped, find_taps
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagate import Propagation

MOST = 500
"""Rows that kernels are compared on."""


@dataclass(frozen=True)
class Seen:
    """What a network shows on some inputs: its outputs, shape (n, outputs), and the units of every activation that a
    contraction consumes, shape (rows, units), in the order of the first parent."""

    outputs: Tensor
    features: list[Tensor]


class Shown:
    """Runs networks on the same inputs."""

    def __init__(self, found: Propagation, symmetry: Symmetry, batches: Sequence[Tensor]) -> None:
        self.taps, self.batches = find_taps(found, symmetry), batches
        self.runner = _Tapped(found.program, self.taps)

    def of(self, state: Mapping[str, Tensor]) -> Seen:
        outputs, features = [], []
        for batch in self.batches:
            self.runner.seen = {}
            (output,) = pytree.tree_leaves(self.runner.call(state, (batch,), {}))
            outputs.append(output.flatten(1))
            features.append([_rows(self.runner.seen[tap.node], tap) for tap in self.taps])
        return Seen(torch.cat(outputs), [torch.cat(own) for own in zip(*features, strict=True)])


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def standardised(x: Tensor) -> Tensor:
    """Every output with mean zero and deviation one."""
    return centred(x) / x.std(0).clamp(min=1e-6)


def _error(x: Tensor, target: Tensor) -> float:
    return float((x - target).square().mean() / target.square().mean())


def _nearer(x: Tensor, a: Tensor, b: Tensor) -> float:
    each = torch.stack([(x - y).square().sum(1) for y in (a, b)])
    return float(each.min(0).values.mean() / torch.stack([a, b]).square().sum(2).mean())


def _confident(a: Tensor, b: Tensor) -> Tensor:
    """For every input what the parent says whose output is larger."""
    return torch.where(a.norm(dim=1, keepdim=True) > b.norm(dim=1, keepdim=True), a, b)


def _correlation(x: Tensor, y: Tensor) -> float:
    return float((standardised(x) * standardised(y)).mean())


def _kernel(x: Tensor) -> Tensor:
    x = centred(x[torch.linspace(0, len(x) - 1, min(len(x), MOST)).long()])
    return F.normalize((x @ x.T).flatten(), dim=0)


def _alignment(x: Tensor, a: Tensor, b: Tensor) -> float:
    """Linear CKA with both parents together."""
    return float(F.cosine_similarity(_kernel(x), _kernel(a) + _kernel(b), dim=0))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _features(measure: Callable[[Tensor, Tensor, Tensor], float]) -> Callable[[Seen, Seen, Seen], float]:
    """The mean of a measure over activations."""
    return lambda m, a, b: _mean([measure(*own) for own in zip(m.features, a.features, b.features, strict=True)])


CRITERIA: dict[str, Callable[[Seen, Seen, Seen], float]] = {
    "mean output": lambda m, a, b: _error(m.outputs, (a.outputs + b.outputs) / 2),
    "mean output, standardised": lambda m, a, b: _error(
        standardised(m.outputs), standardised((a.outputs + b.outputs) / 2)
    ),
    "nearer output": lambda m, a, b: _nearer(m.outputs, a.outputs, b.outputs),
    "confident output": lambda m, a, b: _error(m.outputs, _confident(a.outputs, b.outputs)),
    "confident output, cosine": lambda m, a, b: float(
        1 - F.cosine_similarity(m.outputs, _confident(a.outputs, b.outputs)).mean()
    ),
    "output correlation": lambda m, a, b: 1 - _mean([_correlation(m.outputs, p.outputs) for p in (a, b)]),
    "output CKA": lambda m, a, b: 1 - _alignment(m.outputs, a.outputs, b.outputs),
    "mean feature": _features(lambda x, a, b: _error(x, (a + b) / 2)),
    "feature correlation": _features(lambda x, a, b: 1 - _mean([_correlation(x, y) for y in (a, b)])),
    "feature CKA": _features(lambda x, a, b: 1 - _alignment(x, a, b)),
    "output and feature": lambda m, a, b: CRITERIA["mean output"](m, a, b) + CRITERIA["mean feature"](m, a, b),
}
"""The error of a merge, from what it and its parents show. The first is the criterion of `fxmerge.choose`."""
