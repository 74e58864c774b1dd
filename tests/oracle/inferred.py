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
from fxmerge.program.capture import capture_program
from fxmerge.symmetry.group import analyse
from fxmerge.symmetry.propagate import Propagation
from tests.oracle.architectures import CASES, INCOMPLETE
from tests.slow import slow

FACTORIES = {**CASES, **{name: factory for name, (factory, _) in INCOMPLETE.items()}}

LARGER = {
    "attention, norms of queries and keys",
    "attention, three streams of one width",
    "attention, three streams of three widths",
    "bias by head",
    "channel shuffle",
    "conv 3d",
    "ConvNeXt block",
    "cross-covariance attention",
    "decoder layer",
    "decoder with tokens, read along time",
    "DenseNet",
    "encoder layer, post-norm",
    "grouped queries, native",
    "Inception",
    "inverted residual, squeeze-excite",
    "language model, tied embedding",
    "learnt queries",
    "LSTM",
    "MLP-Mixer",
    "reshaped, pooled and interpolated",
    "residual CNN, padded shortcut",
    "residual CNN, projection shortcut",
    "residual CNN, two padded shortcuts",
    "residual mlp",
    "ResNeXt block",
    "rotary attention, norms of queries and keys",
    "siamese",
    "stream of sub-pixels",
    "sub-pixel convolution, then a kernel",
    "SwiGLU, apart",
    "tokens filled",
    "transformed units",
    "U-Net",
    "units written between constants",
    "VGG",
    "weights by head",
}
"""Architectures that take more than a second to capture and to write out; smaller ones have their layers."""

assert FACTORIES.keys() >= LARGER


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
    """A test for each of some architectures; `tests/conftest.py` runs all tests of one in one process."""
    return pytest.mark.parametrize("name", [slow(name) if name in LARGER else name for name in names])
