"""Tiny networks with the dimension of their continuous symmetry in closed form.

`NETWORKS` says of every network which continuous changes of basis it has, and which redundancies it has beside them.
`tests/oracle/test_continuous.py` demands that both together are the nullity of its Jacobian, so that nothing is
missing.

The changes of basis are terms (group, size, copies):

- GL: all invertible matrices of the size. Layers write and read linearly.
- O: orthogonal matrices. A norm or a scalar product is between.
- O1: orthogonal matrices that keep the vector of ones. A LayerNorm is between.
- C: a complex number for each of `size` planes that a rotary embedding turns, each at a frequency of its own.
- U: a rotation for each of `size` such planes.
- GLC: all invertible complex matrices of the size, for planes of one frequency.
- R: a positive scale for each of `size` units. An activation between is positively homogeneous, a gain meets what reads
  it, or units are multiplied by each other.

Their dimensions are independent of signs and permutations, which are not continuous.

Sizes are such that no direction is dead, unless one is named: inputs have at least as many features as the stream that
they are written to, and heads at most as many as the stream that they read. Norms have an epsilon of 0.1. A smaller one
would nearly make the scale of their inputs irrelevant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

Kind = tuple[str, int, int]
"""A group, the size of its matrices, and how many copies of it act independently."""

_DIMENSIONS: dict[str, Callable[[int], int]] = {
    "GL": lambda n: n * n,
    "O": lambda n: n * (n - 1) // 2,
    "O1": lambda n: (n - 1) * (n - 2) // 2,
    "C": lambda n: 2 * n,
    "U": lambda n: n,
    "GLC": lambda n: 2 * n * n,
    "R": lambda n: n,
}


def dimension(kinds: Iterable[Kind]) -> int:
    """The dimension of a product of groups."""
    return sum(copies * _DIMENSIONS[group](size) for group, size, copies in kinds)


@dataclass(frozen=True)
class Network:
    """A tiny network and its continuous symmetry.

    Arguments:
        model: makes the network.
        args: example inputs.
        kinds: the continuous changes of basis.
        redundancies: by name, the number of further directions that leave the function unchanged.
        seed: of the parameters and inputs that the nullity is taken at. At some parameters a ReLU is off for all
            inputs, or on for all, or never on together with one that it reads. Each has redundancies of its own. So
            networks of ReLU have a seed at which none of this is the case.
    """

    model: Callable[[], nn.Module]
    args: tuple[Tensor, ...]
    kinds: tuple[Kind, ...] = ()
    redundancies: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0


# ------------------------------------------------------------------------------------ redundancies

NEXT_BIAS = "bias that the next bias can take over"
BIAS_BEFORE = "bias that the shift of the norm can take over"
ROTATIONS = "rotations of the stream, once the next layers have taken over its gains"
TURNS = "rotations of the stream, once the layers before have taken over its gains"
KEYS = "key bias behind a softmax"
VALUES = "value bias that the output bias can take over"
WRITERS = "mean of what writes to the stream of a LayerNorm: a weight per input, and a bias"
READERS = "mean that what reads behind a LayerNorm does not see: a weight per output"
ADDED = "one of two terms that are added"
SHIFT = "common shift behind a softmax"
STREAM = "scale of the residual stream"
NORMALIZED = "scale of what is divided by its norm"
CELL = "one of the two biases of a recurrent cell"
PRODUCT = "scale of one factor of a product that the other can take over"

# ------------------------------------------------------------------------------------ parts


def rms(n: int, *, eps: float = 0.1) -> nn.Module:
    return nn.RMSNorm(n, eps=eps, elementwise_affine=False)


def rms_gain(n: int) -> nn.Module:
    return nn.RMSNorm(n, eps=0.1)


def layer_norm(n: int) -> nn.Module:
    return nn.LayerNorm(n, eps=0.1, elementwise_affine=False)


def layer_norm_affine(n: int) -> nn.Module:
    return nn.LayerNorm(n, eps=0.1)


class FixedGains(nn.Module):
    """An RMSNorm whose gains are a buffer of ones."""

    gains: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("gains", torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.gains.shape, self.gains, 0.1)


class Residual(nn.Module):
    """x + f(norm(x)), or a sum of several such f."""

    def __init__(self, norm: nn.Module, *blocks: nn.Module) -> None:
        super().__init__()
        self.norm, self.blocks = norm, nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        parts: list[Tensor] = [block(y) for block in self.blocks]
        return x + torch.stack(parts).sum(0)


class PostNorm(nn.Module):
    """norm(x + f(x))."""

    def __init__(self, norm: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.norm, self.block = norm, block

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.block(x))
        return y


class Transposed(nn.Sequential):
    """Layers over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x.mT)  # type: ignore[no-untyped-call]
        return y.mT


def mlp(
    n: int, hidden: int = 5, out: int | None = None, *, act: Callable[[], nn.Module] = nn.GELU, bias: bool = True
) -> nn.Module:
    return nn.Sequential(nn.Linear(n, hidden), act(), nn.Linear(hidden, n if out is None else out, bias=bias))


