"""Bases inside of heads in which heads that are to become one agree."""

from __future__ import annotations

import torch
from torch import Tensor

from fxmerge.matching.assignment import Scores
from fxmerge.units.layout import Ids

SWEEPS = 20
"""How often the basis of each head is chosen anew."""


def likeness(products: Scores, units: Ids) -> Scores:
    """How alike heads are in those bases in which they are most alike, for all pairs: from 0 to 1.

    Arguments:
        products: of all pairs of units, as covariances are.
        units: the units of each head, shape (heads, units of a head).
    """
    blocks = torch.from_numpy(products[units[:, None, :, None], units[None, :, None, :]])
    norms = torch.linalg.svdvals(blocks).sum(-1)
    size = norms.diagonal().clamp(min=torch.finfo(norms.dtype).tiny).sqrt()
    alike: Scores = (norms / size[:, None] / size).numpy()
    return alike


def agreeing(products: Scores, units: Ids, size: int) -> Tensor:
    """Orthogonal matrices under which the heads of each group are as alike as possible (generalized Procrustes, Gower
    1975), one head of a group after the other.

    Arguments:
        products: of all pairs of units, as covariances are.
        units: the units of each head, shape (heads, units of a head). Heads of a group are neighbours.
        size: how many heads a group has.

    Returns:
        Shape (heads, units of a head, units of a head): row i of a matrix gives the new unit i. The first head of each
        group keeps its basis.
    """
    blocks = torch.from_numpy(products[units[:, None, :, None], units[None, :, None, :]])
    found = torch.eye(units.shape[1], dtype=blocks.dtype).repeat(len(units), 1, 1)
    for start in range(0, len(units), size):
        group = range(start, start + size)
        for sweep in range(SWEEPS):
            for i in group[1:]:
                # In the first sweep only those before it have a basis that was chosen.
                others = [j for j in group if j != i and (sweep > 0 or j < i)]
                cross = torch.stack([found[j] @ blocks[j, i] for j in others]).sum(0)
                left, _, right = torch.linalg.svd(cross)
                found[i] = left @ right
    return found
