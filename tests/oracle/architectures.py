"""Tiny architectures of every kind, with sizes as distinct as they can be, so that mistakes show.

Every entry makes a model and example inputs. `tests/oracle/test_oracle.py` compares their inferred symmetry with the
exact one, so a model must stay small: some thousands of scalar operations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

Factory = Callable[[], tuple[nn.Module, tuple[Any, ...]]]

CASES: dict[str, Factory] = {}
"""Architectures whose symmetry is inferred exactly."""

INCOMPLETE: dict[str, tuple[Factory, str]] = {}
"""Architectures whose symmetry is inferred soundly but not completely, and what is missing."""


def case(name: str) -> Callable[[Factory], Factory]:
    def register(factory: Factory) -> Factory:
        CASES[name] = factory
        return factory

    return register


def incomplete(name: str, reason: str) -> Callable[[Factory], Factory]:
    def register(factory: Factory) -> Factory:
        INCOMPLETE[name] = factory, reason
        return factory

    return register


def image(channels: int, *size: int) -> tuple[Tensor]:
    return (torch.randn(1, channels, *size),)


def tokens(count: int, dims: int) -> tuple[Tensor]:
    return (torch.randn(1, count, dims),)


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)  # type: ignore[no-any-return, no-untyped-call]


class Permute(nn.Module):
    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


# ------------------------------------------------------------------------------------ MLPs


@case("mlp")
def mlp() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2)
    return nn.Sequential(*layers), (torch.randn(1, 3),)


class LayersUsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.down, self.up, self.head = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).relu()
        for _ in range(2):
            x = self.up(self.down(x).relu()).tanh()
        return self.head(x)  # type: ignore[no-any-return]


@case("bottleneck, layers used twice")
def layers_used_twice() -> tuple[nn.Module, tuple[Any, ...]]:
    return LayersUsedTwice(), (torch.randn(1, 3),)


@case("square layer used twice")
def square_layer_used_twice() -> tuple[nn.Module, tuple[Any, ...]]:
    square = nn.Linear(4, 4)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), square, nn.ReLU(), square, nn.ReLU(), nn.Linear(4, 2)), (
        torch.randn(1, 3),
    )


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.inner, self.bias = nn.Linear(3, 5), nn.Linear(5, 4), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(self.encoder(x).relu()).relu()
        return F.linear(F.linear(h, self.inner.weight.T), self.encoder.weight.T, self.bias)


@case("tied autoencoder")
def tied_autoencoder() -> tuple[nn.Module, tuple[Any, ...]]:
    return TiedAutoencoder(), (torch.randn(1, 3),)


@case("residual mlp")
def residual_mlp() -> tuple[nn.Module, tuple[Any, ...]]:
    blocks = [Residual(nn.Linear(6, n), nn.ReLU(), nn.Linear(n, 6)) for n in (5, 4)]
    return nn.Sequential(nn.Linear(3, 6), *blocks, nn.Linear(6, 2)), (torch.randn(1, 3),)


class Highway(nn.Module):
    def __init__(self, dims: int) -> None:
        super().__init__()
        self.gate, self.change = nn.Linear(dims, dims), nn.Linear(dims, dims)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).sigmoid()
        return gate * self.change(x).relu() + (1 - gate) * x  # type: ignore[no-any-return]


@case("highway")
def highway() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(nn.Linear(3, 4), Highway(4), Highway(4), nn.Linear(4, 2)), (torch.randn(1, 3),)


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.both, self.head = (
            nn.Linear(2, 4),
            nn.Linear(2, 5),
            nn.Bilinear(4, 5, 3),
            nn.Linear(3, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.both(self.left(x).relu(), self.right(x).relu()).relu())  # type: ignore[no-any-return]


@case("bilinear")
def bilinear() -> tuple[nn.Module, tuple[Any, ...]]:
    return Bilinear(), (torch.randn(1, 2),)


@case("weight norm")
def normed_weights() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = weight_norm(nn.Linear(3, 5)), nn.ReLU(), weight_norm(nn.Linear(5, 4)), nn.ReLU(), nn.Linear(4, 2)
    return nn.Sequential(*layers), (torch.randn(1, 3),)


class Siamese(nn.Module):
    """One encoder on two inputs, whose features lie side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([self.encoder(a), self.encoder(b)], dim=1))  # type: ignore[no-any-return]


@case("siamese")
def siamese() -> tuple[nn.Module, tuple[Any, ...]]:
    return Siamese(), (torch.randn(1, 3), torch.randn(1, 3))


