"""Symmetries as text: nothing is lost, and what an edit may break is told in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxmerge
from fxmerge.symmetry.ranges import read_ranges, write_ranges
from tests.oracle.continuous_networks import NETWORKS
from tests.oracle.inferred import FACTORIES, each, inferred
from tests.oracle.nullity import generic


def same(a: fxmerge.Symmetry, b: fxmerge.Symmetry) -> bool:
    """Equal in all that the algorithms use, arrays by their entries."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.tolist()
        if hasattr(value, "__dataclass_fields__"):
            return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
        if isinstance(value, dict):
            return [(key, plain(v)) for key, v in value.items()]
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return bool(plain(a) == plain(b))


@each(FACTORIES)
def test_a_symmetry_comes_back_as_it_was(name: str) -> None:
    symmetry = inferred(name).symmetry
    back = fxmerge.Symmetry.from_json(symmetry.to_json())
    assert same(symmetry, back)
    assert back.names == symmetry.names
    assert str(back) == str(symmetry)
    assert back.log_order() == symmetry.log_order()
    drawn = [s.sample_permutation(torch.Generator().manual_seed(0)) for s in (symmetry, back)]
    assert drawn[0] == drawn[1]


class Sorts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(torch.relu(self.b(torch.sort(self.a(x), dim=-1).values)))
        return out


def test_what_verification_found_comes_back(tmp_path: Path) -> None:
    from dataclasses import replace

    torch.manual_seed(1)  # Not one whose units are all dead on these inputs.
    model, x = Sorts(), torch.randn(4, 3)
    symmetry = fxmerge.find_symmetry(model, (x,))
    wrong = replace(symmetry, layout=tuple(a for a in symmetry.layout if a.parameter != "c.weight")).verify(model, (x,))
    assert wrong.demoted == ("b.weight[0]",)
    wrong.to_json(tmp_path / "spec.json")
    for source in (tmp_path / "spec.json", str(tmp_path / "spec.json")):
        back = fxmerge.Symmetry.from_json(source)
        assert (back.demoted, back.error, back.unknown) == (wrong.demoted, wrong.error, wrong.unknown)
        assert same(back, wrong)


@given(st.lists(st.integers(-3, 30), max_size=30), st.integers(1, 3), st.integers(1, 3))
def test_ranges_come_back(numbers: list[int], each: int, times: int) -> None:
    array = np.tile(np.repeat(np.array(numbers, np.int64), each), times)
    assert read_ranges(write_ranges(array), 1000).tolist() == array.tolist()


def grouped() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 2, 1))


IMAGE = torch.zeros(2, 2, 4, 4)


@cache
def text() -> str:
    return fxmerge.find_symmetry(grouped(), (IMAGE,)).to_json()


def spec() -> dict[str, Any]:
    entries: dict[str, Any] = json.loads(text())
    return entries


def test_a_class_that_is_deleted_no_longer_moves() -> None:
    entries = spec()
    (free,) = (c for c in entries["classes"] if c["name"] == "3.weight[0]")
    entries["classes"].remove(free)
    symmetry = fxmerge.Symmetry.from_json(json.dumps(entries))
    assert "3.weight[0]" not in symmetry.names
    assert symmetry.stuck["3.weight", 0]["left out of the spec"].tolist() == [0, 1, 2, 3]
    assert not symmetry.verify(grouped(), (torch.randn(2, 2, 4, 4),)).demoted


@pytest.mark.parametrize("pin", ["1.weight", "1.weight[0]", "1.*"])
def test_an_axis_can_be_pinned_in_the_text(pin: str) -> None:
    symmetry = fxmerge.Symmetry.from_json(json.dumps(spec() | {"pin": [pin]}))
    assert symmetry.names == ("3.weight[0]",)
    assert symmetry.stuck["0.weight", 0]["on request"].tolist() == list(range(6))
    assert symmetry.demoted == ()
    assert not symmetry.verify(grouped(), (torch.randn(2, 2, 4, 4),)).demoted


