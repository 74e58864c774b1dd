"""What a walk over a program found: the units of every axis, the labels of every node, and rows that are used apart."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fxmerge.program.captured import Program
from fxmerge.symmetry.deferred import Deferred
from fxmerge.symmetry.labels import Labels
from fxmerge.symmetry.units import Ids, UnitGraph, mix

Axis = tuple[str, int]
"""A parameter's name and one of its dimensions."""


@dataclass
class AxisUnits:
    """The units of one parameter axis.

    `ids` has one dimension for each entry of `dims`: the axis itself, and every other dimension whose
    rows are used apart from each other, so that the axis has separate units for each block of rows.
    """

    dims: tuple[int, ...]
    ids: Ids


@dataclass
class Propagation:
    """What a walk over a program found: its units, how often each op was met that has no rule or was probed, and the
    labels of every node, apart from those that were deferred."""

    program: Program
    units: UnitGraph
    axes: dict[Axis, AxisUnits]
    unknown: Counter[Any] = field(default_factory=Counter)
    probed: Counter[Any] = field(default_factory=Counter)
    labels: dict[str, Labels] = field(default_factory=dict)
    deferred: dict[str, Deferred] = field(default_factory=dict)


def rows_used_apart(found: Propagation, known: Mapping[Axis, Ids]) -> dict[Axis, Ids]:
    """For every axis whose rows are used apart, the block that each row belongs to."""
    if not found.units.rows:
        return {}
    movable = np.ones(found.units.size, bool)
    for ids in found.units.final:
        movable[ids] = False
    blocks, count = np.zeros(found.units.size, np.int64), 1
    for ids, groups in found.units.rows:
        span = int(groups.max() - groups.min()) + 1
        block = np.unique(blocks[ids] * span + groups - groups.min(), return_inverse=True)[1]
        blocks[ids] = count + block
        count += int(block.max()) + 1
    by_parameter = defaultdict(list)
    for (name, dim), axis in found.axes.items():
        if movable[axis.ids].any():
            by_parameter[name].append(dim)
    splits = {}
    for (name, dim), axis in found.axes.items():
        row = blocks[
            np.moveaxis(axis.ids, axis.dims.index(dim), 0).reshape(axis.ids.shape[axis.dims.index(dim)], -1)[:, 0]
        ]
        if (name, dim) not in known and len(np.unique(row)) > 1 and set(by_parameter[name]) - {dim}:
            splits[name, dim] = np.unique(row, return_inverse=True)[1]
    return splits


def rows_summed_apart(found: Propagation, known: Mapping[Axis, Ids]) -> dict[Axis, Ids]:
    """The rows of parameters with an axis that is only summed over, in each row, and of which some units are alike.

    Such units, as the weights of equal inputs, may move in each row by themselves. Not so those with which others move.
    """
    units = found.units
    bound, summed, blocks = np.zeros(units.size, bool), np.zeros(units.size, bool), np.zeros(units.size, np.uint64)
    for ids in units.summed:
        summed[ids] = True
    for ids, _ in units.pinned:
        bound[ids] = True
    for a, b in units.equal:
        bound[a[a != b]] = bound[b[a != b]] = True
    for child, parent in units.member:
        bound[parent] = True
        np.add.at(blocks, child, mix(parent))
    splits: dict[Axis, Ids] = {}
    used, at = units.nodes_by_axis(units.used, units.used_at), units.nodes_by_axis(units.summed, units.summed_at)
    for (name, dim), axis in found.axes.items():
        if not used[name, dim] <= at[name, dim]:
            continue
        alike = np.unique(blocks[axis.ids[(summed & ~bound)[axis.ids]]], return_counts=True)[1]
        if (alike > 1).any():
            rows = {d: _length(found.axes[n, d], d) for n, d in found.axes if n == name and d != dim}
            apart = {d: n for d, n in rows.items() if (name, d) not in known or known[name, d].max() + 1 < n}
            splits |= {(name, d): np.arange(n) for d, n in apart.items()}
    return splits


def _length(axis: AxisUnits, dim: int) -> int:
    return int(axis.ids.shape[axis.dims.index(dim)])
