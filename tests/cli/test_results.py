"""What commands write, print and give as exit codes."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fxmerge
from fxmerge import Align, Recipe, io
from fxmerge.networks import build
from fxmerge.output import writing
from fxmerge.plan import from_yaml
from tests import files
from tests.cli.conftest import Call

ARCH = ("--arch", "tests.files:mlp")
DATA = ("--data", "tests.files:batches")

FILES = {
    "README.md",
    "SHA256SUMS",
    "recipe.yaml",
    "report.html",
    "report.json",
    "symmetry.json",
    "units.json",
    "model.safetensors",
}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def model_of(path: Path, **settings: Any) -> torch.nn.Module:
    return build(io.load(path), "tests.files:mlp", settings).model


# -------------------------------------------------------------------------- merge


def test_merge_writes_what_the_library_makes(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, out, err = call("merge", *pair, *ARCH, *DATA, "--out", tmp_path / "merged")
    assert (code, err) == (0, "")
    assert out.startswith("2 models, merged; captured by symbolic_trace\n")
    merged = tmp_path / "merged"
    assert names(merged) == FILES | {"model.pt2"}
    expected = fxmerge.merge(model_of(pair[0]), model_of(pair[1]), files.batches())
    state = io.load(merged)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    x = files.batches()[0][:5]
    assert torch.equal(torch.export.load(merged / "model.pt2").module()(x), expected(x))
    assert fxmerge.Symmetry.from_json(merged / "symmetry.json").names == ("0.weight[0]",)
    units = fxmerge.UnitMap.from_json(merged / "units.json")
    assert [len(own) for own in units.maps] == [1, 1]
    images = fxmerge.report(expected).images
    assert [own[0].tolist() for own in units.maps] == [image["0.weight[0]"] for image in images]


def test_everything_about_a_merge_is_told(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, out, _ = call("merge", *pair, *ARCH, *DATA, "--out", tmp_path / "merged", "--json")
    told = json.loads(out)
    assert code == 0 and told["out"] == str(tmp_path / "merged")
    assert told["loads"] == {".": "torch.export.load('model.pt2').module()"}
    summary = json.loads((tmp_path / "merged" / "report.json").read_text())
    assert summary == {key: value for key, value in told.items() if key != "out"}
    assert [model["parameters"] for model in summary["models"]] == [67, 67]
    plan = from_yaml(tmp_path / "merged" / "recipe.yaml")
    assert [model.sha256 for model in plan.models] == [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest()} for path in pair
    ]
    _, head, card = (tmp_path / "merged" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": ["a.safetensors", "b.safetensors"],
        "library_name": "pytorch",
        "tags": ["fxmerge", "merge"],
    }
    assert "One network merged from `a.safetensors` (model A), `b.safetensors` (model B)" in card
    assert f"{summary['report']['errors']['merged']:.3g}" in card
    sums = [line.split("  ") for line in (tmp_path / "merged" / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in sums} == names(tmp_path / "merged") - {"SHA256SUMS"}


def test_what_the_card_says_loads_the_networks(
    call: Call, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("merge", *pair, *ARCH, *DATA, "--out", tmp_path / "merged", "--share", "trunk", "--name", "x", "--name", "y")
    card = (tmp_path / "merged" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path / "merged")
    exec(code, names)
    x = files.batches()[0]
    for whole, name in zip(names["network"](x), ("head_x", "head_y"), strict=True):
        assert torch.equal(whole, names[name](x))


def page_of(folder: Path) -> dict[str, Any]:
    """The data in the page of a result."""
    html = (folder / "report.html").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    return found


def test_a_page_shows_the_result_with_the_names_of_the_files(
    call: Call, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    call("merge", *pair, *ARCH, *DATA, "--out", tmp_path / "merged")
    data, summary = page_of(tmp_path / "merged"), json.loads((tmp_path / "merged" / "report.json").read_text())
    assert data["title"] == "a.safetensors + b.safetensors" and data["warnings"] == summary["warnings"]
    assert [row["name"] for row in data["nearness"]["rows"]] == ["merged", "a.safetensors", "b.safetensors"]
    assert data["nearness"]["rows"][0]["error"] == summary["report"]["errors"]["merged"]
    facts = dict(map(tuple, data["facts"]))
    assert facts["architecture"] == "tests.files:mlp" and facts["data"] == summary["data"][0]
    assert facts["to load it"] == summary["loads"]["."] and data["line"] is None


def test_the_page_of_a_merge_without_data_begins_with_its_warnings(call: Call, tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name in ("a", "b"):
        model = files.unsettled()[0]
        model[1].running_mean.normal_()
        (tmp_path / name).mkdir()
        io.save(model.state_dict(), tmp_path / name / "model.safetensors")
    models = [tmp_path / name / "model.safetensors" for name in ("a", "b")]
    code, _, _ = call("merge", *models, "--arch", "tests.files:unsettled", "--out", tmp_path / "merged")
    data = page_of(tmp_path / "merged")
    assert code == 0 and any("normalize by running statistics" in text for text in data["warnings"])
    assert dict(map(tuple, data["facts"]))["models"] == ", ".join(map(str, models))  # Their names alone are equal.


def test_a_page_that_cannot_be_drawn_does_not_cost_the_weights(
    call: Call, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "page", lambda *args, **kwargs: {}["no such layer"])
    code, _, err = call("merge", *pair, *ARCH, *DATA, "--out", tmp_path / "merged")
    assert code == 0 and "report.html was not written: it cannot be drawn (KeyError: 'no such layer')" in err
    assert {"model.safetensors", "README.md"} <= names(tmp_path / "merged") and "report.html" not in names(
        tmp_path / "merged"
    )


def test_networks_on_the_line_are_measured_on_request(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, _, _ = call("merge", *pair, *ARCH, *DATA, "--line", 3, "--out", tmp_path / "merged")
    line = page_of(tmp_path / "merged")["line"]
    expected = fxmerge.interpolate(model_of(pair[0]), model_of(pair[1]), files.batches(), points=3)
    assert code == 0 and line["fractions"] == [0, 0.5, 1]
    assert line["before"] == pytest.approx(expected.before) and line["after"] == pytest.approx(expected.after)


def test_a_line_needs_two_networks_that_are_equal_and_data(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = ("--out", tmp_path / "merged")
    for models, data in [((*pair, pair[0]), DATA), (pair, ())]:
        code, _, err = call("merge", *models, *ARCH, *data, "--line", 3, *out)
        assert code == 2 and "--line goes between two models, on one --data" in err
    assert not (tmp_path / "merged").exists()
    other = files.weights(tmp_path / "c.safetensors", 2, num_classes=5)
    sets = ("--set-b", "num_classes=5")
    code, _, err = call("merge", pair[0], other, *ARCH, *sets, *DATA, "--line", 3, *out)
    assert code == 0 and "no networks on the line between the models were measured" in err
    assert page_of(tmp_path / "merged")["line"] is None


def test_an_archive_runs_without_fxmerge(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    call("merge", *pair, *ARCH, *DATA, "--out", tmp_path / "merged", "--share", "trunk", "--name", "x", "--name", "y")
    code = """
