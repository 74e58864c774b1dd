"""A merge that was interrupted goes on after its last finished stage, to the same result to the last bit."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxmerge
from fxmerge import Align, Average, Budget, LeastSquares, OptionError, OutputError, Recipe, Repair, Run, Zip, manifest
from fxmerge.io import writing
from fxmerge.refitting import course, gather
from fxmerge.stages import MANIFEST, Form, Kept, Stages, digest
from tests.networks import Attentive, mlp, pictures, vectors
from tests.slow import but_slow

PLAIN = Form[dict[str, Tensor]](Kept, lambda kept: dict(kept.tensors))


class Interrupted(BaseException):
    """Stands for the end of the process."""


@dataclass
class Watch:
    """The stages that are computed, and those that are dropped; a run ends before it writes more than `left` files."""

    done: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    left: int | None = None


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    found, write = Watch(), Stages._write

    def watched(self: Stages, path: Path, saved: Kept, more: dict[str, Any]) -> None:
        if found.left is not None:
            if not found.left:
                raise Interrupted
            found.left -= 1
        (found.dropped if more["dropped"] else found.done).append(path.stem)
        write(self, path, saved, more)

    monkeypatch.setattr(Stages, "_write", watched)
    return found


# -------------------------------------------------------------------------- whole merges


class Normalized(nn.Module):
    """Convolutions with BatchNorm and a residual connection."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.norm = nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.inner, self.again = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.again(self.inner(x)))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Repeating(nn.Module):
    """A layer that reads what it gave before, and an output layer that is tied to the first one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.cell, self.gain = nn.Linear(64, 12), nn.Linear(12, 12), nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.stem(x.flatten(1)))
        for _ in range(3):
            hidden = torch.tanh(self.cell(hidden)) * self.gain
        return hidden @ self.stem.weight


class Turning(nn.Module):
    """A layer of complex numbers between real ones."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.head = nn.Linear(64, 8), nn.Linear(8, 3)
        self.turn = nn.Parameter(torch.randn(8, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.stem(x.flatten(1))) * self.turn
        out: Tensor = self.head(hidden.abs())
        return out


def normalized(seed: int) -> nn.Module:
    net = Normalized(seed)
    for batch in pictures():
        net(batch)
    return net.eval()


def classes(seed: int, count: int) -> nn.Module:
    net = mlp(seed)
    net[-1] = nn.Linear(20, count)  # type: ignore[operator]
    return net


def merged(make: Callable[[int], nn.Module], data: list[Tensor], recipe: Recipe | None = None) -> Any:
    return lambda run: fxmerge.merge(make(0), make(1), data, recipe, run=run)


def batches() -> list[Tensor]:
    return [batch for one in vectors() for batch in one.chunk(2)]


BY_BASES = Zip(continuous=True)

MERGES: dict[str, Callable[[Run], fx.GraphModule]] = {
    "layers": merged(mlp, batches()),
    "several models": lambda run: fxmerge.merge_many([mlp(0), mlp(1), mlp(2)], batches(), run=run),
    "without data": lambda run: fxmerge.merge(mlp(0), mlp(1), example=batches()[0], run=run),
    "statistics": merged(normalized, pictures()),
    "statistics alone": merged(normalized, pictures(), Recipe(fit=None)),
    "repair": merged(normalized, pictures(), Recipe(fit=Repair())),
    "scores": merged(mlp, batches(), Recipe(fit=LeastSquares(outputs="logits"))),
    "a circle, and an output that is tied": merged(lambda seed: Repeating(seed).eval(), batches()),
    "complex numbers": merged(lambda seed: Turning(seed).eval(), batches()),
    "bases": merged(lambda seed: Attentive(seed).eval(), pictures(), Recipe(match=BY_BASES)),
    "the better one": merged(lambda seed: Attentive(seed).eval(), pictures(), Recipe(match=Zip(continuous="auto"))),
    "heads": lambda run: fxmerge.merge(classes(0, 10), classes(1, 5), loaders=[batches(), batches()], run=run),
    "a trunk within a distance": merged(mlp, batches(), Recipe(share=Budget(distance=0.5))),
    "a wider one": merged(mlp, batches(), Recipe(match=Zip(width=1.5))),
    "folded": lambda run: fxmerge.fold(Attentive(0).eval(), pictures(), 0.5, run=run),
    "aligned": lambda run: fxmerge.align(mlp(0), mlp(1), batches(), run=run),
    "one basis": merged(
        lambda seed: Attentive(seed).eval(), pictures(), Recipe(match=Align(continuous=True), fit=None)
    ),
    "standardized": merged(mlp, batches(), Recipe(combine=Average((2, 1)), targets="standardized")),
}


def equal(one: fx.GraphModule, other: fx.GraphModule) -> None:
    """Both networks, their reports but for times, and their maps are the same."""
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name
    reports = [fxmerge.report(own).to_dict() for own in (one, other)]
    assert set(reports[0].pop("seconds")) == set(reports[1].pop("seconds"))
    for report in reports:
        for layer in report["layers"].values():
            layer.pop("seconds")
    assert repr(reports[0]) == repr(reports[1])


@pytest.mark.parametrize("name", but_slow(MERGES, 1))
def test_an_interrupted_merge_goes_on_to_the_same_result(name: str, tmp_path: Path, watch: Watch) -> None:
    """A run ends after every stage in turn, and the next one goes on from there."""
    make = MERGES[name]
    expected = make(Run())
    equal(make(Run(resume=tmp_path / "undisturbed")), expected)
    stages, watch.done = watch.done, []
    assert len(stages) >= 2
    runs, ended = 0, False
    while not ended:
        runs, watch.left, ended = runs + 1, 1, True
        try:
            equal(make(Run(resume=tmp_path / "work")), expected)
        except Interrupted:
            ended = False
    assert runs >= len(stages)
    watch.left = None
    equal(make(Run(resume=tmp_path / "work")), expected)
    assert watch.done == stages, "a finished stage was computed again, or one was left out"


def test_finished_layers_are_neither_read_from_data_nor_solved_again(
    tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed again is the way of the activations to where the run goes on, once for every network."""
    make, solved, computed = MERGES["layers"], list[str](), list[str]()
    solve, compute = gather.LayerFit.settle, course.Lane._compute

    def settle(self: gather.LayerFit, *args: Any) -> Any:
        solved.append(self.layer.name)
        return solve(self, *args)

    def node(self: course.Lane, node: fx.Node) -> None:
        if "linear" in str(node.target) or "addmm" in str(node.target):
            computed.append(node.name)
        compute(self, node)

    monkeypatch.setattr(gather.LayerFit, "settle", settle)
    monkeypatch.setattr(course.Lane, "_compute", node)
    make(Run(resume=tmp_path / "undisturbed"))
    layers, whole = list(solved), len(computed)
    assert layers == ["1.weight", "3.weight", "5.weight"]
    watch.done, watch.left = [], 6  # Verification, activations, matching, activations dropped, and two of three layers.
    with pytest.raises(Interrupted):
        make(Run(resume=tmp_path / "work"))
    watch.left = None
    solved.clear()
    computed.clear()
    make(Run(resume=tmp_path / "work"))
    assert solved == layers[2:]
    assert len(computed) <= whole
    solved.clear()
    computed.clear()
    make(Run(resume=tmp_path / "work"))
    assert not solved and not computed


def test_less_memory_may_be_allowed_after_an_interruption(tmp_path: Path, watch: Watch) -> None:
    make, watch.left = MERGES["layers"], 5
    with pytest.raises(Interrupted):
        make(Run(resume=tmp_path / "work"))
    watch.left = None
    equal(make(Run(resume=tmp_path / "work", memory=1e-9)), make(Run()))


def test_warnings_of_finished_stages_are_told_again(
    tmp_path: Path, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    def compute() -> dict[str, Tensor]:
        logging.getLogger("fxmerge.some").warning("%d units are left", 3)
        logging.getLogger("fxmerge.some").info("no matter")
        return {"x": torch.ones(2)}

    for _ in range(2):
        caplog.clear()
        assert torch.equal(Stages(tmp_path, {}).remember("stage", compute, PLAIN)["x"], torch.ones(2))
        assert [(one.name, one.getMessage()) for one in caplog.records if one.levelno >= logging.WARNING] == [
            ("fxmerge.some", "3 units are left")
        ]
    assert watch.done == ["001-stage"]


def test_the_time_of_an_earlier_run_counts(tmp_path: Path) -> None:
    make = MERGES["layers"]
    first, again = (fxmerge.report(make(Run(resume=tmp_path / "work"))) for _ in range(2))
    layers = {name: own["seconds"] for name, own in again.layers.items()}
    assert layers == {name: own["seconds"] for name, own in first.layers.items()}
    assert again.seconds["fitting"] > sum(layers.values())


# -------------------------------------------------------------------------- other inputs


def other_weights(run: Run) -> object:
    return fxmerge.merge(mlp(0), mlp(2), batches(), run=run)


def other_graph(run: Run) -> object:
    nets = [mlp(0), mlp(1)]
    for net in nets:
        net[2] = nn.GELU()  # type: ignore[operator]
    return fxmerge.merge(*nets, batches(), run=run)


OTHERS: dict[str, tuple[Callable[[Run], object], str]] = {
    "weights": (
        other_weights,
        "a run that differs from this one in the weights of model B. Give what that run was given. To begin anew, ",
    ),
    "a graph": (other_graph, "the graph of the models. "),
    "data": (
        lambda run: fxmerge.merge(mlp(0), mlp(1), batches()[:1], run=run),
        "the calibration data. ",
    ),
    "a recipe": (
        lambda run: fxmerge.merge(mlp(0), mlp(1), batches(), Recipe(match=Zip(alpha=0.3)), run=run),
        "recipe.match.alpha (0.5 there, 0.3 here). ",
    ),
    "another kind of recipe": (
        lambda run: fxmerge.merge(mlp(0), mlp(1), batches(), Recipe(match=Zip(continuous="auto")), run=run),
        "matrices holds no stages of such a run",
    ),
    "a verb": (lambda run: fxmerge.align(mlp(0), mlp(1), batches(), run=run), "the verb (merge there, align here), "),
    "a seed": (
        lambda run: fxmerge.merge(mlp(0), mlp(1), batches(), run=Run(seed=3, resume=run.resume)),
        "the seed (0 there, 3 here). Give what that run was given. To begin anew, delete the folder",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_inputs_are_refused(other: str, tmp_path: Path) -> None:
    run = Run(resume=tmp_path / "work")
    MERGES["layers"](run)
    before = sorted(path.name for path in (tmp_path / "work").iterdir())
    make, sentence = OTHERS[other]
    with pytest.raises(OptionError, match=re.escape(sentence)):
        make(run)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == before


def test_other_threads_and_versions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MERGES["layers"](Run(resume=tmp_path / "work"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(manifest, "version", lambda name: "0.0")
    with pytest.raises(
        OptionError, match=r"number of threads \(\d+ there, 64 here\), torch \(.* there, 0.0 here\), .*, and 1 more\."
    ):
        MERGES["layers"](Run(resume=tmp_path / "work"))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OptionError, match="holds no stages of such a run"):
        MERGES["layers"](Run(resume=tmp_path))
    with pytest.raises(OutputError, match="Not a directory"):
        MERGES["layers"](Run(resume=tmp_path / "thesis.tex"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_other_batches_of_numbers_have_other_checksums() -> None:
    """What is no tensor counts too, and so does where it stands."""
    x = torch.ones(2)
    different = [[(x, 1)], [(x, 2)], [(1, x)], [(x,), (1,)], [{"a": x, "b": 1}], [{"b": x, "a": 1}], [(x, None)]]
    assert len({digest(manifest._leaves(one)) for one in different}) == len(different)


# -------------------------------------------------------------------------- files


def test_tensors_of_all_kinds_come_back(tmp_path: Path) -> None:
    tied = torch.randn(3, 4)
    tensors = {
        "b": tied,
        "a": tied,
        "a name / with = signs": torch.randn(2, 2, dtype=torch.complex128),
        "half": torch.randn(5).bfloat16(),
        "mask": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
        "number": torch.tensor(7),
        "view": torch.randn(4, 6).T[1:],
        "text": torch.ones(1),
        "sha256": torch.full((1,), torch.nan),
    }
    plain = {"x": [1, 0.1, None, "é"], "y": {}}
    kept = Form[Kept](lambda found: found, lambda found: found)
    for _ in range(2):
        found = Stages(tmp_path, {}).remember("stage", lambda: Kept(tensors, plain), kept)
        assert list(found.tensors) == list(tensors) and found.plain == plain
        for name, tensor in tensors.items():
            own = found.tensors[name]
            assert own.dtype == tensor.dtype and torch.equal(own.nan_to_num(9), tensor.nan_to_num(9))
        assert found.tensors["a"] is found.tensors["b"]


def test_what_cannot_be_kept_is_computed_again(tmp_path: Path) -> None:
    form, values = Form[int](lambda found: None, lambda kept: 0), iter((1, 2))
    assert [Stages(tmp_path, {}).remember("stage", lambda: next(values), form) for _ in range(2)] == [1, 2]


def damaged(content: bytes, how: int | str) -> bytes:
    if how == "empty":
        return b""
    if how == "cut":
        return content[:-1]
    assert isinstance(how, int)
    at = how % len(content)
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


@pytest.mark.parametrize("how", ["empty", "cut", *range(0, 1000, 97), -1, -9, -40])
def test_a_damaged_file_is_told_and_computed_again(how: int | str, tmp_path: Path, caplog: Any) -> None:
    count = 0

    def compute() -> dict[str, Tensor]:
        nonlocal count
        count += 1
        return {"x": torch.arange(40.0), "y": torch.ones(2)}

    Stages(tmp_path, {}).remember("stage", compute, PLAIN)
    path = tmp_path / "001-stage.safetensors"
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, how))
    caplog.clear()
    again = Stages(tmp_path, {}).remember("stage", compute, PLAIN)
    assert torch.equal(again["x"], torch.arange(40.0)) and torch.equal(again["y"], torch.ones(2))
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path} is damaged (") and count == 2
    Stages(tmp_path, {}).remember("stage", compute, PLAIN)
    assert count == 2


def test_a_file_of_another_run_is_computed_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        Stages(tmp_path / name, {"seed": name}).remember("stage", lambda: {"x": torch.zeros(1)}, PLAIN)
    (tmp_path / "one" / "001-stage.safetensors").replace(tmp_path / "two" / "001-stage.safetensors")
    found = Stages(tmp_path / "two", {"seed": "two"}).remember("stage", lambda: {"x": torch.ones(1)}, PLAIN)
    assert float(found["x"]) == 1


def test_a_damaged_manifest_is_written_again(tmp_path: Path) -> None:
    Stages(tmp_path, {"seed": "0"}).remember("stage", lambda: {"x": torch.zeros(1)}, PLAIN)
    whole = (tmp_path / MANIFEST).read_text()
    for text in ("", "[]", whole[:-3]):
        (tmp_path / MANIFEST).write_text(text)
        Stages(tmp_path, {"seed": "0"}).remember("stage", lambda: 1 / 0, PLAIN)  # type: ignore[arg-type, return-value]
        assert (tmp_path / MANIFEST).read_text() == whole


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        if path.name.startswith(".004-"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(writing, "settle", full)
        with pytest.raises(OutputError, match=r"004-fitting.safetensors cannot be written: No space left on device"):
            MERGES["layers"](Run(resume=tmp_path / "work"))
    names = [path.name for path in sorted((tmp_path / "work").iterdir())]
    assert names == [*(f"{name}.safetensors" for name in watch.done[:3]), MANIFEST]
    equal(MERGES["layers"](Run(resume=tmp_path / "work")), MERGES["layers"](Run()))


@pytest.mark.parametrize("wrong", ["", 3, True])
def test_the_folder_of_a_run_is_a_path(wrong: Any) -> None:
    with pytest.raises(OptionError, match=r"Run.resume is .*; it must be the path of a folder, or None"):
        Run(resume=wrong)


def test_what_only_the_next_stage_reads_is_dropped_after_it(tmp_path: Path, watch: Watch) -> None:
    def run() -> list[dict[str, Tensor]]:
        stages = Stages(tmp_path, {})
        big = stages.remember("big", lambda: {"x": torch.arange(3e4)}, PLAIN, until="small")
        small = stages.remember("small", lambda: {"y": big["x"].sum()}, PLAIN)
        return [small, stages.remember("last", lambda: {"z": small["y"] + 1}, PLAIN)]

    whole, path = run(), tmp_path / "001-big.safetensors"
    assert path.stat().st_size < 2000
    assert watch.done == ["001-big", "002-small", "003-last"] and watch.dropped == ["001-big"]
    assert run() == whole and len(watch.done) == 3
    (tmp_path / "002-small.safetensors").write_bytes(b"damaged")
    assert run() == whole
    assert watch.done[3:] == ["001-big", "002-small"] and path.stat().st_size < 2000
    path.unlink()
    assert run() == whole and watch.done[5:] == ["001-big"]
