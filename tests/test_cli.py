"""The command line and the demonstration behind it."""

from __future__ import annotations

import pytest

from fxmerge import OptionError, cli, demo


@pytest.fixture(scope="module")
def table() -> demo.Table:
    return demo.run("cnn", seed=0, epochs=5, progress=False)


def test_every_row_and_column_is_there(table: demo.Table) -> None:
    text = str(table)
    assert tuple(row.name for row in table.rows) == demo.ROWS
    assert all(name in text for name in demo.ROWS)
    for column in ("task A", "task B", "per-task", "joint", "parameters"):
        assert column in text.splitlines()[0]


def test_parents_are_good_at_their_own_task(table: demo.Table) -> None:
    assert table["parent A (0-4)"].task_a > 0.95
    assert table["parent B (5-9)"].task_b > 0.95


def test_the_merge_beats_plain_averaging(table: demo.Table) -> None:
    assert table["fxmerge"].per_task > table["plain average"].per_task + 0.1
    assert table["fxmerge"].joint > table["plain average"].joint + 0.1


def test_the_merge_is_of_the_size_of_one_parent(table: demo.Table) -> None:
    assert table["fxmerge"].parameters == table["parent A (0-4)"].parameters
    assert table["ensemble"].parameters == 2 * table["fxmerge"].parameters


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
    ("arguments", "sentence"),
    [
        ([], "required: command"),
        (["demo", "--arch", "mlp"], "invalid choice: 'mlp'"),
        (["demo", "--seed", "-1"], "a seed is a whole number from 0 to 2147483647, not '-1'"),
        (["demo", "--seed", "x"], "a seed is a whole number from 0 to 2147483647, not 'x'"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
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
