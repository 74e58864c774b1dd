"""Whether a network of other sizes is the same function, where units are copies of each other."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

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
from fxmerge.symmetry.lowest import Lowest
from fxmerge.symmetry.propagation import Propagation
from fxmerge.symmetry.units import Ids
from fxmerge.units.unit_map import UnitMap
from fxmerge.validate import agree


def outputs(program: Program, state: Mapping[str, Tensor], call: Any) -> list[Any]:
    """What a program computes, in float64 throughout, so that rounding does not hide that networks differ."""
    return InDoubleOnUse(program).all_outputs(state, call)


class InDoubleOnUse(Runner):
    """Runs a program in float64. What a parameter is in float64 is in memory only while a node uses it."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        return pytree.tree_map(in_double, super().fetch_args_kwargs_from_env(n))

    def all_outputs(self, state: Mapping[str, Tensor], call: Any) -> list[Any]:
        """What the program gives on inputs, which are as they are in the model."""
        args, kwargs = pytree.tree_map(in_double, call)
        with InDouble():  # type: ignore[no-untyped-call]
            return self.outputs(state, args, kwargs)


class _Lowest(InDoubleOnUse):
    """Runs a program in which some units have the lowest of all scores."""

    def __init__(self, lowest: Lowest, left_out: Mapping[int, Ids]) -> None:
        super().__init__(lowest.found.program)
        self.lowest, self.left_out = lowest, left_out

    def run_node(self, n: fx.Node) -> Any:
        return self.lowest.value(n, super().run_node(n), self.left_out)


def outputs_of_lowest(
    found: Propagation, symmetry: Symmetry, left_out: Mapping[int, Ids], state: Mapping[str, Tensor], call: Any
) -> list[Any]:
    """What a network computes if some units have the lowest of all scores.

    Arguments:
        found: the labelled program.
        symmetry: its classes.
        left_out: units of some classes by number.
        state: the parameters.
        call: (args, kwargs) of the model.
    """
    lowest = Lowest(found, symmetry, left_out)
    return _Lowest(lowest, left_out).all_outputs(lowest.state(state, left_out), call)


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
    return agree(outputs(found.program, state, call), outputs(into, spread(copies, state), call))


def spread(units: UnitMap, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`UnitMap.spread`, in float64 where entries are shared out: a third of a number may not be one in less."""
    return units.spread({name: in_double(own) if name in units.shared_out else own for name, own in state.items()})


def unequal(symmetry: Symmetry, numbers: Collection[int], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state in which no two units of some classes are equal: of equal scores, a graph with fewer units may choose
    others."""
    generator, changed = torch.Generator().manual_seed(0), dict(state)
    for axis in symmetry.layout:
        own = changed[axis.parameter]
        if not axis.classes.isdisjoint(numbers) and own.is_floating_point():
            factor = torch.randn(own.shape, generator=generator).mul_(0.1).add_(1)
            changed.update(dict.fromkeys((axis.parameter, *axis.aliases), own * factor.to(own)))
    return changed
