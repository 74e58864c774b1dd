"""The symmetry of a model: its equivalence classes and the permutation group that they generate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import networkx as nx
import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from fxmerge.capture import Args, Kwargs, capture_program
from fxmerge.errors import PermutationError
from fxmerge.program import Program
from fxmerge.symmetry.classes import UnitClass, resolve
from fxmerge.symmetry.contracted import Role
from fxmerge.symmetry.outputs import FreeOutput, free_leaves, free_outputs, paths_of
from fxmerge.symmetry.overrides import REQUESTED, Pin, Rules, overriding, pinned_axes
from fxmerge.symmetry.propagate import Axis, AxisUnits, Propagation, propagate
from fxmerge.symmetry.structure import PINNED, combinations, structure
from fxmerge.symmetry.units import Ids
from fxmerge.units.layout import AxisLayout
from fxmerge.units.permutation import Permutation, build_image

Choice = Callable[[int, Ids, Ids], Ids]
"""(class number, units, places) -> the place of each unit; all of shape (combinations of parents, units)."""


@dataclass(frozen=True)
class ClassAxis:
    """A parameter axis that the units of a class index.

    Attributes:
        parameter: name in the model's state dict.
        dim: dimension of the parameter.
        indices: for every unit of the class, its index along the dimension.
        rows: the dimensions whose rows have units of their own along this axis (empty for most axes).
    """

    parameter: str
    dim: int
    indices: Ids
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class EquivalenceClass:
    """Units of a model that may be exchanged with each other.

    Attributes:
        name: unique within the symmetry: the first axis that the class indexes.
        size: number of units.
        structure: "free" (any permutation), "nested" (within the units of one parent class, or along
            with them), "product" (tied across several parents), "split" (within fixed subsets) or "pinned".
        axes: the parameter axes that the units index; none for a block such as an attention head.
        parents: names of the classes in which the units are nested.
        why: for a pinned class, the node and the reason; else empty.
    """

    name: str
    size: int
    structure: str
    axes: tuple[ClassAxis, ...]
    parents: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Symmetry:
    """The coordinate permutations of a model's parameters that leave its function unchanged.

    Made by `find_symmetry`.

    Attributes:
        units: the movable classes in the form that the algorithms use, parents before children.
        layout: where the units lie on the parameters.
        stuck: for every axis, the indices that do not move, by reason.
        unknown: how often each op occurs that has no rule, so that what it touches is pinned.
        probed: how often each op occurs that has no rule, and whose behaviour was found by numeric trials.
        demoted: names of classes that `verify` found unsound and turned to the identity.
        error: the largest relative output error that `verify` measured, None before.
        free: where units lie along the outputs that were declared free.
    """

    units: tuple[UnitClass, ...]
    layout: tuple[AxisLayout, ...]
    stuck: Mapping[Axis, Mapping[str, Ids]]
    unknown: Mapping[str, int] = field(default_factory=dict)
    probed: Mapping[str, int] = field(default_factory=dict)
    demoted: tuple[str, ...] = ()
    error: float | None = None
    free: tuple[FreeOutput, ...] = ()

    # ---------------------------------------------------------------------- description

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the movable classes, in the order of `units`."""
        own: list[str] = []
        children: dict[int, int] = {}
        for number, c in reversed(list(enumerate(self.units))):
            for parent, _ in c.parents:
                children[parent] = number
        for number in range(len(self.units)):
            first, depth = number, 0
            while not self.units[first].roles and first in children:
                first, depth = children[first], depth + 1
            axis = self.units[first].roles[0].axis if self.units[first].roles else ("?", 0)
            own.append("blocks of " * depth + f"{axis[0]}[{axis[1]}]")
        seen: Counter[str] = Counter()
        for i, name in enumerate(own):
            seen[name] += 1
            if seen[name] > 1:
                own[i] = f"{name}#{seen[name]}"
        return tuple(own)

    @cached_property
    def classes(self) -> tuple[EquivalenceClass, ...]:
        """All classes: the movable ones, parents before children, then the pinned axes."""
        index = {(a.parameter, a.dim): a for a in self.layout}
        movable = []
        for number, c in enumerate(self.units):
            axes = []
            for axis in index.values():
                rows = tuple(d for d in axis.dims if d != axis.dim)
                axes += [ClassAxis(axis.parameter, axis.dim, axis.index[s], rows) for n, s in axis.roles if n == number]
            parents = tuple(self.names[p] for p, _ in c.parents)
            movable.append(EquivalenceClass(self.names[number], c.size, structure(c), tuple(axes), parents))
        pinned = [
            EquivalenceClass(f"{name}[{dim}]", len(ids), PINNED, (ClassAxis(name, dim, ids),), (), why)
            for (name, dim), reasons in self.stuck.items()
            for why, ids in reasons.items()
        ]
        return (*movable, *pinned)

    @cached_property
    def graph(self) -> nx.DiGraph[str]:
        """The movable classes, with an edge from every class to each class in which it is nested.

        Node attributes: `size`, `structure`, `axes`.
        """
        graph: nx.DiGraph[str] = nx.DiGraph()
        for c in self.classes:
            if c.structure != PINNED:
                graph.add_node(c.name, size=c.size, structure=c.structure, axes=c.axes)
                graph.add_edges_from((c.name, parent) for parent in c.parents)
        return graph

    def __str__(self) -> str:
        from fxmerge.symmetry.describe import describe

        return describe(self)

    # ---------------------------------------------------------------------- the group

    def log_order(self) -> float:
        """Natural logarithm of the number of permutations of parameter entries in the group."""
        return float(sum(n * math.lgamma(k + 1) for n, k in map(combinations, self.units)))

    def identity(self) -> Permutation:
        """The permutation that moves nothing."""
        return Permutation(self.layout, tuple(np.arange(c.size) for c in self.units))

    def element(self, images: Mapping[str, Sequence[int]]) -> Permutation:
        """The group element that sends unit i of each class to the place `images[class name][i]`.

        Raises:
            PermutationError: if a class is missing, or its image is not a permutation of its units.
        """
        arrays = []
        for name, c in zip(self.names, self.units, strict=True):
            image = np.asarray(images.get(name, ()), np.int64)
            if not np.array_equal(np.sort(image), np.arange(c.size)):
                raise PermutationError(f"The image of class {name!r} is not a permutation of its {c.size} units.")
            arrays.append(image)
        return Permutation(self.layout, tuple(arrays))

    def sample(self, generator: torch.Generator | None = None) -> Permutation:
        """A uniformly distributed element of the group.

        Arguments:
            generator: source of randomness, on the CPU; torch's default one if None.
        """

        def choose(_: int, units: Ids, places: Ids) -> Ids:
            order = torch.rand(units.shape, dtype=torch.float64, generator=generator).argsort(dim=1).numpy()
            return np.take_along_axis(places, order, axis=1)

        return self.build(choose)

    def build(self, choose: Choice) -> Permutation:
        """The group element whose free choices are made by `choose`, parents before children."""
        images: list[Ids] = []
        for number, _c in enumerate(self.units):
            images.append(self.class_image(number, images, lambda u, p, n=number: choose(n, u, p)))  # type: ignore[misc]
        return Permutation(self.layout, tuple(images))

    def class_image(self, number: int, images: Sequence[Ids], choose: Callable[[Ids, Ids], Ids]) -> Ids:
        """Where the units of one class go, given where the units of its parents go."""
        c = self.units[number]
        key = np.stack([*(at for _, at in c.parents), c.fixed], axis=1)

        def moved(rows: Ids) -> Ids:
            columns = [images[p][rows[:, i]] for i, (p, _) in enumerate(c.parents)]
            return np.stack([*columns, rows[:, -1]], axis=1)

        return build_image(c.size, key, moved, choose)

    def restrict(self, p: Permutation, classes: Iterable[int]) -> Permutation:
        """An element that is p on the classes given and on all their ancestors, and elsewhere moves units
        only as their parents make necessary."""
        kept = set(classes)
        for number in sorted(kept, reverse=True):
            kept |= self.ancestors(number)
        images: list[Ids] = []
        for number in range(len(self.units)):
            images.append(p.images[number] if number in kept else self.class_image(number, images, lambda u, q: q))
        return Permutation(self.layout, tuple(images))

    def ancestors(self, number: int) -> set[int]:
        """The classes in which a class is nested, directly or not."""
        found: set[int] = set()
        for parent, _ in self.units[number].parents:
            found |= {parent} | self.ancestors(parent)
        return found

    @cached_property
    def choices(self) -> tuple[int, ...]:
        """The classes with a choice of their own: those whose units do not just move along with their parents."""
        return tuple(n for n, c in enumerate(self.units) if combinations(c)[1] > 1)

    @cached_property
    def views(self) -> dict[int, tuple[tuple[int, Ids], ...]]:
        """For every class with a choice, where its units show: in the class itself, and in each class that
        only moves along with it, as the units of that class in the order (own units, units of the other per own)."""
        shown: dict[int, list[tuple[int, Ids]]] = {
            n: [(n, np.arange(c.size)[:, None])] for n, c in enumerate(self.units)
        }
        for number in reversed(range(len(self.units))):
            if number not in self.choices:
                for parent, _ in self.units[number].parents:
                    own = self.arranged(number, parent)[:, :, 0]
                    shown[parent] += [(n, view[own].reshape(len(own), -1)) for n, view in shown[number]]
        return {n: tuple(shown[n]) for n in self.choices}

    def arranged(self, number: int, parent: int) -> Ids:
        """The units of a class by parent, by the combination of all else that they are nested in, and by rank:
        shape (parent units, combinations, units in each)."""
        c = self.units[number]
        own = next(at for p, at in c.parents if p == parent)
        key = np.stack([own, *(at for p, at in c.parents if p != parent), c.fixed], axis=1)
        rows, row = np.unique(key, axis=0, return_inverse=True)
        order = np.argsort(row.reshape(-1), kind="stable")
        parents = len(np.unique(own))
        return order.reshape(parents, len(rows) // parents, -1)

    def verify(
        self,
        model: nn.Module | ExportedProgram,
        args: Args,
        kwargs: Kwargs | None = None,
        trials: int = 1,
        generator: torch.Generator | None = None,
    ) -> Symmetry:
        """Proves the group on the module itself; see `fxmerge.symmetry.verify.verify`."""
        from fxmerge.symmetry.verify import verify

        return verify(self, model, args, kwargs, trials=trials, generator=generator)

    # ---------------------------------------------------------------------- the spec

    def to_json(self, path: str | Path | None = None) -> str:
        """Writes the symmetry as a text that can be read, kept, compared and edited.

        Arguments:
            path: a file to write it to, too.

        Returns:
            JSON, from which `from_json` makes the same symmetry.
        """
        from fxmerge.symmetry.spec import to_json

        text = to_json(self)
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
        from fxmerge.symmetry.readspec import from_json

        return from_json(source)


def find_symmetry(
    model: nn.Module | ExportedProgram,
    args: Args = (),
    kwargs: Kwargs | None = None,
    *,
    pin: Iterable[Pin] = (),
    rules: Rules | None = None,
    free: str | Iterable[str] = (),
) -> Symmetry:
    """Infers which coordinate permutations of a model's parameters leave its function unchanged.

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
        a: 3 units, 3! | 0.weight(a _), 0.bias(a), 2.weight(_ a)
        pinned: 0.weight[1], 2 indices: linear
    """
    return analyse(capture_program(model, args, kwargs), pin, rules, free)[1]


def analyse(
    program: Program, pin: Iterable[Pin] = (), rules: Rules | None = None, free: str | Iterable[str] = ()
) -> tuple[Propagation, Symmetry]:
    """The labels of a captured program, and its symmetry."""
    leaves = free_leaves(free, paths_of(program.aten.out, sum(program.aten.outputs)))
    shapes = {name: tuple(tensor.shape) for name, tensor in program.parameters.items()}
    asked = pinned_axes(pin, shapes, program.aliases)
    while True:
        found = propagate(program, overriding(rules), leaves)
        found.units.node = ""
        for axis in asked:
            if axis in found.axes:
                found.units.pin(np.unique(found.axes[axis].ids), REQUESTED)
        resolution = resolve(found.units, found.axes)
        outputs, unknown_leaves = free_outputs(found, resolution.classes, leaves)
        if not unknown_leaves:
            break
        leaves = leaves - unknown_leaves
    raw = {axis: np.unique(units.ids) for axis, units in found.axes.items()}
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
    return found, Symmetry(classes, tuple(layout), stuck, unknown, probed, free=tuple(outputs))


def _indices(axis: AxisUnits, dim: int, ids: Ids) -> Ids:
    return np.unique(np.nonzero(np.isin(axis.ids, ids))[axis.dims.index(dim)])
