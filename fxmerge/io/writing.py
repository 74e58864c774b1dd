"""Writing weights: a file, or a directory with shards and their index. A file is there whole or not at all."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from fxmerge.errors import OptionError, OutputError
from fxmerge.io.reading import INDEX, SAFETENSORS, TORCH

if TYPE_CHECKING:
    from torch import Tensor

NAME = "model"
"""Of the weights in a directory."""


def save(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    *,
    shard_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[Path, ...]:
    """Writes tensors to a file or a directory.

    Each file is written under another name beside its place, flushed to the disk, and then moved into place. Names of
    one and the same memory are each written in full, so that the file loads by any tool.

    Arguments:
        tensors: what to write, by name; such as a state dict or a `Checkpoint`.
        path: a .safetensors, .pt, .pth or .bin file; or a directory, which then holds model.safetensors, or shards with
            model.safetensors.index.json as those of Hugging Face.
        shard_size: how many bytes of tensors a shard of a directory may hold; a larger tensor has a shard of its own.
        metadata: texts to keep in .safetensors files.

    Returns:
        The files that were written; an index comes last.

    Raises:
        OptionError: if the path has another ending, or shards of a file are asked for.
        OutputError: if a file cannot be written.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> [path.name for path in save(torch.nn.Linear(8, 8).state_dict(), folder, shard_size=256)]
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors', 'model.safetensors.index.json']
    """
    path = Path(path)
    if path.suffix in TORCH:
        _check_whole(path, shard_size)
        import torch

        with written(path) as place, Sink(place) as sink:
            torch.save(dict(tensors), cast(IO[bytes], sink))
        return (path,)
    if path.suffix == SAFETENSORS:
        _check_whole(path, shard_size)
        return (_safetensors(tensors, list(tensors), path, metadata),)
    if not path.is_dir() and (path.exists() or path.suffix):
        raise OptionError(f"{path} is no place for weights: name a directory, or a file that ends in {SAFETENSORS}.")
    with told(path):
        path.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(tensors, shard_size))
    other = path / (f"{NAME}{SAFETENSORS}{INDEX}" if len(shards) == 1 else f"{NAME}{SAFETENSORS}")
    if other.exists():
        raise OutputError(f"{other} is there, and would stand beside other weights. Remove it, or name another place.")
    if len(shards) == 1:
        return (_safetensors(tensors, shards[0], path / f"{NAME}{SAFETENSORS}", metadata),)
    files = []
    for number, names in enumerate(shards, start=1):
        file = path / f"{NAME}-{number:05d}-of-{len(shards):05d}{SAFETENSORS}"
        files.append(_safetensors(tensors, names, file, metadata))
    places = {name: file.name for names, file in zip(shards, files, strict=True) for name in names}
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = path / f"{NAME}{SAFETENSORS}{INDEX}"
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n"
    with written(index) as place:
        place.write_text(text, encoding="utf-8")
    return (*files, index)


def _check_whole(path: Path, shard_size: int | None) -> None:
    if shard_size is not None:
        raise OptionError(f"{path} is one file, and shard_size is given: name a directory, or leave it out.")


def _shards(tensors: Mapping[str, Tensor], size: int | None) -> Iterator[list[str]]:
    """The names of the tensors of each shard, in their order."""
    names: list[str] = []
    held = 0
    for name, tensor in tensors.items():
        own = tensor.numel() * tensor.element_size()
        if names and size is not None and held + own > size:
            yield names
            names, held = [], 0
        names.append(name)
        held += own
    yield names


def _safetensors(
    tensors: Mapping[str, Tensor], names: list[str], path: Path, metadata: Mapping[str, str] | None
) -> Path:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise OptionError(f"{path} needs the package safetensors: pip install 'fxmerge[io]'; or write .pt.") from error
    seen: set[int] = set()
    own = {}
    for name in names:
        tensor = tensors[name].detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if memory in seen else tensor  # The format has no two names for one memory.
        seen.add(memory)
    with written(path) as place:
        save_file(own, place, {"format": "pt", **(metadata or {})})
    return path


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A place to write a file at, which is then flushed to the disk and moved to its own; or removed after an error.

    Raises:
        OutputError: if it cannot be written.
    """
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: {path.parent} is no directory. Make it, or name another place.")
    place = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with told(path):
            yield place
            settle(place)
            place.replace(path)
    finally:
        place.unlink(missing_ok=True)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turns what the system says of files into a sentence.

    Raises:
        OutputError: in place of an OSError, and of what safetensors makes of one.
    """
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))  # As safetensors tells it.
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if number is None:  # Packages also raise an OSError where the system has said nothing.
            raise
        full = number in (errno.ENOSPC, errno.EDQUOT)
        hint = "Make room, or name another place." if full else "Name another place."
        raise OutputError(f"{path} cannot be written: {os.strerror(number)}. {hint}") from error


class Sink(io.RawIOBase):
    """A file for torch to write to. Where the disk takes no more, torch would end the process; so this keeps the error
    until torch is done.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "zeros.pt"
        >>> with Sink(path) as file:
        ...     torch.save(torch.zeros(2), file)
        >>> torch.load(path)
        tensor([0., 0.])
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self.file.seek(offset, whence) if self.error is None else 0

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return size

    def close(self) -> None:
        """Closes the file.

        Raises:
            OSError: the first that the system gave.
        """
        if not self.closed:
            super().close()
            try:
                self.file.close()
            except OSError as error:
                self.error = self.error or error
            if self.error is not None:
                raise self.error


def settle(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are on the disk. It may be read by whom new files may be read
    by: safetensors writes files for their owner only."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
    flush(path)


def _umask() -> int:
    own = os.umask(0)
    os.umask(own)
    return own


def flush(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are on the disk."""
    if sys.platform == "win32" and path.is_dir():
        return  # Windows opens no directories.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
