"""Writing weights: whole or not at all."""

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxmerge.errors import OptionError, OutputError
from fxmerge.io import save


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "folder"])
def test_a_full_disk_leaves_what_was_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save({"a": torch.zeros(2)}, tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        save({"a": torch.ones(2)}, tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_who_may_read_new_files_may_read_these(name: str, tmp_path: Path) -> None:
    save({"a": torch.zeros(2)}, tmp_path / name)
    (tmp_path / "new").touch()
    assert (tmp_path / name).stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.skipif(sys.platform == "win32", reason="the system has no limit of the size of files")
@pytest.mark.parametrize("most", [0, 100, 3000])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "folder"])
def test_a_disk_that_takes_no_more(name: str, most: int, tmp_path: Path) -> None:
    """The system refuses to write more than so many bytes to a file. The writer of torch would end the process."""
    import resource

    before = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot be written: File too large"):
            save({"a": torch.zeros(1000)}, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


@pytest.mark.parametrize("given", [{"path": "w.npz"}, {"path": "w.pt", "shard_size": 10}])
def test_what_no_weights_can_be_written_to(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError):
        save({"a": torch.zeros(2)}, **(given | {"path": tmp_path / given["path"]}))


def test_a_file_where_a_directory_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save({"a": torch.zeros(2)}, tmp_path / "file" / "w.pt")
