"""Where the units of models go: the value that matching gives, and that everything after it takes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fxmerge.errors import UnitMapError
from fxmerge.units import written
from fxmerge.units.layout import AxisLayout, Ids, add_axis, along_axis, move_axis
from fxmerge.units.permutation import Permutation

Axis = tuple[str, int]
"""A parameter and one of its dimensions."""

PIECE = 2**20
"""So many entries are averaged at a time."""


@dataclass(frozen=True, eq=False)
class UnitMap:
    """For every class of units and every model, the merged unit that each of the model's units goes into.

    A map is one to one where models are aligned, and many to one where units are merged. Along axes that produce
    units, a merged unit is the mean of its members. Along axes that consume units, it is the sum of its members of each
    model (the merge and unmerge matrices of ZipIt!, arXiv 2305.03053, equation 4).

    Attributes:
        names: the names of the classes.
        layout: where the units lie on the axes of the parameters.
        consumed: the axes along which the network consumes units.
        maps: `maps[m][c][u]` is the merged unit into which unit `u` of class `c` of model `m` goes.
        widths: for every class, how many merged units there are.
        kept: for every class of which there are fewer merged units than units of a model, the units in whose places the
            merged ones stand, ascending; a model's units otherwise. () for those with the smallest numbers.

    Raises:
        UnitMapError: if the maps, widths and names do not fit each other.

    Example:
        >>> from fxmerge.units.layout import AxisLayout
        >>> rows = AxisLayout("weight", (), (2, 3), 0, (0,), np.arange(2), ((0, np.arange(2)),))
        >>> units = UnitMap(("weight[0]",), (rows,), frozenset(), ((np.array([0, 0]),), (np.array([0, 1]),)), (2,))
        >>> print(units)
        weight[0]: 2 + 2 units of 2 models -> 2 merged units, 1 with several units of one model
        >>> one, two = ({"weight": torch.full((2, 3), value)} for value in (1.0, 4.0))
        >>> units.merge([one, two])["weight"]
        tensor([[2., 2., 2.],
                [4., 4., 4.]])
    """

    names: tuple[str, ...]
    layout: tuple[AxisLayout, ...]
    consumed: frozenset[Axis]
    maps: tuple[tuple[Ids, ...], ...]
    widths: tuple[int, ...]
    kept: tuple[Ids, ...] = ()

    def __post_init__(self) -> None:
        if not self.maps or any(len(own) != len(self.widths) for own in self.maps):
            raise UnitMapError(f"Give every model one map for each of the {len(self.widths)} classes.")
        if len(self.names) != len(self.widths):
            raise UnitMapError(f"There are {len(self.names)} names for {len(self.widths)} classes.")
        for m, own in enumerate(self.maps):
            for name, width, units in zip(self.names, self.widths, own, strict=True):
                if len(units) and not 0 <= int(units.min()) <= int(units.max()) < width:
                    raise UnitMapError(
                        f"Class {name!r} of model {m} goes into units {int(units.min())} to {int(units.max())}; "
                        f"there are {width} merged units, numbered from 0."
                    )

    # ---------------------------------------------------------------------- making one

    @staticmethod
    def of(
        permutations: Sequence[Permutation], names: Sequence[str], consumed: frozenset[Axis] = frozenset()
    ) -> UnitMap:
        """The map that brings each of several models where its own permutation does."""
        first = permutations[0]
        widths = tuple(len(image) for image in first.images)
        return UnitMap(tuple(names), first.layout, consumed, tuple(p.images for p in permutations), widths)

    @staticmethod
    def still(models: int) -> UnitMap:
        """The map of models without any class: no unit of theirs moves."""
        return UnitMap((), (), frozenset(), ((),) * models, ())

    def apart(self) -> UnitMap:
        """The map of the same models in which no units are merged: each model has merged units of its own."""
        sizes = [[len(own) for own in each] for each in zip(*self.maps, strict=True)]
        maps = tuple(
            tuple(sum(own[:m]) + np.arange(own[m]) for own in sizes)  # Behind those of the models before it.
            for m in range(len(self.maps))
        )
        return replace(self, maps=maps, widths=tuple(sum(own) for own in sizes), kept=())

    def then(self, other: UnitMap) -> UnitMap:
        """First this map, then one of its merged units: of one model for all, or of as many models.

        Raises:
            UnitMapError: if the other map is of other units.
        """
        if len(other.maps) not in (1, len(self.maps)) or self.widths != tuple(len(u) for u in other.maps[0]):
            raise UnitMapError(
                f"A map into {self.widths} merged units cannot be followed by one of {len(other.maps)} models with "
                f"{tuple(len(u) for u in other.maps[0])} units."
            )
        after = other.maps * len(self.maps) if len(other.maps) == 1 else other.maps
        maps = tuple(
            tuple(b[a] for a, b in zip(own, next_own, strict=True))
            for own, next_own in zip(self.maps, after, strict=True)
        )
        return replace(self, maps=maps, widths=other.widths, kept=other.kept)

    def inverse(self) -> UnitMap:
        """The map back, from merged units to those of the models.

        Raises:
            UnitMapError: if it is not one to one.
        """
        if not self.one_to_one:
            raise UnitMapError("The map merges units, or leaves merged units without members: it has no inverse.")
        return replace(self, maps=tuple(tuple(np.argsort(units) for units in own) for own in self.maps))

    @cached_property
    def one_to_one(self) -> bool:
        """Whether every model has exactly one unit in every merged unit."""
        return all(self._bijective)

    @cached_property
    def _bijective(self) -> tuple[bool, ...]:
        """For every class, whether every model has exactly one unit in every merged unit."""
        return tuple(
            all(len(own[c]) == width and bool((np.bincount(own[c], minlength=width) == 1).all()) for own in self.maps)
            for c, width in enumerate(self.widths)
        )

    @cached_property
    def resized(self) -> frozenset[int]:
        """The numbers of the classes that have more or fewer merged units than a model has units."""
        return frozenset(c for c, width in enumerate(self.widths) if any(len(own[c]) != width for own in self.maps))

    def into(self, axis: AxisLayout) -> AxisLayout:
        """The layout of an axis of a model, or of one of its values, in merged units."""
        return axis.resized(self.widths, self.kept or None)

    @cached_property
    def moving(self) -> frozenset[int]:
        """The numbers of the classes of which a unit gets another number."""
        return frozenset(
            c
            for c, width in enumerate(self.widths)
            if any(len(own[c]) != width or not np.array_equal(own[c], np.arange(width)) for own in self.maps)
        )

    def permutation(self, model: int) -> Permutation:
        """What a one-to-one map does to one model.

        Raises:
            UnitMapError: if the map is not one to one.
        """
        if not self.one_to_one:
            raise UnitMapError("The map merges units, or leaves merged units without members: it is no permutation.")
        return Permutation(self.layout, self.maps[model])

    # ---------------------------------------------------------------------- parameters

    def apply(self, state: Mapping[str, Tensor], model: int = 0) -> dict[str, Tensor]:
        """The parameters of one model in merged units.

        Arguments:
            state: tensors by name, of any dtype and device. They are read one at a time, once each.
            model: the number of the model.

        Returns:
            A new dict with the same keys in the same order, and the `_metadata` of `state` if it has any. Entries of
            merged units without members are 0.

        Raises:
            UnitMapError: if a parameter is missing or has another shape.
        """
        return self._each(state, lambda name: self.apply_tensor(name, state, model))

    def apply_tensor(self, name: str, state: Mapping[str, Tensor], model: int = 0) -> Tensor:
        """One tensor of `apply`."""
        return self._placed(name, self._checked(name, state), model)

    def merge(
        self,
        states: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float] | None = None,
        special: Mapping[str, Sequence[float]] | None = None,
    ) -> dict[str, Tensor]:
        """The parameters of all models, merged.

        Arguments:
            states: one per model: tensors by name, of any dtype and device. They are read one name at a time.
            weights: how much each model counts; they sum to one. None: all alike.
            special: other weights, for tensors by name.

        Returns:
            New tensors in the dtype of the first state, in its order and with its `_metadata`. Tensors that are
            not floating-point, or that are equal in all states and in which no units merge, are the first state's.

        Raises:
            UnitMapError: if there is not one state and one weight per model, or a parameter is missing or has another
                shape.
        """
        weights = [1 / len(states)] * len(states) if weights is None else weights
        by_name = special or {}
        if not len(states) == len(weights) == len(self.maps):
            raise UnitMapError(
                f"The map is of {len(self.maps)} models; {len(states)} states and {len(weights)} weights were given."
            )
        return self._each(states[0], lambda name: self.merge_tensor(name, states, by_name.get(name, weights)))

    def merge_tensor(self, name: str, states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Tensor:
        """One tensor of `merge`."""
        tensors = [self._checked(name, state) for state in states]
        first, numbers = tensors[0], {n for axis in self._axes_of(name) for n, _ in axis.roles}
        if not (first.is_floating_point() or first.is_complex()):
            return first.clone()
        one_to_one = all(self._bijective[n] for n in numbers)
        if self.moves_alike(name) and all(torch.equal(first, other.to(first.device)) for other in tensors[1:]):
            return self._placed(name, first, 0).clone()
        wide = torch.promote_types(first.dtype, torch.float32)
        if one_to_one:
            moved = [self._placed(name, tensor, m).to(first.device) for m, tensor in enumerate(tensors)]
            return _mean(moved, weights, wide)
        total: Tensor | float = 0.0
        counts: Tensor | float = 0.0
        for m, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
            sums, count = self.gather(name, tensor.to(first.device, wide), m)
            total, counts = total + weight * sums, counts + weight * count
        return _ratio(torch.as_tensor(total), torch.as_tensor(counts)).to(first.dtype)

    def moves_alike(self, name: str) -> bool:
        """Whether the entries of a parameter go to the same places from all models, and none are merged."""
        numbers = {n for axis in self._axes_of(name) for n, _ in axis.roles}
        return all(self._bijective[n] and self._moves_alike(n) for n in numbers)

    def shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a parameter with merged units, by that which it has in a model."""
        sizes = list(shape)
        for axis in self._axes_of(name):
            sizes[axis.dim] = self._into[axis.parameter, axis.dim].shape[axis.dim]
        return tuple(sizes)

    def gather(
        self, name: str, tensor: Tensor, model: int, *, only: Literal["produced", "consumed"] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One parameter of one model, with the members of every merged unit added up.

        Arguments:
            name: of the parameter.
            tensor: its values.
            model: the number of the model.
            only: the axes along which units are added up: those that consume units, or the others; None for all.

        Returns:
            The sums, and the number of members along producing axes that each entry is a sum of, which broadcasts.
        """
        count = torch.ones((), dtype=tensor.dtype.to_real(), device=tensor.device)
        for axis in self._axes_of(name):
            consumes = (axis.parameter, axis.dim) in self.consumed
            if only == ("produced" if consumes else "consumed"):
                continue
            into = self._into[axis.parameter, axis.dim]
            target = axis.target(self.maps[model], into)
            tensor = add_axis(tensor, axis, target, into.shape[axis.dim])
            members = _members(axis, target, into).to(count)
            if count.ndim and count.shape[axis.dim] > 1:  # Rows with units of their own, which are added up.
                count = add_axis(count, axis, target, into.shape[axis.dim])
                count = count / along_axis(members, into) if consumes else count
            elif not consumes:
                count = count * members.reshape([n if d in axis.dims else 1 for d, n in enumerate(tensor.shape)])
        return tensor, count

    def produce(self, state: Mapping[str, Tensor], model: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One model that gives merged units from units of its own: its layers give sums over the members.

        Returns:
            The state dict; and for every parameter with units, how many members each entry is a sum of.
        """
        sums, counts = dict(state), {}
        for name, axes in self._axes.items():
            if state[name].is_floating_point() or state[name].is_complex():
                wide = torch.promote_types(state[name].dtype, torch.float32)
                sums[name], count = self.gather(name, state[name].to(wide), model, only="produced")
                counts[name] = count.expand(sums[name].shape)
                for alias in axes[0].aliases:
                    sums[alias], counts[alias] = sums[name], counts[name]
        return sums, counts

    def spread(self, state: Mapping[str, Tensor], model: int = 0) -> dict[str, Tensor]:
        """One model in whose own units the merged network's function is the same, as long as no op counts units: all
        members of a merged unit give what it gives, and what reads it is shared out among them.

        Arguments:
            state: parameters in merged units.
            model: the number of the model.

        Returns:
            Parameters in units of the model, of which `apply` makes `state` again.
        """
        wide = dict(state)
        for name, axes in self._axes.items():
            for axis in reversed(axes):
                into = self._into[axis.parameter, axis.dim]
                target = axis.target(self.maps[model], into)
                wide[name] = move_axis(wide[name], axis if len(axis.dims) > 1 else into, target)
                if (name, axis.dim) in self.consumed:
                    members = _members(axis, target, into).to(wide[name])
                    index = torch.from_numpy(target).to(members.device)
                    members = torch.take_along_dim(members, index, axis.dims.index(axis.dim))
                    wide[name] = wide[name] / along_axis(members, axis)
            wide.update(dict.fromkeys(axes[0].aliases, wide[name]))
        return wide

    @cached_property
    def shared_out(self) -> frozenset[str]:
        """The parameters that read merged units, of which `spread` divides the entries by numbers of members."""
        merged = {n for own in self.maps for n, units in enumerate(own) if len(np.unique(units)) < len(units)}
        axes = [a for a in self.layout if (a.parameter, a.dim) in self.consumed and not merged.isdisjoint(a.classes)]
        return frozenset(name for axis in axes for name in (axis.parameter, *axis.aliases))

    # ---------------------------------------------------------------------- activations

    def unmerge(self, value: Tensor, dim: int, number: int, model: int = 0) -> Tensor:
        """Merged activations back in one model's units.

        Arguments:
            value: merged units of a class lie along one dimension.
            dim: this dimension.
            number: the class.
            model: the number of the model.

        Example:
            >>> units = UnitMap(("a",), (), frozenset(), ((np.array([1, 0, 1]),),), (2,))
            >>> units.unmerge(torch.tensor([[10.0, 20.0]]), 1, 0)
            tensor([[20., 10., 20.]])
        """
        return value.index_select(dim, torch.from_numpy(self.maps[model][number]).to(value.device))

    def unmerge_tensor(self, name: str, merged: Tensor, model: int) -> Tensor:
        """A merged parameter that produces units, in one model's units."""
        for axis in self._axes_of(name):
            source = axis.target(self.maps[model], self._into[axis.parameter, axis.dim])
            merged = move_axis(merged, axis, source)
        return merged

    # ---------------------------------------------------------------------- as text

    def __str__(self) -> str:
        lines = []
        for c, (name, width) in enumerate(zip(self.names, self.widths, strict=True)):
            sizes = [len(own[c]) for own in self.maps]
            shared = sum(
                bool((np.stack([np.bincount(own[c], minlength=width) for own in self.maps])[:, u] > 1).any())
                for u in range(width)
            )
            models = f" of {len(sizes)} models" if len(sizes) > 1 else ""
            several = f", {shared} with several units of one model" if shared else ""
            units = f"{' + '.join(map(str, sizes))} unit{'s' * (sizes != [1])}"
            lines.append(f"{name}: {units}{models} -> {width} merged unit{'s' * (width != 1)}{several}")
        return "\n".join(lines)

    def to_json(self, path: str | Path | None = None) -> str:
        """The map as a JSON text, with all that is needed to apply it; also written to `path` if one is given."""
        text = written.to_json({field.name: getattr(self, field.name) for field in fields(self)})
        if path is not None:
            Path(path).write_text(text)
        return text

    @staticmethod
    def from_json(source: str | Path) -> UnitMap:
        """Reads what `to_json` gave: a text, or a file.

        Raises:
            UnitMapError: if it is no such text.
        """
        return UnitMap(**written.from_json(source))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnitMap) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.names, self.widths, tuple(u.tobytes() for own in self.maps for u in own)))

    # ---------------------------------------------------------------------- inside

    @cached_property
    def _axes(self) -> dict[str, list[AxisLayout]]:
        """The axes of every parameter, what lies apart by rows before the rows."""
        found: dict[str, list[AxisLayout]] = {}
        for axis in self.layout:
            found.setdefault(axis.parameter, []).insert(0, axis)
        return found

    @cached_property
    def _into(self) -> dict[Axis, AxisLayout]:
        """The layout of every axis in merged units."""
        found = {(axis.parameter, axis.dim): self.into(axis) for axis in self.layout}
        for axis in self.layout:
            own = found[axis.parameter, axis.dim]
            for d in (d for d in axis.dims if d != axis.dim and (axis.parameter, d) in found):
                if found[axis.parameter, d].shape[d] != own.shape[d]:
                    raise UnitMapError(
                        f"Rows of {axis.parameter!r} have units of their own along dimension {axis.dim}: their number "
                        f"cannot change without these. Give the classes along dimension {d} as many merged units as a "
                        "model has."
                    )
        return found

    def _axes_of(self, name: str) -> Sequence[AxisLayout]:
        """The axes of a parameter, by any of its names."""
        return self._axes.get(self._aliases.get(name, name), ())

    @cached_property
    def _aliases(self) -> dict[str, str]:
        return {alias: axis.parameter for axis in self.layout for alias in axis.aliases}

    def _each(self, state: Mapping[str, Tensor], of: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """A state dict with one tensor for every parameter; all names of one parameter have the same."""
        made: OrderedDict[str, Tensor] = OrderedDict()
        if hasattr(state, "_metadata"):
            made._metadata = state._metadata  # type: ignore[attr-defined]
        known: dict[str, Tensor] = {}
        missing = [name for name in self._axes if name not in state]
        if missing:
            raise UnitMapError(f"The state dict has no parameter {missing[0]!r}, which has units of the map.")
        for name in state:
            first = self._aliases.get(name, name)
            if first not in known:
                known[first] = of(first)
            made[name] = known[first]
        return made

    def _checked(self, name: str, state: Mapping[str, Tensor]) -> Tensor:
        if name not in state:
            raise UnitMapError(
                f"A state dict has no tensor {name!r}; give the state dicts of models of one architecture."
            )
        tensor, axes = state[name], self._axes_of(name)
        if axes and tuple(tensor.shape) != axes[0].shape:
            raise UnitMapError(
                f"Parameter {name!r} has shape {tuple(tensor.shape)}, but the map is of shape {axes[0].shape}."
            )
        return tensor

    def _placed(self, name: str, tensor: Tensor, model: int) -> Tensor:
        """One parameter of one model in merged units; the same tensor if no unit moves."""
        axes = self._axes_of(name)
        if all(self._bijective[n] for axis in axes for n, _ in axis.roles):
            for axis in reversed(axes):
                source = axis.source(self.maps[model])
                tensor = tensor if source is None else move_axis(tensor, axis, source)
            return tensor
        sums, count = self.gather(name, tensor.to(torch.promote_types(tensor.dtype, torch.float32)), model)
        return _ratio(sums, count).to(tensor.dtype)

    def _moves_alike(self, number: int) -> bool:
        return all(np.array_equal(own[number], self.maps[0][number]) for own in self.maps[1:])


def _members(axis: AxisLayout, target: Ids, into: AxisLayout) -> Tensor:
    """How many members every entry of the merged axis has, in every row as it was before."""
    dim = axis.dims.index(axis.dim)
    shape = [into.shape[d] if d == axis.dim else n for d, n in zip(axis.dims, axis.slot.shape, strict=True)]
    ones = torch.ones(axis.slot.shape, dtype=torch.float64)
    return torch.zeros(shape, dtype=torch.float64).scatter_add_(dim, torch.from_numpy(target), ones)


def _mean(tensors: Sequence[Tensor], weights: Sequence[float], wide: torch.dtype) -> Tensor:
    """The weighted sum of tensors in the dtype of the first, worked out in a wide one, a few entries at a time."""
    mean = torch.empty(tensors[0].shape, dtype=tensors[0].dtype, device=tensors[0].device)
    pieces = zip(*(tensor.reshape(-1).split(PIECE) for tensor in tensors), strict=True)
    for into, own in zip(mean.view(-1).split(PIECE), pieces, strict=True):
        into.copy_(torch.stack([w * piece.to(wide) for w, piece in zip(weights, own, strict=True)]).sum(0))
    return mean


def _ratio(total: Tensor, count: Tensor) -> Tensor:
    """The mean over members; 0 where there are none."""
    return torch.where(count > 0, total / count, 0.0)