def rotary(x: Tensor, frequencies: Sequence[float]) -> Tensor:
    """Turns the first pairs of units by angles that grow with the place. A pair is i and i + the number of pairs."""
    planes = len(frequencies)
    places = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)
    angles = places[:, None] * torch.tensor(frequencies, dtype=x.dtype, device=x.device)
    a, b, rest = x[..., :planes], x[..., planes : 2 * planes], x[..., 2 * planes :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


def _cos_sin(x: Tensor, frequencies: Sequence[float]) -> tuple[Tensor, Tensor]:
    angles = torch.arange(x.shape[-2])[:, None] * torch.tensor(frequencies, dtype=x.dtype)
    return angles.cos(), angles.sin()


def rotary_halves(x: Tensor, frequencies: Sequence[float]) -> Tensor:
    """`rotary`, as a sum of x and of x with its halves exchanged and one of them negated."""
    cos, sin = (torch.cat([part, part], -1) for part in _cos_sin(x, frequencies))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def rotary_pairs(x: Tensor, frequencies: Sequence[float]) -> Tensor:
    """Turns pairs of neighbouring units."""
    cos, sin = _cos_sin(x, frequencies)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def rotary_complex(x: Tensor, frequencies: Sequence[float]) -> Tensor:
    """`rotary_pairs`, by complex numbers."""
    turn = torch.complex(*_cos_sin(x, frequencies))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


class Attention(nn.Module):
    """Attention with heads, of which the options are those of usual transformers.

    Arguments:
        dim: the width of the stream.
        heads: the number of heads of queries.
        size: the width of a head.
        groups: the number of heads of keys and values; by default that of queries.
        source: the width of the stream that keys and values read; by default that of queries.
        bias: the letters of the layers that have a bias, among "qkvo".
        packed: one weight for queries, keys and values.
        fused: by `F.scaled_dot_product_attention`, with a causal mask.
        frequencies: of a rotary embedding of queries and keys.
        rotate: how that is computed.
        norm: makes the norms of queries and keys, which all heads share.
        relative: the number of tokens, if every head has a bias for every distance.
        linear: without a softmax.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 2,
        size: int = 3,
        *,
        groups: int | None = None,
        source: int | None = None,
        bias: str = "",
        packed: bool = False,
        fused: bool = False,
        frequencies: Sequence[float] = (),
        rotate: Callable[[Tensor, Sequence[float]], Tensor] = rotary,
        norm: Callable[[int], nn.Module] | None = None,
        relative: int = 0,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.groups, self.size, self.rotate = heads, groups or heads, size, rotate
        self.packed, self.fused, self.frequencies, self.linear = packed, fused, frequencies, linear
        self.sizes = [n * size for n in (heads, self.groups, self.groups)]
        if packed:
            self.qkv = nn.Linear(dim, sum(self.sizes), bias="q" in bias)
        else:
            dims = dim, source or dim, source or dim
            self.q, self.k, self.v = (
                nn.Linear(n, m, bias=name in bias) for name, n, m in zip("qkv", dims, self.sizes, strict=True)
            )
        self.o = nn.Linear(heads * size, dim, bias="o" in bias)
        self.norms = nn.ModuleList([norm(size), norm(size)] if norm else [])
        self.relative = nn.Parameter(torch.randn(heads, 2 * relative - 1)) if relative else None

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        source = x if source is None else source
        parts = self.qkv(x).split(self.sizes, -1) if self.packed else (self.q(x), self.k(source), self.v(source))
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in parts)
        if self.norms:
            q, k = (norm(part) for norm, part in zip(self.norms, (q, k), strict=True))
        if self.frequencies:
            q, k = (self.rotate(part, self.frequencies) for part in (q, k))
        if self.groups < self.heads:
            k, v = (part.repeat_interleave(self.heads // self.groups, 1) for part in (k, v))
        y: Tensor = self.o(self.mix(q, k, v).transpose(1, 2).flatten(2))
        return y

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores: Tensor = q @ k.mT / self.size**0.5
        if self.relative is not None:
            places = torch.arange(q.shape[-2])
            scores = scores + self.relative[:, places[:, None] - places + len(places) - 1]
        return (scores if self.linear else scores.softmax(-1)) @ v


class SharedProjection(nn.Module):
    """Attention in which one layer makes two of queries, keys and values: "qk" or "kv"."""

    def __init__(self, dim: int, shared: str) -> None:
        super().__init__()
        self.shared = shared
        self.both, self.other, self.o = (nn.Linear(n, m, bias=False) for n, m in ((dim, 6), (dim, 6), (6, dim)))

    def forward(self, x: Tensor) -> Tensor:
        both, other = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.both, self.other))
        q, k, v = (both, both, other) if self.shared == "qk" else (other, both, both)
        y: Tensor = self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return y


class LatentAttention(nn.Module):
    """Attention in which keys and values of all heads are made of one narrow latent vector per token."""

    def __init__(self, dim: int, latent: int, norm: nn.Module) -> None:
        super().__init__()
        self.latent, self.norm, self.q = nn.Linear(dim, latent, bias=False), norm, nn.Linear(dim, 4, bias=False)
        self.k, self.v, self.o = (nn.Linear(n, m, bias=False) for n, m in ((latent, 4), (latent, 4), (4, dim)))

    def forward(self, x: Tensor) -> Tensor:
        latent = self.norm(self.latent(x))
        parts = self.q(x), self.k(latent), self.v(latent)
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in parts)
        y: Tensor = self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return y


class CosineAttention(Attention):
    """Scores are cosines, times a temperature per head."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.temperature = nn.Parameter(torch.randn(2, 1, 1))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        return (scores * self.temperature).softmax(-1) @ v


class NormedHeads(Attention):
    """The output of every head has a norm."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.rms_norm(super().mix(q, k, v), (self.size,), eps=0.1)


class TalkingHeads(Attention):
    """Scores are mixed across heads before the softmax."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.mixing = nn.Parameter(torch.randn(2, 2))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhqk,gh->bgqk", q @ k.mT, self.mixing).softmax(-1) @ v