class ComparedFeatures(nn.Module):
    """One encoder on two inputs, compared in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4))
        self.head = nn.Linear(12, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.encoder(a), self.encoder(b)
        return self.head(torch.cat([a * b, (a - b).abs(), torch.maximum(a, b)], dim=1))  # type: ignore[no-any-return]


@case("compared features")
def compared_features() -> tuple[nn.Module, tuple[Any, ...]]:
    return ComparedFeatures(), (torch.randn(1, 3), torch.randn(1, 3))


class DenseExperts(nn.Module):
    """A mixture of experts in which every expert counts, with their weights stacked."""

    def __init__(self, *, batched: bool) -> None:
        super().__init__()
        self.batched = batched
        self.inner, self.gate, self.head = nn.Linear(2, 4), nn.Linear(4, 3), nn.Linear(4, 2)
        self.up, self.down = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        gates = self.gate(x).softmax(-1)
        if self.batched:
            each = torch.bmm(torch.bmm(x.expand(3, -1, -1), self.up).relu(), self.down)
            mixed = (each * gates.T[:, :, None]).sum(0)
        else:
            h = torch.einsum("ti,eih->teh", x, self.up).relu()
            mixed = torch.einsum("teh,eho,te->to", h, self.down, gates)
        return self.head(x + mixed)  # type: ignore[no-any-return]


@case("experts by bmm")
def experts_by_bmm() -> tuple[nn.Module, tuple[Any, ...]]:
    return DenseExperts(batched=True), (torch.randn(2, 2),)


@case("experts by einsum")
def experts_by_einsum() -> tuple[nn.Module, tuple[Any, ...]]:
    return DenseExperts(batched=False), (torch.randn(2, 2),)


class Transformed(nn.Module):
    """A network whose hidden units are mixed by a matrix that is computed from them."""

    def __init__(self, add: str) -> None:
        super().__init__()
        self.add = add
        self.inner, self.pooled, self.head = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(3, 2)
        self.matrix = nn.Linear(2, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).relu()
        entries = self.matrix(self.pooled(x).amax(1).relu())
        if self.add == "entries":
            entries = entries + torch.eye(3).flatten().view(1, 9).repeat(len(x), 1)
        mixed = entries.view(-1, 3, 3)
        if self.add == "matrix":
            mixed = mixed + torch.eye(3)
        y = torch.bmm(x, mixed)
        return self.head((x + y if self.add == "units" else y).tanh())  # type: ignore[no-any-return]


@case("transformed units")
def transformed() -> tuple[nn.Module, tuple[Any, ...]]:
    return Transformed(""), (torch.randn(1, 2, 2),)


@incomplete("transformed units, beside an identity", "units that are pairs of units of one class are pinned")
def transformed_beside_identity() -> tuple[nn.Module, tuple[Any, ...]]:
    return Transformed("matrix"), (torch.randn(1, 2, 2),)


@incomplete("transformed units, beside an identity in one row", "units that are pairs of units of one class are pinned")
def transformed_beside_flat_identity() -> tuple[nn.Module, tuple[Any, ...]]:
    return Transformed("entries"), (torch.randn(1, 2, 2),)


@incomplete("transformed units, added to themselves", "units that are pairs of units of one class are pinned")
def transformed_and_added() -> tuple[nn.Module, tuple[Any, ...]]:
    return Transformed("units"), (torch.randn(1, 2, 2),)


class PointFeatures(nn.Module):
    """Features of points, which a matrix mixes that is computed by convolutions and a maximum over the points."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.local = nn.Conv1d(2, 3, 1), nn.Conv1d(3, 2, 1)
        self.norm, self.matrix, self.outer = nn.BatchNorm1d(3), nn.Linear(2, 9), nn.Conv1d(3, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.inner(x)).relu()
        pooled = self.local(x).relu().amax(2)
        mixing = (self.matrix(pooled) + torch.eye(3).view(1, 9)).view(-1, 3, 3)
        x = torch.bmm(x.transpose(2, 1), mixing).transpose(2, 1)
        return self.head(self.outer(x).amax(2))  # type: ignore[no-any-return]


@incomplete("features of points, transformed", "units that are pairs of units of one class are pinned")
def point_features() -> tuple[nn.Module, tuple[Any, ...]]:
    return PointFeatures(), (torch.randn(1, 2, 2),)


class WithDiagonal(nn.Module):
    """Weights and second moments to which a diagonal is added."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.square, self.head = nn.Linear(2, 4), nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x) @ (self.square + torch.eye(4))
        return self.head((x @ (x.mT @ x + 0.1 * torch.eye(4))).relu())  # type: ignore[no-any-return]


@case("diagonals are added")
def with_diagonal() -> tuple[nn.Module, tuple[Any, ...]]:
    return WithDiagonal(), (torch.randn(2, 2),)


class BiasedExperts(nn.Module):
    """Experts with biases, of which every token takes the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_bias = nn.Parameter(torch.randn(3, 2, 5)), nn.Parameter(torch.randn(3, 1, 5))
        self.down, self.down_bias = nn.Parameter(torch.randn(3, 5, 4)), nn.Parameter(torch.randn(3, 1, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.baddbmm(self.up_bias, x.expand(3, -1, -1), self.up).relu()
        return self.head((hidden @ self.down + self.down_bias).relu().mean(0))  # type: ignore[no-any-return]


@case("experts with biases")
def experts_with_biases() -> tuple[nn.Module, tuple[Any, ...]]:
    return BiasedExperts(), (torch.randn(2, 2),)


class Gated(nn.Module):
    """A gated linear unit, its two halves from one layer or from two."""

    def __init__(self, dims: int, hidden: int, *, packed: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dims)
        self.up = nn.ModuleList([nn.Linear(dims, 2 * hidden)] if packed else [nn.Linear(dims, hidden) for _ in "ab"])
        self.down = nn.Linear(hidden, dims, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.cat([layer(self.norm(x)) for layer in self.up], -1).chunk(2, -1)
        return x + self.down(F.silu(a) * b)  # type: ignore[no-any-return]


class GatedApart(Gated):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up
        return x + self.down(F.silu(gate(self.norm(x))) * up(self.norm(x)))  # type: ignore[no-any-return]


@case("SwiGLU, packed")
def swiglu_packed() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(nn.Linear(3, 4), Gated(4, 5, packed=True), nn.Linear(4, 2)), (torch.randn(1, 3),)


@case("SwiGLU, packed by cat")
def swiglu_cat() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(nn.Linear(3, 4), Gated(4, 5, packed=False), nn.Linear(4, 2)), (torch.randn(1, 3),)


@case("SwiGLU, apart")
def swiglu_apart() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(nn.Linear(3, 4), GatedApart(4, 5, packed=False), nn.Linear(4, 2)), (torch.randn(1, 3),)


# ------------------------------------------------------------------------------------ convolutions


@case("conv, BatchNorm, flatten")
def conv_flatten() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)
    return nn.Sequential(*layers), image(2, 3, 2)


@case("VGG")
def vgg() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(10, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2)),
    ), image(2, 4, 8)


@case("adaptive pooling")
def adaptive_pooling() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = nn.Conv2d(2, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(6, 5)
    return nn.Sequential(*layers), image(2, 3, 2)


@case("global pooling")
def global_pooling() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 2, stride=2), nn.ReLU(), nn.AvgPool2d(2, stride=1), nn.Conv2d(3, 5, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)),
    ), image(2, 6, 4)


@case("conv 1d")
def conv_1d() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(
        *(nn.Conv1d(2, 3, 3, padding=2, dilation=2), nn.BatchNorm1d(3), nn.ReLU(), nn.MaxPool1d(2)),
        *(nn.Conv1d(3, 4, 2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2)),
    ), image(2, 7)


