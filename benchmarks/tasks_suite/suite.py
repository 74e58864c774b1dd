"""The networks of the benchmark, the data they learn, and how long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from tasks_suite import dense, images, text
from tasks_suite.images import EMBEDDING
from tasks_suite.networks import MLP, VGG, ConvNeXt, Mixer, ResNet20, UNet, group_norm
from tasks_suite.problem import Problem
from tasks_suite.sequences import GPT, LSTM, Llama, ViT

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "fashion": images.fashion,
    "digits": images.digits,
    "text": text.library,
    "dense": dense.dense,
}


@dataclass(frozen=True)
class Entry:
    """A network and how it is trained.

    Attributes:
        build: makes it, with random weights.
        data: what it learns; a key of `PROBLEMS`.
        steps: how many batches it is trained on.
        learning_rate: the largest; it rises and falls in one cycle.
        batch: how many inputs a batch has.
        seeds: how many pairs `benchmarks/tasks.py` trains; none of what only other benchmarks merge.
        weight_decay: of AdamW.
    """

    build: Callable[[], nn.Module]
    data: str
    steps: int
    learning_rate: float
    batch: int = 64
    seeds: int = 3
    weight_decay: float = 0.05


def _resnet(width: int, norm: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
    return partial(ResNet20, width, 2, norm, EMBEDDING)


def _vit(*, fused: bool) -> Callable[[], nn.Module]:
    return partial(ViT, 28, 4, 64, 3, 4, EMBEDDING, fused=fused)


_STAGES = ((32,), (64,), (128, 128))
_CHARACTERS = len(text.VOCABULARY)

NETWORKS: dict[str, Entry] = {
    "mlp": Entry(partial(MLP, 784, 512, EMBEDDING), "fashion", 1500, 1e-3),
    "mlp-2048": Entry(partial(MLP, 784, 2048, EMBEDDING), "fashion", 500, 5e-4, seeds=0),
    "vgg": Entry(partial(VGG, _STAGES, None, EMBEDDING), "fashion", 700, 2e-3),
    "vgg-bn": Entry(partial(VGG, _STAGES, nn.BatchNorm2d, EMBEDDING), "fashion", 600, 3e-3),
    "resnet20-1-bn": Entry(_resnet(1, nn.BatchNorm2d), "fashion", 700, 5e-3),
    "resnet20-2-bn": Entry(_resnet(2, nn.BatchNorm2d), "fashion", 500, 3e-3),
    "resnet20-4-bn": Entry(_resnet(4, nn.BatchNorm2d), "fashion", 500, 3e-3, seeds=1),
    "resnet20-1-gn": Entry(_resnet(1, group_norm), "fashion", 700, 5e-3),
    "resnet20-2-gn": Entry(_resnet(2, group_norm), "fashion", 500, 3e-3),
    "resnet20-4-gn": Entry(_resnet(4, group_norm), "fashion", 500, 3e-3, seeds=1),
    "vit-fused": Entry(_vit(fused=True), "fashion", 1000, 2e-3),
    "vit-separate": Entry(_vit(fused=False), "fashion", 1000, 2e-3),
    "convnext": Entry(partial(ConvNeXt, (32, 64), 2, EMBEDDING), "fashion", 600, 3e-3),
    "mixer": Entry(partial(Mixer, 28, 4, 64, 3, EMBEDDING), "fashion", 1000, 2e-3),
    "gpt": Entry(partial(GPT, _CHARACTERS, text.CONTEXT, 96, 2, 4), "text", 1200, 3e-3, batch=32),
    "gpt-tied": Entry(
        partial(GPT, _CHARACTERS, text.CONTEXT, 96, 2, 4, tied=True), "text", 1200, 3e-3, batch=32, seeds=1
    ),
    "llama": Entry(partial(Llama, _CHARACTERS, 96, 2, 4, 256), "text", 1200, 3e-3, batch=32),
    "llama-tied": Entry(partial(Llama, _CHARACTERS, 96, 2, 4, 256, tied=True), "text", 1200, 3e-3, batch=32, seeds=0),
    "experts-8": Entry(partial(Llama, _CHARACTERS, 96, 2, 4, 64, experts=8), "text", 1200, 3e-3, batch=32, seeds=0),
    "lstm": Entry(partial(LSTM, _CHARACTERS, 64, 192, 1), "text", 1200, 5e-3, batch=32),
    "unet-bn": Entry(partial(UNet, (24, 48, 96), nn.BatchNorm2d, dense.MAPS), "dense", 600, 3e-3),
    "unet-gn": Entry(partial(UNet, (24, 48, 96), group_norm, dense.MAPS), "dense", 600, 3e-3),
    "digits-mlp": Entry(partial(MLP, 64, 64, EMBEDDING), "digits", 300, 3e-3, seeds=1),
    "digits-vgg-bn": Entry(partial(VGG, ((16,), (32,)), nn.BatchNorm2d, EMBEDDING), "digits", 100, 1e-2, seeds=1),
    "digits-vgg-gn": Entry(partial(VGG, ((16,), (32,)), group_norm, EMBEDDING), "digits", 100, 1e-2, seeds=1),
    "digits-vit": Entry(partial(ViT, 8, 2, 32, 1, 4, EMBEDDING, fused=False), "digits", 100, 5e-3, seeds=1),
}

SHORT = ("digits-mlp", "digits-vgg-bn")
LONG = tuple(name for name, entry in NETWORKS.items() if entry.data != "digits" and entry.seeds)
