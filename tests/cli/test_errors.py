"""Whatever is wrong: a sentence, an exit code, and nothing written."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import save_file

import fxmerge
from fxmerge import cli, io
from fxmerge.cli.app import app
from fxmerge.cli.console import CODES
from fxmerge.output import writing
from fxmerge.output.target import target
from tests import files
from tests.cli.conftest import Call
from tests.slow import slow

ARCH = ("--arch", "tests.files:mlp")
DATA = ("--data", "tests.files:batches")


# -------------------------------------------------------------------------- help and startup


@pytest.mark.parametrize("name", app.commands)
def test_help_fits_a_screen_and_has_an_example(name: str, call: Call) -> None:
    code, out, _ = call(name, "--help")
    lines = out.splitlines()
    assert code == 0 and len(lines) <= 40 and max(map(len, lines)) <= 100
    assert re.search(rf"^  fxmerge {name} .*[-\w]", out, re.MULTILINE)


def test_the_help_tells_the_exit_codes(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0 and len(out.splitlines()) <= 40
    told = " ".join(out.split())
    assert all(f"{number} {meaning}" in told for number, meaning in CODES.items())
    assert call("--version")[1] == f"fxmerge {fxmerge.__version__}\n"


def seconds(*arguments: str) -> float:
    """The processor time of a Python process, the least of five."""
    spent = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(spent)


def test_help_starts_at_once_and_without_torch() -> None:
    code = "import sys; from fxmerge.cli import main; main(['merge', '--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert seconds("-m", "fxmerge.cli", "--help") < seconds("-c", "pass") + 0.3


def test_without_click_the_extra_is_named() -> None:
    code = "import sys; sys.modules['click'] = None; from fxmerge.cli import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "fxmerge: the command line needs click, rich and PyYAML: pip install 'fxmerge[cli]'\n"


def test_the_installed_command_is_this_one() -> None:
    text = (Path(fxmerge.__file__).parents[1] / "pyproject.toml").read_text()
    assert 'fxmerge = "fxmerge.cli:main"' in text


# -------------------------------------------------------------------------- errors


def written(call: Call, tmp_path: Path, *arguments: object) -> tuple[int, str, str]:
    """Runs a merge that fails; nothing may be written, and nothing left beside the target."""
    before = sorted(tmp_path.iterdir())
    code, out, err = call(*arguments, "--out", tmp_path / "merged")
    assert code and sorted(tmp_path.iterdir()) == before
    return code, out, err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("merge", "a", "--frce"), 2, "No such option"),
        (("merge", "a", "b", "--samples", "0"), 2, "0 is not in the range x>=1"),
        (("merge", "a", *ARCH), 1, "merge takes 2 or more models, and 1 is given."),
        (("merge", "a", "b"), 1, "a has no architecture: pass --arch, such as timm:resnet18 or hf."),
        (("merge", "Recipe.names", "b"), 1, "Recipe.names has no architecture: pass --arch"),
        (("align", "a", "b", "c", *ARCH), 1, "align takes 2 models, and 3 are given."),
        (("merge", "a", "b", *ARCH), 3, "There is no file or directory 'a'."),
        (("merge", "Output.pt", "b", *ARCH), 3, "There is no file or directory 'Output.pt'."),
        (("merge", "a.pt", "b.pt", "--arch", "mlp"), 1, "'mlp' is no architecture; write timm:NAME"),
        (("merge", "a.pt", "b.pt", "--arch", "hf"), 1, "config.json is not there"),
        (("merge", "a.pt", "b.pt", *ARCH, "--set", "hidden=6"), 3, "'0.weight' has shape (8, 4)"),
        (("merge", "a.pt", "b.pt", *ARCH, "--set", "x"), 1, "write key=value, not 'x'"),
        (("merge", "a.pt", "b.pt", *ARCH, "--data", "no"), 1, "There are no data 'no'"),
        (("merge", "a.pt", "b.pt", *ARCH, "--share", "nowhere", *DATA), 1, "'nowhere'"),
        (("merge", "a.pt", "b.pt", *ARCH, *DATA, *DATA, *DATA), 1, "data has 3 entries for 2 models"),
        (("merge", "a.pt", "b.pt", *ARCH, "--device", "gpu"), 1, "--device is 'gpu'; it must be"),
        (("merge", "a.pt", "b.pt", *ARCH, "--shard-size", "5X"), 1, "--shard-size is '5X'"),
        (("merge", "a.pt", "b.pt", *ARCH, "--share", "nothing", "--width", "2"), 1, "--share is 'nothing', so that"),
        (("merge", "a.pt", "b.pt", *ARCH, "--name", "x"), 1, "--name has 1 names for 2 models"),
        (("merge", "a.pt", "b.pt", *ARCH, "--name", "x", "--name", "y"), 1, "pass --share trunk to keep theirs apart."),
        (("merge", "a.pt", "b.pt", *ARCH, "--width", "-1", *DATA), 1, "--width is -1.0; it must be a positive number"),
        (("merge", "a.pt", "b.pt", *ARCH, "--recipe", "fit.yaml"), 1, "needs data: pass --data, or recipe.fit: null."),
        (("merge", "width.yaml"), 1, "line 3, column 36: recipe.match.width is -1; it must be a positive number"),
        (("merge", "a.pt", "nan.pt", *ARCH), 1, "of model B (shape (3,)) are NaN or infinite"),
        (("merge", "a.pt", "half.pt", *ARCH), 1, "bring all models to one dtype"),
        (("merge", "a.pt", "int.pt", *ARCH), 3, "holds int8, and the network's holds float32"),
        (("merge", "a.pt", "pickle.pt", *ARCH), 3, "--allow-pickle"),
        (("merge", "a.pt", "b.pt", *ARCH, "--recipe", "no.yaml"), 1, "cannot be read: No such file"),
        (("merge", "no.yaml"), 1, "cannot be read: No such file"),
        (("merge", "fold.yaml"), 2, "says fold: run fxmerge fold"),
        (("merge", "fold.yaml", "b.pt"), 2, "another model does not go with it"),
        (
            ("merge", "wrong.yaml"),
            1,
            "wrong.yaml, line 2, column 1: the file has no field 'arhc'; did you mean 'arch'?",
        ),
        (("fold", "a.pt", *ARCH, "--width", "1.5"), 1, "fold makes a network smaller"),
        (("fold", "a.pt", *ARCH, "--width", "up=half"), 2, "--width is a number, or CLASS=NUMBER for each class"),
        (("fold", "a.pt", *ARCH, "--width", "0.5", "--width", "up=0.5"), 2, "--width is a number, or CLASS=NUMBER"),
    ],
)
def test_errors(
    arguments: tuple[str, ...],
    code: int,
    sentence: str,
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    files.weights(tmp_path / "a.pt", 0)
    state = dict(io.load(files.weights(tmp_path / "b.pt", 1)).items())
    torch.save(state | {"2.bias": torch.full((3,), torch.nan)}, "nan.pt")
    torch.save({name: tensor.half() for name, tensor in state.items()}, "half.pt")
    torch.save({name: tensor.char() for name, tensor in state.items()}, "int.pt")
    torch.save(files.mlp()[0], "pickle.pt")
    Path("fold.yaml").write_text("verb: fold\nmodels: [{path: a.pt}]\narch: tests.files:mlp\n")
    Path("fit.yaml").write_text("fit: {kind: Readout}\n")
    both = "models: [{path: a.pt}, {path: b.pt}]\narch: tests.files:mlp\n"
    Path("width.yaml").write_text(both + "recipe: {match: {kind: Zip, width: -1}}\n")
    Path("wrong.yaml").write_text("models: [{path: a.pt}, {path: b.pt}]\narhc: hf\n")
    found, out, err = written(call, tmp_path, *arguments)
    assert (found, out) == (code, "")
    assert sentence in " ".join(err.split()) and err.startswith("fxmerge: ") and err.count("fxmerge: ") == 1


def test_a_pickle_is_read_if_it_is_trusted(call: Call, tmp_path: Path) -> None:
    torch.save(files.mlp()[0], tmp_path / "a.pt")
    code, _, err = call("fold", tmp_path / "a.pt", *ARCH, *DATA, "--allow-pickle", "--out", tmp_path / "small")
    assert code == 0 and "warning:" in err and "runs any code that is in the file" in err


def test_out_is_needed(call: Call, pair: tuple[Path, Path]) -> None:
    code, _, err = call("merge", *pair, *ARCH)
    assert code == 2 and "--out is missing" in err


def test_errors_for_machines(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, out, err = call("merge", pair[0], tmp_path / "no.pt", *ARCH, "--out", tmp_path / "merged", "--json")
    assert (json.loads(out), err) == (
        {"error": f"There is no file or directory '{tmp_path / 'no.pt'}'.", "code": 3},
        "",
    )
    code, out, _ = call("merge", "--json")
    assert code == 2 and json.loads(out)["code"] == 2


def test_batches_that_do_not_fit(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, _, err = written(call, tmp_path, "merge", *pair, *ARCH, "--data", "tests.files:strange")
    assert code == 1 and "A batch is a object; expected a tensor" in err


@pytest.mark.parametrize("error", [RuntimeError("first line\nsecond"), KeyboardInterrupt(), click.exceptions.Abort()])
def test_what_no_one_expects(
    error: BaseException, call: Call, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr("fxmerge.cli.doing.execute", fails)
    code, _, err = written(call, tmp_path, "merge", *pair, *ARCH)
    if type(error) is RuntimeError:
        assert code == 70
        assert "an error that fxmerge does not know, RuntimeError: first line. -v shows where." in err
    else:
        assert code == 130 and "interrupted" in err


@pytest.mark.parametrize("typed", [["recipe", "--schema"], ["merge", "--help"], ["--version"]])
def test_a_reader_that_goes_away(typed: list[str]) -> None:
    """The command ends as others do that the system stops with SIGPIPE, and says nothing."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fxmerge.cli", *typed]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_names_are_printed_as_they_are(call: Call, tmp_path: Path) -> None:
    code, _, err = call("check", tmp_path / "[red]a:smile:b.pt")
    assert code == 3 and "[red]a:smile:b.pt" in err


