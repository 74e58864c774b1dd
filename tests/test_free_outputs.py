"""Outputs that are declared free: units may move along them."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxmerge
from fxmerge import Align, Recipe, Repair, Zip
from fxmerge.inspection import inspect
from fxmerge.symmetry.outputs import free_leaves, name_of, paths_of
from tests.slow import slow


class Vision(nn.Module):
    """A residual backbone that ends in BatchNorm, and gives a map and its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.stem(x)
        h = self.norm(h + self.b(torch.relu(self.a(h))))
        return {"map": h, "pooled": (h.mean((2, 3)), 3)}


class Text(nn.Module):
    """A transformer block without a head; its last norm is an output, and, as a constant beside it, a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm, self.last = nn.Embedding(11, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h = self.tokens(ids)
        n = self.norm(h)
        h = h + self.mix(n, n, n, need_weights=False)[0]
        return self.last(h), torch.ones(ids.shape)


class Joined(nn.Module):
    """One output holds the same units twice, beside an input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return torch.cat([h, x, h + self.b(h)], -1)


X = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(96).reshape(8, 12) * 7 % 11
ROWS = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
NETS: list[tuple[Callable[[], nn.Module], Tensor, float]] = [
    (Vision, X, math.factorial(8) * math.factorial(6)),
    (Text, IDS, math.factorial(8) * 2 * math.factorial(4) ** 4),  # The stream, and two heads with their q/k and v.
    (Joined, ROWS, math.factorial(6)),
]
EACH = pytest.mark.parametrize(("build", "x", "order"), NETS, ids=["vision", "text", "joined"])


