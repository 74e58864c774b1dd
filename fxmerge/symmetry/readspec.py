"""Reading the JSON text of a symmetry, and checking everything that an edit may have broken."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from fxmerge.errors import PermutationError, SpecError
from fxmerge.symmetry.base import Group
from fxmerge.symmetry.classes import UnitClass
from fxmerge.symmetry.contracted import Role
from fxmerge.symmetry.freeze import freeze
from fxmerge.symmetry.outputs import FreeOutput
from fxmerge.symmetry.overrides import REQUESTED, pinned_axes
from fxmerge.symmetry.propagation import Axis
from fxmerge.symmetry.ranges import read_ranges
from fxmerge.symmetry.spec import KIND, VERSION, slots
from fxmerge.symmetry.units import Ids
from fxmerge.units.kind import Exponents, Kind, UnitKind
from fxmerge.units.layout import AxisLayout

G = TypeVar("G", bound=Group)

LEFT_OUT = "left out of the spec"
"""The reason given for indices that belong to no class of a spec and are not pinned in it."""

TRIALS = 8
LIMIT = 1 << 31


def from_json(source: str | Path, kind: type[G]) -> G:
    """The symmetry that a JSON text, or a file with one, describes; see `Symmetry.from_json`.

    Raises:
        SpecError: if the text is no such description, or describes no group.
        OptionError: if `pin` names no parameter.
    """
    spec = _load(source)
    parameters = _Parameters(_typed(spec, "parameters", dict, "The spec"))
    units, roles = _classes(_typed(spec, "classes", list, "The spec"), parameters)
    layout = parameters.layout(roles)
    stuck = _pinned(_typed(spec, "pinned", list, "The spec", []), parameters)
    _leave_out(stuck, layout, parameters)
    error = spec.get("error")
    if error is not None and (isinstance(error, bool) or not isinstance(error, (int, float))):
        raise SpecError(f"The spec has the error {error!r}; it is a number, or null before verification.")
    symmetry = kind(
        units,
        layout,
        stuck,
        _typed(spec, "unknown", dict, "The spec", {}),
        _typed(spec, "probed", dict, "The spec", {}),
        tuple(_typed(spec, "demoted", list, "The spec", [])),
        error,
        _outputs(_typed(spec, "outputs", list, "The spec", []), [c["name"] for c in spec["classes"]], units),
        _kinds(spec["classes"]),
    )
    _check_moves(symmetry)
    asked = set(pinned_axes(_typed(spec, "pin", list, "The spec", []), parameters.shapes, parameters.aliases))
    still = [n for n, c in enumerate(units) if any(r.axis in asked for r in c.roles)]
    return freeze(symmetry, still, lambda _: REQUESTED)[0] if still else symmetry


def _load(source: str | Path) -> dict[str, Any]:
    text, where = str(source), "The text"
    if isinstance(source, Path) or not text.lstrip().startswith("{"):
        where = text if len(text) < 300 else "The text"
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise SpecError(
                f"{where} is neither the text of a symmetry nor a file that can be read: {error}"
            ) from error
    try:
        spec = json.loads(text)
    except ValueError as error:
        raise SpecError(f"{where} is not JSON: {error}") from error
    if not isinstance(spec, dict) or spec.get("fxmerge") != KIND:
        raise SpecError(f'{where} does not describe a symmetry: it has no entry "fxmerge": "{KIND}".')
    if spec.get("version") != VERSION:
        raise SpecError(f"{where} is of version {spec.get('version')!r}; this version of fxmerge reads {VERSION}.")
    known = [
        "fxmerge",
        "version",
        "pin",
        "parameters",
        "classes",
        "pinned",
        "unknown",
        "probed",
        "demoted",
        "error",
        "outputs",
    ]
    _check_keys(spec, known, "The spec")
    return spec


def _check_keys(entry: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in entry:
        if key not in known:
            raise SpecError(f"{where} has an unknown entry {key!r}; the entries are {', '.join(known)}.")


NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}


def _typed(entry: Any, key: str, kind: Any, where: str, default: Any = None) -> Any:
    """An entry that must be there, unless it has a default, and be of a kind."""
    if not isinstance(entry, dict):
        raise SpecError(f"{where} is {entry!r}; it must be an object.")
    value = entry.get(key, default)
    if value is None:
        raise SpecError(f"{where} has no entry {key!r}.")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise SpecError(f"{where} has the {key} {value!r}; it must be {NAMES[kind]}.")
    return value


def _numbers(text: Any, where: str, what: str, below: int, count: int | None = None) -> Ids:
    """Numbers from 0 to `below` - 1, as many as `count` if it is given."""
    if not isinstance(text, str):
        raise SpecError(f"{where} has {what} {text!r}; they must be a text such as '0:8'.")
    try:
        numbers = read_ranges(text, LIMIT if count is None else count)
    except (ValueError, OverflowError) as error:
        raise SpecError(f"{where} has wrong {what}: {error}.") from error
    if count is not None and len(numbers) != count:
        raise SpecError(f"{where} has {len(numbers)} {what} ({text!r}), but there must be {count}.")
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < below:
        bad = int(numbers.min() if numbers.min() < 0 else numbers.max())
        raise SpecError(f"{where} has {what} out of range: {bad} is not from 0 to {below - 1}.")
    return numbers


class _Parameters:
    """The parameters that a spec lists: their shapes, their other names, and the slots of their axes."""

    def __init__(self, entries: dict[str, Any]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.aliases: dict[str, str] = {}
        self.apart: dict[Axis, dict[int, Ids]] = {}
        for name, entry in entries.items():
            where = f"Parameter {name!r}"
            shape = _typed(entry, "shape", list, where)
            _check_keys(entry, ("shape", "aliases", "apart"), where)
            if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
                raise SpecError(f"{where} has the shape {shape}; it must be a list of sizes.")
            self.shapes[name] = tuple(shape)
            for alias in (name, *_typed(entry, "aliases", list, where, [])):
                if alias in self.aliases:
                    raise SpecError(f"Parameter {alias!r} is listed twice.")
                self.aliases[alias] = name
            for dim, blocks in _typed(entry, "apart", dict, where, {}).items():
                at = self.dim(name, dim, where)
                if not isinstance(blocks, dict):
                    raise SpecError(f"{where} has {blocks!r} apart along dimension {dim}; it must be an object.")
                self.apart[name, at] = {
                    self.dim(name, d, where, but=at): self._blocks(name, d, text, where) for d, text in blocks.items()
                }

    def dim(self, name: str, dim: Any, where: str, but: int | None = None) -> int:
        """A dimension of a parameter, other than `but`."""
        number = int(dim) if isinstance(dim, str) and dim.isdecimal() else dim
        if not isinstance(number, int) or not 0 <= number < len(self.shapes[name]) or number == but:
            raise SpecError(
                f"{where} has dimension {dim!r}, which {name!r} of shape {self.shapes[name]} does not have"
                + (", or cannot be apart from." if but is not None else ".")
            )
        return number

    def _blocks(self, name: str, dim: str, text: Any, where: str) -> Ids:
        size = self.shapes[name][int(dim)]
        blocks = _numbers(text, where, f"blocks of rows apart in dimension {dim}", size, size)
        if not np.array_equal(np.unique(blocks), np.arange(blocks.max(initial=-1) + 1)):
            raise SpecError(
                f"{where} has blocks of rows apart in dimension {dim} that are not counted from 0: {text!r}."
            )
        return blocks

    def slots(self, axis: Axis) -> tuple[tuple[int, ...], Ids]:
        return slots(axis[1], self.shapes[axis[0]][axis[1]], self.apart.get(axis, {}))

    def layout(self, roles: Mapping[Axis, Sequence[tuple[int, Ids]]]) -> tuple[AxisLayout, ...]:
        """The layout of all axes with roles, by parameter; rows move before the axes that they keep apart."""
        layout = []
        for name, shape in self.shapes.items():
            aliases = tuple(a for a, own in self.aliases.items() if own == name and a != name)
            axes = []
            for dim in range(len(shape)):
                if (name, dim) in roles:
                    dims, slot = self.slots((name, dim))
                    axes.append(AxisLayout(name, aliases, shape, dim, dims, slot, tuple(roles[name, dim])))
            layout += sorted(axes, key=lambda a: len(a.dims))
        return tuple(layout)


def _classes(
    entries: list[Any], parameters: _Parameters
) -> tuple[tuple[UnitClass, ...], dict[Axis, list[tuple[int, Ids]]]]:
    """The classes, and for every axis the units of the classes on it."""
    names = [_typed(entry, "name", str, f"Class {n}") for n, entry in enumerate(entries)]
    units: list[UnitClass] = []
    roles: dict[Axis, list[tuple[int, Ids]]] = {}
    taken: dict[Axis, Ids] = {}
    for number, (name, entry) in enumerate(zip(names, entries, strict=True)):
        where = f"Class {name!r}"
        _check_keys(entry, ("name", "size", "axes", "parents", "fixed", *_OF_KINDS), where)
        if name in names[:number]:
            raise SpecError(f"{where} is listed twice.")
        size = _typed(entry, "size", int, where)
        if size < 2:
            raise SpecError(f"{where} has the size {size}; a class has two units or more.")
        own = []
        for axis in _typed(entry, "axes", list, where, []):
            role = _role(axis, size, where, parameters)
            count = int(parameters.slots(role.axis)[1].max()) + 1
            owner = taken.setdefault(role.axis, np.full(count, -1))
            there = owner[role.raw]
            if len(np.unique(role.raw)) < size or (there >= 0).any():
                other = names[int(there.max())] if (there >= 0).any() else name
                raise SpecError(
                    f"{where} overlaps with {other!r} on {role.axis[0]}[{role.axis[1]}]: one unit is in both."
                    if other != name
                    else f"{where} has one unit twice on {role.axis[0]}[{role.axis[1]}]."
                )
            owner[role.raw] = number
            own.append(role)
            roles.setdefault(role.axis, []).append((number, role.raw))
        parents = _parents(_typed(entry, "parents", dict, where, {}), names, units, size, where)
        fixed = _numbers(entry["fixed"], where, "fixed positions", LIMIT, size) if "fixed" in entry else None
        units.append(UnitClass(size, tuple(own), parents, np.zeros(size, np.int64) if fixed is None else fixed))
        _check_even(units[-1], units, where)
    nested = {p for c in units for p, _ in c.parents}
    for number, c in enumerate(units):
        if not c.roles and number not in nested:
            raise SpecError(f"Class {names[number]!r} is on no axis, and no class is nested in it; delete it, too.")
    return tuple(units), roles


_OF_KINDS = ("kind", "limited", "inverse", "planes", "scales", "signs", "stretches")
"""The entries of a class that say by which matrices its units may be mixed."""


def _kinds(entries: Sequence[Mapping[str, Any]]) -> tuple[UnitKind, ...]:
    """By which matrices the units of each class may be mixed; empty if no class says so."""
    words = {str(kind): kind for kind in Kind}
    found = []
    for entry in entries:
        where = f"Class {entry['name']!r}"
        word = _typed(entry, "kind", str, where, str(Kind.PERMUTATION))
        if word not in words:
            raise SpecError(f"{where} has the kind {word!r}; it must be one of {', '.join(map(repr, words))}.")
        inverse = set()
        for axis in _typed(entry, "inverse", list, where, []):
            inside = f"An inverse axis of {where}"
            _check_keys(axis, ("parameter", "dim", "first"), inside)
            dim, first = (_typed(axis, key, int, inside) for key in ("dim", "first"))
            inverse.add((_typed(axis, "parameter", str, inside), dim, first))
        scales = frozenset(map(str, _typed(entry, "scales", list, where, [])))
        why, planes = _typed(entry, "limited", str, where, ""), _planes(entry, words[word], where)
        signs, stretches = (_exponents(entry, key, words[word], where) for key in ("signs", "stretches"))
        found.append(UnitKind(words[word], why, frozenset(inverse), scales, planes, signs, stretches))
    return tuple(found) if any("kind" in entry for entry in entries) else ()


def _exponents(entry: Mapping[str, Any], key: str, kind: Kind, where: str) -> tuple[Exponents, ...]:
    """The axes that each sign, or each scale, of the units of a class multiplies, with the powers."""
    lists = _typed(entry, key, list, where, [])
    if lists and kind != Kind.PERMUTATION:
        raise SpecError(f"{where} has the kind {str(kind)!r} and {key}; only units that are permuted have {key}.")
    found = []
    for one in lists:
        inside = f"An axis of the {key} of {where}"
        if not isinstance(one, list):
            raise SpecError(f"{where} has {one!r} among its {key}; each is a list of axes.")
        axes = []
        for axis in one:
            parameter = _typed(axis, "parameter", str, inside)
            _check_keys(axis, ("parameter", "dim", "first", "power"), inside)
            dim, first, power = (_typed(axis, name, int, inside) for name in ("dim", "first", "power"))
            axes.append((parameter, dim, first, power))
        found.append(tuple(axes))
    return tuple(found)


def _planes(entry: Mapping[str, Any], kind: Kind, where: str) -> tuple[tuple[int, int], ...]:
    """The units of every plane of a class of a kind that turns planes."""
    size, lists = int(entry["size"]), _typed(entry, "planes", list, where, [])
    wrong = SpecError(
        f"{where} has the kind {str(kind)!r} and the planes {lists!r}; a kind that turns planes has two lists of "
        "units, which hold each unit once, and no other kind has planes."
    )
    if len(lists) != 2 * kind.turns:
        raise wrong
    units = [_numbers(text, where, "units of planes", size, size // 2).tolist() for text in lists]
    if units and sorted(n for own in units for n in own) != list(range(size)):
        raise wrong
    return tuple(zip(*units, strict=True))


def _role(entry: Any, size: int, where: str, parameters: _Parameters) -> Role:
    name = _typed(entry, "parameter", str, f"An axis of {where}")
    _check_keys(entry, ("parameter", "dim", "units"), f"An axis of {where}")
    if name not in parameters.shapes:
        raise SpecError(f"{where} is on {name!r}, which is not among the parameters of the spec.")
    dim = parameters.dim(name, _typed(entry, "dim", int, f"An axis of {where}"), where)
    count = int(parameters.slots((name, dim))[1].max(initial=-1)) + 1
    units = _numbers(_typed(entry, "units", str, where), where, f"units on {name}[{dim}]", count, size)
    return Role((name, dim), units)


def _parents(
    entries: dict[str, Any], names: list[str], units: list[UnitClass], size: int, where: str
) -> tuple[tuple[int, Ids], ...]:
    parents = []
    for name, text in entries.items():
        if name not in names:
            raise SpecError(
                f"{where} is nested in {name!r}, which is not in the spec; put it back, or delete what is nested in it."
            )
        number = names.index(name)
        if number >= len(units):
            raise SpecError(f"{where} is nested in {name!r}, which must be listed before it.")
        parents.append((number, _numbers(text, where, f"parent units in {name!r}", units[number].size, size)))
    return tuple(sorted(parents, key=lambda p: p[0]))


def _check_even(c: UnitClass, units: list[UnitClass], where: str) -> None:
    """Units must be spread evenly over the units of each parent, and over the combinations that there are."""
    for number, at in c.parents:
        if len(np.unique(np.bincount(at, minlength=units[number].size))) > 1:
            raise SpecError(f"{where} is spread unevenly: the units of a parent must hold equally many of its units.")
    key = np.stack([*(at for _, at in c.parents), c.fixed], axis=1)
    held = np.unique(key, axis=0, return_counts=True)[1]
    if len(np.unique(held)) > 1:
        raise SpecError(
            f"{where} is spread unevenly: every combination of parents and fixed positions must hold equally many "
            f"of its units, not {int(held.min())} to {int(held.max())}."
        )


def _check_moves(symmetry: Group) -> None:
    """Wherever the parents of a class may go, there must be places for its units."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(TRIALS if any(c.parents for c in symmetry.units) else 0):
        try:
            symmetry.sample_permutation(generator)
        except PermutationError as error:
            raise SpecError(f"The classes do not make a group: {error}") from error


