"""What can be known of files before any tensor is read: whether they go together, and what a merge would share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from fxmerge.errors import FxmergeError
from fxmerge.io import Checkpoint
from fxmerge.networks import Network, skeleton
from fxmerge.plan.estimate import Estimate, estimate
from fxmerge.plan.parts import Data
from fxmerge.validate import name_of


@dataclass(frozen=True)
class FileFacts:
    """What the header of one model's weights says.

    Attributes:
        path: of the weights.
        tensors: how many there are.
        parameters: how many numbers they hold.
        bytes: that they take.
        dtypes: how many tensors are of each dtype.
        notes: what was seen through.
        settings: the arguments that its architecture is built with.
    """

    path: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    notes: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Check:
    """What a pre-flight found.

    Attributes:
        files: of each model.
        equal: the share of the first model's parameters that lie in tensors which all models have, with equal shapes.
        first_difference: where the models first differ in names or shapes, in a sentence; "" if nowhere.
        memory: how many bytes a merge needs at least: all models and the result.
        estimate: how long it takes at least; None without data or an architecture.
        problems: what would stop a merge, each in a sentence.
    """

    files: tuple[FileFacts, ...]
    equal: float
    first_difference: str
    memory: int
    estimate: Estimate | None = None
    problems: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def check(
    checkpoints: Sequence[Checkpoint],
    archs: Sequence[str | None],
    settings: Sequence[Mapping[str, Any]],
    inputs: Sequence[str] = (),
    data: Sequence[str] = (),
    *,
    rows: Data | None = None,
    device: str | torch.device | None = None,
    fitted: bool = True,
) -> Check:
    """Compares the headers of files with each other, and with the networks that they are to be of.

    Arguments:
        checkpoints: the weights, of which no tensor is read.
        archs: the architecture of each; None does not build it.
        settings: the arguments of each architecture.
        inputs: shapes of example inputs.
        data: the paths of calibration data, which only have to exist.
        rows: how many rows of data there will be, for an estimate of the time.
        device: where it is to run.
        fitted: whether layers will be fitted.
    """
    problems: list[str] = []
    built, arguments, networks = [], [], list[Network]()
    for checkpoint, arch, own in zip(checkpoints, archs, settings, strict=True):
        found, used = checkpoint, dict(own)
        if arch is not None:
            try:
                network = skeleton(checkpoint, arch, own, inputs)
                networks.append(network)
                found, used = network.checkpoint, dict(network.settings)
            except FxmergeError as error:
                problems.append(str(error))
        built.append(found)
        arguments.append(used)
    first, *others = built
    common = {n for n in first.entries if all(_same(first, other, n) for other in others)}
    numbers = sum(entry.numbers for entry in first.entries.values())
    share = sum(first.entries[name].numbers for name in common) / max(numbers, 1)
    if others and not common:
        problems.append("The models have no tensor of equal name and shape; they cannot share a layer.")
    problems += _dtypes(built, common)
    for path in data:
        if not Path(path).exists() and ":" not in path:
            problems.append(f"There are no data {path!r}.")
    return Check(
        tuple(_facts(*pair) for pair in zip(built, arguments, strict=True)),
        share,
        _difference(built),
        sum(one.bytes for one in built) + first.bytes,
        None if rows is None or len(networks) < len(built) else estimate(networks, rows, device, fitted=fitted),
        tuple(problems),
    )


def _facts(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> FileFacts:
    dtypes: dict[str, int] = {}
    for entry in checkpoint.entries.values():
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + 1
    numbers = sum(entry.numbers for entry in checkpoint.entries.values())
    return FileFacts(
        str(checkpoint.path), len(checkpoint), numbers, checkpoint.bytes, dtypes, checkpoint.notes, settings
    )


def _same(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    return name in other.entries and one.entries[name].shape == other.entries[name].shape


def _difference(checkpoints: Sequence[Checkpoint]) -> str:
    """The first tensor, in the order of the first model, in which some model differs."""
    first = checkpoints[0]
    for i, other in enumerate(checkpoints[1:], start=1):
        for name in chain(first.entries, (n for n in other.entries if n not in first.entries)):
            if not _same(first, other, name) if name in first.entries else True:
                said = [
                    f"has shape {own.entries[name].shape} in {name_of(k)}"
                    if name in own.entries
                    else f"is not in {name_of(k)}"
                    for k, own in ((0, first), (i, other))
                ]
                return f"{name!r} {' and '.join(said)}."
    return ""


def _dtypes(checkpoints: Sequence[Checkpoint], common: set[str]) -> list[str]:
    """Whether a tensor that all models have is of another dtype in one of them."""
    first = checkpoints[0]
    for i, other in enumerate(checkpoints[1:], start=1):
        for name in first.entries:
            if name in common and first.entries[name].dtype != other.entries[name].dtype:
                return [
                    f"{name!r} is {first.entries[name].dtype} in {name_of(0)} and {other.entries[name].dtype} in "
                    f"{name_of(i)}; save all models in one dtype."
                ]
    return []
