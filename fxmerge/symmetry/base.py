"""The symmetry group of a model: its equivalence classes, and the elements that they generate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import networkx as nx
import numpy as np
import torch

from fxmerge.errors import PermutationError
from fxmerge.symmetry.classes import UnitClass
from fxmerge.symmetry.outputs import FreeOutput
from fxmerge.symmetry.propagation import Axis
from fxmerge.symmetry.structure import PINNED, combinations, structure
from fxmerge.symmetry.units import Ids
from fxmerge.units.basis import Basis, Mixed, random_matrices
from fxmerge.units.kind import Kind, UnitKind
from fxmerge.units.layout import AxisLayout
from fxmerge.units.permutation import Permutation, build_image
from fxmerge.units.scaling import Scaled, Scaling, random_factors
from fxmerge.units.transformation import Transformation

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
        kind: the matrices by which the units may be mixed, within the units of their parents.
        signs: how many signs each unit has, if units are not mixed.
        stretches: how many positive scales each unit has, if units are not mixed.
        limited: what limits the kind: the node or the reason.
    """

    name: str
    size: int
    structure: str
    axes: tuple[ClassAxis, ...]
    parents: tuple[str, ...] = ()
    why: str = ""
    kind: Kind = Kind.PERMUTATION
    limited: str = ""
    signs: int = 0
    stretches: int = 0


