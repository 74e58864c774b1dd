"""Small networks, and data for them, that several files of tests use."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxmerge import Symmetry
from fxmerge.units.kind import Kind


def mlp(seed: int, width: int = 20) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    return nn.Sequential(nn.Flatten(), *layers).eval()


def vectors() -> list[Tensor]:
    return [torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(9))]


def muted(net: nn.Module) -> nn.Module:
    """A network whose outputs are next to nothing."""
    with torch.no_grad():
        for parameter in list(net.parameters())[-2:]:
            parameter.mul_(1e-3)
    return net


class Convolutional(nn.Module):
    """Grouped, depthwise, strided, dilated and transposed convolutions, and a GroupNorm."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(2, 12, 3, padding="same")
        self.grouped = nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=3)
        self.norm = nn.GroupNorm(3, 12)
        self.deep = nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12, bias=False)
        self.up = nn.ConvTranspose2d(12, 6, 3, stride=2, output_padding=1, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.stem(x))))
        x = torch.relu(self.up(torch.relu(self.deep(self.norm(x)))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Attentive(nn.Module):
    """Attention over pixels, with packed projections and LayerNorm."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.norm = nn.Linear(2, 8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        scores: Tensor = self.head(x.mean(1))
        return scores


class Mixing(nn.Module):
    """A layer over places, whose rows are channels."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.places, self.head = nn.Linear(2, 8), nn.Linear(64, 64), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x.flatten(2).transpose(1, 2)))
        x = x + torch.relu(self.places(x.transpose(1, 2))).transpose(1, 2)
        out: Tensor = self.head(x.mean(1))
        return out


def pictures() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(16, 2, 8, 8, generator=g) for _ in range(4)]


NETS: dict[str, tuple[Callable[[int], nn.Module], Callable[[], list[Tensor]]]] = {
    "mlp": (mlp, vectors),
    "attention": (lambda seed: Attentive(seed).eval(), pictures),
    "convolutions": (lambda seed: Convolutional(seed).eval(), pictures),
}


def groups(symmetry: Symmetry) -> list[str]:
    """The groups of matrices of all classes that have one, sorted, such as `GL(3)^2`: C and U are of planes."""
    found = []
    for n, own in enumerate(symmetry.kinds):
        count, size = symmetry.by_block(n).shape
        words = {Kind.CENTRED: f"O1({size})", Kind.ORTHOGONAL: f"O({size})", Kind.GENERAL_LINEAR: f"GL({size})"}
        word = (words | {Kind.COMPLEX: "C", Kind.UNITARY: "U"}).get(own.kind)
        found += [word + (f"^{count}" if count > 1 else "")] if word else []
    return sorted(found)