def _outputs(entries: list[Any], names: list[str], units: Sequence[UnitClass]) -> tuple[FreeOutput, ...]:
    found = []
    for entry in entries:
        where = "A free output"
        leaf, dim, size = (_typed(entry, key, int, where) for key in ("leaf", "dim", "size"))
        _check_keys(entry, ("leaf", "dim", "size", "units"), where)
        classes, own = np.full(size, -1), np.zeros(size, np.int64)
        for one in _typed(entry, "units", list, where):
            name = _typed(one, "class", str, where)
            if name not in names:
                continue  # Deleted from the spec: its units stay.
            number = names.index(name)
            at = _numbers(one.get("positions"), where, "positions", size)
            classes[at] = number
            own[at] = _numbers(one.get("units"), where, "units", units[number].size, len(at))
        for number in np.unique(classes[classes >= 0]).tolist():
            if len(np.unique(np.bincount(own[classes == number], minlength=units[number].size))) > 1:
                raise SpecError(f"{where} does not hold every unit of class {names[number]!r} equally often.")
        found.append(FreeOutput(leaf, dim, classes, own))
    return tuple(found)


def _pinned(entries: list[Any], parameters: _Parameters) -> dict[Axis, dict[str, Ids]]:
    stuck: dict[Axis, dict[str, Ids]] = {}
    for entry in entries:
        name = _typed(entry, "parameter", str, "A pinned axis")
        where = f"Pinned {name!r}"
        _check_keys(entry, ("parameter", "dim", "indices", "why"), where)
        dim, below = _typed(entry, "dim", int, where), LIMIT
        if name in parameters.shapes:
            below = parameters.shapes[name][parameters.dim(name, dim, where)]
        why, ids = _typed(entry, "why", str, where), _numbers(entry.get("indices"), where, "indices", below)
        if why in stuck.setdefault((name, dim), {}):
            raise SpecError(f"{where} has two entries with the reason {why!r} for dimension {dim}.")
        stuck[name, dim][why] = ids
    return stuck


def _leave_out(stuck: dict[Axis, dict[str, Ids]], layout: Sequence[AxisLayout], parameters: _Parameters) -> None:
    """Adds the indices that are in no class and not pinned, as after a class was deleted."""
    moving = {(a.parameter, a.dim): np.concatenate([a.index[s] for _, s in a.roles]) for a in layout}
    for name, shape in parameters.shapes.items():
        for dim, size in enumerate(shape):
            told = [*stuck.get((name, dim), {}).values(), *([moving[name, dim]] if (name, dim) in moving else [])]
            rest = np.setdiff1d(np.arange(size), np.concatenate([np.zeros(0, np.int64), *told]))
            if len(rest) and size > 1:
                stuck.setdefault((name, dim), {})[LEFT_OUT] = rest
