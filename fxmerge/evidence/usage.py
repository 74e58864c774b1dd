"""How often units are chosen among others on data, as experts are that a router sends tokens to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, fx

from fxmerge.processes import ALONE, Processes
from fxmerge.program.run import Data, Recorder
from fxmerge.symmetry.deferred import Index
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagation import Propagation
from fxmerge.symmetry.shown import places_and_blocks, shown_by

Usage = Mapping[int, Sequence[Tensor]]
"""For classes by number, one tensor for every model: how often each unit was chosen, shape (units,), float64."""


def usage(
    found: Propagation,
    symmetry: Symmetry,
    classes: Collection[int],
    models: Sequence[Mapping[str, Tensor]],
    data: Data,
    processes: Processes = ALONE,
) -> Usage:
    """Counts how often each unit is named by the numbers that an op finds, such as topk.

    Arguments:
        found: the labelled program.
        symmetry: its classes.
        classes: the numbers of those to count. Of some of these, no op may find numbers.
        models: state dicts.
        data: calibration batches.
        processes: those that share the data.
    """
    naming = _naming(found, symmetry, classes)
    sizes = {n: symmetry.units[n].size for n, _ in naming.values()}
    counts = {n: [torch.zeros(size, dtype=torch.float64) for _ in models] for n, size in sizes.items()}
    if not naming:
        return counts
    runner = Recorder(found.program, naming)
    for number, (args, kwargs) in enumerate(data.batches("usage")):
        for m, state in enumerate(models if processes.owns(number) else ()):
            runner.seen = {}
            runner.call(state, args, kwargs)
            for node, (n, units) in naming.items():
                named = torch.bincount(runner.seen[node].reshape(-1).cpu(), minlength=len(units))
                counts[n][m].index_add_(0, units, named.double())
    return processes.total("usage", counts)


def _naming(found: Propagation, symmetry: Symmetry, classes: Collection[int]) -> dict[fx.Node, tuple[int, Tensor]]:
    """The nodes that find numbers of units of some classes: for each the class, and the unit that each number names."""
    number, place = places_and_blocks(found, symmetry)
    indices = {name: index for name, index in found.deferred.items() if isinstance(index, Index)}
    naming: dict[fx.Node, tuple[int, Tensor]] = {}
    for node in found.program.graph.graph.nodes:
        if node.name in indices and all(before.name not in indices for before in node.all_input_nodes):
            for column in indices[node.name].hot.columns:
                shown = shown_by(column, number, place)
                own = set(np.unique(shown.number).tolist()) & set(classes)
                if shown.dims == (0,) and len(own) == 1 and (shown.number >= 0).all():
                    naming[node] = own.pop(), torch.from_numpy(shown.place)
    return naming