def generic(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = build()
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            net.train()(X)
    return net.eval()


def leaves(net: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [y for y in pytree.tree_leaves(net(x)) if isinstance(y, Tensor)]


@EACH
def test_units_move_along_a_free_output_and_verification_holds(
    build: Callable[[], nn.Module], x: Tensor, order: float
) -> None:
    net = generic(build, 0)
    free = fxmerge.find_symmetry(net, (x,), free="output")
    assert math.isclose(free.log_order(), math.log(order))
    verified = free.verify(net, (x,), trials=3)
    assert verified.error is not None and verified.error < 1e-9 and not verified.demoted
    p = verified.sample_permutation(torch.Generator().manual_seed(3))
    twin = build()
    twin.load_state_dict(p.apply(net.state_dict()))
    expected, got = leaves(net, x), leaves(twin.eval(), x)
    assert not all(torch.allclose(a, b) for a, b in zip(expected, got, strict=True))
    flat = pytree.tree_leaves(twin(x))
    for own in verified.free:
        flat[own.leaf] = own.put_back(flat[own.leaf], p.images)
    for a, b in zip(expected, [y for y in flat if isinstance(y, Tensor)], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_verification_demotes_what_does_not_move_as_it_is_said_to() -> None:
    net = generic(Joined, 0)
    symmetry = fxmerge.find_symmetry(net, (ROWS,), free="output")
    swapped = (np.where(o.units < 2, 1 - o.units, o.units) for o in symmetry.free)
    wrong = tuple(replace(o, units=units) for o, units in zip(symmetry.free, swapped, strict=True))
    assert replace(symmetry, free=wrong).verify(net, (ROWS,)).demoted == symmetry.names
    assert not replace(symmetry, free=wrong).verify(net, (ROWS,)).layout


@pytest.mark.parametrize(
    ("build", "x", "order"), [slow(NETS[0]), slow(NETS[1]), NETS[2]], ids=["vision", "text", "joined"]
)
def test_a_planted_twin_is_found_exactly(build: Callable[[], nn.Module], x: Tensor, order: float) -> None:
    net, twin = generic(build, 0), build()
    symmetry = fxmerge.find_symmetry(net, (x,), free="output")
    planted = symmetry.sample_permutation(torch.Generator().manual_seed(7))
    twin.load_state_dict(planted.apply(net.state_dict()))
    aligned = fxmerge.align(twin.eval(), to=net, loader=[x], recipe=fxmerge.Recipe(free=["output"]))
    for key, value in net.state_dict().items():
        assert torch.equal(aligned.state_dict()[key], value), key
    recipes = (
        fxmerge.Recipe(free="output"),
        fxmerge.Recipe(match=fxmerge.Align(), fit=None, free="output"),
        fxmerge.Recipe(match=fxmerge.Align(), free="output"),
    )
    for recipe in recipes:
        merged = fxmerge.merge(net, twin, [x], recipe)
        for a, b in zip(leaves(merged, x), leaves(net, x), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


class Deep(nn.Module):
    """Three BatchNorms, whose statistics are far from those of any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.top = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (6, 5, 4))
        for tensor in self.state_dict().values():
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip((self.stem, self.body, self.top), self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return x.mean((2, 3))


RECIPES = [Recipe(free="output"), Recipe(match=Align(), fit=None, free="output"), Recipe(fit=Repair(), free="output")]


@pytest.mark.parametrize("recipe", RECIPES, ids=["zip", "align", "repair"])
def test_a_backbone_merged_with_a_permuted_twin_keeps_its_statistics(recipe: Recipe) -> None:
    torch.manual_seed(0)
    net, twin, x = Deep().double().eval(), Deep().double().eval(), X.double()
    planted = fxmerge.find_symmetry(net, (x,), free="output").sample_permutation(torch.Generator().manual_seed(7))
    twin.load_state_dict(planted.apply(net.state_dict()))
    merged = fxmerge.merge(net, twin, [x], recipe)
    units = fxmerge.report(merged).images[0]["top.weight[0]"]
    torch.testing.assert_close(merged(x)[:, units], net(x), atol=1e-12, rtol=0)
    with torch.no_grad():  # What comes after a layer that differs is estimated on the data, as ever.
        twin.body.weight += 1e-3
    after = fxmerge.merge(net, twin, [x], recipe).state_dict()
    assert torch.equal(after["norms.0.running_var"].sort().values, net.norms[0].running_var.sort().values)
    for name in ("norms.1.running_var", "norms.2.running_var"):
        assert not torch.allclose(after[name].sort().values, net.state_dict()[name].sort().values, rtol=1e-2)


@pytest.mark.slow
def test_a_vision_transformer_without_a_head_is_given_back() -> None:
    timm = pytest.importorskip("timm")

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
        model: nn.Module = timm.models.VisionTransformer(**sizes)
        return model.double().eval()

    net, twin, x = build(0), build(1), torch.randn(8, 3, 16, 16, dtype=torch.double)
    planted = fxmerge.find_symmetry(net, (x,), free="output").sample_permutation(torch.Generator().manual_seed(7))
    twin.load_state_dict(planted.apply(net.state_dict()))
    merged = fxmerge.merge(net, twin, [x], Recipe(match=Zip(reference=0), free="output"))
    torch.testing.assert_close(merged(x), net(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("count", [2, 3])
def test_units_of_a_free_output_are_aligned_and_not_zipped(count: int) -> None:
    models = [generic(Vision, seed) for seed in range(count)]
    merged = fxmerge.merge_many(models, [X], recipe=fxmerge.Recipe(free="output"))
    told = fxmerge.report(merged)
    images = told.images
    assert all(sorted(own["stem.weight[0]"]) == list(range(8)) for own in images)
    assert "stem.weight[0]" not in told.zipped_within and "a.weight[0]" in told.zipped_within
    assert all(torch.isfinite(y).all() for y in leaves(merged, X))


def test_one_of_several_outputs_may_be_free() -> None:
    class Two(Vision):
        def forward(self, x: Tensor) -> dict[str, Any]:
            h = self.stem(x)
            return {"map": h, "other": self.a(h)}

    for free in ("output['other']", "output.other"):
        symmetry = fxmerge.find_symmetry(generic(Two, 0), (X,), free=free)
        assert symmetry.names == ("a.weight[0]",)
        assert [o.leaf for o in symmetry.free] == [1]
        assert symmetry.verify(generic(Two, 0), (X,)).demoted == ()
    exported = torch.export.export(generic(Two, 0), (X,))
    assert fxmerge.find_symmetry(exported, (X,), free=free).verify(exported, (X,)).names == ("a.weight[0]",)


def test_blocks_along_an_output_stay() -> None:
    """Of attention maps it is not known which parameter's units lie along the heads."""

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
            return q @ q.mT

    net, x = Maps(), torch.randn(2, 5, 3)
    symmetry = fxmerge.find_symmetry(net, (x,), free="output").verify(net, (x,))
    assert not symmetry.demoted and not symmetry.free
    assert any("output" in reasons for reasons in symmetry.stuck.values()) or symmetry.classes


def test_a_free_symmetry_is_written_and_read() -> None:
    net = generic(Vision, 0)
    symmetry = fxmerge.find_symmetry(net, (X,), free="output").verify(net, (X,))
    read = fxmerge.Symmetry.from_json(symmetry.to_json())
    assert read.to_json() == symmetry.to_json() and read.verify(net, (X,)).demoted == ()
    with pytest.raises(fxmerge.OptionError, match=r"Both symmetry and Recipe\.free are given"):
        fxmerge.align(net, to=net, loader=[X], symmetry=symmetry, recipe=fxmerge.Recipe(free="output"))
    pinned = symmetry.to_json().replace('"pin": []', '"pin": ["stem.weight[0]"]')
    assert fxmerge.Symmetry.from_json(pinned).verify(net, (X,)).demoted == ()
    with pytest.raises(fxmerge.SpecError, match="equally often"):
        fxmerge.Symmetry.from_json(
            symmetry.to_json().replace(*(f'"positions": "0:{n}", "units": "0:{n}"' for n in (8, 7)))
        )


def test_names_of_outputs() -> None:
    spec = pytree.tree_structure({"a": [0, 0], "b": 0})
    paths = paths_of(spec, 3)
    assert [name_of(p) for p in paths] == ["output['a'][0]", "output['a'][1]", "output['b']"]
    assert free_leaves(["output.a[1]", 'output["b"]'], paths) == {1, 2}
    assert paths_of(None, 1) == [()]
    assert paths_of(None, 2) == [("0",), ("1",)]
    with pytest.raises(fxmerge.OptionError, match="free is True; give names of outputs"):
        free_leaves(True, paths)  # type: ignore[arg-type]
    for wrong in ("a", "output.c", "output[", "outputs", 3):
        with pytest.raises(fxmerge.OptionError, match=r"free names no output.*output\['a'\]\[0\]"):
            free_leaves([wrong], paths)  # type: ignore[list-item]
    with pytest.raises(fxmerge.OptionError, match="free names no output"):
        fxmerge.merge(nn.Linear(3, 2), nn.Linear(3, 2), [ROWS], recipe=fxmerge.Recipe(free="logits"))


def test_it_is_explained_and_inspected() -> None:
    net = generic(Vision, 0)
    assert any("output" in str(chain) for chain in fxmerge.explain(net, (X,)))
    assert not any("pinned: output" in str(chain) for chain in fxmerge.explain(net, (X,), free="output"))
    assert inspect(net, (X,), free="output", verify=True).free > inspect(net, (X,)).free
