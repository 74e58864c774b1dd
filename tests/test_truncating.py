"""Networks with fewer units of the classes that may be mixed: directions that count are left, others are left out."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.program.capture import capture_program
from fxmerge.symmetry.flow import Flow, flows
from fxmerge.symmetry.group import analyse
from fxmerge.symmetry.truncation import Truncation
from fxmerge.truncating import MIXED
from fxmerge.units.kind import Kind
from tests.networks import Attentive
from tests.oracle.continuous_networks import NETWORKS
from tests.oracle.nullity import generic
from tests.slow import but_slow

pytestmark = pytest.mark.usefixtures("one_thread")


def planted(model: nn.Module, args: Any) -> tuple[nn.Module, dict[str, float]]:
    """A network that is confined to half of the directions of every class, in a random basis, and these shares."""
    program = capture_program(model, args)
    found, symmetry = analyse(program)
    consumed = frozenset(axis for axis, kind in flows(found).items() if kind is Flow.CONSUMES)
    left = {
        n: max(symmetry.by_block(n).shape[1] // 2, 2 if symmetry.kind(n) == Kind.CENTRED else 1)
        for n in range(len(symmetry.units))
        if symmetry.kind(n) in MIXED and all(len(own.axis.dims) == 1 for own in symmetry.mixed[n])
    }
    state = Truncation(symmetry, consumed, left).projection.project(model.state_dict())
    model.load_state_dict(symmetry.sample(torch.Generator().manual_seed(0)).basis.apply(state))
    return model, {symmetry.names[n]: width / symmetry.by_block(n).shape[1] for n, width in left.items()}


def folded(model: nn.Module, args: Any, width: Any, *data: Any, **recipe: Any) -> Any:
    """A fold of a model that takes several arguments, with batches of these or without."""
    return fxmerge.fold(
        model, list(data) or None, width, fxmerge.Recipe(**recipe), example=args, inputs=lambda given: (given, {})
    )


SIZES = "have the shape|not known to allow other sizes|cut inside of units"
MEANING = "the network is another one when directions that are not in use are left out"
WHOLE = {
    "tied embedding, RMSNorm": MEANING,  # One parameter gives and reads units that would be scaled.
    "norms of queries and keys": MEANING,
    "side by side behind a norm, two inputs": MEANING,
    "side by side behind a norm, one input": MEANING,
    "mixture of experts": SIZES,
    "cosine of two towers": SIZES,
}
"""The networks that keep all directions of some class, and why."""

NAMES = [name for name, network in NETWORKS.items() if any(group != "R" for group, *_ in network.kinds)]


QUICK = ("linear bottleneck", "attention, packed, biases", "tied embedding, RMSNorm", "mixture of experts")


@pytest.mark.parametrize("name", but_slow(NAMES, QUICK))
def test_directions_that_are_not_in_use_are_left_out_exactly(name: str, caplog: pytest.LogCaptureFixture) -> None:
    network = NETWORKS[name]
    model, args = generic(network.model(), network.args, network.seed)
    model, width = planted(model, args)
    if name in WHOLE:  # Units of these classes may be merged then.
        with caplog.at_level(logging.INFO, "fxmerge"), suppress(fxmerge.OptionError):
            assert width.keys() - fxmerge.report(folded(model, args, width)).bases.keys()
        assert re.search(f"as many units as before: .*{WHOLE[name]}", caplog.text)
        return
    small = folded(model, args, width)
    told = fxmerge.report(small).widths
    assert told.keys() >= width.keys() and all(told[n][1] < told[n][0] for n in width)
    with torch.no_grad():
        expected, got = model(*args), small(*args)
    assert float((expected - got).abs().max()) < 1e-9 * float(expected.abs().max())


def distance(expected: torch.Tensor, got: torch.Tensor) -> float:
    """What outputs miss of the variance of others."""
    return float((expected - got).square().sum() / (expected - expected.mean(0)).square().sum())


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 2, 4, 4, generator=generator) for _ in range(6)]


def test_principal_directions_are_nearer_than_merged_units(images: list[torch.Tensor]) -> None:
    """Also without data, where what is merged is a subspace too, but not the best one."""
    net = Attentive(0).eval()
    with torch.no_grad():
        for data in (images, None):
            missed = {}
            for continuous in (True, False):
                recipe = fxmerge.Recipe(match=fxmerge.Zip(continuous=continuous))
                small = fxmerge.fold(net, data, {"stem.weight[0]": 0.5}, recipe, example=images[0])
                assert fxmerge.report(small).widths["stem.weight[0]"] == (8, 4)
                missed[continuous] = distance(net(images[-1]), small(images[-1]))
            assert missed[True] < missed[False]


def test_units_are_merged_beside_directions_that_are_left_out(images: list[torch.Tensor]) -> None:
    net = Attentive(0).eval()
    small = fxmerge.fold(net, images, 0.5)
    told = fxmerge.report(small)
    assert told.bases["stem.weight[0]"] == "orthogonal, keeps the mean"
    assert told.bases.keys() < told.widths.keys() and told.widths["head.0.weight[0]"] == (12, 6)
    assert "head.0.weight[0]" not in told.bases and set(told.layers) >= {"stem.weight", "qkv.weight", "proj.weight"}
    small.graph.lint()
    with torch.no_grad():
        assert small(images[0][:3]).shape == (3, 3)
        assert distance(net(images[-1]), small(images[-1])) < 2 * told.errors["merged"] + 1e-6


def test_heads_keep_their_dimensions_unless_these_are_named(images: list[torch.Tensor]) -> None:
    net = Attentive(0).eval()
    inside = {"qkv.weight[0]", "qkv.weight[0]#2"}
    assert inside.isdisjoint(fxmerge.report(fxmerge.fold(net, images, 0.5)).widths)
    told = fxmerge.report(fxmerge.fold(net, images, {"qkv*": 0.5}))
    assert inside == set(told.bases) and told.widths["qkv.weight[0]"] == (8, 4)


def test_blocks_that_are_named_are_merged_with_what_lies_in_them(images: list[torch.Tensor]) -> None:
    told = fxmerge.report(fxmerge.fold(Attentive(0).eval(), images, {"blocks of *": 0.5}))
    assert told.widths["blocks of qkv.weight[0]"] == (2, 1) and not told.bases


def test_the_nearer_of_two_folds_is_kept(images: list[torch.Tensor]) -> None:
    told = {
        way: fxmerge.report(
            fxmerge.fold(Attentive(0).eval(), images, 0.5, fxmerge.Recipe(match=fxmerge.Zip(continuous=way)))
        )
        for way in (True, False, "auto")
    }
    nearest = min((told[way].errors["merged"], way) for way in (True, False))[0]
    assert told["auto"].errors["merged"] == nearest


def test_a_merge_with_fewer_directions(images: list[torch.Tensor]) -> None:
    """Of two models with heads of their own, of which one is the other in another basis: all that is lost is what a
    fold of one loses."""
    one, two = Attentive(0).double().eval(), Attentive(0).double().eval()
    data = [x.double() for x in images]
    flat = fxmerge.canonicalize(one, (data[0],))
    symmetry = fxmerge.find_symmetry(flat, (data[0],))
    two.load_state_dict(symmetry.sample(torch.Generator().manual_seed(1)).basis.apply(flat.state_dict()))
    match = fxmerge.Zip(continuous=True, width=0.75, alpha=1)
    recipe = fxmerge.Recipe(match=match, share="trunk", fit=None)
    merged = fxmerge.merge(one, two, recipe=recipe, example=data[0])
    small = fxmerge.fold(one, None, 0.75, fxmerge.Recipe(match=match, fit=None), example=data[0])
    told = fxmerge.report(merged)
    assert told.widths == fxmerge.report(small).widths and told.widths["stem.weight[0]"] == (8, 6)
    with torch.no_grad():
        expected, (first, second) = small(data[0]), merged(data[0])
        torch.testing.assert_close(first, second)
        assert distance(one(data[0]), first) < 2 * distance(one(data[0]), expected)


def test_what_a_fold_by_bases_cannot_be_asked_for(images: list[torch.Tensor]) -> None:
    net, by_bases = Attentive(0).eval(), fxmerge.Recipe(match=fxmerge.Zip(continuous=True))
    with pytest.raises(fxmerge.OptionError, match=r"width is a Budget, which counts no bases: pass a share"):
        fxmerge.fold(net, images, fxmerge.Budget(parameters=0.5), by_bases)
    with pytest.raises(fxmerge.OptionError, match=r"names 'steam\*', which is no class; there are 'stem\.weight\[0\]'"):
        fxmerge.fold(net, images, {"steam*": 0.5})
    with pytest.raises(fxmerge.OptionError, match=r"names 'stem\*', but 'stem\.weight\[0\]' cannot have more units"):
        fxmerge.fold(net, images, {"stem*": 1.5})


def test_a_stream_that_keeps_its_mean_has_two_units_at_least(images: list[torch.Tensor]) -> None:
    small = fxmerge.fold(Attentive(0).eval(), images, {"stem*": 0.01})
    assert fxmerge.report(small).widths["stem.weight[0]"] == (8, 2)
    assert torch.isfinite(small(images[0])).all()


class Branching(nn.Module):
    """A bottleneck behind a branch on values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) if float(x.sum()) > 0 else self.b(x)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore")
def test_a_network_that_follows_a_path_keeps_its_directions() -> None:
    with pytest.raises(fxmerge.OptionError, match=r"needs a model that torch\.export can capture"):
        fxmerge.fold(Branching().eval(), None, {"a*": 0.5}, example=torch.ones(3, 4))
