"""Which parameters and which other classes the merging of a class touches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fxmerge.matching.assignment import descendants
from fxmerge.symmetry.flow import Flow
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagation import Axis
from fxmerge.units.layout import AxisLayout


def reads(symmetry: Symmetry, flow: Mapping[Axis, Flow], number: int) -> int:
    """How many layers read the units of a class; all heads count as one."""
    axes = {(a.parameter, a.dim) for a in axes_of(symmetry, number)}
    return max(sum(flow[axis] is Flow.CONSUMES for axis in axes), 1)


def neighbours(symmetry: Symmetry, classes: Sequence[int]) -> dict[int, set[int]]:
    """For every class, the classes (itself included) that share a parameter with it."""
    on = {n: {a.parameter for a in axes_of(symmetry, n)} for n in classes}
    return {n: {m for m in classes if not on[m].isdisjoint(on[n])} for n in classes}


def meets_itself(symmetry: Symmetry, number: int) -> bool:
    """Whether a class, or what is nested in it, lies along several axes of one parameter, so that how alike its units
    are depends on what is merged of it."""
    names = [axis.parameter for axis in axes_of(symmetry, number)]
    return len(set(names)) < len(names)


def axes_of(symmetry: Symmetry, number: int) -> list[AxisLayout]:
    """The axes along which a class lies, or what is nested in it."""
    tree = set(descendants(symmetry, number))
    return [axis for axis in symmetry.layout if any(n in tree for n, _ in axis.roles)]
