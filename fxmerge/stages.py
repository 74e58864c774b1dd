"""Results of stages in a folder, so that a run that was interrupted goes on after the last stage that it finished."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from fxmerge import io
from fxmerge.errors import OptionError, OutputError, first_line
from fxmerge.io.writing import flush, told, written
from fxmerge.progress import warnings_logged

logger = logging.getLogger(__name__)

T = TypeVar("T")

MANIFEST = "stages.json"
"""The file that tells what the results of a folder depend on."""

TEXT, SUM = "text", "sha256"
"""The names of the plain data and of the checksum in the file of a stage; its tensors have numbers."""

SHOWN = 3
"""So many differences are told."""

ANEW = "To begin anew, delete the folder or name another one; on the command line, leave out --resume."
"""What to do where a folder is of another run."""

DIGEST = 64
"""The length of a checksum, whose digits tell a reader nothing."""


@dataclass(frozen=True)
class Kept:
    """What is kept of a result: tensors by name, and plain data as JSON has them."""

    tensors: Mapping[str, Tensor]
    plain: Any = None


@dataclass(frozen=True)
class Form(Generic[T]):
    """How a result is kept.

    Attributes:
        save: what is kept of it; None where it has to be computed again.
        load: the result, from what was kept.
    """

    save: Callable[[T], Kept | None]
    load: Callable[[Kept], T]


class Stages:
    """The results of the stages of one merge, each in a file of its own, in the order in which they are asked for.

    A file is written under another name, flushed to the disk and moved into place, so that it is there whole or not at
    all. It is a .safetensors file with a checksum of all that it holds. Nothing is unpickled.

    Arguments:
        folder: where the files are; None keeps nothing.
        manifest: what all results depend on, by name. Entries are short texts or checksums.

    Attributes:
        spared: how many seconds it took an earlier run to compute what was not computed again.

    Raises:
        OptionError: if the folder holds results that depend on something else.
        OutputError: if the folder cannot be written.

    Example:
        >>> import tempfile
        >>> form = Form[Tensor](lambda found: Kept({"x": found}), lambda kept: kept.tensors["x"])
        >>> folder = Path(tempfile.mkdtemp())
        >>> Stages(folder, {"seed": "0"}).remember("squares", lambda: torch.arange(3) ** 2, form)
        tensor([0, 1, 4])
        >>> Stages(folder, {"seed": "0"}).remember("squares", lambda: 1 / 0, form)
        tensor([0, 1, 4])
        >>> [path.name for path in sorted(folder.iterdir())]
        ['001-squares.safetensors', 'stages.json']
    """

    def __init__(self, folder: Path | None = None, manifest: Mapping[str, str] | None = None) -> None:
        self.folder, self.spared, self._asked = folder, 0.0, 0
        self._before: tuple[str, Path, dict[str, Any]] | None = None
        self._manifest = json.dumps(manifest or {}, indent=2) + "\n"
        if folder is not None:
            self._open(folder, manifest or {})

    def remember(self, name: str, compute: Callable[[], T], form: Form[T], until: str | None = None) -> T:
        """The result of a stage: what an earlier run computed, or else what `compute` gives, which is then kept.

        A result that was computed just now is also read back from its file. So an interrupted run and one that was not
        go on with the same values. Warnings that were logged meanwhile are logged again.

        Arguments:
            name: of the stage; it becomes part of the name of a file.
            compute: computes the result.
            form: how it is kept.
            until: the name of the next stage, if that alone reads the result. Once the result of that stage is kept,
                this one is dropped, and a later run gets what `form` loads from nothing.

        Raises:
            OutputError: if the file cannot be written.
        """
        if self.folder is None:
            return compute()
        self._asked += 1
        path = self._path(self._asked, name)
        kept = self._read(path) if path.exists() else None
        if kept is not None and kept.plain["dropped"] and (until is None or not self._is_whole(until)):
            kept = None
        if kept is not None:
            logger.info("%s is done: %s", name, path)
            self.spared += kept.plain["seconds"]
            for source, text in kept.plain["warnings"]:
                logging.getLogger(source).warning("%s", text)
        else:
            began = time.perf_counter()
            with warnings_logged() as warnings:
                found = compute()
            saved = form.save(found)
            if saved is None:
                self._before = None
                return found
            del found  # What is read back takes its room.
            said = [(one.name, one.getMessage()) for one in warnings]
            more = {"seconds": time.perf_counter() - began, "warnings": said, "dropped": False}
            self._write(path, saved, more)
            del saved
            kept = self._read(path)
            if kept is None:
                raise OutputError(f"{path} cannot be read back after it was written. Name a folder on another disk.")
            if self._before is not None and self._before[0] == name:
                self._write(self._before[1], Kept({}), self._before[2] | {"dropped": True})
        self._before = None if until is None else (until, path, {k: kept.plain[k] for k in ("seconds", "warnings")})
        return form.load(Kept(kept.tensors, kept.plain["plain"]))

    # ---------------------------------------------------------------------- files

    def _path(self, number: int, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:03}-{name}.safetensors"

    def _is_whole(self, name: str) -> bool:
        """Whether the result of the next stage is kept."""
        path = self._path(self._asked + 1, name)
        return path.exists() and self._read(path) is not None

    def _open(self, folder: Path, manifest: Mapping[str, str]) -> None:
        path, before = folder / MANIFEST, None
        with told(folder):
            there = folder.exists() and any(one.suffix != ".tmp" for one in folder.iterdir())
            if path.exists():
                before = _manifest_in(path)
            elif there or (folder.parent / MANIFEST).exists():
                raise OptionError(f"{folder} holds no stages of such a run. {ANEW}")
        if before is not None and before != manifest:
            raise OptionError(
                f"{folder} holds stages of a run that differs from this one in {differences(before, manifest)}. "
                f"Give what that run was given. {ANEW}"
            )
        if before is None:
            with told(folder):
                folder.mkdir(parents=True, exist_ok=True)
            with written(path) as place:
                place.write_text(self._manifest, encoding="utf-8")
            flush(folder)

    def _write(self, path: Path, saved: Kept, more: Mapping[str, Any]) -> None:
        """Writes the file of a stage; tensors under several names are written once."""
        numbers: dict[int, int] = {}
        of_names = {name: numbers.setdefault(id(tensor), len(numbers)) for name, tensor in saved.tensors.items()}
        own = dict(zip(of_names.values(), saved.tensors.values(), strict=True))
        text = {
            "manifest": hashlib.sha256(self._manifest.encode()).hexdigest(),
            "names": of_names,
            "devices": [str(tensor.device) for tensor in own.values()],
            "complex": [number for number, tensor in own.items() if tensor.is_complex()],
            "plain": saved.plain,
            **more,
        }
        tensors = {
            str(number): torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for number, t in own.items()
        }
        tensors[TEXT] = _bytes(json.dumps(text).encode())
        tensors[SUM] = _bytes(bytes.fromhex(digest(tensors)))
        io.save(tensors, path)
        flush(path.parent)

    def _read(self, path: Path) -> Kept | None:
        """What the file of a stage holds; None if it is damaged, which is logged."""
        try:
            tensors = {name: tensor.clone() for name, tensor in io.load(path).items()}
            wanted = bytes(tensors.pop(SUM).tolist()).hex()
            numbers = sorted((name for name in tensors if name != TEXT), key=int)
            ordered = {name: tensors[name] for name in (*numbers, TEXT)}
            text = json.loads(bytes(ordered[TEXT].numpy()))
            if digest(ordered) != wanted or text["manifest"] != hashlib.sha256(self._manifest.encode()).hexdigest():
                raise ValueError("its checksum is that of other values")
        except Exception as error:  # Whatever readers make of a damaged file.
            logger.warning("%s is damaged (%s). Its stage is computed again.", path, first_line(error))
            return None
        found = [ordered[number].to(where) for number, where in zip(numbers, text["devices"], strict=True)]
        for number in text["complex"]:
            found[number] = torch.view_as_complex(found[number])
        return Kept({name: found[number] for name, number in text["names"].items()}, text)


NO_STAGES = Stages()
"""Keeps nothing."""


def digest(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """The SHA-256 of tensors: of their names, dtypes, shapes and values, in their order.

    Example:
        >>> digest({"x": torch.zeros(2)}) == digest({"x": torch.zeros(2)})
        True
        >>> digest({"x": torch.zeros(2)}) == digest({"x": torch.zeros(1, 2)})
        False
    """
    found = hashlib.sha256()
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        plain = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
        found.update(plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _bytes(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())


def _manifest_in(path: Path) -> dict[str, str] | None:
    """What a manifest says; None if it is damaged. Files of stages tell themselves which manifest they are of."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        problem = "it is no mapping"
    except ValueError as error:
        problem = first_line(error)
    logger.warning("%s is damaged (%s), and is written again.", path, problem)
    return None


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Where two manifests differ."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    said = []
    for name in names[:SHOWN]:
        values = [own.get(name, "nothing") for own in (before, now)]
        plain = all(len(value) < DIGEST for value in values)
        said.append(f"{name} ({values[0]} there, {values[1]} here)" if plain else name)
    return ", ".join(said) + (f", and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
