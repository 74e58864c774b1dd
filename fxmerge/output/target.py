"""A directory that is written whole or not at all, by one run at a time."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fxmerge.errors import FxmergeError, OutputError
from fxmerge.io.writing import flush, settle, told

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

logger = logging.getLogger(__name__)

WRITTEN = ("recipe.yaml", "report.json")
"""The files by which a directory is known as one that fxmerge wrote."""

TEMPORARY, OLD, LOCK, STAGES = ".fxmerge-tmp", ".fxmerge-old", ".fxmerge-lock", ".fxmerge-stages"

EXCHANGE, HERE = 2, -100
"""RENAME_EXCHANGE and AT_FDCWD of Linux."""


@contextmanager
def target(
    path: str | Path, *, force: bool = False, inputs: Iterable[Path] = (), resume: bool = False
) -> Iterator[Path]:
    """A temporary directory beside the target, which takes its place once all is written and on the disk.

    After an error nothing is left of it. What a killed run left is removed by the next run with the same target.
    While a run works on a target, another one is refused.

    Arguments:
        path: the directory to write.
        force: whether it may replace a directory that fxmerge wrote before. That one stays until the new one is whole.
        inputs: files that are read meanwhile, none of which may lie in the target.
        resume: whether the stages that an interrupted run has finished are kept for this one, in `stages_of`. In any
            case they are removed once the target is in its place.

    Raises:
        OutputError: if the target exists, is used by another run, or cannot be written.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with target(folder / "merged") as place:
        ...     _ = (place / "recipe.yaml").write_text("")
        >>> sorted(found.name for found in folder.rglob("*"))
        ['merged', 'recipe.yaml']
    """
    path = Path(path).absolute()
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: {path.parent} is no directory. Make it, or name another place.")
    with _locked(path):
        with told(path):
            _clean(path, resume)
            _check_free(path, force, [Path(one).resolve() for one in inputs])
            place = Path(tempfile.mkdtemp(TEMPORARY, f".{path.name}.", path.parent))
        try:
            yield place
            with told(path):
                for found in [*place.rglob("*"), place]:
                    settle(found)
                _check_free(path, force, ())
                _move(place, path)
                flush(path.parent)
            shutil.rmtree(stages_of(path), ignore_errors=True)
        except BaseException as error:
            _settle_stages(stages_of(path), error, resume)
            raise
        finally:
            shutil.rmtree(place, ignore_errors=True)


def stages_of(path: str | Path) -> Path:
    """The folder beside a target in which a run leaves the stages that it has finished."""
    path = Path(path).absolute()
    return path.with_name(f".{path.name}{STAGES}")


def _settle_stages(stages: Path, error: BaseException, resume: bool) -> None:
    """After an error, keeps finished stages if the same inputs may go on from there, and tells so."""
    of_inputs = isinstance(error, FxmergeError) and not isinstance(error, OutputError)
    if (of_inputs and not resume) or not any(stages.rglob("*.safetensors")):
        shutil.rmtree(stages, ignore_errors=True)
    elif not of_inputs:
        logger.warning("Finished stages are kept in %s. The same command with --resume goes on after them.", stages)


def _check_free(path: Path, force: bool, inputs: Iterable[Path]) -> None:
    """The target must not exist, or may be replaced."""
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir() or path.is_symlink():
        raise OutputError(f"{path} exists and is no directory; name another place.")
    inside = next((one for one in inputs if path.resolve() in one.parents), None)
    if inside is not None:
        raise OutputError(f"{path} holds {inside.name}, which is read; name another place.")
    if not any(path.iterdir()):
        return
    if not all((path / name).is_file() for name in WRITTEN):
        raise OutputError(f"{path} exists and was not written by fxmerge; name another place.")
    if not force:
        raise OutputError(f"{path} exists. Pass --force to replace it, or name another place.")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock of a target, which the system gives up if the process dies."""
    file = path.with_name(f".{path.name}{LOCK}")
    with told(path):
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            if sys.platform == "win32":
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = file.exists() and os.path.samestat(os.fstat(handle), file.stat())
        except OSError:
            ours = False
        if not ours:  # Another run holds it, or has just removed the file that was locked.
            raise OutputError(f"{path} is being written by another run. Wait for it, or name another place.")
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _clean(path: Path, resume: bool) -> None:
    """Removes what killed runs left, but for finished stages if they are to be kept; a target that was moved away, and
    not yet replaced, is moved back."""
    stages = stages_of(path)
    if stages.exists() and not resume:
        logger.warning("The stages of an interrupted run are removed. --resume would have gone on after them.")
        shutil.rmtree(stages)
    for part in stages.rglob(".*.tmp"):
        part.unlink()
    for found in path.parent.iterdir():
        # Targets whose names begin alike, such as v1 and v1.5, have nothing to do with each other.
        if re.fullmatch(rf"\.{re.escape(path.name)}\.[^.]+({re.escape(TEMPORARY)}|{re.escape(OLD)})", found.name):
            if found.name.endswith(OLD) and not path.exists():
                found.rename(path)
            else:
                shutil.rmtree(found)


def _move(place: Path, path: Path) -> None:
    """Puts a directory into the place of the target, at once where the system can."""
    if not path.exists():
        place.rename(path)
    elif not _exchanged(place, path):
        old = place.with_suffix(OLD)
        path.rename(old)
        place.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges two directories in one step; tells whether the system could."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0
