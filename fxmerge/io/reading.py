"""Reading weights: from .safetensors, from shards with an index, from directories and from files of torch."""

from __future__ import annotations

import json
import logging
import pickle
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxmerge.errors import CheckpointError, first_line
from fxmerge.io.checkpoint import Checkpoint, entry_of
from fxmerge.io.headers import AGAIN, Entry, read_header
from fxmerge.io.wrappers import unwrapped

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

SAFETENSORS, INDEX = ".safetensors", ".index.json"
TORCH = (".pt", ".pth", ".bin", ".ckpt")
IN_DIRECTORY = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What a directory of weights holds; the first of these that is there is read."""


def load(path: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Opens a file or a directory of weights.

    A checkpoint of a trainer is seen through: the state dict in an entry such as `state_dict` is taken, and the notes
    tell which. Headers are checked at once; tensors are read when they are asked for.

    Arguments:
        path: a .safetensors file; an index of shards (`model.safetensors.index.json`); a directory with one of these or
            with `pytorch_model.bin`, as of Hugging Face; or what `torch.save` wrote (.pt, .pth, .bin, .ckpt).
        allow_pickle: whether a file of torch that holds more than tensors may be unpickled, which can run any code in
            it. Only for files that you trust.

    Raises:
        CheckpointError: if there is no such file, it is damaged, a shard is missing, or it holds no state dict.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> torch.save({"epoch": 3, "state_dict": torch.nn.Linear(4, 2).state_dict()}, folder / "last.ckpt")
        >>> weights = load(folder / "last.ckpt")
        >>> sorted(weights), weights["bias"].shape
        (['bias', 'weight'], torch.Size([2]))
        >>> weights.notes
        ("the state dict is its entry 'state_dict'.",)
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"There is no file or directory {str(path)!r}.")
    if path.is_dir():
        return _directory(path, allow_pickle)
    if path.name.endswith(INDEX):
        return _sharded(path, allow_pickle)
    if path.suffix == SAFETENSORS:
        header = read_header(path)
        _check_any(path, header.entries)
        return Checkpoint(path, (path,), header.entries, _reader(path), metadata=header.metadata)
    if path.suffix in TORCH:
        return _of_torch(path, allow_pickle)
    raise CheckpointError(
        f"{path} is no file of weights by its name: it must end in {SAFETENSORS}, {INDEX} or {', '.join(TORCH)}."
    )


def _directory(path: Path, allow_pickle: bool) -> Checkpoint:
    """The weights in a directory: .safetensors before files of torch."""
    found = [name for name in IN_DIRECTORY if (path / name).exists()]
    if not found:
        raise CheckpointError(f"The directory {path} has no weights: none of {', '.join(IN_DIRECTORY)} is in it.")
    name, *others = found
    if name + INDEX in others:
        raise CheckpointError(
            f"The directory {path} holds {name} and {name + INDEX}; give one of them, or remove the other."
        )
    inside = load(path / name, allow_pickle=allow_pickle)
    checkpoint = Checkpoint(path, inside.files, inside.entries, inside.read, "", inside.notes, inside.metadata)
    return checkpoint.noted(*(f"{other} beside {name} was not read." for other in others))


def _check_any(path: Path, entries: Mapping[str, Entry]) -> None:
    if not entries:
        raise CheckpointError(f"{path} holds no tensor.")


def _reader(path: Path) -> Callable[[str], Tensor]:
    """Reads tensors of a .safetensors file, which is opened when the first is read."""

    @cache
    def opened() -> Any:
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise CheckpointError(
                f"{path} needs the package safetensors: pip install 'fxmerge[io]'; or save the weights by torch.save."
            ) from error
        try:
            return safe_open(path, "pt")
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read: {error}. {AGAIN}") from error

    def read(name: str) -> Tensor:
        try:
            tensor: Tensor = opened().get_tensor(name)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{name!r} of {path} cannot be read: {error}. {AGAIN}") from error
        return tensor

    return read


def _sharded(path: Path, allow_pickle: bool) -> Checkpoint:
    """The tensors of all shards of an index."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        places = dict(found["weight_map"])
        if not all(isinstance(shard, str) for shard in places.values()):
            raise TypeError("a shard has no name")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is no index of shards: {type(error).__name__}: {error}. {AGAIN}") from error
    shards: dict[str, Checkpoint] = {}
    for shard in dict.fromkeys(places.values()):
        if Path(shard).name != shard or shard.endswith(INDEX):
            raise CheckpointError(f"{path} names the shard {shard!r}; a shard is a file of weights beside the index.")
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path} names the shard {shard!r}, which is not there. Copy all shards.")
        shards[shard] = load(path.parent / shard, allow_pickle=allow_pickle)
    for name, shard in places.items():
        if name not in shards[shard].entries:
            raise CheckpointError(
                f"{path} says that {name!r} is in the shard {shard!r}, which does not hold it. {AGAIN}"
            )
    for shard, held in shards.items():
        left = [name for name in held if places.get(name) != shard]
        if left:
            raise CheckpointError(f"The shard {shard!r} holds {left[0]!r}, which {path} does not say. {AGAIN}")
    entries = {name: shards[shard].entries[name] for name, shard in places.items()}
    _check_any(path, entries)
    files = (path, *(path.parent / shard for shard in shards))
    notes = tuple(dict.fromkeys(note for held in shards.values() for note in held.notes))
    return Checkpoint(path, files, entries, lambda name: shards[places[name]][name], notes=notes)


