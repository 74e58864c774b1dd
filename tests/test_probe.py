"""Ops without a rule: what trials on their values find, against what their definitions say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d, roi_align

import fxmerge


@torch.library.custom_op("fxmerge_probe::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@torch.library.custom_op("fxmerge_probe::cumulate", mutates_args=())
def cumulate(x: Tensor) -> Tensor:
    return x.cumsum(-1).tanh()


@torch.library.custom_op("fxmerge_probe::dense", mutates_args=())
def dense(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x @ w.T + b).relu()


@torch.library.custom_op("fxmerge_probe::moments", mutates_args=())
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(1), x / x.std(1, keepdim=True)


@torch.library.custom_op("fxmerge_probe::scaled", mutates_args=())
def scaled(x: Tensor) -> Tensor:
    """Holds a constant of its own, which tells the last dimension apart."""
    return x * torch.arange(1, x.shape[-1] + 1)


@torch.library.custom_op("fxmerge_probe::rotated", mutates_args=())
def rotated(x: Tensor) -> Tensor:
    return x * (0.6 + 0.8j) / (1 + x.abs().square().sum(-1, keepdim=True))


rotated.register_fake(torch.empty_like)
attention.register_fake(lambda q, k, v: torch.empty_like(v))
cumulate.register_fake(torch.empty_like)
dense.register_fake(lambda x, w, b: x.new_empty((*x.shape[:-1], w.shape[0])))
moments.register_fake(lambda x: (x.new_empty((x.shape[0], *x.shape[2:])), torch.empty_like(x)))
scaled.register_fake(torch.empty_like)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(5, 36), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, 3, 4).permute(2, 0, 3, 1, 4)
        heads = torch.ops.fxmerge_probe.attention(q, k, v)
        return self.out(heads.transpose(1, 2).reshape(b, t, 12))  # type: ignore[no-any-return]


class Between(nn.Module):
    """An op between two layers."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op, self.a, self.b = op, nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(getattr(torch.ops.fxmerge_probe, self.op)(self.a(x)))  # type: ignore[no-any-return]


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(7, 3)
        self.weight, self.bias = nn.Parameter(torch.randn(7, 6)), nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.ops.fxmerge_probe.dense(self.a(x), self.weight, self.bias))  # type: ignore[no-any-return]


class Moments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        mean, rest = torch.ops.fxmerge_probe.moments(self.a(x))
        return self.b(mean) + self.c(rest).sum(1)  # type: ignore[no-any-return]


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(6, 5, dtype=torch.cfloat))
        self.b = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.ops.fxmerge_probe.rotated(x.to(torch.cfloat) @ self.a.mT).real)  # type: ignore[no-any-return]


class Deformable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.offset = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 18, 3, padding=1)
        self.deform, self.b = DeformConv2d(6, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.b(self.deform(x, self.offset(x)).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "shape", "sizes"),
    [
        (Attention(), (2, 7, 5), [3, 12, 12]),
        (Dense(), (2, 5), [6, 7]),
        (Moments(), (2, 4, 5), [6]),
        (Complex(), (2, 5), [6]),
        (Deformable(), (2, 3, 8, 8), [6, 8]),
    ],
)
def test_what_moves_together_is_found(model: nn.Module, shape: tuple[int, ...], sizes: list[int]) -> None:
    x = (torch.randn(shape),)
    symmetry = fxmerge.find_symmetry(model, x)
    assert len(symmetry.probed) == 1
    assert symmetry.unknown == {}
    assert sorted(c.size for c in symmetry.classes if c.structure != "pinned") == sizes
    assert symmetry.verify(model, x, trials=3).demoted == ()


@pytest.mark.parametrize("op", ["cumulate", "scaled"])
def test_what_depends_on_the_order_is_pinned(op: str) -> None:
    symmetry = fxmerge.find_symmetry(Between(op), (torch.randn(2, 5),))
    assert all(c.structure == "pinned" for c in symmetry.classes)
    assert f"{op}: probed" in {c.why for c in symmetry.classes}


def test_there_are_no_trials_without_values() -> None:
    symmetry = fxmerge.find_symmetry(Dense().to("meta"), (torch.zeros(2, 5, device="meta"),))
    assert symmetry.probed == {}
    assert symmetry.unknown == {"fxmerge_probe.dense.default": 1}


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Linear(24, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        pooled = roi_align(self.a(x), boxes, (2, 2))
        return self.c(self.b(pooled.flatten(1)).relu())  # type: ignore[no-any-return]


def test_channels_pass_through_regions_of_interest() -> None:
    model, boxes = Regions(), torch.tensor([[0, 0.0, 0, 4, 4], [1, 1, 1, 6, 6]])
    x = torch.randn(2, 3, 8, 8), boxes
    symmetry = fxmerge.find_symmetry(model, x)
    assert symmetry.log_order() == pytest.approx(torch.lgamma(torch.tensor([7.0, 9.0])).sum().item())
    assert symmetry.verify(model, x, trials=3).demoted == ()