class CrossAttention(nn.Module):
    """A decoder's stream of width 4 that reads an encoder's stream of width 5."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 5, bias=False), nn.Linear(6, 4)
        self.source_norm, self.norm, self.last = norm(5), rms(4), rms(4)
        self.attention, self.head = Attention(4, source=5), nn.Linear(4, 3)

    def forward(self, source: Tensor, x: Tensor) -> Tensor:
        source, x = self.source_norm(self.encode(source)), self.decode(x)
        y: Tensor = self.head(self.last(x + self.attention(self.norm(x), source)))
        return y


class Pooled(nn.Module):
    """Attention of learnt queries."""

    def __init__(self, queries: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, 3))
        self.k, self.v, self.o = nn.Linear(5, 3, bias=False), nn.Linear(5, 3, bias=False), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.o((self.query @ self.k(x).mT).softmax(-1) @ self.v(x))
        return y


class Tied(nn.Module):
    """A language model whose embedding is its readout."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(7, 4), nn.Sequential(*layers)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.layers(self.embed(tokens)), self.embed.weight)


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encoder(x), self.encoder.weight.T)


class Positions(nn.Module):
    """A table of positions that is added, and a first token that is learnt."""

    def __init__(self, tokens: int, dim: int, *, first: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(tokens + first, dim))
        self.first = nn.Parameter(torch.randn(1, 1, dim)) if first else None

    def forward(self, x: Tensor) -> Tensor:
        if self.first is not None:
            x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1)
        return x + self.table