def _of_torch(path: Path, allow_pickle: bool) -> Checkpoint:
    """The state dict in what `torch.save` wrote. Tensors are mapped to the file, so that they are read when used."""
    import torch

    notes: list[str] = []
    try:
        given = _torch_load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            raise CheckpointError(
                f"{path} holds more than tensors, or is damaged, and reading it could run code that is in it. Save "
                "model.state_dict() alone, as .safetensors at best. If you trust the file, pass allow_pickle=True (on "
                f"the command line --allow-pickle). torch says: {first_line(error)}."
            ) from error
        logger.warning("%s is unpickled, as was asked for: this runs any code that is in the file.", path)
        notes.append("the file was unpickled.")
        try:
            given = _torch_load(path, weights_only=False)
        except Exception as second:
            raise _unreadable(path, second) from second
    except Exception as error:
        raise _unreadable(path, error) from error
    if isinstance(given, torch.nn.Module):
        notes.append(f"the state dict is that of the pickled {type(given).__name__}.")
        given = given.state_dict()
    state, way = unwrapped(path, given, lambda value: isinstance(value, torch.Tensor))
    if way:
        notes.append(f"the state dict is its entry {'.'.join(way)!r}.")
    entries = {name: entry_of(tensor) for name, tensor in state.items()}
    checked = cache(lambda: _check_sums(path))

    def read(name: str) -> Tensor:
        checked()
        tensor: Tensor = state[name]
        return tensor

    return Checkpoint(path, (path,), entries, read).noted(*notes)


def _check_sums(path: Path) -> None:
    """The records of a zip file of torch must have the checksums that stand beside them, once a tensor is read.

    Raises:
        CheckpointError: if some have not. If none has, torch was told to write none, by `set_crc32_options`.
    """
    if not zipfile.is_zipfile(path):
        return
    good, bad = 0, []
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:
        raise _unreadable(path, error) from error
    with archive:
        for record in archive.infolist():
            try:
                with archive.open(record) as content:
                    while content.read(2**20):
                        pass
                good += record.file_size > 0
            except Exception:  # A flipped bit may also say that a record is encrypted, or packed in an unknown way.
                bad.append(record.filename)
    if good and bad:
        raise CheckpointError(f"{path} has a record {bad[0]!r} that is not as it was written. {AGAIN}")


def _torch_load(path: Path, *, weights_only: bool) -> Any:
    import torch

    # What torch wrote before it took to zip files cannot be mapped.
    return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=zipfile.is_zipfile(path))


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read by torch: {first_line(error)}. {AGAIN}")
