"""Maps of units as JSON texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fxmerge.errors import UnitMapError
from fxmerge.units.layout import AxisLayout

VERSION = 1


def to_json(fields: Mapping[str, Any]) -> str:
    """A map as a JSON text, by its fields."""
    return json.dumps(
        {
            "version": VERSION,
            "names": fields["names"],
            "widths": fields["widths"],
            "kept": [own.tolist() for own in fields["kept"]],
            "maps": [[own.tolist() for own in each] for each in fields["maps"]],
            "consumed": sorted(fields["consumed"]),
            "layout": [
                asdict(axis) | {"slot": axis.slot.tolist(), "roles": [[n, s.tolist()] for n, s in axis.roles]}
                for axis in fields["layout"]
            ],
        }
    )


def from_json(source: str | Path) -> dict[str, Any]:
    """The fields of a map, from a text that `to_json` gave or from a file of it.

    Raises:
        UnitMapError: if it is no such text.
    """
    try:
        text = source if isinstance(source, str) and source.lstrip().startswith("{") else Path(source).read_text()
        found = json.loads(text)
        if found["version"] != VERSION:
            raise UnitMapError(f"The map has version {found['version']}; this fxmerge reads version {VERSION}.")
        return {
            "names": tuple(found["names"]),
            "layout": tuple(map(_axis, found["layout"])),
            "consumed": frozenset((name, dim) for name, dim in found["consumed"]),
            "maps": tuple(tuple(np.array(units, np.int64) for units in own) for own in found["maps"]),
            "widths": tuple(found["widths"]),
            "kept": tuple(np.array(units, np.int64) for units in found.get("kept", ())),
        }
    except (KeyError, TypeError, ValueError, OSError) as error:
        if isinstance(error, UnitMapError):
            raise
        raise UnitMapError(f"This is no map of units that fxmerge wrote: {error!r}.") from error


def _axis(found: Mapping[str, Any]) -> AxisLayout:
    return AxisLayout(
        found["parameter"],
        tuple(found["aliases"]),
        tuple(found["shape"]),
        found["dim"],
        tuple(found["dims"]),
        np.array(found["slot"], np.int64),
        tuple((number, np.array(slots, np.int64)) for number, slots in found["roles"]),
    )