@case("conv 3d")
def conv_3d() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(
        *(nn.Conv3d(2, 3, (1, 2, 2)), nn.BatchNorm3d(3), nn.ReLU(), nn.MaxPool3d((2, 1, 1))),
        *(nn.Conv3d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)),
    ), image(2, 2, 3, 3)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut: the identity, a projection, or zero-padded channels."""

    def __init__(self, rows: int, hidden: int, columns: int, shortcut: str) -> None:
        super().__init__()
        self.stride = 1 if shortcut == "identity" else 2
        self.conv1, self.bn1 = nn.Conv2d(rows, hidden, 3, self.stride, 1, bias=False), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = nn.Conv2d(hidden, columns, 1, bias=False), nn.BatchNorm2d(columns)
        self.shortcut: nn.Module = nn.Identity()
        if shortcut == "projection":
            self.shortcut = nn.Sequential(nn.Conv2d(rows, columns, 1, 2, bias=False), nn.BatchNorm2d(columns))
        self.padding = (1, columns - rows - 1) if shortcut == "padding" else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        beside = self.shortcut(x)
        if self.padding is not None:
            beside = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *self.padding))
        return (y + beside).relu()  # type: ignore[no-any-return]


def residual_cnn(*blocks: nn.Module, out: int) -> tuple[nn.Module, tuple[Any, ...]]:
    stem = nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(out, 3)), image(2, 4, 2)


@case("residual CNN")
def residual_identity() -> tuple[nn.Module, tuple[Any, ...]]:
    return residual_cnn(ResidualBlock(4, 3, 4, "identity"), ResidualBlock(4, 5, 4, "identity"), out=4)


@case("residual CNN, projection shortcut")
def residual_projection() -> tuple[nn.Module, tuple[Any, ...]]:
    return residual_cnn(ResidualBlock(4, 3, 6, "projection"), ResidualBlock(6, 5, 6, "identity"), out=6)


@case("residual CNN, padded shortcut")
def residual_padding() -> tuple[nn.Module, tuple[Any, ...]]:
    return residual_cnn(ResidualBlock(4, 3, 8, "padding"), ResidualBlock(8, 5, 8, "identity"), out=8)


@case("residual CNN, two padded shortcuts")
def residual_paddings() -> tuple[nn.Module, tuple[Any, ...]]:
    return residual_cnn(ResidualBlock(4, 3, 7, "padding"), ResidualBlock(7, 5, 11, "padding"), out=11)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()  # type: ignore[no-any-return]


@case("inverted residual, squeeze-excite")
def inverted_residual() -> tuple[nn.Module, tuple[Any, ...]]:
    block = Residual(
        *(nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(5), nn.SiLU()),
        *(nn.Conv2d(5, 5, 3, padding=1, groups=5, bias=False), nn.BatchNorm2d(5), nn.SiLU(), SqueezeExcite(5, 4)),
        *(nn.Conv2d(5, 3, 1, bias=False), nn.BatchNorm2d(3)),
    )
    return nn.Sequential(nn.Conv2d(2, 3, 1), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 6)), image(
        2, 3, 2
    )


@case("depthwise multiplier")
def depthwise_multiplier() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 6, (2, 1), groups=3), nn.ReLU(), nn.Conv2d(6, 4, 1)
    return nn.Sequential(*layers), image(2, 3, 2)


@case("grouped convolutions")
def grouped_convolutions() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, (1, 2), groups=2), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)),
    ), image(3, 2, 3)


@case("ResNeXt block")
def resnext() -> tuple[nn.Module, tuple[Any, ...]]:
    block = Residual(
        *(nn.Conv2d(5, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, (1, 3), padding=(0, 1), groups=3)),
        *(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5)),
    )
    return nn.Sequential(nn.Conv2d(2, 5, 1), nn.ReLU(), block, nn.ReLU(), nn.Conv2d(5, 3, 1)), image(2, 2, 3)


@incomplete(
    "groups of different sizes",
    "blocks that overlap irregularly stay where they are; what is missing is the reflection that exchanges them",
)
def incommensurate_groups() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 12, 1, groups=2), nn.ReLU()),
        *(nn.Conv2d(12, 6, 1, groups=3), nn.ReLU(), nn.Conv2d(6, 3, 1)),
    ), image(2, 2, 1)


class GroupedInputs(nn.Module):
    """A convolution of which one group sees inputs, which stay where they are, and the other one features."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.grouped, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(6, 8, (1, 2), groups=2), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.grouped(torch.cat([x, self.inner(x).relu()], dim=1)).relu())  # type: ignore[no-any-return]


@case("grouped convolution of inputs and features")
def grouped_inputs() -> tuple[nn.Module, tuple[Any, ...]]:
    return GroupedInputs(), image(3, 1, 3)


@case("channel shuffle")
def channel_shuffle() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2), nn.ChannelShuffle(2), nn.ReLU()),
        *(nn.Conv2d(6, 9, 1, groups=3), nn.ReLU(), nn.Conv2d(9, 5, 1)),
    ), image(2, 2, 1)


class ShuffleUnit(nn.Module):
    def __init__(self, half: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *(nn.Conv2d(half, half, 1), nn.BatchNorm2d(half), nn.ReLU()),
            *(nn.Conv2d(half, half, (1, 3), padding=(0, 1), groups=half), nn.BatchNorm2d(half)),
            *(nn.Conv2d(half, half, 1), nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        x = torch.cat([kept, self.branch(changed)], dim=1)
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


@case("ShuffleNet unit")
def shuffle_unit() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), ShuffleUnit(3), nn.Conv2d(6, 4, 1)), image(2, 1, 3)


@case("ShuffleNet units")
def shuffle_units() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = nn.Conv2d(2, 8, 1), nn.ReLU(), ShuffleUnit(4), ShuffleUnit(4), ShuffleUnit(4), nn.Conv2d(8, 3, 1)
    return nn.Sequential(*layers), image(2, 1, 2)


class DenseLayer(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(rows), nn.Conv2d(rows, columns, (1, 3), padding="same", bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.norm(x).relu())], dim=1)


