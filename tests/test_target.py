"""Directories that are written whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fxmerge import OutputError
from fxmerge.output import target as module
from fxmerge.output.target import WRITTEN, target


def write(path: Path, text: str, force: bool = False) -> None:
    with target(path, force=force) as place:
        for name in WRITTEN:
            (place / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


WHOLE = {f"merged/{name}": "new" for name in WRITTEN}


def test_a_directory_takes_its_place(tmp_path: Path) -> None:
    write(tmp_path / "merged", "new")
    assert content(tmp_path) == WHOLE
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()
    for new, own in [("new", "merged"), ("new/file", "merged/report.json")]:
        assert (tmp_path / new).stat().st_mode == (tmp_path / own).stat().st_mode


def test_an_empty_directory_may_be_the_target(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    write(tmp_path / "merged", "new")
    assert content(tmp_path) == WHOLE


@pytest.mark.parametrize("exchange", [True, False])
def test_an_existing_one_is_replaced_only_by_force(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(module, "_exchanged", lambda one, other: False)
    write(tmp_path / "merged", "old")
    with pytest.raises(OutputError, match=r"exists. Pass --force to replace it"):
        write(tmp_path / "merged", "new")
    assert set(content(tmp_path).values()) == {"old"}
    write(tmp_path / "merged", "new", force=True)
    assert content(tmp_path) == WHOLE
    assert list(tmp_path.iterdir()) == [tmp_path / "merged"]


def test_what_is_not_of_fxmerge_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name, sentence in [
        ("home", "was not written by fxmerge"),
        ("file", "is no directory"),
        ("link", "is no directory"),
        ("none/merged", "is no directory. Make it"),
    ]:
        with pytest.raises(OutputError, match=sentence):
            write(tmp_path / name, "new", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "home", "link"}
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_a_target_that_holds_an_input(tmp_path: Path) -> None:
    write(tmp_path / "merged", "old")
    with (
        pytest.raises(OutputError, match=r"holds report.json, which is read"),
        target(tmp_path / "merged", force=True, inputs=[tmp_path / "merged" / "report.json"]),
    ):
        pass


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_after_an_error_all_is_as_before(error: BaseException, tmp_path: Path) -> None:
    write(tmp_path / "merged", "old")
    with pytest.raises(type(error)), target(tmp_path / "merged", force=True) as place:
        (place / "part").write_text("")
        raise error
    assert content(tmp_path) == dict.fromkeys(WHOLE, "old")


def test_after_a_full_disk_all_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write(tmp_path / "merged", "old")
    monkeypatch.setattr(module, "settle", full)
    with pytest.raises(OutputError, match=r"merged cannot be written: No space left on device"):
        write(tmp_path / "merged", "new", force=True)
    assert content(tmp_path) == dict.fromkeys(WHOLE, "old")


def test_two_runs_do_not_write_to_one_target(tmp_path: Path) -> None:
    with target(tmp_path / "merged"), pytest.raises(OutputError, match="is being written by another run"):
        write(tmp_path / "merged", "new")
    write(tmp_path / "merged", "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "merged"]


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = f"from fxmerge.output.target import target\nwith target({str(tmp_path / 'merged')!r}) as place:\n"
    code += " (place / 'part').write_text('')\n print('in', flush=True)\n import time\n time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "merged").exists() and list(tmp_path.iterdir())
    write(tmp_path / "merged", "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "merged"]


def test_targets_whose_names_begin_alike_are_apart(tmp_path: Path) -> None:
    with target(tmp_path / "model-1.5") as first, target(tmp_path / "model-1") as second:
        for place in (first, second):
            (place / "x").write_text("whole")
    assert all((tmp_path / name / "x").exists() for name in ("model-1", "model-1.5"))


def test_a_run_that_was_killed_between_two_moves_is_undone(tmp_path: Path) -> None:
    write(tmp_path / "merged", "old")
    (tmp_path / "merged").rename(tmp_path / f".merged.1{module.OLD}")
    with pytest.raises(OutputError, match="exists"):
        write(tmp_path / "merged", "new")
    assert set(content(tmp_path).values()) == {"old"}


def test_a_reader_never_misses_the_target_while_it_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "merged", "old")
    code = f"import os\nwhile True:\n os.stat({str(tmp_path / 'merged')!r})"
    reader = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 1
        while time.monotonic() < until:
            write(tmp_path / "merged", "new", force=True)
        assert reader.poll() is None
    finally:
        reader.kill()
        reader.wait()
