"""A symmetry as a JSON text that a person can read, keep, compare and edit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from fxmerge.errors import SpecError
from fxmerge.program.captured import Program
from fxmerge.symmetry.base import Group
from fxmerge.symmetry.ranges import write_ranges
from fxmerge.symmetry.units import Ids
from fxmerge.units.kind import UnitKind
from fxmerge.units.layout import AxisLayout

KIND, VERSION = "symmetry", 1
WIDTH = 110
"""An object that fits into a line of this width is written in one."""


def to_json(symmetry: Group) -> str:
    """The text from which `fxmerge.symmetry.readspec.from_json` makes the same symmetry.

    Every list of numbers is written as ranges; see `fxmerge.symmetry.ranges`.
    """
    slots = {(a.parameter, a.dim): a for a in symmetry.layout}
    classes = []
    for number, (name, c) in enumerate(zip(symmetry.names, symmetry.units, strict=True)):
        axes = [
            {"parameter": r.axis[0], "dim": r.axis[1], "units": write_ranges(r.raw)} for r in c.roles if r.axis in slots
        ]
        entry: dict[str, Any] = {"name": name, "size": c.size, "axes": axes}
        if c.parents:
            entry["parents"] = {symmetry.names[p]: write_ranges(at) for p, at in c.parents}
        if c.fixed.any():
            entry["fixed"] = write_ranges(c.fixed)
        if symmetry.kinds:
            entry |= _kind(symmetry.kinds[number])
        classes.append(entry)
    parameters: dict[str, dict[str, Any]] = {}
    for a in symmetry.layout:
        parameter = parameters.setdefault(a.parameter, {"shape": list(a.shape)})
        if a.aliases:
            parameter["aliases"] = list(a.aliases)
        if len(a.dims) > 1:
            parameter.setdefault("apart", {})[str(a.dim)] = {
                str(d): write_ranges(block) for d, block in rows_apart(a).items()
            }
    pinned = [
        {"parameter": name, "dim": dim, "indices": write_ranges(ids), "why": why}
        for (name, dim), reasons in symmetry.stuck.items()
        for why, ids in reasons.items()
    ]
    spec = {
        "fxmerge": KIND,
        "version": VERSION,
        "pin": [],
        "parameters": parameters,
        "classes": classes,
        "pinned": pinned,
        "unknown": dict(symmetry.unknown),
        "probed": dict(symmetry.probed),
        "demoted": list(symmetry.demoted),
        "error": symmetry.error,
    }
    if symmetry.free:
        spec["outputs"] = [
            {
                "leaf": o.leaf,
                "dim": o.dim,
                "size": len(o.classes),
                "units": [
                    {
                        "class": symmetry.names[n],
                        "positions": write_ranges(np.flatnonzero(o.classes == n)),
                        "units": write_ranges(o.units[o.classes == n]),
                    }
                    for n in np.unique(o.classes[o.classes >= 0]).tolist()
                ],
            }
            for o in symmetry.free
        ]
    return _format(spec, "") + "\n"


def _kind(own: UnitKind) -> dict[str, Any]:
    """The entries of a class that say by which matrices its units may be mixed."""
    entries: dict[str, Any] = {"kind": str(own.kind)}
    if own.why:
        entries["limited"] = own.why
    if own.inverse:
        entries["inverse"] = [{"parameter": p, "dim": d, "first": slot} for p, d, slot in sorted(own.inverse)]
    if own.planes:
        entries["planes"] = [write_ranges(np.array(units)) for units in zip(*own.planes, strict=True)]
    for key, told in (("signs", own.signs), ("stretches", own.stretches)):
        if told:
            entries[key] = [
                [{"parameter": p, "dim": d, "first": slot, "power": power} for p, d, slot, power in one] for one in told
            ]
    if own.scales:
        entries["scales"] = sorted(own.scales)
    return entries


def _format(value: Any, indent: str) -> str:
    """JSON with one line for everything that fits into one."""
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (dict, list)) or len(indent) + len(flat) <= WIDTH:
        return flat
    inner = indent + "  "
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(k, ensure_ascii=False)}: {_format(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + _format(v, inner) for v in value) + f"\n{indent}]"


def rows_apart(axis: AxisLayout) -> dict[int, Ids]:
    """For each other dimension whose rows have units of their own along an axis: the block of each row."""
    blocks = {}
    for i, d in enumerate(axis.dims):
        if d != axis.dim:
            first = np.moveaxis(axis.slot, i, 0).reshape(axis.slot.shape[i], -1)[:, 0]
            blocks[d] = np.unique(first, return_inverse=True)[1].reshape(-1)
    return blocks


def slots(dim: int, size: int, apart: dict[int, Ids]) -> tuple[tuple[int, ...], Ids]:
    """The slots of an axis: they count along the axis, and on from block to block of the rows kept apart.

    Returns:
        The dimensions of the array of slots, and the array.
    """
    others = sorted(apart)
    counts = [int(apart[d].max()) + 1 for d in others]
    slot = np.arange(int(np.prod(counts)) * size, dtype=np.int64).reshape(*counts, size)
    for i, d in enumerate(others):
        slot = np.take(slot, apart[d], axis=i)
    dims = sorted((*others, dim))
    return tuple(dims), np.ascontiguousarray(slot.transpose([(*others, dim).index(d) for d in dims]))


def check_fits(symmetry: Group, program: Program) -> None:
    """A symmetry that is used with a model must be of its parameters.

    Raises:
        SpecError: if a parameter is missing, has another shape, or is tied to others than in the symmetry.
    """
    for axis in symmetry.layout:
        if axis.parameter not in program.aliases:
            raise SpecError(
                f"The symmetry moves {axis.parameter!r}, but the model has no such parameter; it is a symmetry of "
                "another model."
            )
        own = program.aliases[axis.parameter]
        shape = tuple(program.parameters[own].shape)
        if shape != axis.shape:
            raise SpecError(
                f"The symmetry is of a parameter {axis.parameter!r} of shape {axis.shape}, but the model's has shape "
                f"{shape}; it is a symmetry of another model."
            )
        tied = {alias for alias, name in program.aliases.items() if name == own}
        if tied != {axis.parameter, *axis.aliases}:
            raise SpecError(
                f"The model ties {_listed(tied)} to each other, but the symmetry "
                f"{_listed({axis.parameter, *axis.aliases})}; it is a symmetry of another model."
            )


def _listed(names: set[str]) -> str:
    return " and ".join(repr(n) for n in sorted(names))