@case("DenseNet")
def densenet() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 1), DenseLayer(4, 3), DenseLayer(7, 5), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 6, 1), nn.AvgPool2d((1, 2)), DenseLayer(6, 2), nn.Flatten(), nn.Linear(8, 3)),
    ), image(2, 1, 2)


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Conv2d(3, 4, 1)
        self.wide = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 5, (1, 3), padding=(0, 1)))
        self.pool = nn.Sequential(nn.MaxPool2d((1, 3), 1, (0, 1)), nn.Conv2d(3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.point(x), self.wide(x), self.pool(x)], dim=1).relu()


@case("Inception")
def inception() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), Inception(), nn.Conv2d(11, 6, 1)), image(2, 1, 3)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.inner = nn.Conv2d(2, 3, (1, 3), padding=(0, 1)), nn.Conv2d(3, 5, 1)
        self.up = nn.ConvTranspose2d(5, 4, 2, stride=2)
        self.decoder, self.head = nn.Conv2d(7, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.encoder(x).relu()
        y = self.up(self.inner(F.max_pool2d(skip, 2)).relu())
        return self.head(self.decoder(torch.cat([skip, y], dim=1)).relu())  # type: ignore[no-any-return]


@case("U-Net")
def unet() -> tuple[nn.Module, tuple[Any, ...]]:
    return UNet(), image(2, 2, 4)


@case("transposed convolutions")
def transposed_convolutions() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(
        *(nn.ConvTranspose2d(3, 4, (1, 3), stride=(1, 2), padding=(0, 1), output_padding=(0, 1)), nn.BatchNorm2d(4)),
        *(nn.ReLU(), nn.ConvTranspose2d(4, 6, 1, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 2, (2, 1))),
    ), image(3, 1, 2)


@case("upsampling")
def upsampling() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(3, 4, (1, 2)), nn.ReLU()),
        *(nn.Upsample(size=(2, 2), mode="bilinear"), nn.Conv2d(4, 5, 1)),
    ), image(2, 1, 2)


