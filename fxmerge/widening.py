"""Networks that differ in the numbers of their units only: the narrower ones with more units, and the same function."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from fxmerge.emit.bake import bake
from fxmerge.emit.proof import same_when_repeated
from fxmerge.emit.resize import rewritten, write
from fxmerge.emit.sizes import CannotResizeError
from fxmerge.errors import CaptureError
from fxmerge.matching.room import Room, may_change, repeated
from fxmerge.program import models
from fxmerge.program.capture import Args, capture_ops, capture_program
from fxmerge.program.captured import Program
from fxmerge.symmetry.flow import flows
from fxmerge.symmetry.group import Symmetry, analyse
from fxmerge.symmetry.propagation import Propagation

logger = logging.getLogger(__name__)

Call = tuple[Args, dict[str, Any]]


class _CannotWidenError(Exception):
    """Some classes cannot have more units, with the reason."""

    def __init__(self, classes: Collection[int], why: str) -> None:
        super().__init__(why)
        self.classes = classes


def of_equal_width(
    given: Sequence[nn.Module], names: Sequence[str], call: Call, varying: Collection[tuple[int, int]]
) -> tuple[nn.Module, ...]:
    """Models of which each class has as many units as in the model that has most; as they are, if they have already, or
    if one cannot have as many, of which is warned.

    A unit becomes several that give the same, and what reads them is shared out among them (Net2WiderNet, arXiv
    1511.05641), so that the function stays the same.

    Arguments:
        given: the models.
        names: what they are called in messages.
        call: (args, kwargs) of all.
        varying: dimensions of inputs that may have several sizes.
    """
    shapes = [{name: tuple(t.shape) for name, t in models.tensors(model).items()} for model in given]
    if any(own.keys() != shapes[0].keys() for own in shapes) or not any(_inputs_differ(shapes[0], s) for s in shapes):
        return tuple(given)
    try:
        programs = [capture_program(model, *call, varying=set(varying)) for model in given]
    except CaptureError:
        return tuple(given)
    if any(_ops(program) != _ops(programs[0]) for program in programs):
        return tuple(given)
    found = [analyse(program, continuous=False) for program in programs]
    symmetries = [symmetry for _, symmetry in found]
    if any(symmetry.names != symmetries[0].names or not symmetry.names for symmetry in symmetries):
        return tuple(given)
    most = [max(c.size for c in same) for same in zip(*(s.units for s in symmetries), strict=True)]
    made = list[nn.Module]()
    for model, name, program, (propagation, symmetry) in zip(given, names, programs, found, strict=True):
        if all(c.size == size for c, size in zip(symmetry.units, most, strict=True)):
            made.append(model)
            continue
        try:
            made.append(_widened(model, program, propagation, symmetry, most, call, varying))
        except (CannotResizeError, _CannotWidenError) as error:
            differ = [n for n, c in enumerate(symmetry.units) if c.size != most[n]]
            n = next((n for n in differ if n in error.classes), differ[0])
            logger.warning(
                "%s has %d units of class %r, where another network has %d, and cannot be given as many: %s What comes "
                "before is merged, if there is anything.",
                *(name, symmetry.units[n].size, symmetry.names[n], most[n], error),
            )
            return tuple(given)
        logger.info("%s has more units, each several times, so that all networks have as many", name)
    return tuple(made)


def _ops(program: Program) -> list[str]:
    """The ops of a program, in order."""
    return [str(node.target) for node in program.graph.graph.nodes if node.op == "call_function"]


def _inputs_differ(first: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether tensors differ in another size than the first one, which is that of a layer's outputs."""
    return any(len(a) == len(b) and a[1:] != b[1:] for a, b in ((first[name], other[name]) for name in first))


def _widened(
    model: nn.Module,
    program: Program,
    found: Propagation,
    symmetry: Symmetry,
    sizes: Sequence[int],
    call: Call,
    varying: Collection[tuple[int, int]],
) -> fx.GraphModule:
    """A model with more units of each class, and the same function.

    Raises:
        CannotResizeError: if the graph does not allow these sizes.
        _CannotWidenError: if the classes do not, or if the function does not stay the same.
    """
    grown = {n: size for n, size in enumerate(sizes) if size > symmetry.units[n].size}
    roots = {n: size for n, size in grown.items() if symmetry.ancestors(n).isdisjoint(grown)}
    _, more = may_change(symmetry, flows(found), list(roots))
    refused = set(roots) - more or {n for n, width in enumerate(Room.of(symmetry, roots).widths) if width != sizes[n]}
    if refused:
        raise _CannotWidenError(refused, "they lie in blocks, such as heads or groups, or no layer reads them.")
    state = models.tensors(model)
    if not same_when_repeated(found, symmetry, roots, state, call):
        raise _CannotWidenError(set(roots), "the network is then another one, as if an op counted units.")
    several, copies = repeated(symmetry, flows(found), roots)
    wide = copies.spread(state)
    ops = capture_ops(model, *call, varying=set(varying))
    for node, changes in rewritten(ops, program, found, symmetry, several, wide, call).items():
        write(node, changes)
    ops.recompile()
    return bake(replace(program, module=ops), wide)
