"""Columns: int64 tensors that give a unit, or an inert number, to every position of the tensor they label.

A column has the shape of that tensor, and stride 0 along the dimensions on which it does not depend, so
that it costs the memory of its support only, and every view op of torch moves it for free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, ...]


def support(column: Tensor) -> tuple[int, ...]:
    """The dimensions on which a column depends."""
    return tuple(d for d, (n, s) in enumerate(zip(column.shape, column.stride(), strict=True)) if n > 1 and s != 0)


def axis_column(shape: Shape, dim: int) -> Tensor:
    """The column that numbers the positions along one dimension."""
    return spread(torch.arange(shape[dim]), shape, (dim,))


def spread(ids: Tensor, shape: Shape, dims: Sequence[int]) -> Tensor:
    """Lays `ids`, whose dimensions are `dims` of the result, out over `shape`."""
    return ids.reshape([shape[d] if d in dims else 1 for d in range(len(shape))]).expand(shape)


def core(column: Tensor, dims: Sequence[int]) -> Tensor:
    """The column along `dims`, at the first position of every other dimension."""
    kept = [d for d in range(column.ndim) if d in dims]
    flat = column[tuple(slice(None) if d in dims else 0 for d in range(column.ndim))]
    return flat.permute([kept.index(d) for d in dims])


def compact(column: Tensor) -> Tensor:
    """The column at the first position of every dimension on which it does not depend, all dimensions kept."""
    dims = support(column)
    return column[tuple(slice(None) if d in dims else slice(0, 1) for d in range(column.ndim))]


def shrink(column: Tensor) -> Tensor:
    """The same column with stride 0 along every dimension on which it is constant."""
    small = compact(column)
    for d in support(small):
        first = small.narrow(d, 0, 1)
        # The last slice differs from the first in almost every column that depends on d at all.
        if torch.equal(first, small.narrow(d, -1, 1)) and bool((small == first).all()):
            small = first
    return small.expand(column.shape)


def reshape(column: Tensor, shape: Shape) -> Tensor:
    """`column.reshape(shape)`, made dense only along the view groups on which the column depends."""
    inner: list[int] = []
    narrow = column
    for old, new in view_groups(tuple(column.shape), shape):
        if any(d in support(column) for d in old):
            inner += [shape[d] for d in new]
        else:
            for d in old:
                narrow = narrow.narrow(d, 0, 1)
            inner += [1] * len(new)
    return narrow.reshape(inner).expand(shape)


def view_groups(old: Shape, new: Shape) -> list[tuple[range, range]]:
    """The finest runs of dimensions of `old` and of `new` that hold the same entries."""
    if math.prod(old) != math.prod(new):
        raise ValueError(f"a tensor of shape {old} cannot be viewed as {new}")
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b, m, n = i, j, 1, 1
        if i < len(old):
            m, i = old[i], i + 1
        elif j < len(new):
            n, j = new[j], j + 1
        while m != n:
            if m < n:
                m, i = m * old[i], i + 1
            else:
                n, j = n * new[j], j + 1
        groups.append((range(a, i), range(b, j)))
    return groups


def joint_column(factors: Sequence[Tensor]) -> Tensor | None:
    """The common refinement of some columns: positions are alike if they are in all of them."""
    if len(factors) < 2:
        return factors[0] if factors else None
    dims = sorted({d for f in factors for d in support(f)})
    shape = tuple(factors[0].shape)
    code, limit = np.zeros([shape[d] for d in dims], np.int64), 1
    for f in factors:
        ids = core(f, dims).numpy()
        size = int(ids.max()) + 1
        if limit * size > 2**62:
            code = np.unique(code, return_inverse=True)[1].reshape(code.shape)
            limit = int(code.max()) + 1
        code, limit = code * size + ids, limit * size
    return spread(torch.from_numpy(code), shape, dims)
