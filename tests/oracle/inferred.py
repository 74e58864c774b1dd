"""What is inferred of the oracle's architectures, each captured once for all tests of one process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from fxmerge import Symmetry
from fxmerge.capture import capture_program
from fxmerge.symmetry.group import analyse
from fxmerge.symmetry.propagate import Propagation
from tests.oracle.architectures import CASES, INCOMPLETE

FACTORIES = {**CASES, **{name: factory for name, (factory, _) in INCOMPLETE.items()}}


@dataclass(frozen=True)
class Inferred:
    """An architecture with what is inferred of it. Tests share it, so that none may modify it."""

    model: nn.Module
    args: tuple[Any, ...]
    propagation: Propagation
    symmetry: Symmetry


@cache
def inferred(name: str) -> Inferred:
    """What is inferred of the architecture of a name."""
    torch.manual_seed(0)
    model, args = FACTORIES[name]()
    return Inferred(model, args, *analyse(capture_program(model, args)))


def each(names: Iterable[str]) -> pytest.MarkDecorator:
    """A test for each of some architectures. All tests of one architecture run in one process."""
    return pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names])
