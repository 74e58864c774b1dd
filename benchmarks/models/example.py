"""What a factory of the zoo makes: a model with random weights, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]
"""Inputs by name: those that end in "ids" are tokens, those that end in "mask" are ones, others are normal."""

TOKENS = (3, 100)
"""Tokens are drawn from this range; those below are special in most configurations."""


class Example(NamedTuple):
    """A model in eval mode, and the arguments of its forward."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Factory = Callable[[], Example]


def example(model: nn.Module, *args: Any, **kwargs: Any) -> Example:
    return Example(model.eval(), args, kwargs)


def inputs(shapes: Shapes) -> dict[str, Tensor]:
    return {name: _input(name, shape) for name, shape in shapes.items()}


def _input(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith("ids"):
        return torch.randint(*TOKENS, shape)
    return torch.ones(shape, dtype=torch.int64) if name.endswith("mask") else torch.randn(shape)
