"""Ops of torchvision: regions of interest are read from every channel alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxmerge.symmetry.labels import Labels, inert, pin, reduce
from fxmerge.symmetry.rules.registry import Site, rule


@rule("torchvision::roi_align", "torchvision::roi_pool")
def regions(at: Site, x: Labels | Tensor, boxes: Labels | Tensor, *args: Any, **kwargs: Any) -> Any:
    """From (batch, channels, height, width) and boxes of shape (regions, 5) to (regions, channels, height, width)."""
    reason = f"{at.name}: places told by the boxes"
    pin(at.units, at.labels(boxes), reason)
    channels = reduce(at.units, pin(at.units, at.labels(x), reason, [0, 2, 3]), [0, 2, 3], at.name)

    def read(shape: tuple[int, ...]) -> Labels:
        return at.join(channels.reshape((1, *channels.shape, 1, 1)), inert(shape, [0, 2, 3]), shape)

    return [read(shape) for shape in at.shape] if isinstance(at.shape, list) else read(at.shape)


@rule("torchvision::nms")
def suppression(at: Site, boxes: Labels | Tensor, scores: Labels | Tensor, *args: Any) -> Labels:
    """Which boxes are kept: places in a list."""
    for x in (boxes, scores):
        pin(at.units, at.labels(x), f"{at.name}: values become places")
    return inert(at.shape)
