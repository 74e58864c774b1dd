"""Products of rows with stacked matrices, where an index chooses among these and the rows are in its order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxmerge.symmetry.columns import core, support
from fxmerge.symmetry.deferred import Chosen, Counts, Deferred, Index
from fxmerge.symmetry.labels import Labels
from fxmerge.symmetry.rules.contraction import contract
from fxmerge.symmetry.rules.lifting import simplest
from fxmerge.symmetry.rules.registry import Site, rule


@rule("_grouped_mm", "transformers::grouped_mm_fallback", contracts=True, takes=True)
def grouped_mm(
    at: Site, rows: Labels | Deferred, stack: Labels | Deferred, ends: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Every row is multiplied by the matrix of the unit that is named for it: the matrices' other axes are apart."""
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, (Labels, Tensor, Deferred))]
    if given or not isinstance(ends, Counts) or not ends.ends or len(rows.shape) != 2 or len(stack.shape) != 3:
        return NotImplemented
    own = _order_of(at, rows, ends)
    if own is None or own.count != stack.shape[0]:
        return NotImplemented
    each = rows.full if isinstance(rows, Chosen) else at.labels(rows).reshape((1, *rows.shape))
    full = contract(at, [each, at.labels(stack)], ["eSi", "eio"], "eSo")
    return simplest(at, Chosen(full, own.reshape((rows.shape[0], 1)).expand(at.shape)))


def _order_of(at: Site, rows: Labels | Deferred, ends: Counts) -> Index | None:
    """The sorted numbers in whose order rows lie, if they are the ones that were counted."""
    ordered: Index
    for followed in at.units.followed:
        if followed.order is None:
            continue
        numbers, ordered = followed.order
        if ends.of in (numbers.source, ordered.source):
            if isinstance(rows, Chosen):
                place = torch.arange(rows.shape[0])[:, None].expand(rows.shape)
                if rows.by.source is ordered.source and torch.equal(rows.by.place, place):
                    return ordered
            elif any(
                np.array_equal(core(c, (0,)), followed.ids) for c in at.labels(rows).columns if support(c) == (0,)
            ):
                return ordered
    return None