@dataclass(frozen=True)
class Group:
    """The permutations and changes of basis of a model's parameters that leave its function unchanged.

    Attributes:
        units: the movable classes in the form that the algorithms use, parents before children.
        layout: where the units lie on the parameters.
        stuck: for every axis, the indices that do not move, by reason.
        unknown: how often each op occurs that has no rule, so that what it touches is pinned.
        probed: how often each op occurs that has no rule, and whose behaviour was found by numeric trials.
        demoted: names of classes that `verify` found unsound and turned to the identity.
        error: the largest relative output error that `verify` measured, None before.
        free: where units lie along the outputs that were declared free.
        kinds: for every class of `units`, by which matrices its units may be mixed. Empty where that is not known: then
            units are only permuted.
    """

    units: tuple[UnitClass, ...]
    layout: tuple[AxisLayout, ...]
    stuck: Mapping[Axis, Mapping[str, Ids]]
    unknown: Mapping[str, int] = field(default_factory=dict)
    probed: Mapping[str, int] = field(default_factory=dict)
    demoted: tuple[str, ...] = ()
    error: float | None = None
    free: tuple[FreeOutput, ...] = ()
    kinds: tuple[UnitKind, ...] = ()

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
            own.append(self.units[number].name or "blocks of " * depth + f"{axis[0]}[{axis[1]}]")
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
            own = self.kinds[number] if self.kinds else UnitKind()
            named = EquivalenceClass(self.names[number], c.size, structure(c), tuple(axes), parents)
            movable.append(
                replace(named, kind=own.kind, limited=own.why, signs=len(own.signs), stretches=len(own.stretches))
            )
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

    def kind(self, number: int) -> Kind:
        """The kind of a class of `units`."""
        return self.kinds[number].kind if self.kinds else Kind.PERMUTATION

    def scales(self, number: int) -> frozenset[str]:
        """The parameters on which a class is not mixed, since they hold one number for all of its units."""
        return self.kinds[number].scales if self.kinds else frozenset()

    def dimension(self) -> int:
        """The dimension of the group of changes of basis and positive scales that leave the function unchanged.

        Example:
            >>> import torch, fxmerge
            >>> bottleneck = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(3, 5))
            >>> fxmerge.find_symmetry(bottleneck, (torch.zeros(1, 4),)).dimension()  # of GL(3)
            9
        """
        sizes = (self.by_block(n).shape for n in range(len(self.units)))
        mixed = sum(int(count) * self.kind(n).dimension(int(each)) for n, (count, each) in enumerate(sizes))
        return mixed + sum(c.size * c.stretches for c in self.classes)

    @cached_property
    def mixed(self) -> tuple[tuple[Mixed, ...], ...]:
        """For every class of `units`, the axes on which a change of its basis acts; none for what is only permuted."""
        return tuple(self._mixed(n) if self.kind(n) > Kind.PERMUTATION else () for n in range(len(self.units)))

    def _mixed(self, number: int) -> tuple[Mixed, ...]:
        own, views = self.kinds[number], dict(self.views[number])
        return tuple(
            Mixed(
                axis, slots[views[n]][self.by_block(number)], (axis.parameter, axis.dim, int(slots[0])) in own.inverse
            )
            for axis in self.layout
            for n, slots in axis.roles
            if n in views and axis.parameter not in own.scales
        )

    def by_block(self, number: int) -> Ids:
        """The units of a class that are mixed with each other: shape (blocks, units).

        A block is a plane of a class whose planes are turned; in other classes it is a combination of parents and fixed
        positions.
        """
        if self.kind(number).turns:
            return np.array(self.kinds[number].planes, np.int64)
        return np.argsort(self.units[number].blocks, kind="stable").reshape(combinations(self.units[number]))

    def identity_basis(self) -> Basis:
        """The change of basis that changes nothing, with an entry for every class that has one."""
        mixing = [n for n in range(len(self.units)) if self.kind(n) > Kind.PERMUTATION]
        sizes = {n: self.by_block(n).shape for n in mixing}
        return Basis(self.mixed, {n: torch.eye(k, dtype=torch.float64).repeat(m, 1, 1) for n, (m, k) in sizes.items()})

    @cached_property
    def scaled(self) -> tuple[tuple[Scaled, ...], ...]:
        """For every class of `units`, the axes on which its units have signs or scales."""
        return tuple(self._scaled(n) if self.kinds else () for n in range(len(self.units)))

    def _scaled(self, number: int) -> tuple[Scaled, ...]:
        own = (*self.kinds[number].signs, *self.kinds[number].stretches)
        powers = [{(parameter, dim, first): power for parameter, dim, first, power in one} for one in own]
        views = dict(self.views[number]) if own else {}
        found = []
        for axis in self.layout:
            for n, slots in axis.roles:
                here = tuple(one.get((axis.parameter, axis.dim, int(slots[0])), 0) for one in powers)
                if n in views and any(here):
                    found.append(Scaled(axis, slots[views[n]], here))
        return tuple(found)

    def sample(self, generator: torch.Generator | None = None) -> Transformation:
        """A random element of the whole group.

        Arguments:
            generator: source of randomness, on the CPU; torch's default one if None.

        Returns:
            Uniformly distributed permutations, signs and, for orthogonal classes, orthogonal matrices. Those of general
            linear ones are invertible, with singular values from 1/2 to 2. Planes are turned by any angle. Scales of
            units, and of complex planes, are from 1/2 to 2.

        Example:
            >>> import torch, fxmerge
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)).double()
            >>> x = torch.randn(5, 4).double()
            >>> change = fxmerge.find_symmetry(net, (x,)).sample(torch.Generator().manual_seed(0))
            >>> before = net(x)
            >>> _ = net.load_state_dict(change.apply(net.state_dict()))
            >>> torch.allclose(net(x), before)
            True
        """
        permutation = self.sample_permutation(generator)
        matrices, factors = {}, {}
        for n, own in enumerate(self.kinds):
            if own.kind > Kind.PERMUTATION:
                blocks, size = self.by_block(n).shape
                matrices[n] = random_matrices(own.kind, blocks, size, generator)
            elif own.signs or own.stretches:
                factors[n] = random_factors(len(own.signs), len(own.stretches), self.units[n].size, generator)
        return Transformation(permutation, Basis(self.mixed, matrices), Scaling(self.scaled, factors))

    def identity_scaling(self) -> Scaling:
        """The factors that change nothing, with an entry for every class whose units have signs or scales."""
        sizes = {n: (len(own.signs) + len(own.stretches), self.units[n].size) for n, own in enumerate(self.kinds)}
        ones = {n: torch.ones(size, dtype=torch.float64) for n, size in sizes.items() if size[0]}
        return Scaling(self.scaled, ones)

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

    def sample_permutation(self, generator: torch.Generator | None = None) -> Permutation:
        """A uniformly distributed permutation of the group.

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
        return tuple(n for n, c in enumerate(self.units) if combinations(c)[1] > 1 or self.kind(n).turns)

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
