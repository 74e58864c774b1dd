"""Ops that draw random numbers: these are other ones at each place and in each call."""

from __future__ import annotations

from typing import Any

import torch

from fxmerge.symmetry import mixing, weighing
from fxmerge.symmetry.labels import Labels, inert
from fxmerge.symmetry.rules.registry import Site, rule


def draws(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an op draws random numbers in this call: dropout and random slopes do so in training only."""
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    for i, argument in enumerate(target._schema.arguments):
        if argument.name in ("train", "training"):
            return bool(args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value))
    return True


@rule(
    *("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "native_dropout"),
    lifts="copies",
    mixes=True,
    weighs=True,
)
def dropout(at: Site, x: Labels, rate: float, train: bool | None) -> Any:
    """In training, every place is dropped or kept by itself."""
    if train and rate:
        at.mix(mixing.separate, x)
        at.weigh(weighing.still, x)
    shapes = at.shape if isinstance(at.shape, list) else [at.shape]
    y = at.join(x, inert(x.shape)) if train and rate else x
    return [y, inert(shapes[1])] if isinstance(at.shape, list) else y


@rule("rrelu", lifts="copies")
def rrelu(at: Site, x: Labels, *args: Any, **kwargs: Any) -> Labels:
    """In training, the slope of every place is drawn by itself."""
    return at.join(x, inert(x.shape)) if draws(at.target, (x, *args), kwargs) else x


@rule("rand_like", "randn_like", "randint_like")
def random(at: Site, *args: Any, **kwargs: Any) -> Labels:
    return inert(at.shape)


@rule("bernoulli", "normal", "multinomial")
def drawn(at: Site, *args: Any, **kwargs: Any) -> Labels:
    """Which numbers are drawn depends on the places of the operands."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, Labels):
            at.pin(x)
    return inert(at.shape)
