"""Calibration data from a directory that `save_to_disk` of the package datasets wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fxmerge.calibration import arrays, images, text
from fxmerge.errors import LoaderError, first_line
from fxmerge.networks import Network
from fxmerge.sources import package

STATE, SPLITS = "state.json", "dataset_dict.json"
"""The files by which a data set, and several of them, are known."""


def is_saved(directory: Path) -> bool:
    """Whether a directory is one of datasets."""
    return directory.is_dir() and any((directory / name).is_file() for name in (STATE, SPLITS))


def read(
    directory: Path, network: Network, samples: int, batch: int, length: int, generator: torch.Generator
) -> tuple[Sequence[Any], list[Path], str]:
    """Some rows of a data set in batches, the files that they are in, and what they are.

    Columns that are inputs of the network are taken as they are; else a column of images is prepared by the network's
    transform; else a column of texts by its tokenizer.

    Raises:
        LoaderError: if the directory cannot be read, or has no such column.
    """
    if (directory / SPLITS).is_file():
        raise LoaderError(
            f"{directory} holds several data sets: name one of {', '.join(map(str, _splits(directory)))}."
        )
    datasets = package("datasets")
    try:
        found: Any = datasets.load_from_disk(str(directory))
    except Exception as error:
        raise LoaderError(f"{directory} cannot be read by datasets: {first_line(error)}.") from error
    if not len(found):
        raise LoaderError(f"{directory} has no rows.")
    files = [Path(own["filename"]) for own in found.cache_files]
    chosen = sorted(torch.randperm(len(found), generator=generator)[:samples].tolist())
    strings = [name for name, feature in found.features.items() if getattr(feature, "dtype", "") == "string"]
    pictures = [name for name, feature in found.features.items() if isinstance(feature, datasets.Image)]
    known = arrays.inputs_of(network)
    first = getattr(network.model, "main_input_name", None) or next(iter(known), "")  # Labels alone are no data.
    inputs = [name for name in found.column_names if name in known and name not in strings and name not in pictures]
    if first in inputs:
        rows = found.select_columns(inputs).select(chosen).with_format("torch")
        told = f"the columns {', '.join(inputs)} of {directory}"
        return _inputs(rows, inputs, directory, network, batch), files, told
    if pictures:
        name = _one(pictures, directory, "images")
        opened = [(f"{name!r} in row {row} of {directory}", partial(_cell, found, row, name)) for row in chosen]
        batches, told = images.prepared(opened, str(directory), network, batch)
        return batches, files, f"the images {name!r} of {directory}, prepared by {told}"
    name = _one([key for key in text.KEYS if key in strings][:1] or strings, directory, "texts")
    tokens = text.read(_texts(found, name), str(directory), network, samples, batch, length)
    return tokens, files, f"the texts {name!r} of {directory}"


def _splits(directory: Path) -> list[Path]:
    try:
        return [directory / name for name in json.loads((directory / SPLITS).read_text(encoding="utf-8"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoaderError(f"{directory / SPLITS} cannot be read: {first_line(error)}.") from error


def _one(names: Sequence[str], directory: Path, what: str) -> str:
    """The only column of a kind."""
    if len(names) != 1:
        said = f"has several columns of {what}, {', '.join(map(repr, names))}" if names else "has no images or texts"
        raise LoaderError(
            f"{directory} {said}, and none with the name of an input. Save one such column alone, as by "
            "select_columns and save_to_disk, or name a column as the input."
        )
    return names[0]


def _cell(found: Any, row: int, name: str) -> Any:
    return found[row][name]


def _texts(found: Any, name: str) -> Iterator[str]:
    """The texts of a column that are not empty."""
    return (value for value in found[name] if value and value.strip())


def _inputs(rows: Any, names: Sequence[str], directory: Path, network: Network, batch: int) -> list[Any]:
    """Columns as inputs by name. Rows of tokens of several lengths are put into batches of one length each."""
    columns: dict[str | None, list[Any]] = {name: list(rows[name]) for name in names}
    if not all(isinstance(value, torch.Tensor) for column in columns.values() for value in column):
        raise LoaderError(f"The columns {', '.join(map(repr, names))} of {directory} are not all numbers.")
    shapes = [tuple(tuple(own.shape) for own in values) for values in zip(*columns.values(), strict=True)]
    batches: list[Any] = []
    for shape in dict.fromkeys(shapes):
        alike = [i for i, own in enumerate(shapes) if own == shape]
        tensors: dict[str | None, torch.Tensor] = {
            name: torch.stack([column[i] for i in alike]) for name, column in columns.items()
        }
        batches += arrays.batches_of(tensors, torch.arange(len(alike)), network, batch)
    return batches
