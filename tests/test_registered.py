"""Packages that register architectures, data and rules: real ones, installed into a directory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxmerge import calibration, io, sources
from fxmerge.errors import LoaderError, OptionError
from fxmerge.networks import build
from tests import files
from tests.cli.conftest import Call, call  # noqa: F401

CODE = """
import torch
from torch import nn


def network(name, hidden=8, num_classes=3):
    assert name == "small"
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)), torch.zeros(1, 4)


def rows(name):
    return [torch.full((4, 4), float(name)), torch.ones(3, 4)]


@torch.library.custom_op("tiny::center", mutates_args=())
def center(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(-1, keepdim=True)


@center.register_fake
def _(x):
    return torch.empty_like(x)


class Centered(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.h = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.h(center(self.f(x)))
"""

RULES = """
import fxmerge
import tiny_networks


@fxmerge.rule("tiny::center")
def centered(at, x):
    return at.join(x, at.reduce(x, [-1], keepdim=True))
"""

POINTS = """
[fxmerge.architectures]
tiny = tiny_networks:network

[fxmerge.data]
tiny = tiny_networks:rows

[fxmerge.rules]
tiny = tiny_rules
"""


def install(folder: Path, name: str, modules: dict[str, str], points: str) -> Path:
    """A package in a directory, with what an installer writes beside it."""
    folder.mkdir(exist_ok=True)
    for module, code in modules.items():
        (folder / f"{module}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    return folder


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = install(tmp_path / "site", "tiny", {"tiny_networks": CODE, "tiny_rules": RULES}, POINTS)
    monkeypatch.syspath_prepend(str(folder))
    for name in ("tiny_networks", "tiny_rules"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def python(code: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


SYMMETRY = """
import torch, fxmerge, tiny_networks
found = fxmerge.find_symmetry(tiny_networks.Centered(), (torch.randn(16, 4),))
print(found.names, dict(found.probed))
"""


def test_rules_of_a_package_are_used(tiny: Path) -> None:
    done = python(SYMMETRY, tiny)
    assert done.stdout == "('f.weight[0]',) {}\n", done.stderr


@pytest.mark.slow
def test_without_its_rules_the_ops_of_a_package_are_probed(tiny: Path) -> None:
    (tiny / "tiny-1.0.dist-info" / "entry_points.txt").write_text("")
    done = python(SYMMETRY, tiny)
    assert done.stdout == "('f.weight[0]',) {'tiny.center.default': 1}\n", done.stderr


@pytest.mark.slow
def test_rules_that_cannot_be_loaded_are_told_once(tiny: Path) -> None:
    (tiny / "tiny_rules.py").write_text("raise ValueError('no rules today')")
    done = python(SYMMETRY + SYMMETRY, tiny)
    assert done.stdout == 2 * "('f.weight[0]',) {'tiny.center.default': 1}\n"
    told = "The rules that 'tiny' of the package tiny registers cannot be loaded (ValueError: no rules today)"
    assert done.stderr.count(told) == 1


def test_architectures_of_a_package(tiny: Path, tmp_path: Path) -> None:
    network = build(io.load(files.weights(tmp_path / "a.pt", num_classes=5)), "tiny:small", {"hidden": 8})
    assert network.settings == {"hidden": 8, "num_classes": 5} and network.source.args[0].shape == (1, 4)
    assert sources.load("tiny:small", ["2x4"]).args[0].shape == (2, 4)
    with pytest.raises(OptionError, match="tiny:large cannot be built: AssertionError"):
        sources.load("tiny:large")


def test_data_of_a_package(tiny: Path, tmp_path: Path) -> None:
    network = build(io.load(files.weights(tmp_path / "a.pt")), "tiny:small")
    found = calibration.read("tiny:5", network)
    assert [batch.shape for batch in found] == [(4, 4), (3, 4)] and float(found.batches[0][0, 0]) == 5
    assert found.note == "7 rows in 2 batches, of tiny:5."
    with pytest.raises(LoaderError, match="tiny:five gives no batches: ValueError"):
        calibration.read("tiny:five", network)


def test_a_merge_from_the_command_line(tiny: Path, call: Call, tmp_path: Path) -> None:  # noqa: F811
    paths = [files.weights(tmp_path / f"{seed}.pt", seed) for seed in range(2)]
    out = tmp_path / "merged"
    code, _, err = call("merge", *paths, "--arch", "tiny:small", "--data", "tiny:2", "--out", out)
    assert code == 0, err
    torch.export.load(out / "model.pt2").module()(torch.zeros(3, 4))
    code, _, err = call("merge", out / "recipe.yaml", "--out", tmp_path / "again")
    assert code == 0, err
    code, printed, err = call("inspect", "tiny:small")
    assert code == 0 and "8 units" in printed, err


def test_what_is_registered_wrongly_is_told(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = "[fxmerge.architectures]\nbroken = tiny_networks:missing\nthing = tiny_rules:RULES\n"
    other = install(tmp_path / "other", "other", {}, points + "tiny = tiny_networks:network\n")
    monkeypatch.syspath_prepend(str(other))
    with pytest.raises(
        OptionError, match="'broken' of the package other cannot be loaded: module 'tiny_networks' has no"
    ):
        sources.load("broken:small")
    with pytest.raises(OptionError, match="'tiny' is registered by the packages other and tiny: uninstall all but one"):
        sources.load("tiny:small")
    with pytest.raises(OptionError, match="'nothing' cannot be imported"):
        sources.load("nothing:small")
