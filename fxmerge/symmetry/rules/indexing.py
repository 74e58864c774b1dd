"""Ops that look positions up: movements where the index is a constant, else the indexed dimensions are pinned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxmerge.symmetry.labels import Labels, inert, move, pin
from fxmerge.symmetry.rules.registry import Site, rule

Index = Labels | Tensor


@rule("index", "_unsafe_index")
def index(at: Site, x: Labels | Tensor, indices: Sequence[Index | None]) -> Labels:
    if not any(isinstance(i, Labels) for i in indices):
        chosen = [i.to("cpu") if isinstance(i, Tensor) else None for i in indices]
        return move(at.units, at.labels(x), lambda c: torch.ops.aten.index(c, chosen), at.shape, at.name)
    dims = [d for d, i in enumerate(indices) if i is not None]
    rank = max(len(i.shape) for i in indices if i is not None)
    first = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    return _look_up(at, at.labels(x), dims, list(range(first, first + rank)))


@rule("index_select")
def index_select(at: Site, x: Labels | Tensor, dim: int, chosen: Index) -> Labels:
    return index(at, x, [None] * (dim % len(x.shape)) + [chosen])


@rule("embedding")
def embedding(at: Site, weight: Labels | Tensor, chosen: Index, *args: Any, **kwargs: Any) -> Labels:
    return index(at, weight, [chosen])


def _look_up(at: Site, x: Labels, dims: Sequence[int], out: Sequence[int]) -> Labels:
    """`dims` of x, indexed by data, are replaced by the dimensions `out` of the result."""
    x = pin(at.units, x, f"{at.name}: indexed by data", dims)
    one = tuple(0 if d in dims else slice(None) for d in range(x.ndim))
    rest = tuple(1 if d in out else n for d, n in enumerate(at.shape))
    looked = x.map(lambda c: c[one].reshape(rest).expand(at.shape), at.shape)
    return at.join(Labels(at.shape, looked.columns, looked.inert), inert(at.shape, out))


@rule("gather")
def gather(at: Site, x: Labels | Tensor, dim: int, chosen: Index, **kwargs: Any) -> Labels:
    labels = at.labels(x)
    dim %= max(labels.ndim, 1)
    if isinstance(chosen, Tensor):
        fixed = chosen.to("cpu")
        return move(at.units, labels, lambda c: torch.gather(c, dim, fixed), at.shape, at.name)
    labels = pin(at.units, labels, f"{at.name}: indexed by data", [dim])
    first = torch.zeros(at.shape, dtype=torch.int64)
    taken = move(at.units, labels, lambda c: torch.gather(c, dim, first), at.shape, at.name)
    return at.join(taken, inert(at.shape, [dim, *_varying_dims(chosen)]))


def _varying_dims(x: Labels) -> list[int]:
    return [d for d, n in enumerate(x.shape) if n > 1]