@case("pixel shuffle")
def pixel_shuffle() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(
        *(nn.Conv2d(2, 5, 1), nn.ReLU(), nn.Conv2d(5, 12, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(3, 2, 1)),
    ), image(2, 1, 2)


@case("sub-pixel convolution, then a kernel")
def sub_pixel() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(nn.Conv2d(2, 8, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(2, 3, (2, 1))), image(2, 2, 1)


class SubPixelStream(nn.Module):
    """A stream of finer images: what comes in is added to channels that were places, and read by a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.up, self.outer = nn.Conv2d(2, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 3, (2, 1))
        self.scale = nn.Parameter(torch.randn(1, 2, 1, 1))
        self.skip, self.outer2 = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, (1, 2))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.skip(y) + self.up(self.inner(x)) * self.scale
        return self.outer(z), self.outer2(z)


@case("stream of sub-pixels")
def sub_pixel_stream() -> tuple[nn.Module, tuple[Any, ...]]:
    return SubPixelStream(), (torch.randn(1, 2, 1, 2), torch.randn(1, 1, 2, 4))


@case("pixel unshuffle, then a kernel")
def pixel_unshuffle_and_kernel() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = nn.Conv2d(2, 3, 1), nn.ReLU(), nn.PixelUnshuffle(2), nn.Conv2d(12, 3, (1, 2)), nn.ReLU()
    return nn.Sequential(*layers, nn.Conv2d(3, 2, 1)), image(2, 2, 4)


@case("decoder that begins with a reshape")
def reshaping_decoder() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = nn.Linear(2, 24), nn.ReLU(), nn.Unflatten(1, (4, 2, 3)), nn.BatchNorm2d(4), nn.Conv2d(4, 2, (1, 2))
    return nn.Sequential(*layers), (torch.randn(1, 2),)


@case("decoder that begins with a reshape and a transposed convolution")
def transposed_decoder() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = nn.Unflatten(1, (3, 1, 2)), nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 1, (1, 2))
    return nn.Sequential(nn.Linear(2, 6), *layers), (torch.randn(1, 2),)


@case("decoder with channels last")
def decoder_with_channels_last() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = nn.Linear(2, 18), nn.Unflatten(1, (3, 2, 3)), Permute(0, 3, 1, 2), nn.Tanh(), nn.Conv2d(3, 2, (2, 1))
    return nn.Sequential(*layers), (torch.randn(1, 2),)


@case("decoder with tokens, read along time")
def decoder_of_tokens() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = nn.Linear(2, 12), nn.Unflatten(1, (4, 3)), nn.LayerNorm(3), Permute(0, 2, 1), nn.Conv1d(3, 2, 2, padding=1)
    return nn.Sequential(*layers), (torch.randn(1, 2),)


@case("reshaped, pooled and interpolated")
def reshaped_and_pooled() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = nn.Linear(2, 27), nn.Unflatten(1, (3, 3, 3)), nn.MaxPool2d(2, 1), nn.Upsample(size=(3, 3), mode="bilinear")
    return nn.Sequential(*layers, nn.Conv2d(3, 1, (1, 2)), nn.AvgPool2d((2, 1), 1)), (torch.randn(1, 2),)


class Halves(nn.Module):
    """A function of both halves of the channels: a simple gate, or a maxout."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(*x.chunk(2, 1))


@case("simple gate")
def simple_gate() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(nn.Conv2d(2, 6, 1), Halves(torch.mul), nn.Conv2d(3, 2, (1, 2))), image(2, 1, 3)


@case("maxout")
def maxout() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(nn.Linear(2, 6), Halves(torch.maximum), nn.Linear(3, 2)), (torch.randn(1, 2),)


@case("pooled units")
def pooled_units() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(nn.Linear(2, 6), nn.MaxPool1d(2), nn.Linear(3, 2)), tokens(2, 2)


def _windows_over_units(name: str, width: int, *layers: nn.Module, out: int) -> None:
    """A case with windows that overlap along hidden units, of which the oracle says what may be reversed."""
    case(name)(
        lambda: (
            nn.Sequential(nn.Linear(2, width), *copy.deepcopy(layers), nn.Linear(out, 3), nn.ReLU(), nn.Linear(3, 1)),
            tokens(1, 2),
        )
    )


_windows_over_units("a convolution along units", 4, nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Conv1d(2, 1, 2), out=2)
_windows_over_units("a strided convolution along units", 5, nn.Conv1d(1, 1, 3, stride=2), out=2)
_windows_over_units("a dilated convolution along padded units", 5, nn.Conv1d(1, 1, 3, padding=2, dilation=2), out=5)
_windows_over_units("a convolution padded more at one end", 4, nn.Conv1d(1, 1, 2, padding="same"), out=4)
_windows_over_units("a convolution that keeps the number of units", 4, nn.Conv1d(1, 1, 3, padding="same"), out=4)
_windows_over_units("a transposed convolution along units", 3, nn.ConvTranspose1d(1, 1, 3, 2, 1), out=5)
_windows_over_units("a transposed convolution with more at one end", 3, nn.ConvTranspose1d(1, 1, 3, 2, 1, 1), out=6)
_windows_over_units("pooling along units", 4, nn.MaxPool1d(2, 1), out=3)


@case("a convolution along units in two dimensions")
def windows_over_two_kinds_of_units() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = nn.Linear(2, 3), Permute(0, 1, 3, 2), nn.Linear(2, 4), nn.Conv2d(1, 1, 2), nn.Flatten(), nn.Linear(6, 1)
    return nn.Sequential(*layers), image(1, 2, 2)


@case("pixel unshuffle")
def pixel_unshuffle() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.ReLU(), nn.PixelUnshuffle(2), nn.Conv2d(12, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 1)
    ), image(2, 2, 2)


@case("GroupNorm")
def group_norm() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = nn.Conv2d(2, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.GroupNorm(2, 4), nn.SiLU()
    return nn.Sequential(*layers, nn.Conv2d(4, 5, 1)), image(2, 1, 3)


@incomplete("GroupNorms of different sizes", "as for groups of different sizes")
def group_norms() -> tuple[nn.Module, tuple[Any, ...]]:
    blocks = [Residual(nn.GroupNorm(groups, 12), nn.ReLU(), nn.Conv2d(12, 12, 1)) for groups in (2, 3)]
    return nn.Sequential(nn.Conv2d(2, 12, 1), *blocks, nn.Conv2d(12, 5, 1)), image(2, 1, 2)


@case("InstanceNorm")
def instance_norm() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = nn.Conv2d(2, 4, 1), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.InstanceNorm2d(5)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(15, 3)), image(2, 1, 3)


class ConvNeXtBlock(nn.Module):
    def __init__(self, dims: int, hidden: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(dims, dims, (1, 3), padding=(0, 1), groups=dims), nn.LayerNorm(dims)
        self.up, self.down = nn.Linear(dims, hidden), nn.Linear(hidden, dims)
        self.scale = nn.Parameter(torch.randn(dims))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


@case("ConvNeXt block")
def convnext() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(nn.Conv2d(2, 4, 1), ConvNeXtBlock(4, 5), nn.Conv2d(4, 3, 1)), image(2, 1, 3)


# ------------------------------------------------------------------------------------ attention


@case("encoder layer, post-norm")
def encoder_post_norm() -> tuple[nn.Module, tuple[Any, ...]]:
    layer = nn.TransformerEncoderLayer(6, 2, 5, batch_first=True)
    return nn.Sequential(nn.Linear(3, 6), layer, nn.Linear(6, 4)), tokens(2, 3)


@case("encoder layer, pre-norm")
def encoder_pre_norm() -> tuple[nn.Module, tuple[Any, ...]]:
    layer = nn.TransformerEncoderLayer(6, 3, 5, batch_first=True, norm_first=True, activation="gelu")
    return nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(6, 3)), tokens(2, 4)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.target, self.source = nn.Linear(3, 4), nn.Linear(2, 4)
        self.layer, self.head = nn.TransformerDecoderLayer(4, 2, 5, batch_first=True), nn.Linear(4, 2)

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        mask = torch.full((3, 3), -torch.inf).triu(1)
        y = self.layer(self.target(target), self.source(source), tgt_mask=mask)
        return self.head(y)  # type: ignore[no-any-return]


@case("decoder layer")
def decoder() -> tuple[nn.Module, tuple[Any, ...]]:
    return Decoder(), (torch.randn(1, 3, 3), torch.randn(1, 2, 2))


class ThreeStreams(nn.Module):
    """Attention with queries, keys and values from three streams."""

    def __init__(self, keys: int, values: int) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(2, 6), nn.Linear(2, keys), nn.Linear(3, values)
        self.attention = nn.MultiheadAttention(6, 2, kdim=keys, vdim=values, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        y = self.attention(self.query(query), self.key(key), self.value(value), need_weights=False)[0]
        return self.head(y.relu())  # type: ignore[no-any-return]


@case("attention, three streams of one width")
def three_streams() -> tuple[nn.Module, tuple[Any, ...]]:
    return ThreeStreams(6, 6), (torch.randn(1, 2, 2), torch.randn(1, 3, 2), torch.randn(1, 3, 3))


@case("attention, three streams of three widths")
def three_widths() -> tuple[nn.Module, tuple[Any, ...]]:
    return ThreeStreams(4, 5), (torch.randn(1, 2, 2), torch.randn(1, 3, 2), torch.randn(1, 3, 3))


class PackedAttention(nn.Module):
    """Queries, keys and values from one layer, unbound after a reshape."""

    def __init__(self, dims: int, heads: int, *, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.out = nn.Linear(dims, 3 * dims, bias=False), nn.Linear(dims, dims)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT * d**-0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, d))  # type: ignore[no-any-return]


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 4, (1, 2), stride=(1, 2))
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 3, 4))
        self.attention = Residual(nn.LayerNorm(4), PackedAttention(4, 2))
        self.mlp = Residual(nn.LayerNorm(4), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.mlp(self.attention(x)))[:, 0])  # type: ignore[no-any-return]


@case("ViT")
def vit() -> tuple[nn.Module, tuple[Any, ...]]:
    return ViT(), image(2, 1, 4)


