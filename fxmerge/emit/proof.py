"""Whether a network of other sizes is the same function, where units are copies of each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

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
from fxmerge.validate import agree


def outputs(program: Program, state: Mapping[str, Tensor], call: Any) -> list[Any]:
    """What a program computes, in float64 throughout, so that rounding does not hide that networks differ."""
    return _in_double(Runner(program), state, call)


def _in_double(runner: Runner, state: Mapping[str, Tensor], call: Any) -> list[Any]:
    args, kwargs = pytree.tree_map(in_double, call)
    wide = {name: in_double(tensor) for name, tensor in {**runner.program.constants, **state}.items()}
    with InDouble():  # type: ignore[no-untyped-call]
        return runner.outputs(wide, args, kwargs)


class _Lowest(Runner):
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
    return _in_double(_Lowest(lowest, left_out), lowest.state(state, left_out), call)


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
