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
from fxmerge.symmetry.propagation import Propagation
from tests.oracle.architectures import CASES, INCOMPLETE
from tests.slow import slow

FACTORIES = {**CASES, **{name: factory for name, (factory, _) in INCOMPLETE.items()}}

LARGER = {
    "a convolution along units in two dimensions",
    "a convolution padded more at one end",
    "a convolution that keeps the number of units",
    "a dilated convolution along padded units",
    "a strided convolution along units",
    "a transposed convolution along units",
    "a transposed convolution with more at one end",
    "attention pooling",
    "attention with sinks",
    "attention, norms of queries and keys",
    "attention, three streams of one width",
    "attention, three streams of three widths",
    "bias by head",
    "channel shuffle",
    "conv 1d",
    "conv 3d",
    "ConvNeXt block",
    "cross-covariance attention",
    "decoder layer",
    "decoder that begins with a reshape and a transposed convolution",
    "decoder with channels last",
    "decoder with tokens, read along time",
    "DenseNet",
    "diagonals are added",
    "encoder layer, post-norm",
    "experts by einsum",
    "experts with biases",
    "fold of overlapping windows",
    "fold of windows side by side",
    "global pooling",
    "grouped convolution of inputs and features",
    "grouped queries",
    "grouped queries, native",
    "GRU",
    "highway",
    "Inception",
    "InstanceNorm",
    "inverted residual, squeeze-excite",
    "language model, tied embedding",
    "layer scale",
    "learnt queries",
    "LSTM",
    "matrix exponential over tokens",
    "MLP-Mixer",
    "packed attention, written out",
    "pixel unshuffle",
    "pixel unshuffle, then a kernel",
    "reshaped, pooled and interpolated",
    "residual CNN, padded shortcut",
    "residual CNN, projection shortcut",
    "residual CNN, two padded shortcuts",
    "residual mlp",
    "ResNeXt block",
    "RNN",
    "rotary attention",
    "rotary attention over a plane, but for one token",
    "rotary attention, norms of queries and keys",
    "shifted windows",
    "ShuffleNet unit",
    "ShuffleNet units",
    "siamese",
    "sliced weight over copies",
    "stream of sub-pixels",
    "sub-pixel convolution, then a kernel",
    "sum of padded windows",
    "SwiGLU, apart",
    "SwiGLU, packed by cat",
    "tokens filled",
    "tokens scattered along constant edges",
    "tokens with a weight each, gated",
    "transformed units",
    "transposed convolutions",
    "U-Net",
    "units beside more and fewer zeros",
    "units in padded pairs",
    "units in pairs, one padded",
    "units scattered in pairs",
    "units written between constants",
    "VGG",
    "weights by head",
}
"""Architectures that take long to capture and to write out; smaller ones have their layers."""

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