@case("packed attention, written out")
def packed_attention() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(nn.Linear(2, 6), PackedAttention(6, 2, fused=False), nn.Linear(6, 4)), tokens(3, 2)


class LayerScale(nn.Module):
    def __init__(self, dims: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(dims))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@case("layer scale")
def layer_scale() -> tuple[nn.Module, tuple[Any, ...]]:
    block = Residual(nn.LayerNorm(6), PackedAttention(6, 3), LayerScale(6))
    return nn.Sequential(nn.Linear(2, 6), block, nn.Linear(6, 4)), tokens(2, 2)


class GroupedQueries(nn.Module):
    """Four query heads on two key and value heads."""

    def __init__(self, *, native: bool) -> None:
        super().__init__()
        self.native = native
        self.inner, self.q, self.k, self.v = nn.Linear(2, 5), nn.Linear(5, 8), nn.Linear(5, 4), nn.Linear(5, 6)
        self.out, self.head = nn.Linear(12, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        b, n, _ = h.shape
        q, k, v = (p(h).view(b, n, heads, -1).transpose(1, 2) for p, heads in ((self.q, 4), (self.k, 2), (self.v, 2)))
        if not self.native:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.native)
        return self.head(h + self.out(y.transpose(1, 2).reshape(b, n, 12)))  # type: ignore[no-any-return]


@case("grouped queries")
def grouped_queries() -> tuple[nn.Module, tuple[Any, ...]]:
    return GroupedQueries(native=False), tokens(3, 2)


@case("grouped queries, native")
def grouped_queries_native() -> tuple[nn.Module, tuple[Any, ...]]:
    return GroupedQueries(native=True), tokens(2, 2)


