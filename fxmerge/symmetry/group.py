"""The symmetry of a model: how it is found, and what can be done with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxmerge.program.capture import Args, Kwargs, capture_program
from fxmerge.program.captured import Program
from fxmerge.symmetry import readspec, spec
from fxmerge.symmetry.base import ClassAxis as ClassAxis
from fxmerge.symmetry.base import EquivalenceClass as EquivalenceClass
from fxmerge.symmetry.base import Group
from fxmerge.symmetry.classes import Resolution, resolve
from fxmerge.symmetry.contracted import Role
from fxmerge.symmetry.describe import describe, tables
from fxmerge.symmetry.kinds import find_kinds, is_uniform, not_turned
from fxmerge.symmetry.outputs import FreeOutput, free_leaves, free_outputs, paths_of
from fxmerge.symmetry.overrides import REQUESTED, Pin, Rules, overriding, pinned_axes
from fxmerge.symmetry.propagate import propagate
from fxmerge.symmetry.propagation import Axis, AxisUnits, Propagation
from fxmerge.symmetry.units import Ids, among, distinct
from fxmerge.symmetry.verify import verify
from fxmerge.units.layout import AxisLayout


@dataclass(frozen=True)
class Symmetry(Group):
    """The permutations and changes of basis of a model's parameters that leave its function unchanged.

    Made by `find_symmetry`. `str(symmetry)` lists the classes; the attributes are those of `Group`.
    """

    def __str__(self) -> str:
        return describe(self)

    def _repr_html_(self) -> str:
        """The same as tables, for notebooks."""
        return tables(self)

    def verify(
        self,
        model: nn.Module | ExportedProgram,
        args: Args,
        kwargs: Kwargs | None = None,
        trials: int = 1,
        generator: torch.Generator | None = None,
    ) -> Symmetry:
        """Proves the group on the module itself; see `fxmerge.symmetry.verify.verify`."""
        return verify(self, model, args, kwargs, trials=trials, generator=generator)

    # ---------------------------------------------------------------------- the spec

    def to_json(self, path: str | Path | None = None) -> str:
        """Writes the symmetry as a text that can be read, kept, compared and edited.

        Arguments:
            path: a file to write it to, too.

        Returns:
            JSON, from which `from_json` makes the same symmetry.
        """
        text = spec.to_json(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @staticmethod
    def from_json(source: str | Path) -> Symmetry:
        """Reads a symmetry that `to_json` wrote, and that may have been edited since.

        Arguments:
            source: the text itself, or the path of a file with it.

        Raises:
            SpecError: if the text is no such description, or describes no group.
            OptionError: if its `pin` names no parameter.

        Example:
            >>> import torch, fxmerge
            >>> mlp = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
            >>> text = fxmerge.find_symmetry(mlp, (torch.zeros(1, 2),)).to_json()
            >>> fxmerge.Symmetry.from_json(text).to_json() == text
            True
        """
        return readspec.from_json(source, Symmetry)


def find_symmetry(
    model: nn.Module | ExportedProgram,
    args: Args = (),
    kwargs: Kwargs | None = None,
    *,
    pin: Iterable[Pin] = (),
    rules: Rules | None = None,
    free: str | Iterable[str] = (),
) -> Symmetry:
    """Infers which permutations and changes of basis of a model's parameters leave its function unchanged.

    Arguments:
        model: any module that torch.export can capture; it is not modified.
        args: example inputs, as the model's forward takes them.
        kwargs: example inputs by keyword.
        pin: parameters that must not move: ("layer.weight", 0) for one axis, a name or a pattern such as
            "layer.*" for all axes.
        rules: rules that come before the registered ones in this call, by op: "mylib::op" or torch.ops.mylib.op.
        free: outputs along which units may move, as the features of a backbone may whose head is not part of the model:
            "output" for all outputs, "output[0]", "output['logits']" or "output.logits" for one of several. The
            outputs of a permuted model are then permuted, too.

    Returns:
        The equivalence classes of parameter axes, and the group that they generate.

    Raises:
        CaptureError: if the model cannot be captured as a graph.
        OptionError: if `pin` names no parameter, `rules` no op, or `free` no output.

    Example:
        >>> import torch, fxmerge
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> symmetry = fxmerge.find_symmetry(mlp, (torch.zeros(1, 2),))
        >>> print(symmetry)
        a: 3 units, 3!, R+^3 | 0.weight(a _), 0.bias(a), 2.weight(_ a)
        pinned: 0.weight[1], 2 indices: linear
    """
    return analyse(capture_program(model, args, kwargs), pin, rules, free)[1]


def analyse(
    program: Program,
    pin: Iterable[Pin] = (),
    rules: Rules | None = None,
    free: str | Iterable[str] = (),
    states: Sequence[Mapping[str, Tensor]] = (),
    *,
    continuous: bool = True,
) -> tuple[Propagation, Symmetry]:
    """The labels of a captured program, and its symmetry.

    Arguments:
        program: the captured program.
        pin, rules, free: as for `find_symmetry`.
        states: state dicts for which the symmetry is to hold; by default the program's own. Where all have gains of one
            number each, larger groups commute with these.
        continuous: whether to find by which matrices units may be mixed; else they are only permuted.
    """
    leaves = free_leaves(free, paths_of(program.aten.out, sum(program.aten.outputs)))
    shapes = {name: tuple(tensor.shape) for name, tensor in program.parameters.items()}
    values = states or [program.parameters]
    uniform = {name for name in program.parameters if all(is_uniform(own[name]) for own in values)}
    asked = pinned_axes(pin, shapes, program.aliases)
    still = set[str]()
    while True:
        found = propagate(program, overriding(rules), leaves, uniform, still, weighs=continuous)
        found.units.node = ""
        for axis in asked:
            if axis in found.axes:
                found.units.pin(distinct(found.axes[axis].ids), REQUESTED)
        resolution = resolve(found.units, found.axes)
        outputs, unknown_leaves = free_outputs(found, resolution.classes, leaves)
        leaves = leaves - unknown_leaves
        if unknown_leaves:
            continue
        symmetry = _symmetry(found, resolution, program, outputs)
        if not continuous and not found.units.turned:
            return found, symmetry
        kinds = find_kinds(found, symmetry, resolution.number, resolution.place)
        more = not_turned(found, replace(symmetry, kinds=kinds), resolution.number)
        if not more:
            return found, replace(symmetry, kinds=kinds if continuous else ())
        still |= more


def _symmetry(found: Propagation, resolution: Resolution, program: Program, outputs: Iterable[FreeOutput]) -> Symmetry:
    """The classes that a walk found, as they lie on parameters."""
    shapes = {name: tuple(tensor.shape) for name, tensor in program.parameters.items()}
    raw = {axis: distinct(units.ids) for axis, units in found.axes.items()}
    # A symmetry outlives the unit graph, so units are counted anew along each axis.
    classes = tuple(
        replace(c, roles=tuple(Role(r.axis, np.searchsorted(raw[r.axis], r.raw)) for r in c.roles))
        for c in resolution.classes
    )
    names: dict[str, list[str]] = {}
    for alias, name in program.aliases.items():
        names.setdefault(name, []).append(alias)
    layout = []
    for (name, dim), units in found.axes.items():
        roles = tuple((number, r.raw) for number, c in enumerate(classes) for r in c.roles if r.axis == (name, dim))
        if roles:
            slot = np.searchsorted(raw[name, dim], units.ids)
            aliases = tuple(a for a in names[name] if a != name)
            layout.append(AxisLayout(name, aliases, shapes[name], dim, units.dims, slot, roles))
    # Rows move before the axes whose units lie apart by rows.
    order = {name: i for i, name in enumerate(shapes)}
    layout.sort(key=lambda a: (order[a.parameter], len(a.dims)))
    stuck: dict[Axis, dict[str, Ids]] = {
        axis: {why: _indices(found.axes[axis], axis[1], ids) for why, ids in reasons.items()}
        for axis, reasons in resolution.pinned.items()
    }
    unknown, probed = ({str(op): n for op, n in ops.items()} for ops in (found.unknown, found.probed))
    return Symmetry(classes, tuple(layout), stuck, unknown, probed, free=tuple(outputs))


def _indices(axis: AxisUnits, dim: int, ids: Ids) -> Ids:
    return distinct(np.nonzero(among(axis.ids, np.sort(ids)))[axis.dims.index(dim)])