class Gated(nn.Module):
    """A gated perceptron: SwiGLU, or bilinear without an activation."""

    def __init__(self, n: int, hidden: int, act: nn.Module, *, bias: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(n, hidden, bias=bias), nn.Linear(n, hidden, bias=bias)
        self.act, self.down = act, nn.Linear(hidden, n)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return y


class Experts(nn.Module):
    """Two experts, which a softmax weighs."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(n, 2), nn.ModuleList([mlp(n, 3), mlp(n, 3)])

    def forward(self, x: Tensor) -> Tensor:
        each = torch.stack([expert(x) for expert in self.experts], -1)
        weights: Tensor = self.router(x).softmax(-1)
        return (each * weights[..., None, :]).sum(-1)


class LayerScale(nn.Module):
    """A block whose outputs have a gain each."""

    def __init__(self, block: nn.Module, n: int) -> None:
        super().__init__()
        self.block, self.gains = block, nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x) * self.gains
        return y


class LowRank(nn.Module):
    """W x + B A x, with W a constant or a parameter."""

    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        self.base, self.a, self.b = (nn.Linear(n, m, bias=False) for n, m in ((5, 4), (5, 2), (2, 4)))
        if frozen:
            self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.b(self.a(x))
        return y


class BilinearForm(nn.Module):
    """The scalar product of two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 3, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        products: Tensor = self.a(x) * self.b(y)
        return products.sum(-1)


class BilinearLayer(nn.Module):
    """A bilinear layer on two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.both = nn.Linear(4, 2, bias=False), nn.Linear(5, 3, bias=False), nn.Bilinear(2, 3, 7)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z: Tensor = self.both(self.a(x), self.b(y))
        return z


class TwoTowers(nn.Module):
    """The cosine between embeddings of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp(5, 4, 3), mlp(6, 5, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cosine_similarity(self.a(x), self.b(y), dim=-1)


class Prototypes(nn.Module):
    """Compares features with a vector per class, by their cosine or by their distance."""

    def __init__(self, *, cosine: bool) -> None:
        super().__init__()
        self.cosine, self.inner, self.classes = cosine, mlp(4, 5, 3), nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if self.cosine:
            return F.normalize(x, dim=-1) @ F.normalize(self.classes, dim=-1).T
        return (x[..., None, :] - self.classes).square().sum(-1)


class Recurrent(nn.Module):
    """A recurrent layer and a readout of every step."""

    def __init__(self, layer: nn.Module, hidden: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layer(x)[0])
        return y


class LinearRecurrence(nn.Module):
    """A linear state space: h = A h + B x, y = C h, with A a matrix or a factor per state."""

    def __init__(self, *, diagonal: bool) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(3) if diagonal else torch.randn(3, 3))
        self.b, self.c = nn.Linear(4, 3, bias=False), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, *steps = self.b(x).unbind(1)
        states: list[Tensor] = [first]
        for step in steps:
            h = states[-1]
            states.append((h * self.a if self.a.ndim == 1 else h @ self.a.T) + step)
        y: Tensor = self.c(torch.stack(states, 1))
        return y


class SideBySide(nn.Module):
    """Two maps side by side behind one norm, of two inputs or of one."""

    def __init__(self, *, one: bool) -> None:
        super().__init__()
        self.one, self.a, self.b = one, nn.Linear(5, 2), nn.Linear(5, 3)
        self.norm, self.head = rms(5), nn.Linear(5, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both = torch.cat([self.a(x), self.b(x if self.one else y)], -1)
        z: Tensor = self.head(self.norm(both))
        return z


class Twice(nn.Module):
    """A block that is applied two times."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(self.block(x))
        return y


class FourierMixing(nn.Module):
    """The real part of a Fourier transform over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.fft.fft(x, dim=-2).real
        return y


class Patches(nn.Module):
    """Tokens of an image, by a convolution."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, dim, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x).flatten(2).mT
        return y


class MeanOfTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-2)


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square()


class PixelNorm(nn.Module):
    """An RMSNorm over the channels of a pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 0.1)


def transformer(
    norm: Callable[[int], nn.Module] = rms, dim: int = 4, attention: nn.Module | None = None, **options: object
) -> nn.Module:
    """A block of attention and a perceptron, each behind a norm, from 6 features to 3."""
    attention = attention or Attention(dim, **options)  # type: ignore[arg-type]
    blocks = Residual(norm(dim), attention), Residual(norm(dim), mlp(dim))
    return nn.Sequential(nn.Linear(6, dim), *blocks, norm(dim), nn.Linear(dim, 3))


def attentive(dim: int = 4, attention: nn.Module | None = None, **options: object) -> nn.Module:
    """A block of attention behind an RMSNorm, from 6 features to 3."""
    attention = attention or Attention(dim, **options)  # type: ignore[arg-type]
    return nn.Sequential(nn.Linear(6, dim), Residual(rms(dim), attention), rms(dim), nn.Linear(dim, 3))


def stream(*blocks: nn.Module, dim: int = 4) -> nn.Module:
    """Blocks behind an RMSNorm, from 6 features to 3."""
    return nn.Sequential(nn.Linear(6, dim), Residual(rms(dim), *blocks), rms(dim), nn.Linear(dim, 3))


def linear(*sizes: int, bias: bool = False) -> list[nn.Module]:
    """Linear layers in a row, the last with a bias."""
    last = len(sizes) - 2
    return [nn.Linear(sizes[i], sizes[i + 1], bias=bias or i == last) for i in range(last + 1)]


def _example(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


SEQUENCES = (_example(4, 5, 6),)
"""Inputs for all that reads 6 features of 5 tokens."""

WORDS = (torch.arange(14).reshape(2, 7)[:, torch.tensor([0, 3, 6, 1, 4, 2, 5])] % 7,)
"""Sequences of tokens, each of a vocabulary of 7."""

IMAGES = (_example(2, 4, 5, 5),)


def vectors(*features: int) -> tuple[Tensor, ...]:
    return tuple(_example(16, n) for n in features)


def perceptron(act: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: mlp(3, 5, 2, act=act)


# ------------------------------------------------------------------------------------ networks

_HEADS: Kind = ("GL", 3, 4)
"""Two heads of size 3, each with a basis for queries and keys and one for values and outputs."""

NETWORKS: dict[str, Network] = {
    # Linear layers in a row.
    "linear bottleneck": Network(lambda: nn.Sequential(*linear(5, 2, 4)), vectors(5), (("GL", 2, 1),)),
    "linear bottleneck, biases": Network(
        lambda: nn.Sequential(*linear(5, 2, 4, bias=True)), vectors(5), (("GL", 2, 1),), {NEXT_BIAS: 2}
    ),
    "two bottlenecks around GELU": Network(
        lambda: nn.Sequential(*linear(5, 2, 6), nn.GELU(), *linear(6, 3, 4)),
        vectors(5),
        (("GL", 2, 1), ("GL", 3, 1)),
    ),
    "two bottlenecks of one width in a row": Network(
        lambda: nn.Sequential(*linear(5, 2, 2, 4)), vectors(5), (("GL", 2, 2),)
    ),
    "two bottlenecks of two widths in a row": Network(
        lambda: nn.Sequential(*linear(5, 2, 3, 5)),
        vectors(5),
        (("GL", 2, 1), ("GL", 3, 1)),
        # One of the 3 units is in no image of the 2, and reads into 5 outputs; the basis of 3 has done so for 3.
        {"direction of the bottleneck that nothing reaches": (3 - 2) * (5 - 3)},
    ),
    "tied linear autoencoder": Network(TiedAutoencoder, vectors(5), (("O", 2, 1),)),
    "low rank beside a frozen base": Network(lambda: LowRank(frozen=True), vectors(5), (("GL", 2, 1),)),
    "low rank beside a base": Network(
        lambda: LowRank(frozen=False),
        vectors(5),
        (("GL", 2, 1),),
        {"low rank that the base can take over, but for its change of basis": 2 * (5 + 4) - 2 * 2},
    ),
    "bilinear form": Network(BilinearForm, vectors(5, 6), (("GL", 3, 1),)),
    "bilinear layer on two maps": Network(BilinearLayer, vectors(4, 5), (("GL", 2, 1), ("GL", 3, 1))),
    # Perceptrons: permutations, and scales where the activation is homogeneous.
    "MLP, ReLU": Network(perceptron(nn.ReLU), vectors(3), (("R", 5, 1),)),
    "MLP, two hidden layers of ReLU": Network(
        lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)),
        vectors(3),
        (("R", 5, 1), ("R", 4, 1)),
        seed=3,
    ),
    "MLP, leaky ReLU": Network(perceptron(nn.LeakyReLU), vectors(3), (("R", 5, 1),)),
    "MLP, PReLU": Network(perceptron(nn.PReLU), vectors(3), (("R", 5, 1),)),
    "MLP, GELU": Network(perceptron(nn.GELU), vectors(3)),
    "MLP, tanh": Network(perceptron(nn.Tanh), vectors(3)),
    "MLP, SiLU": Network(perceptron(nn.SiLU), vectors(3)),
    "MLP, sigmoid": Network(perceptron(nn.Sigmoid), vectors(3)),
    "MLP, softplus": Network(perceptron(nn.Softplus), vectors(3)),
    "MLP, ELU": Network(perceptron(nn.ELU), vectors(3)),
    "MLP, exponential": Network(
        perceptron(Exponential), vectors(3), (), {"bias in an exponential that the next layer can take over": 5}
    ),
    "MLP, square": Network(lambda: mlp(3, 3, 6, act=Square), vectors(3), (("R", 3, 1),)),
    "squares behind one output": Network(
        lambda: nn.Sequential(nn.Linear(4, 3, bias=False), Square(), nn.Linear(3, 1)),
        vectors(4),
        (("R", 3, 1),),
        {"rotations of what is squared, with the signs of the last weights": 3},
    ),
    "MLP, softmax": Network(lambda: nn.Sequential(mlp(3, 5, 4), nn.Softmax(-1)), vectors(3), (), {SHIFT: 5 + 1}),
    "MLP, weight norm": Network(
        lambda: nn.Sequential(weight_norm(nn.Linear(3, 5)), nn.GELU(), nn.Linear(5, 2)),
        vectors(3),
        (),
        {NORMALIZED: 5},
    ),
    "bilinear gated MLP": Network(lambda: Gated(4, 2, nn.Identity(), bias=False), vectors(4), (("R", 2, 2),)),
    # Residual streams.
    "residual without norms": Network(
        lambda: nn.Sequential(
            nn.Linear(6, 4, bias=False), Residual(nn.Identity(), mlp(4, bias=False)), nn.Linear(4, 5)
        ),
        vectors(6),
        (("GL", 4, 1),),
    ),
    "bottleneck in a residual": Network(
        lambda: stream(nn.Sequential(*linear(4, 2, 4))), vectors(6), (("O", 4, 1), ("GL", 2, 1))
    ),
    "SwiGLU": Network(lambda: stream(Gated(4, 5, nn.SiLU(), bias=True)), vectors(6), (("O", 4, 1), ("R", 5, 1))),
    "mixture of experts": Network(lambda: stream(Experts(4)), vectors(6), (("O", 4, 1),), {SHIFT: 4 + 1}),
    "two streams, one behind the other": Network(
        lambda: nn.Sequential(
            *(nn.Linear(6, 5), Residual(rms(5), mlp(5)), rms(5)),
            *(nn.Linear(5, 4), Residual(rms(4), mlp(4)), rms(4), nn.Linear(4, 3)),
        ),
        vectors(6),
        (("O", 5, 1), ("O", 4, 1)),
    ),
    # Transformers.
    "RMSNorm": Network(transformer, SEQUENCES, (("O", 4, 1), _HEADS)),
    "RMSNorm, fixed gains of one": Network(lambda: transformer(FixedGains), SEQUENCES, (("O", 4, 1), _HEADS)),
    "RMSNorm, gains": Network(lambda: transformer(rms_gain), SEQUENCES, (_HEADS, ("R", 4, 3)), {ROTATIONS: 6}),
    "RMSNorm, no epsilon": Network(
        lambda: transformer(lambda n: rms(n, eps=0.0)), SEQUENCES, (("O", 4, 1), _HEADS), {STREAM: 1}
    ),
    "RMSNorm, layer scale": Network(
        lambda: nn.Sequential(nn.Linear(6, 4), Residual(rms(4), LayerScale(Attention(4), 4)), rms(4), nn.Linear(4, 3)),
        SEQUENCES,
        (_HEADS, ("R", 4, 1)),
        {TURNS: 6},
    ),
    "LayerNorm": Network(
        lambda: transformer(layer_norm, 5),
        SEQUENCES,
        (("O1", 5, 1), _HEADS),
        {WRITERS: (6 + 1) + 6 + (5 + 1), READERS: 3 * 6 + 5 + 3},
    ),
    "LayerNorm, gains and biases": Network(
        lambda: transformer(layer_norm_affine, 5, bias="qkvo"),
        SEQUENCES,
        (_HEADS, ("R", 5, 3)),
        {
            WRITERS: (6 + 1) + (6 + 1) + (5 + 1),
            READERS: 3 * 6 + 5 + 3,
            NEXT_BIAS: 3 * 5,
            ROTATIONS: 6,
            KEYS: 6,
            VALUES: 6,
        },
    ),
    "post-norm, RMSNorm": Network(
        lambda: nn.Sequential(
            nn.Linear(6, 4), PostNorm(rms(4), Attention(4)), PostNorm(rms(4), mlp(4)), nn.Linear(4, 3)
        ),
        SEQUENCES,
        (("O", 4, 1), _HEADS),
    ),
    "post-norm, RMSNorm, gains": Network(
        lambda: nn.Sequential(
            *(nn.Linear(6, 4), rms_gain(4), PostNorm(rms_gain(4), Attention(4))),
            *(PostNorm(rms_gain(4), mlp(4)), nn.Linear(4, 3)),
        ),
        SEQUENCES,
        (_HEADS, ("R", 4, 1)),  # Only the gains of the last norm are not read by a residual.
    ),
    "post-norm, LayerNorm": Network(
        lambda: nn.Sequential(
            *(nn.Linear(6, 5), layer_norm(5), PostNorm(layer_norm(5), Attention(5))),
            *(PostNorm(layer_norm(5), mlp(5)), nn.Linear(5, 3)),
        ),
        SEQUENCES,
        (("O1", 5, 1), _HEADS),
        {WRITERS: (6 + 1) + 6 + (5 + 1), READERS: 3 * 6 + 5 + 3},
    ),
    "parallel blocks": Network(
        lambda: stream(Attention(4, bias="o"), mlp(4)), SEQUENCES, (("O", 4, 1), _HEADS), {ADDED: 4}
    ),
    "transformer without norms": Network(
        lambda: nn.Sequential(nn.Linear(6, 4, bias=False), Residual(nn.Identity(), Attention(4)), nn.Linear(4, 5)),
        SEQUENCES,
        (("GL", 4, 1), _HEADS),
    ),
    "position table": Network(
        lambda: nn.Sequential(
            *(nn.Linear(6, 4), Positions(5, 4, first=False)),
            *(Residual(rms(4), Attention(4)), rms(4), nn.Linear(4, 3)),
        ),
        SEQUENCES,
        (("O", 4, 1), _HEADS),
        {ADDED: 4},
    ),
    "position table and a first token": Network(
        lambda: nn.Sequential(
            *(nn.Linear(6, 4, bias=False), Positions(5, 4, first=True)),
            *(Residual(rms(4), Attention(4)), rms(4), nn.Linear(4, 3)),
        ),
        SEQUENCES,
        (("O", 4, 1), _HEADS),
        {ADDED: 4},
    ),
    "tied embedding, RMSNorm": Network(
        lambda: Tied(Residual(rms(4), Attention(4)), rms(4)), WORDS, (("O", 4, 1), _HEADS)
    ),
    "tied embedding without norms": Network(
        lambda: Tied(Residual(nn.Identity(), Attention(4))), WORDS, (("O", 4, 1), _HEADS)
    ),
    # Attention.
    "attention, packed": Network(lambda: attentive(packed=True), SEQUENCES, (("O", 4, 1), _HEADS)),
    "attention, packed, fused and causal": Network(
        lambda: attentive(packed=True, fused=True), SEQUENCES, (("O", 4, 1), _HEADS)
    ),
    "attention, packed, biases": Network(
        lambda: attentive(packed=True, bias="qo"), SEQUENCES, (("O", 4, 1), _HEADS), {KEYS: 6, VALUES: 6}
    ),
    "attention, bias of queries": Network(lambda: attentive(bias="q"), SEQUENCES, (("O", 4, 1), _HEADS)),
    "attention, biases but of outputs": Network(
        lambda: attentive(bias="qkv"),
        SEQUENCES,
        (("O", 4, 1), _HEADS),
        {KEYS: 6, "value biases of which the stream of 4 sees a sum": 6 - 4},
    ),
    "attention, all biases": Network(
        lambda: attentive(bias="qkvo"), SEQUENCES, (("O", 4, 1), _HEADS), {KEYS: 6, VALUES: 6}
    ),
    "grouped queries": Network(lambda: attentive(heads=4, size=2, groups=2), SEQUENCES, (("O", 4, 1), ("GL", 2, 4))),
    "grouped queries, biases": Network(
        lambda: attentive(heads=4, size=2, groups=2, bias="qkvo"),
        SEQUENCES,
        (("O", 4, 1), ("GL", 2, 4)),
        {KEYS: 4, VALUES: 4},
    ),
    "rotary": Network(
        lambda: attentive(5, size=4, frequencies=(1.0, 0.3)), SEQUENCES, (("O", 5, 1), ("C", 2, 2), ("GL", 4, 2))
    ),
    "rotary, grouped queries": Network(
        lambda: attentive(5, size=4, groups=1, frequencies=(1.0, 0.3)),
        SEQUENCES,
        (("O", 5, 1), ("C", 2, 1), ("GL", 4, 1)),
    ),
    "rotary, two groups of queries": Network(
        lambda: attentive(5, heads=4, size=4, groups=2, frequencies=(1.0, 0.3), bias="qkvo"),
        SEQUENCES,
        (("O", 5, 1), ("C", 2, 2), ("GL", 4, 2)),
        {VALUES: 2 * 4},
    ),
    "rotary, packed and fused": Network(
        lambda: attentive(5, size=4, packed=True, fused=True, frequencies=(1.0, 0.3)),
        SEQUENCES,
        (("O", 5, 1), ("C", 2, 2), ("GL", 4, 2)),
    ),
    **{
        f"rotary, {name}": Network(
            lambda rotate=rotate: attentive(5, size=4, frequencies=(1.0, 0.3), rotate=rotate),
            SEQUENCES,
            (("O", 5, 1), ("C", 2, 2), ("GL", 4, 2)),
        )
        for name, rotate in (
            ("halves exchanged", rotary_halves),
            ("neighbouring units", rotary_pairs),
            ("complex numbers", rotary_complex),
        )
    },
    "rotary, half of a head": Network(
        lambda: attentive(5, size=4, frequencies=(1.0,)),
        SEQUENCES,
        (("O", 5, 1), ("C", 1, 2), ("GL", 2, 2), ("GL", 4, 2)),
    ),
    "rotary, planes of one frequency": Network(
        lambda: attentive(5, size=4, frequencies=(1.0, 1.0)), SEQUENCES, (("O", 5, 1), ("GLC", 2, 2), ("GL", 4, 2))
    ),
    "norms of queries and keys": Network(
        lambda: attentive(norm=rms), SEQUENCES, (("O", 4, 1), ("O", 3, 2), ("GL", 3, 2))
    ),
    "norms of queries and keys, gains": Network(
        lambda: attentive(norm=rms_gain), SEQUENCES, (("O", 4, 1), ("GL", 3, 2), ("R", 3, 1))
    ),
    "norms of queries and keys, rotary": Network(
        lambda: attentive(5, size=4, norm=rms, frequencies=(1.0, 0.3)),
        SEQUENCES,
        (("O", 5, 1), ("U", 2, 2), ("GL", 4, 2)),
    ),
    "norms of queries and keys, gains, rotary": Network(
        lambda: attentive(5, size=4, norm=rms_gain, frequencies=(1.0, 0.3)),
        SEQUENCES,
        (("O", 5, 1), ("GL", 4, 2)),
        {PRODUCT: 2},  # One per plane, as both entries of a query's plane meet both of a key's.
    ),
    "bias per distance": Network(lambda: attentive(relative=5), SEQUENCES, (("O", 4, 1), _HEADS), {SHIFT: 2}),
    "talking heads": Network(
        lambda: attentive(attention=TalkingHeads(4)), SEQUENCES, (("O", 4, 1), _HEADS), {PRODUCT: 2}
    ),
    "linear attention": Network(lambda: attentive(linear=True), SEQUENCES, (("O", 4, 1), _HEADS), {PRODUCT: 2}),
    "queries and keys of one layer": Network(
        lambda: stream(SharedProjection(4, "qk")), SEQUENCES, (("O", 4, 1), ("O", 3, 2), ("GL", 3, 2))
    ),
    "keys and values of one layer": Network(
        lambda: stream(SharedProjection(4, "kv")), SEQUENCES, (("O", 4, 1), ("GL", 3, 2))
    ),
    "keys and values of a latent": Network(
        lambda: stream(LatentAttention(5, 3, nn.Identity()), dim=5),
        SEQUENCES,
        (("O", 5, 1), ("GL", 3, 1), ("GL", 2, 4)),
    ),
    "keys and values of a latent behind a norm": Network(
        lambda: stream(LatentAttention(5, 3, rms(3)), dim=5),
        SEQUENCES,
        (("O", 5, 1), ("O", 3, 1), ("GL", 2, 4)),
    ),
    "cross-attention": Network(
        lambda: CrossAttention(rms), (*SEQUENCES, *SEQUENCES), (("O", 5, 1), ("O", 4, 1), _HEADS)
    ),
    "cross-attention, encoder without a norm": Network(
        lambda: CrossAttention(lambda n: nn.Identity()), (*SEQUENCES, *SEQUENCES), (("GL", 5, 1), ("O", 4, 1), _HEADS)
    ),
    "pooled by learnt queries": Network(lambda: Pooled(4), (_example(4, 6, 5),), (("GL", 3, 2),)),
    "pooled by one learnt query": Network(
        lambda: Pooled(1),
        (_example(4, 6, 5),),
        (("GL", 3, 2),),
        # Of the query and its 3 keys per feature, 3 + 15 numbers, only a product of 5 counts; 9 are a basis.
        {"keys that the only query does not ask for": (3 - 1) * (5 - 3)},
    ),
    "cosine attention": Network(
        # The cosine ignores the scale of a query and of a key; rotations are left.
        lambda: attentive(attention=CosineAttention(4)),
        SEQUENCES,
        (("O", 4, 1), ("O", 3, 2), ("GL", 3, 2)),
        {NORMALIZED: 2 * 2},
    ),
    "norm of every head's output": Network(
        lambda: attentive(attention=NormedHeads(4)), SEQUENCES, (("O", 4, 1), ("GL", 3, 2), ("O", 3, 2))
    ),
    "a block used twice": Network(
        lambda: nn.Sequential(nn.Linear(6, 4), Twice(Residual(rms(4), Attention(4))), rms(4), nn.Linear(4, 3)),
        SEQUENCES,
        (("O", 4, 1), _HEADS),
    ),
    "image of patches": Network(
        lambda: nn.Sequential(
            *(Patches(2, 4), Positions(4, 4, first=False), Residual(rms(4), Attention(4))),
            *(rms(4), MeanOfTokens(), nn.Linear(4, 3)),
        ),
        (_example(4, 2, 4, 4),),
        (("O", 4, 1), _HEADS),
        {ADDED: 4},
    ),
    # A linear layer over tokens, or a fixed one, does the same to all channels, so it is no obstacle to rotations.
    "linear mixing of tokens": Network(
        lambda: stream(Transposed(nn.Linear(5, 5, bias=False))), SEQUENCES, (("O", 4, 1),)
    ),
    "linear bottleneck over tokens": Network(
        lambda: stream(Transposed(*linear(5, 2, 5)[:1], nn.Linear(2, 5, bias=False))),
        SEQUENCES,
        (("O", 4, 1), ("GL", 2, 1)),
    ),
    "Fourier mixing of tokens": Network(
        lambda: nn.Sequential(
            *(nn.Linear(6, 4), Residual(rms(4), FourierMixing()), Residual(rms(4), mlp(4))),
            *(rms(4), nn.Linear(4, 3)),
        ),
        SEQUENCES,
        (("O", 4, 1),),
    ),
    # A perceptron over tokens reads channels one by one.
    "MLP-mixer, RMSNorm": Network(
        lambda: nn.Sequential(
            *(nn.Linear(6, 4), Residual(rms(4), Transposed(mlp(5, 6)))),
            *(Residual(rms(4), mlp(4)), rms(4), nn.Linear(4, 3)),
        ),
        SEQUENCES,
    ),
    "MLP-mixer, LayerNorm": Network(
        lambda: nn.Sequential(
            *(nn.Linear(6, 4), Residual(layer_norm(4), Transposed(mlp(5, 6)))),
            *(Residual(layer_norm(4), mlp(4)), layer_norm(4), nn.Linear(4, 3)),
        ),
        SEQUENCES,
        (),
        {
            WRITERS: (6 + 1) + (5 + 1),
            READERS: 5 + 3,
            "bias per token, which adds the same to all channels": 5,
        },
    ),
    # Convolutions, and norms of channels.
    "conv bottleneck": Network(
        lambda: nn.Sequential(nn.Conv2d(4, 2, 1, bias=False), nn.Conv2d(2, 3, 3)), IMAGES, (("GL", 2, 1),)
    ),
    "conv bottleneck, uniform BatchNorm": Network(
        lambda: nn.Sequential(nn.Conv2d(4, 2, 1, bias=False), nn.BatchNorm2d(2, affine=False), nn.Conv2d(2, 3, 3)),
        IMAGES,
        (("GL", 2, 1),),
    ),
    "conv, BatchNorm, ReLU": Network(
        lambda: nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3)),
        IMAGES,
        (("R", 3, 2),),
        {BIAS_BEFORE: 3},
        seed=5,
    ),
    "BatchNorm by statistics of the batch": Network(
        lambda: nn.Sequential(
            *(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3, eps=1e-12, affine=False, track_running_stats=False)),
            *(nn.GELU(), nn.Conv2d(3, 2, 3)),
        ),
        IMAGES,
        (),
        {"scale of the layer before a batch norm": 3, "bias of the layer before a batch norm": 3},
    ),
    "convolutional stream, RMSNorm of a pixel": Network(
        lambda: nn.Sequential(
            *(nn.Conv2d(4, 3, 1), Residual(PixelNorm(), nn.Conv2d(3, 3, 3, padding=1))),
            *(PixelNorm(), nn.Conv2d(3, 2, 1)),
        ),
        IMAGES,
        (("O", 3, 1),),
    ),
    "depthwise separable conv": Network(
        lambda: nn.Sequential(
            nn.Conv2d(4, 5, 1), nn.GELU(), nn.Conv2d(5, 5, 3, groups=5), nn.GELU(), nn.Conv2d(5, 3, 1)
        ),
        IMAGES,
    ),
    "depthwise separable conv, linear": Network(
        lambda: nn.Sequential(
            nn.Conv2d(4, 5, 1, bias=False), nn.Conv2d(5, 5, 3, groups=5, bias=False), nn.Conv2d(5, 3, 1)
        ),
        IMAGES,
        (("R", 5, 2),),
    ),
    "GroupNorm of a linear layer": Network(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8, eps=0.1, affine=False), nn.Linear(8, 3)),
        vectors(6),
        (("O1", 4, 2),),
        {WRITERS: 2 * (6 + 1), READERS: 2 * 3},
    ),
    "GroupNorm of a linear layer, GELU": Network(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8, eps=0.1, affine=False), nn.GELU(), nn.Linear(8, 3)),
        vectors(6),
        (),
        {WRITERS: 2 * (6 + 1)},
    ),
    "GroupNorm over channels and places": Network(
        lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8, eps=0.1, affine=False), nn.Conv2d(8, 3, 1)),
        IMAGES,
        (("O1", 4, 2),),
        {"bias that is the same for all channels of a group": 2},
    ),
    "transposed conv bottleneck": Network(
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 2, 2, bias=False), nn.AvgPool2d(2), nn.Conv2d(2, 3, 1)),
        IMAGES,
        (("GL", 2, 1),),
    ),
    # Norms and distances of features.
    "side by side behind a norm, two inputs": Network(
        lambda: SideBySide(one=False), vectors(5, 5), (("O", 2, 1), ("O", 3, 1))
    ),
    "side by side behind a norm, one input": Network(
        # The two layers are one layer cut in two, with a basis of 5.
        lambda: SideBySide(one=True),
        vectors(5, 5),
        (("O", 2, 1), ("O", 3, 1)),
        {"rotations between two layers of one input": 2 * 3},
    ),
    "cosine of two towers": Network(TwoTowers, vectors(5, 6), (("O", 3, 1),), {NORMALIZED: 2}),
    "cosine with prototypes": Network(lambda: Prototypes(cosine=True), vectors(4), (("O", 3, 1),), {NORMALIZED: 1 + 6}),
    "distance to prototypes": Network(
        lambda: Prototypes(cosine=False), vectors(4), (("O", 3, 1),), {"translation of both ends of a distance": 3}
    ),
    # Recurrence.
    "LSTM": Network(lambda: Recurrent(nn.LSTM(4, 3, batch_first=True), 3), (_example(4, 4, 4),), (), {CELL: 4 * 3}),
    "LSTM with a projection": Network(
        lambda: Recurrent(nn.LSTM(4, 4, batch_first=True, proj_size=2), 2),
        (_example(4, 4, 4),),
        (("GL", 2, 1),),
        {CELL: 4 * 4},
    ),
    "GRU": Network(
        # The third gate multiplies one of its biases by another gate.
        lambda: Recurrent(nn.GRU(4, 3, batch_first=True), 3),
        (_example(4, 4, 4),),
        (),
        {CELL: 2 * 3},
    ),
    "linear recurrence": Network(lambda: LinearRecurrence(diagonal=False), (_example(4, 5, 4),), (("GL", 3, 1),)),
    "linear recurrence, diagonal": Network(
        lambda: LinearRecurrence(diagonal=True), (_example(4, 5, 4),), (("R", 3, 1),)
    ),
}
