"""The models of the zoo, by family."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from models import diffusers_models, layers, timm_models, transformers_models, vision
from models.example import Example, Factory

FAMILIES: dict[str, tuple[str, Callable[[], dict[str, Factory]]]] = {
    "torch.nn": ("torch", layers.torch_nn),
    "torchvision": ("torchvision", vision.torchvision),
    "timm": ("timm", timm_models.timm),
    "transformers": ("transformers", transformers_models.transformers),
    "diffusers": ("diffusers", diffusers_models.diffusers),
    "smp": ("segmentation_models_pytorch", vision.smp),
}
"""For every family the package it needs, and what lists its models."""

__all__ = ["FAMILIES", "Example", "Factory", "find_factory", "is_installed", "list_models"]


def is_installed(family: str) -> bool:
    return find_spec(FAMILIES[family][0]) is not None


def list_models(family: str) -> list[str]:
    """The names of a family's models, as in `timm/resnet18`."""
    return [f"{family}/{name}" for name in FAMILIES[family][1]()]


def find_factory(name: str) -> Factory:
    family, _, rest = name.partition("/")
    return FAMILIES[family][1]()[rest]
