"""Units that have the lowest of all scores, so that none of them is chosen."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagation import Propagation
from fxmerge.symmetry.shown import Shown, places_and_blocks, shown_by

LOWEST = -1e4
"""Lower than any score; finite, so that its products with zeros are zeros."""


@dataclass
class Lowest:
    """Gives units of some classes the lowest score: what they give where they first depend on an input, and their
    entries of vectors that are added to that.

    Arguments:
        found: the labelled program.
        symmetry: its classes.
        classes: the numbers of those of which units may have the lowest score.
    """

    found: Propagation
    symmetry: Symmetry
    classes: Collection[int]
    shown: dict[fx.Node, list[tuple[int, Shown]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        program = self.found.program
        number, place = places_and_blocks(self.found, self.symmetry)
        given = {node for node, (kind, _) in program.sources.items() if kind == "input"}
        after: dict[int, set[fx.Node]] = {n: set() for n in self.classes}
        for node in program.graph.graph.nodes:
            before = node.all_input_nodes
            if given.isdisjoint(before):
                continue
            given.add(node)
            labels = self.found.labels.get(node.name)
            shown = [shown_by(c, number, place) for c in (labels.columns if labels is not None else ())]
            for n in self.classes:
                own = [(n, c) for c in shown if (c.number == n).any()]
                if not after[n].isdisjoint(before):
                    after[n].add(node)
                elif own:
                    after[n].add(node)
                    self.shown.setdefault(node, []).extend(own)

    def state(self, state: Mapping[str, Tensor], units: Mapping[int, Collection[int]]) -> dict[str, Tensor]:
        """The parameters where some units of the classes have the lowest score."""
        found = dict(state)
        for axis in self.symmetry.layout:
            for n, slots in axis.roles:
                if n in units and len(axis.shape) == 1:
                    index = torch.from_numpy(axis.index[slots[list(units[n])]])
                    value = found[axis.parameter]
                    found[axis.parameter] = value.index_fill(0, index.to(value.device), LOWEST)
                    found.update(dict.fromkeys(axis.aliases, found[axis.parameter]))
        return found

    def value(self, node: fx.Node, value: Any, units: Mapping[int, Collection[int]]) -> Any:
        """What a node gives then, which is given what it computes."""
        for n, own in self.shown.get(node, ()):
            if n in units and isinstance(value, Tensor) and value.is_floating_point():
                mask = torch.from_numpy((own.number == n) & np.isin(own.place, list(units[n])))
                mask = mask.reshape([mask.shape[own.dims.index(d)] if d in own.dims else 1 for d in range(value.ndim)])
                value = value.masked_fill(mask.to(value.device), LOWEST)
        return value
