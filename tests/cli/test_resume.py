"""Runs that are killed, or that find the disk full, and go on with --resume to the same bytes."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from fxmerge import NonFiniteError, Recipe, Zip, cli, io
from fxmerge.output.target import stages_of
from fxmerge.refitting import gather
from fxmerge.stages import Stages
from tests import files
from tests.cli.conftest import Call

DATA = ("--data", "tests.files:batches")
DEEP = ("--arch", "tests.files:deep", *DATA)
MOMENTS = 20

NOT_COMPARED = ("report.json", "report.html", "SHA256SUMS")
"""The report and its page have times, and the checksums are of them too."""

Start = Callable[..., BaseProcess]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The weights of two networks in which fitting takes most of the time."""
    folder = tmp_path_factory.mktemp("inputs")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        io.save(files.deep()[0].state_dict(), folder / f"{name}.safetensors")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def merges(inputs: list[Path]) -> Iterator[Start]:
    """Starts the command line in a process of its own, in which all is imported."""
    context = multiprocessing.get_context("forkserver")
    assert isinstance(context, ForkServerContext)
    context.set_forkserver_preload(["tests.cli.test_resume", "fxmerge.cli.doing", "torch.export", "torch._dynamo"])
    runs: list[BaseProcess] = []

    def start(out: Path, *more: str) -> BaseProcess:
        argv = ["merge", *map(str, inputs), *DEEP, "--out", str(out), *more]
        run = context.Process(target=main, args=(argv, str(out.parent / f"{out.name}.log")))
        run.start()
        runs.append(run)
        return run

    yield start
    for run in runs:
        run.kill()
        run.join()


def main(argv: list[str], log: str) -> None:
    """The command line, with all that it prints in a file."""
    torch.set_num_threads(1)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.exit(cli.main(argv))


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of all files but those with times."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_COMPARED)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def without_times(value: Any) -> Any:
    """The report without its times."""
    if isinstance(value, dict):
        return {key: without_times(own) for key, own in value.items() if key not in ("seconds", "memory")}
    return [without_times(own) for own in value] if isinstance(value, list) else value


def same(out: Path, expected: Path) -> None:
    """A directory is whole, and the same as another one that was written in the same place."""
    found, wanted = content(out), content(expected)
    assert set(found) == set(wanted) and {"recipe.yaml", "README.md", "symmetry.json"} <= set(found)
    assert [name for name in found if found[name] != wanted[name]] == []
    reports = [json.loads((folder / "report.json").read_text()) for folder in (out, expected)]
    pages = [(folder / "report.html").read_text().partition('id="data">')[2] for folder in (out, expected)]
    shown = [without_times(json.loads(page.partition("</script>")[0])) for page in pages]
    assert shown[0] == shown[1]
    assert without_times(reports[0]) == without_times(reports[1])
    assert (
        reports[0].keys() == reports[1].keys()
        and reports[0]["report"]["seconds"].keys() == reports[1]["report"]["seconds"].keys()
    )


def left(out: Path) -> list[str]:
    """What lies beside a target and is hidden."""
    return [path.name for path in out.parent.glob(".*")]


