"""`fxmerge inspect`, `fxmerge demo` and what is behind them."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge import OptionError, cli, demo, sources
from fxmerge.cli.app import ARCHITECTURES
from fxmerge.inspection import free_entries
from fxmerge.program.capture import capture_program
from tests.slow import slow


@pytest.fixture(scope="module", params=[slow(16), slow(64)], ids="width {}".format)
def table(request: pytest.FixtureRequest) -> demo.Table:
    """What the demo shows of its residual network, and, most of the time, of a narrow one."""
    recipe = replace(demo.TRAININGS["cnn"], build=partial(demo.CNN, request.param))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo.TRAININGS, "cnn", recipe)
        return demo.run("cnn", seed=0, epochs=8, progress=False)


def test_every_row_and_column_is_there(table: demo.Table) -> None:
    text = str(table)
    assert tuple(row.name for row in table.rows) == demo.ROWS
    assert all(name in text for name in demo.ROWS)
    for column in ("task A", "task B", "mean", "parameters"):
        assert column in text.splitlines()[0]


def test_parents_are_good_at_their_own_task_and_have_no_head_for_the_other(table: demo.Table) -> None:
    a, b, both = table["parent A (0-4)"], table["parent B (5-9)"], table["both parents"]
    assert a.task_b is None and b.task_a is None and a.per_task is None
    assert (a.task_a, b.task_b) == (both.task_a, both.task_b)
    assert min(a.task_a or 0, b.task_b or 0) > 0.95


def test_the_command_names_all_architectures_of_the_demo() -> None:
    assert sorted(demo.TRAININGS) == sorted(ARCHITECTURES)


def mean(table: demo.Table, name: str) -> float:
    found = table[name].per_task
    assert found is not None
    return found


def test_two_heads_on_one_trunk_beat_one_head_and_plain_averaging(table: demo.Table) -> None:
    best = mean(table, "fxmerge, two heads")
    assert best > mean(table, "plain average, two heads") + 0.1
    assert best > mean(table, "one common head") + 0.02
    assert best >= mean(table, "MuDSC, two heads")
    assert best > mean(table, "both parents") - 0.02


def test_the_merge_is_of_the_size_of_one_parent_and_a_head(table: demo.Table) -> None:
    parent, merged = table["parent A (0-4)"].parameters, table["fxmerge, two heads"].parameters
    assert parent < merged < 1.02 * parent
    assert table["both parents"].parameters == 2 * parent


@pytest.mark.slow
def test_the_same_seed_gives_the_same_table() -> None:
    assert demo.run("vit", seed=3, epochs=1, progress=False) == demo.run("vit", seed=3, epochs=1, progress=False)


def test_the_command_prints_the_table(
    table: demo.Table, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def run(arch: demo.Arch, seed: int) -> demo.Table:
        asked.append((arch, seed))
        return table

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo", "--arch", "vit", "--seed", "4"]) == 0
    assert asked == [("vit", 4)]
    assert capsys.readouterr().out == f"{table}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        ([], "Usage: fxmerge", 2),
        (["mrege"], "No such command 'mrege'", 2),
        (["demo", "--arch", "mlp"], "'mlp' is not one of 'cnn', 'vit'", 2),
        (["demo", "--seed", "-1"], "-1 is not in the range 0<=x<=2147483647", 2),
        (["demo", "--seed", "x"], "'x' is not a valid", 2),
        (["inspect"], "Missing argument 'MODEL'", 2),
        (["inspect", "a:b", "--config", "x"], "write key=value, not 'x'", 1),
    ],
)
def test_wrong_arguments(arguments: list[str], sentence: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == code
    assert sentence in capsys.readouterr().err


def test_an_error_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(arch: demo.Arch, seed: int) -> demo.Table:
        raise OptionError("Something is out of range.")

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "fxmerge: Something is out of range.\n"


def test_options_of_run_are_checked() -> None:
    with pytest.raises(OptionError, match="no architecture 'mlp'"):
        demo.run("mlp")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="epochs is 0"):
        demo.run(epochs=0)


def mlp(hidden: int = 5) -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, 2)), torch.zeros(1, 3)


def module_only() -> nn.Module:
    return mlp()[0]


def by_keyword() -> tuple[nn.Module, tuple[()], dict[str, torch.Tensor]]:
    return mlp()[0], (), {"input": mlp()[1]}


def number() -> int:
    return 3


def test_inspect_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "tests.cli.test_inspect:mlp", "--verify", "--config", "hidden=6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a: 6 units, 6!, R+^6 | 0.weight(a _), 0.bias(a), 2.weight(_ a)"
    assert "free: 94.7% of 38 parameter entries lie on an axis that moves" in lines
    assert "captured by: symbolic_trace" in lines
    assert any(line.startswith("verified: outputs change by ") for line in lines)
    assert lines[-1].startswith("seconds: capture ")


def test_inspect_shows_chains_and_takes_pins(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "tests.cli.test_inspect:mlp", "--chains", "--pin", "0.bias"]) == 0
    out = capsys.readouterr().out
    assert "0.weight[0] (5 indices) <- linear: 0.bias[0] <- pinned: on request" in out.splitlines()
    assert "free: 0.0% of 32" in out


def test_inspect_writes_the_spec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "spec.json"
    assert cli.main(["inspect", "tests.cli.test_inspect:mlp", "--json", str(path)]) == 0
    assert str(fxmerge.Symmetry.from_json(path)) in capsys.readouterr().out
    assert cli.main(["inspect", "tests.cli.test_inspect:mlp", "--json", str(tmp_path / "no" / "spec.json")]) == 1
    assert capsys.readouterr().err.startswith("fxmerge: The spec cannot be written: ")


def test_inspect_names_probed_ops(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "tests.test_probe:Dense", "--input", "2x5"]) == 0
    assert "probed: fxmerge_probe.dense.default (1x)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["module_only", "by_keyword"])
def test_what_a_factory_may_return(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--input", "1x3"] if name == "module_only" else []
    assert cli.main(["inspect", f"tests.cli.test_inspect:{name}", *given]) == 0
    assert capsys.readouterr().out.startswith("a: 5 units, 5!, R+^5 |")


def test_inspect_of_a_library_on_the_meta_device(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    asked = ["inspect", "torchvision:resnet18", "--device", "meta", "--input", "2x3x64x64"]
    assert cli.main(asked) == 0
    assert "free: 100.0% of 11,699,112 parameter entries" in capsys.readouterr().out
    assert cli.main([*asked, "--verify"]) == 1
    assert "A model on the meta device has no values to verify" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        ("resnet18", [], "'resnet18' names no model; write package.module:factory"),
        ("torchvision:resnet19", [], "torchvision has no model 'resnet19'. Did you mean 'resnet18'"),
        ("no_such_package:f", [], "'no_such_package' cannot be imported: No module named 'no_such_package'"),
        ("tests.cli.test_inspect:nothing", [], "'tests.cli.test_inspect' has no 'nothing'"),
        ("tests.cli.test_inspect:number", [], "must return a module, (module, args) or (module, args, kwargs)"),
        (
            "tests.cli.test_inspect:mlp",
            ["--config", "width=3"],
            "tests.cli.test_inspect:mlp cannot be built: TypeError",
        ),
        ("tests.cli.test_inspect:mlp", ["--input", "3,4"], "'3,4' is no shape of an input; write 1x3x224x224"),
        ("tests.cli.test_inspect:mlp", ["--input", "3x4:nn"], "'3x4:nn' is no shape of an input"),
        ("tests.cli.test_inspect:mlp", ["--input", "3x4"], "could not be captured as a graph"),
        ("tests.cli.test_inspect:mlp", ["--pin", "x"], "pin names no parameter: 'x'"),
        ("tests.cli.test_inspect:mlp", ["--device", "gpu"], "tests.cli.test_inspect:mlp cannot be built: RuntimeError"),
    ],
)
def test_what_cannot_be_inspected_is_told_in_a_sentence(
    model: str, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", model, *options]) == 1
    told = capsys.readouterr().err
    assert "fxmerge: " in told  # torch may have logged something before.
    assert sentence in told


@pytest.mark.parametrize("source", ["timm:resnet18", "torchvision:resnet18", "hf:bert"])
def test_a_package_that_is_not_installed_is_named(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("timm", "torchvision", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OptionError, match=r"cannot be imported .*; install it: pip install"):
        sources.load(source)


def test_example_inputs() -> None:
    assert sources.example("2x3").dtype == torch.float32
    whole = sources.example("2x16:int64", "meta")
    assert (whole.dtype, whole.shape, whole.device.type) == (torch.int64, (2, 16), "meta")


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(2, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.Conv2d(6, 2, 1)),
        (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
    ],
    ids=["groups", "batch norm"],
)
def test_free_entries_are_those_that_some_element_moves(layers: Any) -> None:
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 2, 6, 6)
    program = capture_program(model, (x,))
    symmetry = fxmerge.find_symmetry(model, (x,))
    moved = {name: torch.zeros(t.shape, dtype=torch.bool) for name, t in program.parameters.items()}
    places = {name: torch.arange(t.numel()).reshape(t.shape) for name, t in program.parameters.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        for name, now in symmetry.sample_permutation(generator).apply(places).items():
            moved[name] |= now != places[name]
    assert free_entries(symmetry, program.parameters) == (
        sum(int(m.sum()) for m in moved.values()),
        sum(m.numel() for m in moved.values()),
    )
