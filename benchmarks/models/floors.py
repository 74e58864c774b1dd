"""What an alignment cannot do without: matrix products, factorisations, assignments and passes, each of them once."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxmerge.evidence import weights
from fxmerge.matching.assignment import assign
from fxmerge.matching.problem import floats, nearest
from fxmerge.progress import BEGUN, DONE
from fxmerge.symmetry.group import Symmetry
from fxmerge.units.basis import Basis

PRODUCT = 4096
"""The rows of the two float32 matrices whose product is the unit of time that other machines can compare."""


class StageClock(logging.Handler):
    """The CPU seconds of the stages that fxmerge logs, since the seconds of a clock depend on other programs."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seconds: dict[str, float] = {}
        self._began: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        now = time.process_time()
        if record.msg == BEGUN and isinstance(record.args, tuple):
            self._began[str(record.args[0])] = now
        elif record.msg == DONE and isinstance(record.args, tuple):
            stage = str(record.args[0])
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._began[stage]


def cpu(work: Callable[[], Any], repeats: int = 2) -> float:
    """The least CPU time of some runs."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def product(size: int = PRODUCT) -> float:
    """CPU seconds of one product of two square matrices in single precision."""
    one, other = torch.randn(2, size, size)
    return cpu(lambda: one @ other)


def passes(model: nn.Module, example: Tensor) -> float:
    """CPU seconds of the two passes in float64 that compare a model with its transformed copy."""
    wide, batch = copy.deepcopy(model).double(), example.double()
    with torch.no_grad():
        return 2 * cpu(lambda: wide(batch))


def matching(symmetry: Symmetry, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """CPU seconds of the products of all slices of every class that two models are matched by, of its assignment, and
    for what is mixed, of its polar factors and of the products that apply them."""
    a, b, slices = floats(symmetry, first), floats(symmetry, second), weights.slices(symmetry)
    scales = {name: weights.scale(a[name], b[name]) for name in a}

    def once() -> None:
        for n in symmetry.choices:
            if not slices[n]:
                continue
            scores = weights.similarity(a, b, slices[n], scales).double()
            blocks = symmetry.by_block(n)
            if symmetry.mixed[n]:
                factors = [nearest(scores[units][:, units], symmetry.kind(n)) for units in blocks]
                own = {place.axis.parameter: b[place.axis.parameter] for place in symmetry.mixed[n]}
                Basis(symmetry.mixed, {n: torch.stack(factors)}).apply(own)
            else:
                for units in blocks:
                    assign(scores[units][:, units].numpy())

    return cpu(once, 1)