@pytest.fixture(scope="module")
def undisturbed(merges: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The result of a run that nothing stopped, as it was written to `merged`; and how long it took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name in ("first", "merged"):  # The server imports all before the first run.
        began = time.monotonic()
        run = merges(folder / name)
        run.join()
        spent = time.monotonic() - began
        assert run.exitcode == 0, (folder / f"{name}.log").read_text()
    return folder / "merged", spent


def moved(expected: Path, out: Path, scratch: Path) -> Path:
    """A copy of a result in which its own path is that of another one."""
    scratch.mkdir()
    for name, own in content(expected).items():
        (scratch / name).write_bytes(own.replace(str(expected).encode(), str(out).encode()))
    for name in NOT_COMPARED:
        (scratch / name).write_bytes((expected / name).read_bytes())
    return scratch


@pytest.mark.slow
def test_runs_that_are_killed_at_random_moments_go_on_to_the_same_bytes(
    merges: Start, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    """Each run is killed and goes on, and every other one is killed again before it goes on to the end. The moments are
    spread over the time that an undisturbed run takes."""
    expected, spent = undisturbed
    rng, killed, gone_on = random.Random(0), 0, 0
    for moment in range(MOMENTS):
        folder = tmp_path / str(moment)
        folder.mkdir()
        out = folder / "merged"
        kills = [(moment + rng.random()) / MOMENTS, *([rng.random()] if moment % 2 else [])]
        for number, share in enumerate(kills):
            run = merges(out, *(["--resume"] if number else []))
            run.join(share * spent)
            run.kill()
            run.join()
            if run.exitcode == -signal.SIGKILL:
                killed += 1
                gone_on += stages_of(out).exists()
                assert not out.exists() or cli.main(["verify", str(out)]) == 0
            if out.exists():
                break
        if not out.exists():
            run = merges(out, "--resume")
            run.join()
            assert run.exitcode == 0, (folder / "merged.log").read_text()
            assert left(out) == []
        assert "Traceback" not in (folder / "merged.log").read_text()
        same(out, moved(expected, out, folder / "expected"))
    assert killed >= MOMENTS and gone_on >= MOMENTS // 5, (spent, killed, gone_on)


def finished(out: Path) -> list[str]:
    return sorted(path.stem for path in stages_of(out).glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 3, 6, 10])
def test_a_run_that_is_killed_as_a_stage_ends_goes_on_with_the_next(
    stages: int, merges: Start, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    run = merges(out)
    while run.is_alive() and len(finished(out)) < stages:
        time.sleep(0.001)
    run.kill()
    run.join()
    done = {name: (stages_of(out) / f"{name}.safetensors").stat().st_mtime_ns for name in finished(out)}
    assert len(done) >= stages
    run = merges(out, "--resume", "-v")
    run.join()
    log = (tmp_path / "merged.log").read_text()
    assert run.exitcode == 0, log
    assert log.count(" is done: ") == len(done)
    assert left(out) == []
    same(out, moved(undisturbed[0], out, tmp_path / "expected"))


# -------------------------------------------------------------------------- what is said and left


def interrupted(after: int, monkeypatch: pytest.MonkeyPatch, call: Call, *argv: object) -> tuple[int, str, str]:
    """A run that the user stops after some stages."""
    write, left = Stages._write, after

    def stop(self: Stages, path: Path, *args: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        write(self, path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Stages, "_write", stop)
        return call(*argv)


@pytest.fixture
def typed(pair: tuple[Path, Path], tmp_path: Path) -> list[object]:
    return ["merge", *pair, "--arch", "tests.files:mlp", *DATA, "--out", tmp_path / "merged"]


def test_an_interrupted_run_tells_how_to_go_on(
    typed: list[object], call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = tmp_path / ".merged.fxmerge-stages"
    code, _, err = interrupted(3, monkeypatch, call, *typed)
    assert (code, err.splitlines()) == (
        130,
        [
            f"warning: Finished stages are kept in {stages}. The same command with --resume goes on after them.",
            "",
            "fxmerge: interrupted.",
        ],
    )
    assert len(list(stages.glob("*.safetensors"))) == 3
    code, _, err = call(*typed, "--resume", "-v")
    assert code == 0 and err.count(" is done: ") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "merged"]
    assert "resume" not in (tmp_path / "merged" / "recipe.yaml").read_text()


def test_nothing_to_go_on_from(typed: list[object], call: Call, tmp_path: Path) -> None:
    code, _, err = call(*typed, "--resume")
    assert (code, err) == (0, "")
    code, _, err = call(*typed, "--resume")
    assert code == 4 and "merged exists. Pass --force" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "merged"]


def test_without_resume_a_run_begins_anew(
    typed: list[object], call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(3, monkeypatch, call, *typed)
    code, _, err = call(*typed)
    assert code == 0
    assert err == "warning: The stages of an interrupted run are removed. --resume would have gone on after them.\n"
    assert json.loads((tmp_path / "merged" / "report.json").read_text())["warnings"] == []
    assert left(tmp_path / "merged") == []


def test_stages_of_other_inputs_are_refused_and_kept(
    typed: list[object], call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = tmp_path / ".merged.fxmerge-stages"
    interrupted(3, monkeypatch, call, *typed)
    before = sorted(stages.iterdir())
    code, _, err = call(*typed, "--resume", "--width", "1.5")
    assert code == 1 and "differs from this one in recipe.match.width (1.0 there, 1.5 here). Give what that" in err
    files.weights(tmp_path / "b.safetensors", 7)
    code, _, err = call(*typed, "--resume")
    assert code == 1 and "in the weights of model B. " in err and "leave out --resume" in err
    assert sorted(stages.iterdir()) == before and not (tmp_path / "merged").exists()


def test_a_damaged_stage_is_told_and_changes_nothing(
    typed: list[object], call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(*typed)[0] == 0
    expected = (tmp_path / "merged").rename(tmp_path / "expected")
    interrupted(5, monkeypatch, call, *typed)
    *_, path = sorted((tmp_path / ".merged.fxmerge-stages").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-20])
    code, _, err = call(*typed, "--resume")
    assert code == 0 and f"warning: {path} is damaged (" in err and "Its stage is computed again.\n" in err
    same(tmp_path / "merged", expected)


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--share", "trunk"], ["--recipe", "bases.yaml"], []])
def test_directories_of_libraries_are_the_same_too(
    more: list[str], gpts: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With heads apart, matched by changes of basis, and as they are."""
    monkeypatch.chdir(tmp_path)
    Recipe(match=Zip(continuous=True)).to_yaml("bases.yaml")
    argv = ["merge", gpts / "a", gpts / "b", "--arch", "hf", "--data", gpts / "corpus.txt", "--samples", "20"]
    argv += [*more, "--out", tmp_path / "merged"]
    assert call(*argv)[0] == 0
    expected = (tmp_path / "merged").rename(tmp_path / "expected")
    for stages in (2, 5):
        assert interrupted(stages, monkeypatch, call, *argv, "--resume")[0] == 130
    code, _, err = call(*argv, "--resume", "-v")
    assert code == 0 and err.count(" is done: ") >= 5
    assert left(tmp_path / "merged") == []
    same(tmp_path / "merged", expected)


def test_a_wrong_input_leaves_no_stages(
    typed: list[object], call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any) -> None:
        raise NonFiniteError("An activation is NaN.")

    monkeypatch.setattr(gather.LayerFit, "settle", wrong)
    code, _, err = call(*typed)
    assert (code, err) == (1, "fxmerge: An activation is NaN.\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_recipe_names_no_folder_of_stages(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("models: [{path: a}, {path: b}]\narch: x:y\nrun: {resume: here}\n")
    code, _, err = call("merge", tmp_path / "r.yaml")
    assert code == 1 and "line 3" in err and "leave it out, and pass --resume" in err


# -------------------------------------------------------------------------- a full disk

FULL = """
import subprocess, sys
from pathlib import Path
from fxmerge import cli

disk, argv = Path(sys.argv[1]), [*sys.argv[2:], "--out", sys.argv[1] + "/merged"]

def room(how):
    subprocess.run(["mount", "-t", "tmpfs", "-o", how, "none", disk], check=True)

room("size=4m")
assert cli.main(argv) == 0
subprocess.run(["cp", "-r", disk / "merged", disk.parent / "expected"], check=True)
subprocess.run(["umount", disk], check=True)
for size in range(60, 4000, 60):
    room(f"remount,size={size}k" if disk.is_mount() else f"size={size}k")
    code = cli.main([*argv, "--resume"])
    stages = len(list(disk.glob(".merged.fxmerge-stages/*.safetensors")))
    parts = [path for path in disk.rglob("*") if "tmp" in path.name]
    print("RUN", code, stages, (disk / "merged").exists(), len(parts), flush=True)
    if code == 0:
        break
subprocess.run(["cp", "-r", disk / "merged", disk.parent / "found"], check=True)
print("LEFT", sorted(path.name for path in disk.iterdir()))
"""


@pytest.mark.slow
def test_after_a_full_disk_a_run_goes_on_to_the_same_bytes(inputs: list[Path], tmp_path: Path) -> None:
    """A disk that is full again and again, and is given more room each time."""
    disk = tmp_path / "disk"
    disk.mkdir()
    own = ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*own, "mount", "-t", "tmpfs", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a disk of its own")
    Recipe(match=Zip(alpha=1)).to_yaml(tmp_path / "how.yaml")  # Without matrices that are larger than all else.
    argv = ["merge", *map(str, inputs), *DEEP, "--recipe", str(tmp_path / "how.yaml")]
    call = [*own, sys.executable, "-c", FULL, str(disk), *argv]
    done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    runs = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RUN")]
    assert len(runs) >= 3 and "Traceback" not in done.stderr, done.stderr
    assert all(run[0] == "4" and run[2:] == ["False", "0"] for run in runs[:-1]), runs
    assert runs[-1] == ["0", "0", "True", "0"], done.stderr
    stages = [int(run[1]) for run in runs[:-1]]
    assert stages == sorted(stages) and len(set(stages)) >= 3, stages
    assert done.stderr.count("cannot be written: No space left on device. Make room") == len(runs) - 1
    assert "LEFT ['merged']" in done.stdout
    same(tmp_path / "found", tmp_path / "expected")
