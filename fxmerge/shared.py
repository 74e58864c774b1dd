"""What all models of a call share: tensors that are equal bit for bit, and that need not move.

A frozen base under adapters, and constants such as grids, centres and frequencies, stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import networkx as nx
import numpy as np
import torch
from torch import Tensor, fx

from fxmerge.program.captured import Program
from fxmerge.symmetry.flow import Flow
from fxmerge.symmetry.freeze import freeze
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagation import Axis
from fxmerge.units.layout import AxisLayout
from fxmerge.units.unit_map import UnitMap

EQUAL = "equal in all models"
"""The reason given for units that do not move since what produces them is the same in all models."""

State = Mapping[str, Tensor]


def equal_names(states: Sequence[State]) -> frozenset[str]:
    """The names of the tensors that are equal, bit for bit, in all of several state dicts; one shares none.

    Example:
        >>> one, two = ({"a": torch.ones(2), "b": torch.full((2,), b)} for b in (0.0, 1.0))
        >>> sorted(equal_names([one, two]))
        ['a']
    """
    first, *others = states
    if not others:
        return frozenset()
    return frozenset(name for name, own in first.items() if all(torch.equal(own, state[name]) for state in others))


def without_shared(
    symmetry: Symmetry,
    flow: Mapping[Axis, Flow],
    states: Sequence[State],
    masks: Collection[str] = (),
    own: Collection[str] = (),
) -> tuple[Symmetry, frozenset[str]]:
    """The symmetry in which units do not move that are the same in all models, and the names of their classes.

    The parameters that produce the units of a class vote: those that are equal in all models, and not uniform along the
    axis, for units that are the same; those that differ for units that each model has found by itself. A bias of
    zeros and a gain of ones are equal in all fresh networks, and say nothing. Units are the same if at least half of
    the parameters and at least half of their entries say so: small adapters do not make units of a frozen layer
    other units, and a fixed table that is added to trained embeddings does not make their units the same. Classes that
    are nested in each other vote together, since they stay or move together.

    Arguments:
        symmetry: the symmetry.
        flow: what produces units.
        states: the state dicts of all models.
        masks: names of buffers that cut parameters. Units along one that is equal in all models are the same.
        own: names of tensors that are of one model alone, which do not vote. Units that lie on none but these stay.
    """
    equal = equal_names(states)
    still: set[int] = set()
    votes = np.zeros((len(symmetry.units), 2, 2))  # By class; for "differs" and "same": entries, and parameters.
    common = {number for axis in symmetry.layout if axis.parameter not in own for number, _ in axis.roles}
    for axis in symmetry.layout:
        if axis.parameter in own:
            continue
        value, same = states[0][axis.parameter], axis.parameter in equal
        if same and axis.parameter in masks and not _uniform(value, axis):
            still |= {number for number, _ in axis.roles}
        if flow[axis.parameter, axis.dim] is not Flow.CONSUMES:
            for number, slots in axis.roles:
                if not same or not _uniform(value, axis):
                    votes[number, int(same)] += value.numel() * len(slots) / len(axis.index), 1
    nested: nx.Graph[int] = nx.Graph()
    nested.add_nodes_from(range(len(symmetry.units)))
    nested.add_edges_from((n, p) for n, c in enumerate(symmetry.units) for p, _ in c.parents)
    for together in nx.connected_components(nested):
        differs, same = votes[list(together)].sum(axis=0)
        if common.isdisjoint(together) or ((same > 0).all() and (same >= differs).all()):
            still |= together
    smaller, names = freeze(symmetry, still, lambda _: EQUAL) if still else (symmetry, ())
    return smaller, frozenset(names)


def _uniform(value: Tensor, axis: AxisLayout) -> bool:
    """Whether all indices of an axis hold the same."""
    return bool((value == value.narrow(axis.dim, 0, 1)).all())


def staying(symmetry: Symmetry, states: Sequence[State]) -> frozenset[str]:
    """The names of the tensors that are equal in all models, and on which no unit moves."""
    moving = {name for axis in symmetry.layout for name in (axis.parameter, *axis.aliases)}
    return equal_names(states) - moving


def agreed(units: UnitMap, states: Sequence[State]) -> frozenset[str]:
    """The names of the tensors that are equal, bit for bit, in all of several models in units that match.

    Models of which all tensors are so, such as a model and the same one in other units, compute the same.

    Arguments:
        units: where the units of the models go.
        states: their state dicts.
    """
    return frozenset(name for name in equal_names(states) if units.moves_alike(name))


def computed_alike(program: Program, names: Collection[str]) -> frozenset[fx.Node]:
    """The nodes that depend on no parameters but those named: all models compute the same there."""
    own: set[fx.Node] = set()
    for node in program.graph.graph.nodes:
        kind, name = program.sources.get(node, ("", ""))
        if (kind != "parameter" or name in names) and own.issuperset(node.all_input_nodes):
            own.add(node)
    return frozenset(own)
