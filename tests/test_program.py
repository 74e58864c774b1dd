"""Captured models: ops written out in simpler ones, as far as torch can do so."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge
from fxmerge.program.capture import capture_program
from fxmerge.program.captured import Program
from fxmerge.symmetry import rules
from fxmerge.symmetry.classes import resolve
from fxmerge.symmetry.propagate import propagate

PRELU, SWISH = torch.ops.aten.prelu.default, torch.ops.aten.hardswish.default


class Activated(nn.Module):
    """Two ops that torch has decompositions of; that of the first cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.slope = nn.Linear(3, 6), nn.Linear(6, 2), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.hardswish(self.slope(self.a(x))))  # type: ignore[no-any-return]


def captured() -> Program:
    return capture_program(Activated().eval(), (torch.randn(4, 3),), {})


def ops(program: Program | Any) -> set[Any]:
    return {node.target for node in program.module.graph.nodes}


def test_an_op_that_torch_cannot_write_out_does_not_stop_others() -> None:
    simpler = captured().aten.decompose([PRELU, SWISH])
    assert simpler is not None
    assert PRELU in ops(simpler)
    assert SWISH not in ops(simpler)


def test_nothing_is_written_out_where_torch_can_write_none_out() -> None:
    aten = captured().aten
    assert aten.decompose([PRELU]) is None
    assert aten.decompose([torch.ops.aten.linear.default.overloadpacket.out]) is None
    assert aten.decompose([]) is None


def test_an_op_that_checks_its_result_is_not_written_out() -> None:
    """That would take a token of effects, which no model is given."""

    class Whitened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h @ torch.linalg.cholesky(h.mT @ h + torch.eye(4)))  # type: ignore[no-any-return]

    model, x = Whitened(), torch.randn(5, 3)
    assert capture_program(model, (x,)).aten.decompose([torch.ops.aten.linalg_cholesky.default]) is None
    symmetry = fxmerge.find_symmetry(model, (x,))
    assert {str(op) for op in symmetry.probed} | {str(op) for op in symmetry.unknown} == {
        "aten.linalg_cholesky.default"
    }


@pytest.mark.parametrize("hidden", [{PRELU}, {PRELU, SWISH}])
def test_an_op_that_cannot_be_written_out_is_probed(hidden: set[Any]) -> None:
    found = propagate(captured(), lambda op: None if op in hidden else rules.find_rule(op))
    assert set(found.probed) == {PRELU}
    assert not found.unknown
    (units,) = (c.size for c in resolve(found.units, found.axes).classes if c.size > 1)
    assert math.factorial(units) == 720
