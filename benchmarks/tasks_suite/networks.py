"""The image networks without attention: a perceptron, VGG, ResNet20, ConvNeXt, an MLP-Mixer and a U-Net."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Callable[[int], nn.Module]

GROUPS = 8


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(GROUPS, channels)


class MLP(nn.Sequential):
    """Four linear layers with ReLU between them."""

    def __init__(self, pixels: int, width: int, out: int) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(pixels, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, out),
        )


class VGG(nn.Sequential):
    """Convolutions and pooling in a chain, and two linear layers on the mean over positions.

    Arguments:
        widths: the channels of each stage; pooling lies between the stages.
        norm: what follows each convolution; nothing if None.
        out: the outputs.
    """

    def __init__(self, widths: tuple[tuple[int, ...], ...], norm: Norm | None, out: int) -> None:
        layers: list[nn.Module] = []
        channels = 1
        for stage in widths:
            layers += [nn.MaxPool2d(2)] if layers else []
            for width in stage:
                layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=norm is None))
                layers += [norm(width)] if norm is not None else []
                layers.append(nn.ReLU())
                channels = width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, out))


class Residual(nn.Module):
    """Two normalised convolutions around a shortcut, which is a convolution where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm1 = norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = norm(out)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and channels == out
            else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), norm(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """Three stages of three blocks, of 16, 32 and 64 channels times the width.

    Arguments:
        width: what the channels are multiplied by.
        stride: of the first convolution.
        norm: what follows each convolution.
        out: the outputs.
    """

    def __init__(self, width: int, stride: int, norm: Norm, out: int) -> None:
        super().__init__()
        channels = 16 * width
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, stride, padding=1, bias=False), norm(channels), nn.ReLU())
        blocks = []
        for stage in range(3):
            for block in range(3):
                down = stage > 0 and block == 0
                blocks.append(Residual(channels, channels * (1 + down), 1 + down, norm))
                channels *= 1 + down
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return y


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution and a perceptron over channels around a shortcut; positions before channels."""

    def __init__(self, dim: int, scale: float = 0.1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.scale = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.scale * self.mlp(self.norm(y))


class ConvNeXt(nn.Module):
    """Two stages of ConvNeXt blocks; the first works on patches of two by two pixels."""

    def __init__(self, dims: tuple[int, int], depth: int, out: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, dims[0], 2, 2)
        self.norm = nn.LayerNorm(dims[0])
        self.first = nn.Sequential(*(ConvNeXtBlock(dims[0]) for _ in range(depth)))
        self.norm_down = nn.LayerNorm(dims[0])
        self.down = nn.Conv2d(dims[0], dims[1], 2, 2)
        self.second = nn.Sequential(*(ConvNeXtBlock(dims[1]) for _ in range(depth)))
        self.norm_out = nn.LayerNorm(dims[1])
        self.head = nn.Linear(dims[1], out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.norm(self.stem(x).permute(0, 2, 3, 1)))
        x = self.second(self.down(self.norm_down(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        y: Tensor = self.head(self.norm_out(x.mean((1, 2))))
        return y


class MixerBlock(nn.Module):
    """A perceptron over tokens and one over channels, each behind a LayerNorm and around a shortcut."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.over_tokens = nn.Sequential(nn.Linear(tokens, dim), nn.GELU(), nn.Linear(dim, tokens))
        self.norm2 = nn.LayerNorm(dim)
        self.over_channels = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        y: Tensor = x + self.over_channels(self.norm2(x))
        return y


class Mixer(nn.Module):
    """An MLP-Mixer over the patches of an image."""

    def __init__(self, size: int, patch: int, dim: int, depth: int, out: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, patch, patch)
        self.blocks = nn.Sequential(*(MixerBlock((size // patch) ** 2, dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, out)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        y: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return y


class UNet(nn.Module):
    """Convolutions down to a quarter of the size and up again, each level joined with what it was on the way down.

    Arguments:
        widths: the channels of the three levels.
        norm: what follows each convolution.
        out: the maps.
    """

    def __init__(self, widths: tuple[int, int, int], norm: Norm, out: int) -> None:
        super().__init__()
        large, middle, small = widths

        def convolve(channels: int, width: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), norm(width), nn.ReLU())

        self.down1, self.down2 = convolve(1, large), convolve(large, middle)
        self.bottom = nn.Sequential(convolve(middle, small), convolve(small, middle))
        self.up2, self.up1 = convolve(2 * middle, large), convolve(2 * large, large)
        self.head = nn.Conv2d(large, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.down1(x)
        x2 = self.down2(F.max_pool2d(x1, 2))
        y = F.interpolate(self.bottom(F.max_pool2d(x2, 2)), scale_factor=2.0)
        y = F.interpolate(self.up2(torch.cat([y, x2], 1)), scale_factor=2.0)
        out: Tensor = self.head(self.up1(torch.cat([y, x1], 1)))
        return out
