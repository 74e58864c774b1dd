"""Calibration data from arrays: .npy, .npz and .safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxmerge import io
from fxmerge.errors import CheckpointError, LoaderError, first_line
from fxmerge.networks import Network
from fxmerge.program import trees

SUFFIXES = (".npy", ".npz", ".safetensors")


def read(path: Path, network: Network, samples: int, batch: int, generator: torch.Generator) -> list[Any]:
    """The rows of arrays in batches: an array alone is the network's first input; several are inputs by name.

    Raises:
        LoaderError: if the file cannot be read, or its arrays are not inputs of the network.
    """
    arrays = _inputs(path, _tensors(path), network)
    rows = {name: len(tensor) if tensor.ndim else 0 for name, tensor in arrays.items()}
    if len(set(rows.values())) > 1 or not all(rows.values()):
        raise LoaderError(f"The arrays of {path} have {rows} rows; all must have as many, one or more.")
    count = next(iter(rows.values()))
    chosen = torch.arange(count)
    if count > samples:
        chosen = torch.randperm(count, generator=generator)[:samples].sort().values
    return batches_of(arrays, chosen, network, batch)


def batches_of(
    arrays: Mapping[str | None, Tensor], chosen: Tensor, network: Network, batch: int
) -> list[Tensor | dict[str | None, Tensor]]:
    """The chosen rows of inputs by name in batches, or of one input without a name, in the dtype of a network."""
    parts: list[Tensor | dict[str | None, Tensor]] = []
    for own in chosen.split(batch):
        taken = {name: _converted(tensor[own], network.dtype) for name, tensor in arrays.items()}
        parts.append(taken.get(None, taken))
    return parts


def inputs_of(network: Network) -> list[str]:
    """The names of the inputs that a network takes, in the order of its forward."""
    return [p.name for p in trees.parameters_of(network.model.forward)]


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return dict(io.load(path).items())
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            arrays = {"": found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
        return {name: torch.from_numpy(array.copy("C")) for name, array in arrays.items()}
    except CheckpointError as error:
        raise LoaderError(str(error)) from error
    except Exception as error:
        raise LoaderError(f"{path} cannot be read as arrays of numbers: {first_line(error)}.") from error


def _inputs(path: Path, arrays: Mapping[str, Tensor], network: Network) -> dict[str | None, Tensor]:
    """Those arrays that are inputs, by name; one alone that is the first input has no name."""
    parameters = inputs_of(network)
    named: dict[str | None, Tensor] = {name: tensor for name, tensor in arrays.items() if name in parameters}
    if named:
        return named
    if len(arrays) == 1:
        return {None: next(iter(arrays.values()))}
    raise LoaderError(
        f"{path} has the arrays {', '.join(map(repr, arrays)) or 'of none'}, and the network takes "
        f"{', '.join(map(repr, sorted(parameters)))}. Give the arrays these names, or save the inputs alone."
    )


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating-point numbers as the network has them, whole numbers as indices."""
    if tensor.is_floating_point():
        return tensor.to(dtype)
    return tensor if tensor.is_complex() or tensor.dtype in (torch.bool, torch.uint8) else tensor.long()
