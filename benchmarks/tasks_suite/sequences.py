"""The networks over sequences: a vision transformer, a GPT, a Llama with and without experts, and an LSTM."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Self-attention, with one projection to queries, keys and values, or one for each."""

    def __init__(self, dim: int, heads: int, *, fused: bool, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        if fused:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.fused = fused
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a LayerNorm and around a shortcut."""

    def __init__(self, dim: int, heads: int, *, fused: bool, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, fused=fused, causal=causal)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class ViT(nn.Module):
    """A vision transformer over the patches of an image, read out as the mean over tokens."""

    def __init__(self, size: int, patch: int, dim: int, depth: int, heads: int, out: int, *, fused: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, fused=fused, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, out)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        y: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return y


class GPT(nn.Module):
    """A causal transformer that gives the scores of each next character, shape (n, length, characters).

    Tied, the weight of the output layer is that of the embedding, as in GPT-2.
    """

    def __init__(self, characters: int, context: int, dim: int, depth: int, heads: int, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, dim)
        self.position = nn.Parameter(0.02 * torch.randn(context, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, fused=True, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, characters)
        if tied:
            self.head.weight = self.embedding.weight
            nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.blocks(self.embedding(tokens) + self.position)))
        return y


def rotated(x: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of queries or keys, shape (n, heads, length, size)."""
    half = x.shape[-1] // 2
    frequencies = 10_000 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * frequencies
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class Experts(nn.Module):
    """A mixture of gated perceptrons, as in Mixtral (arXiv 2401.04088): every token goes to the two experts with the
    highest scores. While it learns, noise in the scores keeps all of them in use."""

    NOISE = 0.5

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * hidden, dim) / dim**0.5)
        self.down = nn.Parameter(torch.randn(experts, dim, hidden) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        if self.training:
            scores = scores + self.NOISE * torch.randn_like(scores)
        best, chosen = scores.softmax(-1).topk(2, -1)
        shares = torch.zeros_like(scores).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
        gate, up = torch.einsum("nld,ehd->nleh", x, self.gate_up).chunk(2, -1)
        given = torch.einsum("nleh,edh->nled", F.silu(gate) * up, self.down)
        out: Tensor = (given * shares[..., None]).sum(2)
        return out


class RotaryBlock(nn.Module):
    """Attention with rotary positions and a gated perceptron, or several as experts, each behind an RMSNorm and around
    a shortcut."""

    def __init__(self, dim: int, heads: int, hidden: int, experts: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        if experts:
            self.experts = Experts(dim, hidden, experts)
        else:
            self.gate, self.up = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
            self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        given = self.experts(y) if hasattr(self, "experts") else self.down(F.silu(self.gate(y)) * self.up(y))
        out: Tensor = x + given
        return out


class Llama(nn.Module):
    """A causal transformer in the manner of Llama, which gives the scores of each next character, shape
    (n, length, characters). Tied, the weight of the output layer is that of the embedding. With experts, these are in
    place of every perceptron."""

    def __init__(
        self, characters: int, dim: int, depth: int, heads: int, hidden: int, *, tied: bool = False, experts: int = 0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, dim)
        self.blocks = nn.Sequential(*(RotaryBlock(dim, heads, hidden, experts) for _ in range(depth)))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, characters, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
            nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.blocks(self.embedding(tokens))))
        return y


class LSTM(nn.Module):
    """A recurrent network that gives the scores of each next character, shape (n, length, characters)."""

    def __init__(self, characters: int, dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, dim)
        self.lstm = nn.LSTM(dim, hidden, depth, batch_first=True)
        self.head = nn.Linear(hidden, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.lstm(self.embedding(tokens))[0])
        return y