import sys; sys.modules["fxmerge"] = None
import torch
both = torch.export.load("model.pt2").module()(torch.ones(7, 4))
one = torch.export.load("heads/y/model.pt2").module()(torch.ones(7, 4))
print([tuple(v.shape) for v in both], torch.equal(both[1], one))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "merged", capture_output=True, text=True)
    assert done.stdout == "[(7, 3), (7, 3)] True\n", done.stderr


def test_a_recipe_from_a_result_gives_the_same_bytes(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    call("merge", *pair, *ARCH, *DATA, "--out", tmp_path / "merged", "--seed", "3")
    code, _, err = call("merge", tmp_path / "merged" / "recipe.yaml", "--out", tmp_path / "again")
    assert (code, err) == (0, "")
    for name in ("model.safetensors", "symmetry.json", "units.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_inputs_that_have_changed_are_refused(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    call("merge", *pair, *ARCH, *DATA, "--out", tmp_path / "merged")
    files.weights(pair[1], 5)
    code, _, err = call("merge", tmp_path / "merged" / "recipe.yaml", "--out", tmp_path / "again")
    assert code == 3 and "'b.safetensors' of" in err and "is not the file of the recipe" in err
    assert not (tmp_path / "again").exists()


def test_data_that_have_changed_are_refused(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "x.npy", np.ones((40, 4)))
    call("merge", *pair, *ARCH, "--data", tmp_path / "x.npy", "--out", tmp_path / "merged")
    np.save(tmp_path / "x.npy", np.zeros((40, 4)))
    code, _, err = call("merge", tmp_path / "merged" / "recipe.yaml", "--out", tmp_path / "again")
    assert code == 1 and "are not the data of the recipe" in err


def test_a_recipe_on_the_command_line(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    Recipe(match=Align(alpha=1), fit=None).to_yaml(tmp_path / "how.yaml")
    code, _, _ = call("merge", *pair, *ARCH, *DATA, "--recipe", tmp_path / "how.yaml", "--out", tmp_path / "merged")
    assert code == 0
    assert from_yaml(tmp_path / "merged" / "recipe.yaml").recipe.match == Align(alpha=1)


def test_without_data_there_is_no_fit(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, _, _ = call("merge", *pair, *ARCH, "--out", tmp_path / "merged")
    assert code == 0 and from_yaml(tmp_path / "merged" / "recipe.yaml").recipe.fit is None


def test_heads_of_other_sizes_and_data_for_each_model(call: Call, tmp_path: Path) -> None:
    a, b = files.weights(tmp_path / "a.pt", 0), files.weights(tmp_path / "b.pt", 1, num_classes=6)
    code, out, err = call("merge", a, b, *ARCH, *DATA, *DATA, "--out", tmp_path / "merged")
    assert code == 0 and "one trunk, with the heads '0', '1'" in out
    assert f"{b}: num_classes=6 follows from the shapes in the file." in err
    assert model_of(tmp_path / "merged" / "heads" / "1", num_classes=6)[2].out_features == 6  # type: ignore[index]
    code, _, _ = call("merge", a, b, *ARCH, "--set-b", "num_classes=6", "--share", "0.7", "--out", tmp_path / "again")
    assert code == 0


def test_task_vectors(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = files.weights(tmp_path / "base.pt", 2)
    code, _, _ = call("merge", *pair, "--base", base, *ARCH, "--out", tmp_path / "merged")
    plan = from_yaml(tmp_path / "merged" / "recipe.yaml")
    assert code == 0 and plan.base is not None and plan.base.path == str(base)
    assert type(plan.recipe.combine).__name__ == "TaskArithmetic"


def test_warnings_come_first(call: Call, tmp_path: Path) -> None:
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = files.unsettled()[0]
        torch.nn.init.uniform_(model[1].running_mean)  # type: ignore[index]
        io.save(model.state_dict(), tmp_path / f"{seed}.pt")
        paths.append(tmp_path / f"{seed}.pt")
    code, _, err = call("merge", *paths, "--arch", "tests.files:unsettled", "--out", tmp_path / "merged")
    assert code == 0 and "warning: 1 layers normalize by running statistics" in err
    card = (tmp_path / "merged" / "README.md").read_text()
    assert card.index("## Warnings") < card.index("One network merged") and "1 layers normalize" in card
    code, out, _ = call("report", tmp_path / "merged")
    assert code == 0 and out.startswith("warning: 1 layers normalize by running statistics")


def test_shards(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, _, _ = call("merge", *pair, *ARCH, *DATA, "--out", tmp_path / "merged", "--shard-size", "100B")
    assert code == 0
    assert "model.safetensors.index.json" in names(tmp_path / "merged")
    assert len(io.load(tmp_path / "merged").files) == 5  # Four shards and their index.


def test_a_network_that_cannot_be_exported_is_told(call: Call, tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.pt" for seed in range(2)]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        io.save(files.Branching().state_dict(), path)
    code, _, err = call("merge", *paths, "--arch", "tests.files:branching", "--out", tmp_path / "merged")
    assert code == 0 and "model.pt2 was not written: torch.export cannot write it" in err
    code, out, _ = call("report", tmp_path / "merged")
    assert code == 0 and out.index("warning: model.pt2 was not written: torch.export") < out.index("2 models")
    assert "model.pt2" not in names(tmp_path / "merged")
    assert "network.load_state_dict(safetensors" in (tmp_path / "merged" / "README.md").read_text()


# -------------------------------------------------------------------------- align and fold


def test_align(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, out, _ = call("align", pair[1], pair[0], *ARCH, *DATA, "--out", tmp_path / "aligned")
    assert code == 0 and out.startswith("2 models, aligned")
    x = files.batches()[0]
    aligned, before = model_of(tmp_path / "aligned"), model_of(pair[1])
    assert torch.allclose(aligned(x), before(x), atol=1e-6)
    assert not torch.equal(aligned[0].weight, before[0].weight)  # type: ignore[index]
    code, _, _ = call("align", tmp_path / "aligned" / "recipe.yaml", "--out", tmp_path / "again")
    assert code == 0


def test_fold(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, out, _ = call("fold", pair[0], *ARCH, *DATA, "--width", "0.5", "--out", tmp_path / "small")
    assert code == 0 and "with 4 units in place of 8" in out
    assert model_of(tmp_path / "small", hidden=4)(torch.zeros(1, 4)).shape == (1, 3)
    code, out, _ = call("compare", tmp_path / "small", *DATA)
    assert code == 0 and "small" in out
    assert call("fold", tmp_path / "small" / "recipe.yaml", "--out", tmp_path / "again")[0] == 0
    assert io.load(tmp_path / "again").entries == io.load(tmp_path / "small").entries


# -------------------------------------------------------------------------- compare, verify, report, recipe


def test_compare(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    call("merge", *pair, *ARCH, *DATA, "--out", tmp_path / "merged")
    call("merge", *pair, *ARCH, *DATA, "--width", "1.5", "--out", tmp_path / "wide")
    code, out, _ = call("compare", tmp_path / "merged", tmp_path / "wide", *DATA, "--json")
    rows = {row["network"]: row["distance"] for row in json.loads(out)}
    assert code == 0
    assert rows["wide"] < rows["merged"] < rows["model A"]
    code, out, _ = call("compare", tmp_path / "merged", *DATA)
    assert "The nearest to the ensemble is merged." in out


def test_compare_of_heads(call: Call, tmp_path: Path) -> None:
    a, b = files.weights(tmp_path / "a.pt", 0), files.weights(tmp_path / "b.pt", 1, num_classes=6)
    call("merge", a, b, *ARCH, *DATA, "--out", tmp_path / "merged")
    code, out, _ = call("compare", tmp_path / "merged", *DATA)
    assert code == 0 and "plain average" in out


def test_verify(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    call("merge", *pair, *ARCH, *DATA, "--out", tmp_path / "merged")
    code, out, _ = call("verify", tmp_path / "merged", "--symmetry")
    assert code == 0 and "in float64" in out and "is whole" in out
    path = tmp_path / "merged" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, _, err = call("verify", tmp_path / "merged")
    assert code == 5 and "problem: model.safetensors has changed since it was written." in err
    path.unlink()
    files.weights(pair[0], 7)
    code, out, _ = call("verify", tmp_path / "merged", "--json")
    assert code == 5
    assert json.loads(out)["problems"] == [
        "model.safetensors is missing.",
        f"{pair[0]}, which was read, has changed since.",
    ]


def test_verify_finds_a_symmetry_of_another_network(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The order of units counts in this network, of the same shapes."""
    call("merge", *pair, "--arch", "tests.files:ordered", *DATA, "--out", tmp_path / "merged")
    assert call("verify", tmp_path / "merged", "--symmetry")[0] == 0
    wrong = fxmerge.find_symmetry(files.mlp()[0], (torch.zeros(1, 4),))
    wrong.to_json(tmp_path / "merged" / "symmetry.json")
    sums = tmp_path / "merged" / "SHA256SUMS"
    own = hashlib.sha256((tmp_path / "merged" / "symmetry.json").read_bytes()).hexdigest()
    lines = [line for line in sums.read_text().splitlines() if not line.endswith("symmetry.json")]
    sums.write_text("\n".join([*lines, f"{own}  symmetry.json"]))
    code, _, err = call("verify", tmp_path / "merged", "--symmetry")
    assert code == 5 and "Class '0.weight[0]' of symmetry.json failed verification." in err


def test_the_symmetry_of_networks_of_other_widths_is_proven(
    call: Call, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    wide = files.weights(tmp_path / "wide.pt", 2, hidden=12)
    code, _, err = call("merge", pair[0], wide, *ARCH, "--set-b", "hidden=12", *DATA, "--out", tmp_path / "merged")
    assert code == 0, err
    code, out, err = call("verify", tmp_path / "merged", "--symmetry")
    assert (code, err) == (0, "") and "change outputs by" in out


@pytest.mark.parametrize("share", ["trunk", "nothing"])
def test_the_symmetry_of_heads_apart_is_proven_on_all_networks(share: str, call: Call, tmp_path: Path) -> None:
    a, b = files.weights(tmp_path / "a.pt", 0), files.weights(tmp_path / "b.pt", 1, num_classes=6)
    call("merge", a, b, *ARCH, *DATA, "--share", share, "--out", tmp_path / "merged")
    code, out, err = call("verify", tmp_path / "merged", "--symmetry")
    assert (code, err) == (0, "") and "change outputs by" in out and "is whole" in out
    path = tmp_path / "merged" / "symmetry.json"
    axes = {axis.parameter for one in fxmerge.Symmetry.from_json(path).classes for axis in one.axes}
    assert call("merge", tmp_path / "merged" / "recipe.yaml", "--out", tmp_path / "again")[0] == 0
    assert {axis[: len("heads.0")] for axis in axes if axis.startswith("heads")} == {"heads.0", "heads.1"}
    files.weights(b, 1)
    code, _, err = call("verify", tmp_path / "merged", "--symmetry")
    assert code == 5 and "which was read, has changed since" in err


@pytest.mark.parametrize("command", [("report",), ("verify",), ("compare", *DATA)])
def test_what_is_no_result(command: tuple[str, ...], call: Call, tmp_path: Path) -> None:
    code, _, err = call(*command, tmp_path)
    assert code == 1 and "is no directory that fxmerge wrote" in err


def test_report(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    call("merge", *pair, *ARCH, *DATA, "--out", tmp_path / "merged")
    code, out, _ = call("report", tmp_path / "merged")
    assert code == 0 and out.startswith("2 models, merged") and "torch.export.load('model.pt2').module()" in out
    code, out, _ = call("report", tmp_path / "merged", "--json")
    assert json.loads(out) == json.loads((tmp_path / "merged" / "report.json").read_text())
    (tmp_path / "merged" / "report.json").write_text("{}")
    code, _, err = call("report", tmp_path / "merged")
    assert code == 1 and "is no report of this version" in err


def test_a_recipe_for_a_command_line(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    typed = [*pair, *ARCH, *DATA, "--share", "trunk", "--seed", "2", "--out", tmp_path / "merged"]
    code, out, _ = call("recipe", "--from", "merge", *typed)
    assert code == 0
    (tmp_path / "recipe.yaml").write_text(out)
    call("merge", *typed)
    code, _, err = call("merge", tmp_path / "recipe.yaml", "--out", tmp_path / "again")
    assert code == 0, err
    paths = [tmp_path / folder / "model.safetensors" for folder in ("merged", "again")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    code, out, _ = call("recipe", "--schema")
    assert code == 0 and json.loads(out)["required"] == ["models"]


# -------------------------------------------------------------------------- check


def test_check(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, out, _ = call("check", *pair, *ARCH)
    assert "for activations what --memory allows" in out
    assert code == 0 and "100.0% of the parameters" in out
    other = files.weights(tmp_path / "c.pt", 2, num_classes=6)
    code, out, _ = call("check", pair[0], other, *ARCH, "--json")
    told = json.loads(out)
    assert code == 0 and told["problems"] == []
    assert told["first_difference"] == "'2.bias' has shape (3,) in model A and has shape (6,) in model B."
    assert told["equal"] == pytest.approx(40 / 67) and told["files"][1]["settings"] == {"num_classes": 6}


def test_check_finds_what_would_stop_a_merge(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in io.load(pair[1]).items()}
    io.save(half, tmp_path / "half.pt")
    code, _, err = call("check", pair[0], tmp_path / "half.pt")
    assert code == 5 and "save all models in one dtype" in err
    io.save({"x": torch.zeros(2)}, tmp_path / "x.pt")
    code, _, err = call("check", pair[0], tmp_path / "x.pt", *ARCH)
    assert code == 5 and "no tensor of equal name and shape" in err and "does not fit the network" in err


def test_check_reads_no_tensor(call: Call, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(path: Path) -> Any:
        def read(name: str) -> torch.Tensor:
            raise AssertionError("a tensor was read")

        return read

    monkeypatch.setattr("fxmerge.io.reading._reader", never)
    assert call("check", *pair, *ARCH)[0] == 0
    assert call("merge", *pair, *ARCH, *DATA, "--dry-run")[0] == 0


def test_check_of_a_yaml_file_and_of_directories(call: Call, gpts: Path, tmp_path: Path) -> None:
    _, out, _ = call("recipe", "--from", "merge", gpts / "a", gpts / "b", "--arch", "hf", "--data", "no.txt")
    (tmp_path / "recipe.yaml").write_text(out)
    code, out, err = call("check", tmp_path / "recipe.yaml")
    assert code == 5 and "no.txt" in err and "100.0% of the parameters" in out
    code, _, err = call("check", tmp_path / "recipe.yaml", "--arch", "hf")
    assert code == 1 and "write --arch, --set and --input into the file" in err


def test_check_estimates_the_time(call: Call, pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, out, _ = call("check", *pair, *ARCH)
    assert code == 0 and re.search(r"At least about \S+ s on 1024 rows of data, by estimate", out)
    code, out, _ = call("merge", *pair, *ARCH, *DATA, "--samples", "64", "--dry-run", "--json")
    found = json.loads(out)["estimate"]
    assert code == 0 and found["rows"] == 64 and found["seconds"] > 0
    aligned = json.loads(call("align", *pair, *ARCH, *DATA, "--samples", "64", "--dry-run", "--json")[1])["estimate"]
    assert aligned["passes"] == found["passes"] * 2 / 5 and aligned["fits"] == 0
    assert json.loads(call("merge", *pair, *ARCH, "--dry-run", "--json")[1])["estimate"] is None
    assert json.loads(call("check", *pair, "--json")[1])["estimate"] is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_stages_that_take_long_are_told_on_a_terminal_only(pair: tuple[Path, Path], tmp_path: Path) -> None:
    import pty

    typed = ["merge", *map(str, pair), *ARCH, *DATA, "--out", str(tmp_path / "merged"), "--force"]
    code = f"from fxmerge.cli import console, main; console.PATIENCE = 0.0; main({typed})"
    terminal, end = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=end, check=True)
    os.close(end)
    told = os.read(terminal, 2**20).decode()
    for stage in ("reading models", "capture", "writing"):
        assert f"{stage} ..." in told and re.search(rf"{stage}: \d+\.\d s", told)
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert piped.stderr == ""