class RotaryAttention(nn.Module):
    """Attention with rotary positions (both halves rotated), and norms shared by all heads."""

    def __init__(self, *, norms: bool, rotary: bool) -> None:
        super().__init__()
        self.rotary = rotary
        self.inner, self.head = nn.Linear(2, 5), nn.Linear(5, 3)
        self.q, self.k, self.v = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(5, 6)
        self.out = nn.Linear(6, 5)
        self.q_norm, self.k_norm = (nn.RMSNorm(4) if norms else nn.Identity() for _ in "qk")

    def rotate(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2])[:, None] * torch.tensor([1.0, 0.1])
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-b, a], dim=-1) * sin

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        b, n, _ = h.shape
        q, k, v = (p(h).view(b, n, 2, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = self.rotate(q), self.rotate(k)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.head(h + self.out(y.transpose(1, 2).reshape(b, n, 6)))  # type: ignore[no-any-return]


@case("rotary attention")
def rotary() -> tuple[nn.Module, tuple[Any, ...]]:
    return RotaryAttention(norms=False, rotary=True), tokens(3, 2)


class SinkAttention(RotaryAttention):
    """Every head has a score beside those of the keys, to which no value belongs."""

    def __init__(self) -> None:
        super().__init__(norms=False, rotary=False)
        self.sinks = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        b, n, _ = h.shape
        q, k, v = (p(h).view(b, n, 2, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        sinks = self.sinks.view(1, 2, 1, 1).expand(b, -1, n, -1)
        weights = torch.cat([q @ k.mT, sinks], -1).softmax(-1)[..., :-1]
        return self.head(h + self.out((weights @ v).transpose(1, 2).reshape(b, n, 6)))  # type: ignore[no-any-return]


@case("attention with sinks")
def sinks() -> tuple[nn.Module, tuple[Any, ...]]:
    return SinkAttention(), tokens(2, 2)


class PartlyRotaryAttention(RotaryAttention):
    """The first token is left as it is. The others lie on a plane: each pair of dims turns along one coordinate."""

    def rotate(self, x: Tensor) -> Tensor:
        places = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        cos, sin = places.cos().repeat(1, 2), places.sin().repeat(1, 2)
        first, rest = x[:, :, :1], x[:, :, 1:]
        a, b = rest.chunk(2, dim=-1)
        return torch.cat([first, rest * cos + torch.cat([-b, a], dim=-1) * sin], dim=2)


@case("rotary attention over a plane, but for one token")
def partly_rotary() -> tuple[nn.Module, tuple[Any, ...]]:
    return PartlyRotaryAttention(norms=False, rotary=True), tokens(4, 2)


@case("attention, norms of queries and keys")
def query_norms() -> tuple[nn.Module, tuple[Any, ...]]:
    return RotaryAttention(norms=True, rotary=False), tokens(2, 2)


@case("rotary attention, norms of queries and keys")
def rotary_norms() -> tuple[nn.Module, tuple[Any, ...]]:
    return RotaryAttention(norms=True, rotary=True), tokens(3, 2)


@case("MLP-Mixer")
def mixer() -> tuple[nn.Module, tuple[Any, ...]]:
    across = Residual(nn.LayerNorm(4), Permute(0, 2, 1), nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3), Permute(0, 2, 1))
    along = Residual(nn.LayerNorm(4), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
    return nn.Sequential(nn.Linear(2, 4), across, along, nn.Linear(4, 2)), tokens(3, 2)


class ShiftedWindows(nn.Module):
    """Attention inside of shifted windows of 1 x 2 places, with a learnt bias for every relative position."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.qkv, self.out, self.head = nn.Linear(2, 4), nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 3)
        self.table = nn.Parameter(torch.randn(3, 2))
        self.register_buffer("index", torch.arange(2)[:, None] - torch.arange(2) + 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        b, h, w, d = x.shape
        windows = x.roll((0, -1), (1, 2)).view(b, h, w // 2, 2, d).reshape(-1, 2, d)
        q, k, v = self.qkv(windows).view(-1, 2, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(2, 2, 2).permute(2, 0, 1)
        y = (q @ k.mT + bias).softmax(-1) @ v
        y = self.out(y.transpose(1, 2).reshape(-1, 2, d)).view(b, h, w, d).roll((0, 1), (1, 2))
        return self.head(x + y)  # type: ignore[no-any-return]


@case("shifted windows")
def shifted_windows() -> tuple[nn.Module, tuple[Any, ...]]:
    return ShiftedWindows(), (torch.randn(1, 1, 4, 2),)


class LanguageModel(nn.Module):
    """A causal language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        x = self.words(ids) + self.places(torch.arange(n))
        return self.head(self.norm(self.block(x, torch.full((n, n), -torch.inf).triu(1))))  # type: ignore[no-any-return]


@case("language model, tied embedding")
def language_model() -> tuple[nn.Module, tuple[Any, ...]]:
    return LanguageModel(), (torch.tensor([[1, 5, 2]]),)


class WeightsByHead(nn.Module):
    """Attention with three-dimensional weights (heads, dims, head dims)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(2, 5), nn.Linear(5, 4)
        self.q, self.k = nn.Parameter(torch.randn(3, 5, 2)), nn.Parameter(torch.randn(3, 5, 2))
        self.v, self.out = nn.Parameter(torch.randn(3, 5, 4)), nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        q, k, v = (torch.einsum("bnd,hdk->bhnk", x, w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bhqk,bhnk->bhqn", q, k).softmax(-1)
        return self.head(x + torch.einsum("bhqn,bhnk,hkd->bqd", weights, v, self.out))  # type: ignore[no-any-return]


@case("weights by head")
def weights_by_head() -> tuple[nn.Module, tuple[Any, ...]]:
    return WeightsByHead(), tokens(2, 2)


class BiasByHead(nn.Module):
    """Attention whose queries get a bias of shape (heads, head dims), and an output weight of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.qk, self.v, self.head = nn.Linear(2, 5), nn.Linear(5, 12), nn.Linear(5, 9), nn.Linear(5, 4)
        self.bias, self.out = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3, 3, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        b, n, _ = x.shape
        q, k = self.qk(x).view(b, n, 2, 3, 2).unbind(2)
        weights = torch.einsum("bqhk,bnhk->bhqn", q + self.bias, k).softmax(-1)
        y = torch.einsum("bhqn,bnhk->bqhk", weights, self.v(x).view(b, n, 3, 3))
        return self.head(x + torch.einsum("bqhk,hkd->bqd", y, self.out))  # type: ignore[no-any-return]


@case("bias by head")
def bias_by_head() -> tuple[nn.Module, tuple[Any, ...]]:
    return BiasByHead(), tokens(2, 2)


class JointAxes(nn.Module):
    """Features that one layer makes as one axis, and the next one takes as two."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(3, 6), nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bhk,hkd->bd", self.inner(x).relu().view(-1, 2, 3), self.out)


@incomplete(
    "one axis as two", "the six features can be exchanged at will, which no permutations of the two axes express"
)
def joint_axes() -> tuple[nn.Module, tuple[Any, ...]]:
    return JointAxes(), (torch.randn(1, 3),)


class CrossCovariance(nn.Module):
    """Attention between the dimensions of a head, with a temperature for every head."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.qkv, self.out, self.head = nn.Linear(3, 6), nn.Linear(6, 18), nn.Linear(6, 6), nn.Linear(6, 4)
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, 3).permute(2, 0, 3, 4, 1).unbind(0)
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature).softmax(-1)
        return self.head(x + self.out((weights @ v).permute(0, 3, 1, 2).reshape(b, n, d)))  # type: ignore[no-any-return]


@case("cross-covariance attention")
def cross_covariance() -> tuple[nn.Module, tuple[Any, ...]]:
    return CrossCovariance(), tokens(2, 3)


class AttentionPooling(nn.Module):
    """A learnt query for every one of two heads pools all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.query = nn.Linear(2, 6), nn.Parameter(torch.randn(2, 1, 3))
        self.key, self.value, self.head = nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).relu()
        b, n, _ = x.shape
        k, v = (p(x).view(b, n, 2, -1).transpose(1, 2) for p in (self.key, self.value))
        return self.head(((self.query @ k.mT).softmax(-1) @ v).flatten(1))  # type: ignore[no-any-return]


@case("attention pooling")
def attention_pooling() -> tuple[nn.Module, tuple[Any, ...]]:
    return AttentionPooling(), tokens(3, 2)


class LearntQueries(nn.Module):
    """Learnt queries that are exchangeable, since their outputs are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.inner, self.head = nn.Parameter(torch.randn(1, 3, 4)), nn.Linear(2, 4), nn.Linear(4, 5)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        y = self.attention(self.queries.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0]
        return self.head(y.mean(1))  # type: ignore[no-any-return]


@case("learnt queries")
def learnt_queries() -> tuple[nn.Module, tuple[Any, ...]]:
    return LearntQueries(), tokens(2, 2)


# ------------------------------------------------------------------------------------ recurrence


class Recurrent(nn.Module):
    def __init__(self, cell: nn.RNNBase) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(cell.hidden_size, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])  # type: ignore[no-any-return]


@case("RNN")
def rnn() -> tuple[nn.Module, tuple[Any, ...]]:
    return Recurrent(nn.RNN(3, 4, num_layers=2, batch_first=True)), tokens(2, 3)


@case("LSTM")
def lstm() -> tuple[nn.Module, tuple[Any, ...]]:
    return Recurrent(nn.LSTM(3, 4, batch_first=True)), tokens(2, 3)


@case("GRU")
def gru() -> tuple[nn.Module, tuple[Any, ...]]:
    return Recurrent(nn.GRU(3, 4, batch_first=True)), tokens(2, 3)


# ------------------------------------------------------------------------------------ constant places


class Between(nn.Module):
    """A layer, what is done with its units, and a layer."""

    def __init__(
        self, op: Callable[[Tensor], Tensor], before: nn.Module | None = None, after: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.a = nn.Linear(2, 4) if before is None else before
        self.b = nn.Linear(4, 2) if after is None else after
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.op(self.a(x)))  # type: ignore[no-any-return]


def over_channels(op: Callable[[Tensor], Tensor]) -> Between:
    return Between(op, nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1))


def between(name: str, op: Callable[[Tensor], Tensor], dims: int = 2, after: int = 4) -> None:
    """A case of an op between two linear layers, on two or three tokens."""
    shape = (2, 2) if dims == 2 else (1, 3, 2)
    CASES[name] = lambda: (Between(op, after=nn.Linear(after, 2)), (torch.randn(shape),))


