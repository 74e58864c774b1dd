"""Which reader a path of calibration data has, and what every reader is told."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxmerge.calibration import arrays, images, saved, text
from fxmerge.errors import LoaderError, OptionError
from fxmerge.networks import Network
from fxmerge.registered import DATA, find
from fxmerge.sources import imported

logger = logging.getLogger(__name__)

SAMPLES, BATCH, LENGTH = 1024, 32, 128
"""How many rows of data are read by default, how many are in a batch, and how many tokens a row of text has at most."""


@dataclass(frozen=True)
class Batches:
    """Batches of inputs, which can be iterated several times.

    Attributes:
        batches: what the network takes.
        files: the files that they come from.
        note: what they are, in a sentence.
    """

    batches: tuple[Any, ...]
    files: tuple[Path, ...]
    note: str

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def read(
    path: str,
    network: Network,
    *,
    samples: int = SAMPLES,
    batch: int = BATCH,
    length: int = LENGTH,
    seed: int = 0,
) -> Batches:
    """Reads calibration data in the form that a network takes.

    Arguments:
        path: a directory of images, which the network's own transform prepares; a directory that `save_to_disk` of the
            package datasets wrote, with a column of images, texts or inputs; a .npy, .npz or .safetensors file of
            inputs; a .txt or .jsonl file, which the tokenizer of the network's directory prepares; or
            `package.module:loader`, a loader or a function that returns one; or a name with a prefix that a package
            registers.
        network: the network whose inputs they are.
        samples: how many rows to take at most. Of images and rows of arrays, a random choice.
        batch: how many rows a batch has at most.
        length: how many tokens a row of text has at most.
        seed: of the random choice.

    Raises:
        LoaderError: if there are no data of this kind, or the network has no way to prepare them.

    Example:
        >>> import tempfile, numpy
        >>> from fxmerge import io, networks
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = io.save(torch.nn.Linear(4, 3).state_dict(), folder / "w.safetensors")
        >>> sizes = {"in_features": 4, "out_features": 3}
        >>> network = networks.build(io.load(folder / "w.safetensors"), "torch.nn:Linear", sizes, ["1x4"])
        >>> numpy.save(folder / "x.npy", numpy.zeros((70, 4)))
        >>> [x.shape for x in read(str(folder / "x.npy"), network)]
        [torch.Size([32, 4]), torch.Size([32, 4]), torch.Size([6, 4])]
    """
    place = Path(path)
    if not place.exists():
        module, colon, name = path.partition(":")
        if colon and module and name:
            return _function(path, samples)
        raise LoaderError(f"There are no data {path!r}: name a file, a directory of images or package.module:loader.")
    generator = torch.Generator().manual_seed(seed)
    found: Sequence[Any]
    if saved.is_saved(place):
        found, files, what = saved.read(place, network, samples, batch, length, generator)
    elif place.is_dir():
        found, files, transform = images.read(place, network, samples, batch, generator)
        what = f"{len(files)} images of {path}, prepared by {transform}"
    elif place.suffix in arrays.SUFFIXES:
        found, files = arrays.read(place, network, samples, batch, generator), [place]
        what = f"arrays of {path}"
    elif place.suffix in text.SUFFIXES:
        found, files = text.read(text.lines_of(place), path, network, samples, batch, length), [place]
        what = f"text of {path}"
    else:
        raise LoaderError(
            f"{path} is no file of data by its name: it must end in {', '.join((*arrays.SUFFIXES, *text.SUFFIXES))}."
        )
    return Batches(tuple(found), tuple(files), f"{_counted(found)}, {what}.")


def _counted(batches: Sequence[Any]) -> str:
    rows, count = sum(map(_rows, batches)), len(batches)
    return f"{rows} row{'s' * (rows != 1)} in {count} batch{'es' * (count != 1)}"


def _rows(batch: Any) -> int:
    """How many rows a batch has."""
    return next((len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 0)


def _function(path: str, samples: int) -> Batches:
    """The batches of a loader of the user's, or of a package."""
    module, _, name = path.partition(":")
    try:
        registered = find(DATA, module)
        found = imported(module, name) if registered is None else partial(registered, name)
    except OptionError as error:
        raise LoaderError(str(error)) from error
    try:
        loader: Any = found() if callable(found) and not isinstance(found, Iterable) else found
        batches, rows = [], 0
        for one in loader:
            if rows >= samples:
                break
            batches.append(one)
            rows += _rows(one)
    except Exception as error:
        raise LoaderError(f"{path} gives no batches: {type(error).__name__}: {error}.") from error
    if not batches:
        raise LoaderError(f"{path} is empty: it gave no batch.")
    return Batches(tuple(batches), (), f"{_counted(batches)}, of {path}.")
