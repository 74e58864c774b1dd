"""Reads what a directory of fxmerge holds."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from fxmerge import io
from fxmerge.errors import CheckpointError, OptionError, first_line
from fxmerge.output import exported
from fxmerge.output.target import WRITTEN
from fxmerge.output.writing import SUMS
from fxmerge.plan import Plan, from_yaml
from fxmerge.plan.running import build_of, checksum
from fxmerge.reporting import Report


def plan_of(directory: Path) -> Plan:
    """The plan by which a directory was made.

    Raises:
        OptionError: if fxmerge did not write it.
    """
    if not directory.is_dir() or not all((directory / name).is_file() for name in WRITTEN):
        raise OptionError(f"{directory} is no directory that fxmerge wrote: it has no {' and '.join(WRITTEN)}.")
    return from_yaml(directory / WRITTEN[0])


def summary_of(directory: Path) -> dict[str, Any]:
    """What report.json says.

    Raises:
        OptionError: if it is damaged.
    """
    path = directory / WRITTEN[1]
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if {"warnings", "loads", "report"} <= set(found) and set(found["report"]) == {f.name for f in fields(Report)}:
            return dict(found)
    except (OSError, ValueError, TypeError) as error:
        raise OptionError(f"{path} cannot be read: {error}.") from error
    raise OptionError(f"{path} is no report of this version of fxmerge.")


def network_of(directory: Path, plan: Plan) -> nn.Module:
    """The network of a directory: its archive, or else one of its architecture.

    Raises:
        CheckpointError: if it cannot be built.
    """
    path = directory / exported.NAME
    if path.exists():
        try:
            return exported.read(path)
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read: {first_line(error)}.") from error
    return build_of(plan, plan.models[0], io.load(directory)).model


def problems_of(directory: Path, plan: Plan) -> list[str]:
    """What is wrong with the files of a directory, and with the inputs that it was made of."""
    problems = []
    path = directory / SUMS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if not lines:
        problems.append(f"{SUMS} is missing.")
    for line in lines:
        own, _, name = line.partition("  ")
        if not (directory / name).is_file():
            problems.append(f"{name} is missing.")
        elif checksum(directory / name) != own:
            problems.append(f"{name} has changed since it was written.")
    for model in plan.models:
        place = Path(model.path)
        for name, own in model.sha256.items():
            file = place / name if place.is_dir() else place
            if file.is_file() and checksum(file) != own:
                problems.append(f"{file}, which was read, has changed since.")
    return problems
