"""Writing weights: whole or not at all."""

import errno
import os
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


@pytest.mark.parametrize("given", [{"path": "w.npz"}, {"path": "w.pt", "shard_size": 10}])
def test_what_no_weights_can_be_written_to(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError):
        save({"a": torch.zeros(2)}, **(given | {"path": tmp_path / given["path"]}))


def test_a_file_where_a_directory_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save({"a": torch.zeros(2)}, tmp_path / "file" / "w.pt")