def _class(entries: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (c for c in entries["classes"] if c["name"] == name)
    assert isinstance(found, dict)
    return found


def _set(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda entries: _class(entries, name).update({key: value})


def _units(value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda entries: _class(entries, "3.weight[0]")["axes"][0].update(units=value)


BLOCKS = "blocks of 0.weight[0]"
WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "kind": (lambda s: s.pop("fxmerge"), 'has no entry "fxmerge": "symmetry"'),
    "version": (lambda s: s.update(version=2), "is of version 2; this version of fxmerge reads 1"),
    "key": (lambda s: s.update(clases=[]), "The spec has an unknown entry 'clases'"),
    "no classes": (lambda s: s.pop("classes"), "The spec has no entry 'classes'"),
    "classes of a wrong kind": (lambda s: s.update(classes={}), "it must be a list"),
    "class of a wrong kind": (lambda s: s.update(classes=[3]), "Class 0 is 3; it must be an object"),
    "error": (lambda s: s.update(error="none"), "The spec has the error 'none'"),
    "pin": (lambda s: s.update(pin=["0.wieght"]), "pin names no parameter: '0.wieght'. Did you mean '0.weight'"),
    "shape": (lambda s: s["parameters"]["0.bias"].update(shape=[-1]), "Parameter '0.bias' has the shape"),
    "wrong shape": (lambda s: s["parameters"]["0.bias"].update(shape=[5]), "out of range: 5 is not from 0 to 4"),
    "alias": (lambda s: s["parameters"]["0.bias"].update(aliases=["1.bias"]), "Parameter '1.bias' is listed twice"),
    "apart": (lambda s: s["parameters"]["0.weight"].update(apart={"1": {"1": "0:2"}}), "cannot be apart from"),
    "blocks": (lambda s: s["parameters"]["0.weight"].update(apart={"1": {"0": "1:7"}}), "6 is not from 0 to 5"),
    "gap": (lambda s: s["parameters"]["0.weight"].update(apart={"1": {"0": "1 each 6"}}), "not counted from 0"),
    "name": (_set("3.weight[0]", "name", BLOCKS), "is listed twice"),
    "size": (_set("3.weight[0]", "size", 1), "has the size 1; a class has two units or more"),
    "other size": (_set("3.weight[0]", "size", 5), "has 4 units on 3.weight[0] ('0:4'), but there must be 5"),
    "no range": (_units("0-4"), "'0-4' is no range; write 3, 0:8"),
    "no text": (_units([0, 1, 2, 3]), "it must be a text"),
    "too long": (_units("0:99999999999999999999"), "has wrong units on 3.weight[0]"),
    "out of range": (_units("1:5"), "has units on 3.weight[0] out of range: 4 is not from 0 to 3"),
    "twice": (_units("0, 0:3"), "has one unit twice on 3.weight[0]"),
    "overlap": (
        lambda s: _class(s, "3.weight[0]").update(axes=[{"parameter": "0.bias", "dim": 0, "units": "0:4"}]),
        "'0.weight[0]' overlaps with '3.weight[0]' on 0.bias[0]: one unit is in both",
    ),
    "parameter": (
        lambda s: _class(s, "3.weight[0]")["axes"][0].update(parameter="x"),
        "is on 'x', which is not among the parameters of the spec",
    ),
    "dimension": (lambda s: _class(s, "3.weight[0]")["axes"][0].update(dim=7), "has dimension 7, which '3.weight'"),
    "no parent": (_set("0.weight[0]", "parents", {"x": "0:3 each 2"}), "is nested in 'x', which is not in the spec"),
    "late parent": (lambda s: s["classes"].reverse(), "which must be listed before it"),
    "uneven": (_set("0.weight[0]", "parents", {BLOCKS: "0 each 3, 1 each 2, 2"}), "is spread unevenly"),
    "uneven positions": (_set("0.weight[0]", "fixed", "0 each 3, 1, 0, 1"), "must hold equally many of its units, not"),
    "irregular": (_set("0.weight[0]", "fixed", "0:6"), "do not move along with each other"),
    "childless": (_set("0.weight[0]", "parents", {}), "is on no axis, and no class is nested in it; delete it, too"),
    "pinned twice": (lambda s: s["pinned"].append(s["pinned"][0]), "has two entries with the reason"),
    "pinned out of range": (lambda s: s["pinned"][0].update(indices="0:9"), "has indices out of range"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_edit_is_told_in_a_sentence(name: str) -> None:
    entries = spec()
    edit, sentence = WRONG[name]
    edit(entries)
    with pytest.raises(fxmerge.FxmergeError) as told:
        fxmerge.Symmetry.from_json(json.dumps(entries))
    assert sentence in str(told.value)


def test_what_is_no_spec_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(fxmerge.SpecError, match=r"broken\.json is not JSON"):
        fxmerge.Symmetry.from_json(tmp_path / "broken.json")
    with pytest.raises(fxmerge.SpecError, match=r"neither the text of a symmetry nor a file"):
        fxmerge.Symmetry.from_json("missing.json")


def mlp(seed: int, hidden: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 2))


def test_a_given_symmetry_is_used_in_place_of_inference() -> None:
    a, b, x = mlp(0), mlp(1), torch.randn(16, 4)
    inferred = fxmerge.find_symmetry(a, (x,))
    read = fxmerge.Symmetry.from_json(inferred.to_json())
    assert torch.equal(fxmerge.merge(a, b, [x], symmetry=read)(x), fxmerge.merge(a, b, [x])(x))
    still = fxmerge.find_symmetry(a, (x,), pin=["0.weight[0]"])
    kept = fxmerge.align(b, a, [x], symmetry=still)
    assert fxmerge.report(kept).images == ({},)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in kept.state_dict().items())


def test_a_given_symmetry_is_verified() -> None:
    a, b, x = mlp(0), mlp(1), torch.randn(16, 4)
    entries = json.loads(fxmerge.find_symmetry(a, (x,)).to_json())
    entries["classes"][0]["axes"].pop()
    merged = fxmerge.merge(a, b, [x], symmetry=fxmerge.Symmetry.from_json(json.dumps(entries)))
    assert fxmerge.report(merged).demoted == ("0.weight[0]",)


def test_a_symmetry_of_another_model_is_refused() -> None:
    x = torch.randn(16, 4)
    symmetry = fxmerge.find_symmetry(mlp(0, hidden=6), (x,))
    with pytest.raises(fxmerge.SpecError, match=r"'0.weight' of shape \(6, 4\), but the model's has shape \(8, 4\)"):
        fxmerge.merge(mlp(0), mlp(1), [x], symmetry=symmetry)
    deeper = [nn.Sequential(nn.Sequential(*mlp(seed))) for seed in range(2)]
    with pytest.raises(fxmerge.SpecError, match="the model has no such parameter"):
        fxmerge.merge(deeper[0], deeper[1], [x], symmetry=symmetry)


def test_a_symmetry_of_a_model_with_other_ties_is_refused() -> None:
    def pair(tied: bool) -> nn.Sequential:
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        if tied:
            net[2].weight = net[0].weight
        return net

    x = torch.randn(3, 4)
    with pytest.raises(fxmerge.SpecError, match=r"ties '0.weight' and '2.weight' to each other"):
        fxmerge.merge(pair(True), pair(True), [x], symmetry=fxmerge.find_symmetry(pair(False), (x,)))


# -------------------------------------------------------------------------- kinds


class Stream(nn.Module):
    """A stream with a norm of uniform gains, and a bottleneck: orthogonal, general linear, and permuted units."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3, 5), nn.RMSNorm(5)
        self.down, self.up, self.head = nn.Linear(5, 2, bias=False), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.up(self.down(self.norm(self.embed(x))))))
        return out


def stream() -> tuple[Stream, fxmerge.Symmetry]:
    model = Stream().double()
    return model, fxmerge.find_symmetry(model, (torch.zeros(1, 3, dtype=torch.float64),))


def test_kinds_come_back() -> None:
    model, symmetry = stream()
    words = [str(own.kind) for own in symmetry.kinds]
    assert sorted(words) == ["general linear", "orthogonal", "permutation"]
    spec = json.loads(symmetry.to_json())
    assert [c["kind"] for c in spec["classes"]] == words
    own = spec["classes"][words.index("orthogonal")]
    assert own["scales"] == ["norm.weight"] and own["limited"] == "rms_norm" and own["inverse"]
    back = fxmerge.Symmetry.from_json(symmetry.to_json())
    assert same(symmetry, back)
    drawn = [s.sample(torch.Generator().manual_seed(0)).basis.apply(model.state_dict()) for s in (symmetry, back)]
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


def test_a_spec_without_kinds_is_of_permutations() -> None:
    _, symmetry = stream()
    spec = json.loads(symmetry.to_json())
    for entry in spec["classes"]:
        for key in ("kind", "limited", "inverse", "scales"):
            entry.pop(key, None)
    back = fxmerge.Symmetry.from_json(json.dumps(spec))
    assert back.kinds == () and back.dimension() == 0
    assert back.log_order() == symmetry.log_order()


WRONG_KINDS: dict[str, tuple[str, Any, str]] = {
    "a word that is none": ("kind", "symplectic", "the kind 'symplectic'; it must be one of 'permutation', "),
    "a kind without its planes": ("kind", "complex", "a kind that turns planes has two lists of units"),
    "planes of a kind that has none": ("planes", ["0:2", "2:4"], "no other kind has planes"),
    "planes that are no list": ("planes", "0:2", "it must be a list"),
    "a number": ("kind", 3, "the kind 3; it must be a text"),
    "a limit that is no text": ("limited", ["norm"], "it must be a text"),
    "inverse axes that are no list": ("inverse", {"parameter": "up.weight"}, "it must be a list"),
    "an inverse axis without its dimension": ("inverse", [{"parameter": "up.weight", "first": 0}], "no entry 'dim'"),
    "an unknown entry of an inverse axis": (
        "inverse",
        [{"parameter": "up.weight", "dim": 1, "first": 0, "last": 2}],
        "unknown entry 'last'",
    ),
    "a slot that is no number": ("inverse", [{"parameter": "up.weight", "dim": 1, "first": "0"}], "a whole number"),
    "scales that are no list": ("scales", "norm.weight", "it must be a list"),
}


@pytest.mark.parametrize(
    ("planes", "message"),
    [
        (["0:4"], "two lists of units"),
        (["0:4", "0:4"], "hold each unit once"),
        (["0:3", "3:8"], "3 units of planes"),
        (["0:4", "5:9"], "out of range: 8"),
        ([0, 1], "must be a text"),
    ],
)
def test_wrong_planes_are_told(planes: Any, message: str) -> None:
    model, args = generic(NETWORKS["rotary"].model(), NETWORKS["rotary"].args)
    symmetry = fxmerge.find_symmetry(model, args)
    text = symmetry.to_json()
    back = fxmerge.Symmetry.from_json(text)
    assert back.kinds == symmetry.kinds and back.to_json() == text
    spec = json.loads(text)
    entry = next(c for c in spec["classes"] if c["kind"] == "complex")
    entry["planes"] = planes
    with pytest.raises(fxmerge.SpecError) as caught:
        fxmerge.Symmetry.from_json(json.dumps(spec))
    assert message in str(caught.value) and repr(entry["name"]) in str(caught.value)


@pytest.mark.parametrize("name", WRONG_KINDS)
def test_wrong_kinds_are_told(name: str) -> None:
    key, value, message = WRONG_KINDS[name]
    spec = json.loads(stream()[1].to_json())
    spec["classes"][0][key] = value
    with pytest.raises(fxmerge.SpecError) as caught:
        fxmerge.Symmetry.from_json(json.dumps(spec))
    assert message in str(caught.value) and repr(spec["classes"][0]["name"]) in str(caught.value)
