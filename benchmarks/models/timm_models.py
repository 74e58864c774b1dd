"""The models of timm that `timm.txt` lists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from models.example import Example, Factory, example

LISTING = Path(__file__).with_name("timm.txt")
LARGEST = 60_000_000
"""Parameters of the largest model that is listed, unless it is the smallest of its module."""
SIDE, SMALLER = 256, (224, 256, 192)
"""Pictures larger than the first are replaced by the first of the others that the model takes."""
SAME = 0.03
"""Position embeddings of two sizes may make this much of a difference to the number of parameters."""
THOROUGH = re.compile(
    "vision_transformer|deit|swin|convnext|^efficientnet$|regnet|levit|maxxvit|mobilevit|edgenext|volo|xcit|beit"
    "|^eva$|hiera|mambaout|ghostnet|dla|hrnet|inception|nasnet|res2net|resnest|sknet|vovnet|nfnet"
)
"""Modules of which all models are listed, not only the smallest."""


def timm() -> dict[str, Factory]:
    """The smallest model of every module, and all models of some modules that are not too large."""
    lines = LISTING.read_text().splitlines() if LISTING.exists() else []
    return {name: _timm(name) for name in (line.split()[0] for line in lines if not line.startswith("#"))}


def _timm(name: str) -> Factory:
    def make() -> Example:
        from timm import create_model, models

        config = models.get_pretrained_cfg(name)
        channels, side, _ = config.input_size if config is not None else (3, SMALLER[0], SMALLER[0])
        for smaller in SMALLER if side > SIDE else ():
            options: tuple[dict[str, Any], ...] = ({"img_size": smaller}, {})
            for more in options:
                try:
                    model, images = create_model(name, **more).eval(), torch.randn(2, channels, smaller, smaller)
                    with torch.no_grad():
                        model(images)
                except Exception:  # The model has its own ways to refuse a size.
                    continue
                return example(model, images)
        return example(create_model(name), torch.randn(2, channels, side, side))

    return make


def write_listing() -> None:
    """Counts the parameters of all models of timm and writes `timm.txt`."""
    import timm
    from tqdm import tqdm

    counts: dict[str, dict[str, int]] = {}
    for module in tqdm(timm.list_modules()):
        counts[module] = {name: _count(name) for name in timm.list_models(module=module)}
    chosen: dict[str, int] = {}
    for module, models in counts.items():
        models = _one_of_each_size({n: c for n, c in models.items() if c})
        smallest = min(models, key=lambda n: models[n], default=None)
        for name, count in models.items():
            if name == smallest or (THOROUGH.search(module) and count < LARGEST):
                chosen[name] = count
    head = f"# timm {timm.__version__}: name, parameters. Written by benchmarks/zoo.py --list-timm\n"
    LISTING.write_text(head + "".join(f"{name} {count}\n" for name, count in sorted(chosen.items())))


def _one_of_each_size(models: dict[str, int]) -> dict[str, int]:
    """Without those that differ from another only in the size of the pictures, which ends the name."""
    kept: dict[str, int] = {}
    for name, count in sorted(models.items()):
        twins = [c for n, c in kept.items() if _sizeless(n) == _sizeless(name)]
        if not any(abs(c - count) < SAME * count for c in twins):
            kept[name] = count
    return kept


def _sizeless(name: str) -> str:
    return re.sub(r"_[1-9]\d{2}$", "", name)


def _count(name: str) -> int:
    """The number of parameters, 0 if the model cannot be built without storage."""
    from timm import create_model

    try:
        with torch.device("meta"):
            return sum(p.numel() for p in create_model(name).parameters())
    except Exception:  # Some models compute with their tensors when they are made.
        return 0
