"""The page of a result: what it holds, and that names in it are text."""

import json
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx, nn

import fxmerge
from fxmerge.errors import OptionError, OutputError
from fxmerge.interpolation import Interpolation
from fxmerge.pictures.layers import _module, layers_of
from fxmerge.reporting import made_with
from tests.test_html import HOSTILE


class Net(nn.Module):
    """A residual network with a group norm, whose classes are nested, and layers of a hostile name."""

    def __init__(self, seed: int, hidden: int = 6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, hidden, 3, padding=1)
        self.add_module(HOSTILE, nn.Conv2d(hidden, hidden, 1))
        self.norm = nn.GroupNorm(3, hidden)
        self.head = nn.Linear(hidden, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + getattr(self, HOSTILE)(self.norm(x)).relu()
        scores: torch.Tensor = self.head(x.mean((2, 3)))
        return scores


X = torch.randn(32, 3, 5, 5, generator=torch.Generator().manual_seed(0))
LINE = Interpolation((0.0, 0.5, 1.0), (0.1, float("nan"), 0.1), (0.1, 0.2, 0.1), "distance", 1.5)


@pytest.fixture(scope="module")
def merged() -> fx.GraphModule:
    return fxmerge.merge(Net(0), Net(1), [X])


def test_every_axis_of_every_parameter_tells_what_lies_along_it(merged: fx.GraphModule) -> None:
    data = fxmerge.page(merged).to_dict()
    symmetry, state = made_with(merged).symmetry, merged.state_dict()
    assert {p["name"] for layer in data["layers"] for p in layer["parameters"]} == set(state)
    for layer in data["layers"]:
        for parameter in layer["parameters"]:
            assert [axis["size"] for axis in parameter["axes"]] == list(state[parameter["name"]].shape)
            for dim, axis in enumerate(parameter["axes"]):
                own = [c for c in symmetry.classes for a in c.axes if (a.parameter, a.dim) == (parameter["name"], dim)]
                told = [data["classes"][p["class"]]["name"] if "class" in p else p["why"] for p in axis["parts"]]
                assert sorted(told) == sorted(c.why or c.name for c in own)
    movable = [c for c in symmetry.classes if not c.why]
    assert [(c["name"], c["size"]) for c in data["classes"]] == [(c.name, c.size) for c in movable]
    assert [c["group"] for c in data["classes"]] == re.findall(r", ([^|]*) \|", str(symmetry))


def test_the_numbers_are_those_of_the_report(merged: fx.GraphModule) -> None:
    page = fxmerge.page(merged, models=("a.pt", "b.pt"))
    data, report = page.to_dict(), fxmerge.report(merged)
    fits = {p["name"]: layer["fit"] for layer in data["layers"] for p in layer["parameters"] if layer["fit"]}
    assert report.layers and all(fits[name] == own for name, own in report.layers.items())
    assert {row["name"]: row["error"] for row in data["nearness"]["rows"]} == {
        "merged": report.errors["merged"],
        "a.pt": report.errors["models"][0],
        "b.pt": report.errors["models"][1],
    }
    assert data["seconds"] == report.seconds and data["memory"] == made_with(merged).peak_memory > 2**27
    for one in made_with(merged).similarities:
        (shown,) = next(c for c in data["classes"] if c["name"] == one.name)["similarities"]
        assert {shown["reference"], shown["model"]} == {"a.pt", "b.pt"}
        for key in ("before", "after"):
            values = np.frombuffer(b64decode(shown[key]), np.int8).reshape(one.after.shape) / 127
            assert np.allclose(values, getattr(one, key), atol=0.5 / 127 + 1e-6)


def test_the_data_are_json_without_numbers_that_it_does_not_have(merged: fx.GraphModule) -> None:
    data = fxmerge.page(merged, line=LINE).to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["line"] == {
        "what": "distance",
        "seconds": 1.5,
        "fractions": [0, 0.5, 1],
        "before": [0.1, None, 0.1],
        "after": [0.1, 0.2, 0.1],
    }


def test_what_was_not_computed_is_said(merged: fx.GraphModule) -> None:
    assert len(fxmerge.page(merged).to_dict()["missing"]) == 1
    assert fxmerge.page(merged, line=LINE).to_dict()["missing"] == []
    still = fxmerge.merge(Net(0), Net(1), None, fxmerge.Recipe(match=None, fit=None), example=X)
    page = replace(fxmerge.page(still), peak_memory=None)
    data = page.to_dict()
    words = ["distance to the ensemble", "no similarities", "No layer was fitted", "on the line", "how much memory"]
    assert len(data["missing"]) == len(words)
    assert all(word in text for word, text in zip(words, data["missing"], strict=True))
    assert data["nearness"] is data["line"] is None and not any(c["similarities"] for c in data["classes"])


@pytest.mark.parametrize("made", ["fold", "align", "trunk", "nothing", "base"])
def test_every_verb_has_a_page(made: str) -> None:
    a, b = Net(0), Net(1)
    result = {
        "fold": lambda: fxmerge.fold(a, [X], 0.5),
        "align": lambda: fxmerge.align(a, b, example=X),
        "trunk": lambda: fxmerge.merge(a, b, [X], fxmerge.Recipe(share="trunk")),
        "nothing": lambda: fxmerge.merge(a, b, [X], fxmerge.Recipe(share="nothing")),
        "base": lambda: fxmerge.merge(a, b, base=Net(2), example=X),
    }[made]()
    page = fxmerge.page(result)
    assert page.title.split()[0].lower() == fxmerge.report(result).kind
    assert page.models == {"fold": ("model A",), "base": ("the base", "model A", "model B")}.get(
        made, ("model A", "model B")
    )
    data = page.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert any("head of its own" in text for text in data["missing"]) == (made in ("trunk", "nothing"))
    titles = {"fold": "How near to the model", "trunk": "How near to the models"}
    assert (data["nearness"] or {"title": None})["title"] == titles.get(made)
    assert {p["name"] for layer in data["layers"] for p in layer["parameters"]} == set(result.state_dict())
    if made == "fold":
        assert {c["name"]: c["merged"] for c in data["classes"]} == {
            c["name"]: fxmerge.report(result).widths.get(c["name"], (0, c["size"]))[1] for c in data["classes"]
        }


def test_classes_that_are_mixed_have_no_similarities() -> None:
    def net(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    merged = fxmerge.merge(net(0), net(1), [x], fxmerge.Recipe(match=fxmerge.Align(continuous=True)))
    data, bases = fxmerge.page(merged).to_dict(), fxmerge.report(merged).bases
    assert bases and {c["name"]: c["basis"] for c in data["classes"] if c["basis"]} == bases
    mixed = {name for name, kind in bases.items() if kind != "scales"}
    assert {c["name"] for c in data["classes"] if not c["similarities"]} == mixed != set(bases)
    assert "matched by a change of basis" in data["missing"][0]


# -------------------------------------------------------------------------- the graph of layers


def test_layers_are_joined_as_the_graph_joins_them(merged: fx.GraphModule) -> None:
    layers = layers_of(merged)
    names = [layer.name for layer in layers]
    assert [(layer.op, [names[i] for i in layer.inputs]) for layer in layers] == [
        ("input", []),
        ("Conv2d", ["x"]),
        ("GroupNorm", ["stem"]),
        ("Conv2d", ["norm"]),
        ("add", ["stem", HOSTILE]),
        ("Linear", ["add"]),
        ("output", ["head"]),
    ]


class Scaled(nn.Module):
    """What no state dict has: a buffer, a tensor, and a constant in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)
        self.register_buffer("scale", torch.rand(5), persistent=False)
        self.shift = torch.rand(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu() * self.scale + self.shift
        scores: torch.Tensor = self.last(x) * torch.tensor([1.0, 2.0])
        return scores


def test_constants_are_no_layers() -> None:
    torch.manual_seed(0)
    a, b = Scaled(), Scaled()
    b.scale, b.shift = a.scale, a.shift
    page = fxmerge.page(fxmerge.merge(a, b, [torch.randn(16, 3)]))
    shown = {own["name"] for one in page.to_dict()["layers"] for own in one["parameters"]}
    assert shown == set(a.state_dict())


def test_the_name_of_a_layer_is_where_paths_begin_alike() -> None:
    assert _module(("l0.q.weight", "l1.q.weight")) == "l0.q.weight" and _module(("l.q.weight", "l.k.weight")) == "l"


def test_parameters_of_one_module_are_one_layer_in_an_exported_graph() -> None:
    class Written(nn.Module):
        """A layer in two ops, with a table between them that is no parameter."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
            self.register_buffer("table", torch.ones(3, dtype=torch.int64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x @ self.one.weight.T * self.table + self.one.bias
            return self.two(x.relu().view(x.shape[0], -1)) * x.size(1)

    model = Written()
    exported = torch.export.export(model, (torch.zeros(2, 3),)).module()
    layers = [(layer.name, layer.parameters) for layer in layers_of(exported) if layer.parameters]
    assert layers == [("one", ("one.weight", "one.bias")), ("two", ("two.weight",))]


# -------------------------------------------------------------------------- the file


class Parsed(HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script" and self.lasttag == "script":
            self.scripts[-1] += data


def test_names_cannot_become_elements(merged: fx.GraphModule) -> None:
    html = fxmerge.page(
        merged, title=HOSTILE, models=(HOSTILE, "b"), warnings=[HOSTILE], facts=[("x", HOSTILE)]
    ).to_html()
    parsed = Parsed(html)
    tags = [tag for tag, _ in parsed.elements]
    assert tags.count("script") == 9 and "img" not in tags
    assert json.loads(parsed.scripts[0])["warnings"] == [HOSTILE]
    assert (
        sum(HOSTILE in p["name"] for layer in json.loads(parsed.scripts[0])["layers"] for p in layer["parameters"]) == 2
    )


def test_the_page_loads_nothing_and_has_its_licences(merged: fx.GraphModule) -> None:
    html = fxmerge.page(merged).to_html()
    for tag, attributes in Parsed(html).elements:
        assert tag not in ("link", "iframe", "object", "img") and "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    assert "default-src 'none'" in html
    for name in ("Mike Bostock", "Observable, Inc.", "Chris Pettitt", "Mikola Lysenko"):
        assert name in html
    assert len(html.encode()) < 700_000


def test_a_page_is_saved_whole_or_refused_in_a_sentence(merged: fx.GraphModule, tmp_path: Path) -> None:
    page = fxmerge.page(merged)
    page.save(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page.to_html()
    with pytest.raises(OutputError, match=r"The page cannot be written to .*: No such file"):
        page.save(tmp_path / "no" / "report.html")


def test_networks_of_others_and_wrong_names_are_refused(merged: fx.GraphModule) -> None:
    with pytest.raises(OptionError, match="has no report"):
        fxmerge.page(fx.symbolic_trace(nn.Linear(2, 2)))
    with pytest.raises(OptionError, match="models has 1 names, and there are 2: model A, model B"):
        fxmerge.page(merged, models=["a"])
    copied = fx.GraphModule(merged, merged.graph)
    copied.meta = merged.meta
    with pytest.raises(OptionError, match=r"It is not known what the GraphModule was made with: .* no copy of it"):
        fxmerge.page(copied)


@pytest.mark.slow
def test_the_page_of_a_large_network_is_small() -> None:
    torchvision = pytest.importorskip("torchvision")
    nets = [torchvision.models.resnet50().eval() for _ in range(2)]
    recipe = fxmerge.Recipe(match=fxmerge.Align())
    run = fxmerge.Run(verify=False)
    merged = fxmerge.merge(*nets, recipe=recipe, example=torch.zeros(2, 3, 32, 32), run=run)
    html = fxmerge.page(merged).to_html()
    assert 500_000 < len(html.encode()) < 3_000_000
    assert len(made_with(merged).similarities) == 37
