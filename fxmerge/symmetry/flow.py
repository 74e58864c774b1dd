"""Which parameter axes produce the units that lie on them, and which consume them."""

from __future__ import annotations

from enum import Enum

from fxmerge.symmetry.propagation import Axis, Propagation
from fxmerge.symmetry.units import reached


class Flow(Enum):
    """What a parameter axis does with its units.

    A unit of several models is the mean of what produces it in each; what consumes it adds up.
    """

    PRODUCES = "produces"
    CONSUMES = "consumes"
    BOTH = "both"


def flows(found: Propagation) -> dict[Axis, Flow]:
    """For every parameter axis, what the graph does with its units.

    An axis that a contraction sums over, together with an activation, consumes; one that is in use elsewhere
    as well, such as that of an embedding which is also the output layer, does both; all others produce.
    """
    units = found.units
    used = units.nodes_by_axis(units.used, units.used_at)
    contracted = units.nodes_by_axis(units.contracted, units.contracted_at)
    flow = dict.fromkeys(found.axes, Flow.PRODUCES)
    for axis, nodes in contracted.items():
        flow[axis] = Flow.CONSUMES if nodes >= used[axis] else Flow.BOTH
    return flow


def never_merged(found: Propagation) -> frozenset[Axis]:
    """The parameter axes on which units lie that stay apart, or that lie in such."""
    units = found.units
    if not units.rigid:
        return frozenset()
    apart = reached(units, units.rigid, ((parent, child) for child, parent in units.member))
    return frozenset(axis for axis, own in found.axes.items() if apart[own.ids].any())
