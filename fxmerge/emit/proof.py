"""Whether a network of other sizes is the same function, where units are copies of each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fxmerge.emit.resize import resize
from fxmerge.matching.room import repeated
from fxmerge.program.captured import Program
from fxmerge.program.double import InDouble, in_double
from fxmerge.program.run import Runner
from fxmerge.symmetry.flow import flows
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagation import Propagation
from fxmerge.validate import agree


def outputs(program: Program, state: Mapping[str, Tensor], call: Any) -> list[Any]:
    """What a program computes, in float64 throughout, so that rounding does not hide that networks differ."""
    args, kwargs = pytree.tree_map(in_double, call)
    wide = {name: in_double(tensor) for name, tensor in {**program.constants, **state}.items()}
    with InDouble():  # type: ignore[no-untyped-call]
        return Runner(program).outputs(wide, args, kwargs)


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
