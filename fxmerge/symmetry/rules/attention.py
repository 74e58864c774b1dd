"""Attention: two contractions and a softmax. Heads come out as blocks by themselves."""

from __future__ import annotations

import string

import torch
from torch import Tensor

from fxmerge.symmetry import mixing
from fxmerge.symmetry.labels import Labels, inert
from fxmerge.symmetry.rules.contraction import contract
from fxmerge.symmetry.rules.normalization import normalize
from fxmerge.symmetry.rules.registry import Site, rule

Operand = Labels | Tensor


@rule("scaled_dot_product_attention", contracts=True, adds="attn_mask", mixes=True)
def attention(
    at: Site,
    query: Labels,
    key: Labels,
    value: Labels,
    mask: Operand | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Labels:
    """softmax(q kᵀ + mask) v over (*batch, heads, tokens, dims); the causal mask is a constant over tokens."""
    if enable_gqa:
        heads = query.shape[-3]
        key, value = (_repeat_heads(x, heads) for x in (key, value))
    batch = string.ascii_lowercase[: query.ndim - 2]
    scores = contract(at, [query, key], [batch + "QE", batch + "KE"], batch + "QK")
    if mask is not None:
        scores = at.join(scores, mask)
    if is_causal:
        scores = at.join(scores, torch.ones(scores.shape[-2:]).tril())
    at.mix(mixing.separate, scores)
    weights = normalize(at, scores, [-1])
    if dropout:
        weights = at.join(weights, inert(weights.shape))
    return contract(at, [weights, value], [batch + "QK", batch + "KV"], batch + "QV")


def _repeat_heads(x: Labels, heads: int) -> Labels:
    """Every key and value head serves a run of neighbouring query heads."""
    *batch, own, tokens, dims = x.shape
    shared = (*batch, own, heads // own, tokens, dims)
    spread = x.reshape((*batch, own, 1, tokens, dims)).expand(shared)
    return spread.reshape((*batch, heads, tokens, dims))
