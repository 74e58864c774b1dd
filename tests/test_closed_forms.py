"""Groups of full-size networks against what can be worked out by hand."""

from math import lgamma

import networkx as nx
import pytest
import torch

import fxmerge

IMAGE = torch.zeros(2, 3, 224, 224, device="meta")


def log_factorial(n: int) -> float:
    return lgamma(n + 1)


def symmetry_of(name: str) -> fxmerge.Symmetry:
    from torchvision.models import get_model

    with torch.device("meta"):
        model = get_model(name, weights=None)
    return fxmerge.find_symmetry(model, (IMAGE,))


@pytest.mark.slow
def test_vit_b_16() -> None:
    """The residual stream; in each of 12 layers 12 heads, in each head 64 dims of q and k and 64 of v; the MLP."""
    layer = log_factorial(12) + 24 * log_factorial(64) + log_factorial(3072)
    symmetry = symmetry_of("vit_b_16")
    assert symmetry.log_order() == pytest.approx(log_factorial(768) + 12 * layer, rel=1e-12)
    assert nx.is_directed_acyclic_graph(symmetry.graph)
    assert sorted(c.size for c in symmetry.classes if c.structure == "free") == [12] * 12 + [768] + [3072] * 12


@pytest.mark.slow
def test_resnet50() -> None:
    """The stem, the stream of each of four stages, and two inner layers in each of 3 + 4 + 6 + 3 blocks."""
    free = [64, 256, 512, 1024, 2048]
    for width, blocks in zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True):
        free += [width] * 2 * blocks
    symmetry = symmetry_of("resnet50")
    assert len(free) == 37
    assert sorted(c.size for c in symmetry.classes if c.structure != "pinned") == sorted(free)
    assert symmetry.log_order() == pytest.approx(sum(map(log_factorial, free)), rel=1e-12)


@pytest.mark.slow
def test_resnext50_has_groups_that_move_as_blocks() -> None:
    """As resnet50, but the two inner layers of a block are 32 groups of channels each, tied group by group."""
    free = log_factorial(64) + sum(map(log_factorial, (256, 512, 1024, 2048)))
    for width, blocks in zip((128, 256, 512, 1024), (3, 4, 6, 3), strict=True):
        free += blocks * (log_factorial(32) + 2 * 32 * log_factorial(width // 32))
    assert symmetry_of("resnext50_32x4d").log_order() == pytest.approx(free, rel=1e-12)
