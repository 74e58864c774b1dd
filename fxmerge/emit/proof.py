"""Whether a network of other sizes is the same function, where units are copies of each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxmerge.emit.resize import resize
from fxmerge.matching.room import repeated
from fxmerge.program.captured import Program
from fxmerge.program.double import InDouble, in_double
from fxmerge.program.run import Runner
from fxmerge.symmetry.flow import flows
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagation import Propagation
from fxmerge.symmetry.shown import places_and_blocks, shown_by
from fxmerge.symmetry.units import Ids
from fxmerge.validate import agree


def outputs(program: Program, state: Mapping[str, Tensor], call: Any) -> list[Any]:
    """What a program computes, in float64 throughout, so that rounding does not hide that networks differ."""
    return _in_double(Runner(program), state, call)


def _in_double(runner: Runner, state: Mapping[str, Tensor], call: Any) -> list[Any]:
    args, kwargs = pytree.tree_map(in_double, call)
    wide = {name: in_double(tensor) for name, tensor in {**runner.program.constants, **state}.items()}
    with InDouble():  # type: ignore[no-untyped-call]
        return runner.outputs(wide, args, kwargs)


LOWEST = -1e4
"""Lower than any score; finite, so that its products with zeros are zeros."""


class _Lowest(Runner):
    """Runs a program in which all that some units give, where they first show, is lower than any score.

    Arguments:
        found: the labelled program.
        symmetry: its classes.
        left_out: units of some classes.
    """

    def __init__(self, found: Propagation, symmetry: Symmetry, left_out: Mapping[int, Ids]) -> None:
        super().__init__(found.program)
        number, place = places_and_blocks(found, symmetry)
        given = {node for node, (kind, _) in found.program.sources.items() if kind == "input"}
        self.masks: dict[fx.Node, list[tuple[tuple[int, ...], Tensor]]] = {}
        after: dict[int, set[fx.Node]] = {n: set() for n in left_out}
        for node in found.program.graph.graph.nodes:
            before = node.all_input_nodes
            if given.isdisjoint(before):
                continue
            given.add(node)
            labels = found.labels.get(node.name)
            shown = [shown_by(c, number, place) for c in (labels.columns if labels is not None else ())]
            for n, units in left_out.items():
                own = [c for c in shown if (c.number == n).any()]
                if not after[n].isdisjoint(before):
                    after[n].add(node)
                elif own:
                    after[n].add(node)
                    masks = [(c.dims, torch.as_tensor((c.number == n) & np.isin(c.place, units))) for c in own]
                    self.masks.setdefault(node, []).extend(masks)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for dims, mask in self.masks.get(n, ()):
            if isinstance(value, Tensor) and value.is_floating_point():
                along = mask.reshape([mask.shape[dims.index(d)] if d in dims else 1 for d in range(value.ndim)])
                value = value.masked_fill(along.to(value.device), LOWEST)
        return value


def outputs_of_lowest(
    found: Propagation, symmetry: Symmetry, left_out: Mapping[int, Ids], state: Mapping[str, Tensor], call: Any
) -> list[Any]:
    """What a network computes if some units have the lowest of all scores: what they give where they first depend on
    an input, and their entries of vectors that are added to that.

    Arguments:
        found: the labelled program.
        symmetry: its classes.
        left_out: units of some classes by number.
        state: the parameters.
        call: (args, kwargs) of the model.
    """
    state = dict(state)
    for axis in symmetry.layout:
        for n, slots in axis.roles:
            if n in left_out and len(axis.shape) == 1:
                state[axis.parameter] = state[axis.parameter].index_fill(
                    0, torch.from_numpy(axis.index[slots[left_out[n]]]), LOWEST
                )
                state.update(dict.fromkeys(axis.aliases, state[axis.parameter]))
    return _in_double(_Lowest(found, symmetry, left_out), state, call)


def same_when_repeated(
    found: Propagation, symmetry: Symmetry, widths: Mapping[int, int], state: Mapping[str, Tensor], call: Any
) -> bool:
    """Whether a network is the same function when some classes have more units, each several times.

    Arguments:
        found: the labelled program.
        symmetry: its classes.
        widths: of some classes, how many units there are then.
        state: the parameters.
        call: (args, kwargs) of the model.

    Raises:
        CannotResizeError: if the graph does not allow these sizes.
    """
    several, copies = repeated(symmetry, flows(found), widths)
    into = replace(found.program, aten=resize(found, symmetry, several, copies.spread(state), call))
    wide = copies.spread({name: in_double(tensor) for name, tensor in state.items()})
    return agree(outputs(found.program, state, call), outputs(into, wide, call))
