"""The models of torchvision, and the decoders of segmentation_models_pytorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.example import Example, Factory, example

BATCH = 2
SIZES = {"inception_v3": 299, "quantized_inception_v3": 299}
"""Side of the pictures where it is not 224."""
CLIPS = {"s3d": (16, 224), "mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224)}
"""Frames and side of the clips where they are not 16 and 112."""
UNTIMED = {"init_weights": False}
"""Initialisation of the two models that sample from a truncated normal takes longer than all else."""
INITIALISED_SLOWLY = ("googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3")

SMP = (
    *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus", "UPerNet"),
    "Segformer",
)
"""All but DPT, which takes only transformers as encoders."""


FEW_BOXES = {
    "box_score_thresh": 0.0,
    "box_detections_per_img": 8,
    "rpn_pre_nms_top_n_test": 50,
    "rpn_post_nms_top_n_test": 20,
}
FEW_ANCHORS = {"score_thresh": 0.0, "detections_per_img": 8, "topk_candidates": 20}
"""Options of detectors: a random one is sure of nothing, so every threshold is zero, lest its outputs are empty; there
are few boxes, since a trace along the path of the example writes out what is done for each."""


def torchvision() -> dict[str, Factory]:
    """All models of torchvision; the quantizable ones in floating point."""
    from torchvision import models

    kinds: dict[str, Any] = {
        "segmentation": models.segmentation,
        "detection": models.detection,
        "video": models.video,
        "optical_flow": models.optical_flow,
        "quantization": models.quantization,
    }
    kind = {name: k for k, module in kinds.items() for name in models.list_models(module=module)}
    return {name: _torchvision(name, kind.get(name, "classification")) for name in models.list_models()}


def _torchvision(name: str, kind: str) -> Factory:
    def make() -> Example:
        from torchvision.models import get_model

        options: dict[str, Any] = dict(UNTIMED) if name in INITIALISED_SLOWLY else {}
        if kind in ("segmentation", "detection"):
            options["weights_backbone"] = None
        if kind == "detection":
            options |= FEW_BOXES if "rcnn" in name else FEW_ANCHORS
        if kind == "quantization":
            options["quantize"] = False
        return example(get_model(name, weights=None, **options), *_inputs(name, kind))

    return make


def _inputs(name: str, kind: str) -> tuple[Any, ...]:
    size = SIZES.get(name, 224)
    frames, side = CLIPS.get(name, (16, 112))
    made: dict[str, Any] = {
        "detection": lambda: ([torch.rand(3, 256, 256) for _ in range(BATCH)],),
        "segmentation": lambda: (torch.randn(BATCH, 3, 128, 128),),
        "video": lambda: (torch.randn(BATCH, 3, frames, side, side),),
        "optical_flow": lambda: (torch.randn(BATCH, 3, 128, 128), torch.randn(BATCH, 3, 128, 128)),
    }
    default: tuple[Tensor, ...] = (torch.randn(BATCH, 3, size, size),)
    return made[kind]() if kind in made else default


def smp() -> dict[str, Factory]:
    """Every decoder of segmentation_models_pytorch, with a ResNet-18 as encoder."""
    models = {name: _smp(name, encoder_name="resnet18") for name in SMP}
    models["DPT"] = _smp("DPT", encoder_name="tu-vit_tiny_patch16_224", size=224)
    models["Unet scse"] = _smp("Unet", encoder_name="resnet18", decoder_attention_type="scse")
    models["Unet classifier"] = _smp("Unet", encoder_name="resnet18", aux_params={"classes": 4})
    return models


def _smp(name: str, size: int = 128, **options: Any) -> Factory:
    def make() -> Example:
        import segmentation_models_pytorch

        model = getattr(segmentation_models_pytorch, name)(encoder_weights=None, classes=3, **options)
        return example(model, torch.randn(BATCH, 3, size, size))

    return make