# -------------------------------------------------------------------------- targets


def test_an_existing_target(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    typed = ("merge", *pair, *ARCH, *DATA, "--out", tmp_path / "merged")
    assert call(*typed)[0] == 0
    before = (tmp_path / "merged" / "SHA256SUMS").read_bytes()
    code, _, err = call(*typed)
    assert code == 4 and "exists. Pass --force to replace it" in err
    assert (tmp_path / "merged" / "SHA256SUMS").read_bytes() == before
    assert call(*typed, "--force", "--width", "1.5")[0] == 0
    assert (tmp_path / "merged" / "SHA256SUMS").read_bytes() != before


def test_a_result_is_not_written_over_its_own_input(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    call("align", *pair, *ARCH, *DATA, "--out", tmp_path / "aligned")
    code, _, err = call("merge", tmp_path / "aligned", pair[1], *ARCH, *DATA, "--out", tmp_path / "aligned", "--force")
    assert code == 4 and "holds model.safetensors, which is read" in err


def test_a_target_that_another_run_writes(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    with target(tmp_path / "merged"):
        code, _, err = call("merge", *pair, *ARCH, *DATA, "--out", tmp_path / "merged")
        assert code == 4 and "is being written by another run" in err
        assert not (tmp_path / "merged").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="the system has no limit of the size of files")
@pytest.mark.parametrize("most", [0, 100, 600, 2000, 5000])
def test_a_disk_that_takes_no_more(
    most: int, call: Call, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses to write more than so many bytes to a file: a stage; and if all of these are there, the
    weights or the archive."""
    import resource

    stages, limits = tmp_path / ".merged.fxmerge-stages", resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*more: str) -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            code, out, err = call("merge", *pair, *ARCH, *DATA, "--out", tmp_path / "merged", *more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (code, out) == (4, "") and "cannot be written" in err
        assert {path.name for path in tmp_path.iterdir()} <= {*(path.name for path in pair), stages.name}
        return err

    assert ("Finished stages are kept" in limited()) == stages.exists() == (most >= 2000)
    with monkeypatch.context() as patch:
        patch.setattr(writing, "to_yaml", lambda plan: 1 / 0)
        code, _, _ = call("merge", *pair, *ARCH, *DATA, "--out", tmp_path / "merged", "--resume")
    assert code == 70
    before = sorted(stages.iterdir())
    name = "model.safetensors" if most < 600 else "model.pt2"
    assert f".fxmerge-tmp/{name} cannot be written" in limited("--resume")
    assert sorted(stages.iterdir()) == before


# -------------------------------------------------------------------------- damage


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut short, or with a flipped bit within the first part."""
    if rng.random() < 0.5:
        return content[: rng.randrange(len(content))]
    at = rng.randrange(min(len(content), 8 + int.from_bytes(content[:8], "little")))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


@pytest.mark.parametrize("seed", [0, *map(slow, range(1, 4))])
def test_damaged_weights_never_give_an_output(seed: int, call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    rng = random.Random(seed)
    save_file(dict(io.load(pair[1]).items()), pair[1])  # Without metadata, of which a flipped bit does no harm.
    content = pair[1].read_bytes()
    for _ in range(25):
        pair[1].write_bytes(damaged(content, rng))
        code, out, err = written(call, tmp_path, "merge", *pair, *ARCH, *DATA)
        assert (code, out) == (3, "") and err.startswith("fxmerge: ") and str(pair[1]) in err


@pytest.mark.parametrize("seed", [0, *map(slow, range(1, 4))])
def test_damaged_files_of_torch_never_give_another_result(
    seed: int, call: Call, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """A flipped bit in the padding of a file does no harm; any other is told of."""
    rng, own, state = random.Random(seed), tmp_path / "b.pt", dict(io.load(pair[1]).items())
    io.save(state, own)
    content, refused = own.read_bytes(), 0
    for _ in range(40):
        at = rng.randrange(len(content))
        own.write_bytes(content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :])
        code, _, err = call("merge", pair[0], own, *ARCH, "--out", tmp_path / "merged", "--force")
        refused += code
        assert code in (0, 3), err
        if not code:
            found = io.load(own)
            assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert refused


@pytest.mark.parametrize("seed", [0, *map(slow, range(1, 4))])
def test_damaged_shards_never_give_an_output(seed: int, call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    rng, state = random.Random(seed), dict(io.load(pair[1]).items())
    for _ in range(15):
        own = io.save(state, tmp_path / "shards", shard_size=100)
        for path in own[:-1]:
            save_file(dict(io.load(path).items()), path)
        path = rng.choice(own)
        content = path.read_bytes()
        if path.suffix == ".json":
            path.write_bytes(content[: rng.randrange(len(content) - 2)])
        else:
            path.write_bytes(damaged(content, rng))
        code, out, err = written(call, tmp_path, "merge", pair[0], tmp_path / "shards", *ARCH, *DATA)
        assert (code, out) == (3, "") and err.startswith("fxmerge: ")


@pytest.mark.parametrize("seed", [0, *map(slow, range(1, 4))])
def test_damaged_recipes_never_give_a_traceback(
    seed: int, call: Call, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(seed)
    _, text, _ = call("recipe", "--from", "merge", "a.safetensors", "b.safetensors", *ARCH, *DATA)
    for _ in range(20):
        content = text.encode()
        at = rng.randrange(len(content))
        changed = content[:at] if rng.random() < 0.3 else content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        (tmp_path / "recipe.yaml").write_bytes(changed)
        code, _, err = call("merge", tmp_path / "recipe.yaml", "--dry-run")
        assert code in (0, 1, 2, 3, 5), err


# -------------------------------------------------------------------------- runs that are stopped


def process(pair: tuple[Path, Path], out: Path, *more: str) -> "subprocess.Popen[bytes]":
    typed = ["merge", *map(str, pair), *ARCH, *DATA, "--out", str(out), *more]
    own = [sys.executable, "-m", "fxmerge.cli", *typed]
    return subprocess.Popen(own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def waited_for(out: Path) -> None:
    """Until the temporary directory of a run is there."""
    until = time.monotonic() + 60
    while not list(out.parent.glob(f".{out.name}.*-tmp")) and time.monotonic() < until:
        time.sleep(0.01)


def test_a_run_that_is_asked_to_end_cleans_up(pair: tuple[Path, Path], tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with process(pair, tmp_path / "merged") as run:
        waited_for(tmp_path / "merged")
        run.terminate()
        _, err = run.communicate(timeout=60)
    assert (run.returncode, err.decode()) == (130, "fxmerge: interrupted; nothing was written.\n")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_that_is_killed_at_any_moment_leaves_no_part(
    replaced: bool, call: Call, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """After every kill the target is not there, or as it was, or whole."""
    out, rng = tmp_path / "merged", random.Random(0)
    more = ["--force"] if replaced else []
    if replaced:
        assert call("merge", *pair, *ARCH, *DATA, "--out", out, "--seed", "1")[0] == 0
    with process(pair, tmp_path / "timed") as run:
        waited_for(tmp_path / "timed")
        began = time.perf_counter()
        run.communicate(timeout=60)
        whole = time.perf_counter() - began
    shutil.rmtree(tmp_path / "timed")
    moments = 0
    for _ in range(10):
        with process(pair, out, *more) as run:
            waited_for(out)
            time.sleep(rng.uniform(0, whole))
            run.send_signal(signal.SIGKILL)
            run.communicate(timeout=60)
        moments += run.returncode == -signal.SIGKILL
        if replaced or out.exists():
            assert call("verify", out)[0] == 0
        if out.exists() and not replaced:
            shutil.rmtree(out)
    assert moments >= 3
    assert call("merge", *pair, *ARCH, *DATA, "--out", out, *more)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "merged"]
    assert cli.main(["verify", str(out)]) == 0
