"""The classes of which units of one model may be merged with each other."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from fxmerge.matching.assignment import descendants
from fxmerge.matching.nested import inside, is_block
from fxmerge.symmetry.flow import Flow
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagation import Axis


def mergeable(symmetry: Symmetry, flow: Mapping[Axis, Flow], one_to_one: Collection[int] = ()) -> list[int]:
    """The classes whose units may be merged inside of one model, with all that lies in them.

    Not those that are to be matched one to one, nor those on an axis that both produces and consumes, for which mean
    and sum cannot both be right, nor those along a free output, since who reads it does not know what is merged.
    """
    classes = []
    seen = {n for output in symmetry.free for n in output.classes.tolist()}.union(one_to_one)
    for n in symmetry.choices:
        tree = set(descendants(symmetry, n))
        axes = [(a.parameter, a.dim) for a in symmetry.layout if any(number in tree for number, _ in a.roles)]
        if tree.isdisjoint(seen) and all(flow[axis] is not Flow.BOTH for axis in axes):
            classes.append(n)
    return classes


def read_one_by_one(symmetry: Symmetry, flow: Mapping[Axis, Flow], number: int) -> bool:
    """Whether no layer adds up what several units of a class give, so that the mean of what reads them serves one that
    takes the place of several: each has a matrix of its own, as an expert has that is chosen for some tokens."""
    inside_of = inside(symmetry, number)
    for axis in symmetry.layout:
        if flow[axis.parameter, axis.dim] is not Flow.CONSUMES:
            continue
        unit = np.full(len(axis.index), -1)
        for n, slots in axis.roles:
            if n in inside_of:
                unit[slots] = inside_of[n]
        rows = np.moveaxis(unit[axis.slot], axis.dims.index(axis.dim), -1)
        if (rows >= 0).any() and (rows != rows[..., :1]).any():
            return False
    return True


def read_by_unit(symmetry: Symmetry, flow: Mapping[Axis, Flow]) -> frozenset[str]:
    """The parameters that read what lies in blocks, each block by itself, as the last matrices of experts do."""
    found = set[str]()
    for n in symmetry.choices:
        if is_block(symmetry, n) and read_one_by_one(symmetry, flow, n):
            nested = set(descendants(symmetry, n)[1:]).intersection(symmetry.choices)
            consumed = [axis for axis in symmetry.layout if flow[axis.parameter, axis.dim] is Flow.CONSUMES]
            found |= {axis.parameter for axis in consumed if axis.classes <= nested}
    return frozenset(found)


def zipped_classes(
    symmetry: Symmetry, flow: Mapping[Axis, Flow], one_to_one: Collection[int] = (), resized: Collection[int] = ()
) -> list[int]:
    """Those classes of `mergeable` that a zip goes over: units that are no blocks. But of blocks of which there are to
    be more or fewer, the blocks, and then not what lies in them."""
    return [
        n
        for n in mergeable(symmetry, flow, one_to_one)
        if (n in resized or not is_block(symmetry, n)) and symmetry.ancestors(n).isdisjoint(resized)
    ]