def negative_ones_cut(h: Tensor) -> Tensor:
    h = h.clone()
    h[h < 0] = 0
    return h


def rows_replaced(h: Tensor) -> Tensor:
    h = h.clone()
    h[h.sum(-1) < 0] = 1.0
    return h


def some_written_over(h: Tensor) -> Tensor:
    h = h.sin() + h
    h[:, torch.tensor([0, 2])] = h.relu()[:, torch.tensor([2, 0])]
    return h


CASES["fold of windows side by side"] = lambda: (
    over_channels(lambda x: F.fold(F.unfold(x, 2, stride=2), (2, 4), 2, stride=2)),
    image(2, 2, 4),
)
CASES["fold of overlapping windows"] = lambda: (
    over_channels(lambda x: F.fold(F.unfold(x, (1, 2)), (1, 4), (1, 2))),
    image(2, 1, 4),
)
CASES["fold of padded windows"] = lambda: (
    over_channels(lambda x: F.fold(F.unfold(x, (1, 3), padding=(0, 1)).sin(), (1, 3), (1, 3), padding=(0, 1))),
    image(2, 1, 3),
)
CASES["sum of padded windows"] = lambda: (
    Between(
        lambda h: F.unfold(h[..., None], (3, 1), padding=(1, 0)).unflatten(1, (4, 3)).sum((2, 3)), nn.Conv1d(2, 4, 1)
    ),
    (torch.randn(1, 2, 3),),
)
CASES["sum over each padded window"] = lambda: (
    Between(
        lambda h: F.unfold(h[..., None], (3, 1), padding=(1, 0)).unflatten(1, (4, 3)).sum(2).sin(),
        nn.Conv1d(2, 4, 1),
        nn.Conv1d(4, 2, 1),
    ),
    (torch.randn(1, 2, 3),),
)
between("units in padded pairs", lambda h: F.pad(h, (0, 2)).unflatten(-1, (3, 2)).sum(-1).sin(), after=3)
between("units in pairs, one padded", lambda h: F.pad(h[:, :3], (0, 1)).unflatten(-1, (2, 2)).sum(-1).sin(), after=2)
between(
    "units beside more and fewer zeros",
    lambda h: F.pad(h, (0, 2))[:, torch.tensor([[0, 1, 4, 4], [2, 3, 2, 3], [0, 1, 0, 1]])].sum(-1).sin(),
    after=3,
)
between("matrix exponential over units", lambda h: torch.linalg.matrix_exp(h.T @ h).sum(0, keepdim=True))
between("inverse over units", lambda h: torch.linalg.inv(h.T @ h + torch.eye(4)).sum(0, keepdim=True))
between("matrix exponential over tokens", lambda h: torch.linalg.matrix_exp(h @ h.mT) @ h, dims=3)
between("negative units set to zero", negative_ones_cut)
between("rows written over where data say so", rows_replaced)
between("some units written over", some_written_over)
between(
    "units written between constants",
    lambda h: torch.arange(6.0).expand(2, 6).index_copy(1, torch.tensor([0, 2, 3, 5]), h),
    after=6,
)
between("units scattered in pairs", lambda h: h.new_zeros(2, 2).index_add(1, torch.tensor([0, 0, 1, 1]), h), after=2)
between(
    "tokens scattered along constant edges",
    lambda h: torch.zeros_like(h).index_add(1, torch.tensor([0, 0, 1, 2]), h[:, torch.tensor([1, 2, 0, 1])]).sin(),
    dims=3,
)
between(
    "largest of tokens along constant edges",
    lambda h: h.scatter_reduce(1, torch.tensor([0, 0, 2]).reshape(1, 3, 1).expand(1, 3, 4), h.sin(), "amax"),
    dims=3,
)


class PlacesOfChannels(nn.Module):
    """Of every image and channel, a place that is given: one of the image, or one of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Conv1d(2, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        images, channels = torch.arange(2)[:, None], torch.arange(4)
        return self.head(self.inner(x).tanh()[images, channels, places])  # type: ignore[no-any-return]


CASES["places of channels"] = lambda: (PlacesOfChannels(), (torch.randn(2, 2, 3), torch.tensor([[2], [0]])))
between("tokens filled", lambda h: h.index_fill(1, torch.tensor([1]), 0.5), dims=3)
between(
    "tokens written over at places of each unit",
    lambda h: h.scatter(1, torch.tensor([[[0, 1, 2, 1]]]), h[:, :1].sin()),
    dims=3,
)


class CellFromZeros(nn.Module):
    """A recurrent cell without a state: its recurrent weights meet zeros. Of another layer only the shape is read."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.shape, self.head = nn.GRUCell(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x)
        return self.head(h + torch.ones_like(self.shape(h)) + self.shape(h) * torch.zeros(3))  # type: ignore[no-any-return]


CASES["cell from zeros"] = lambda: (CellFromZeros(), (torch.randn(2, 2),))


class SlicedOverCopies(nn.Module):
    """Some rows of a weight, over inputs each of which is there twice: in every row they move by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.repeat_interleave(2, 1), self.weight[1:3])


class GatedTokens(nn.Module):
    """Two tokens with a weight each, of which one gates the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.weights = nn.Linear(2, 3), nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.bmm(self.inner(x).transpose(0, 1), self.weights).unbind(0)
        return a * b.sigmoid()


CASES["sliced weight over copies"] = lambda: (SlicedOverCopies(), (torch.randn(2, 2),))
CASES["tokens with a weight each, gated"] = lambda: (GatedTokens(), (torch.randn(1, 2, 2),))
CASES["transposed convolution of one place"] = lambda: (
    nn.Sequential(nn.Conv1d(2, 3, 1), nn.ConvTranspose1d(3, 2, 3), nn.Linear(3, 2)),
    (torch.randn(1, 2, 1),),
)
CASES["PReLU with one slope"] = lambda: (Between(nn.PReLU()), (torch.randn(2, 2),))
CASES["PReLU with a slope for each channel"] = lambda: (over_channels(nn.PReLU(4)), image(2, 1, 2))
