"""REPAIR: the units of a merged network have the means and deviations of the parents' units."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from tests.networks import NETS, mlp
from tests.slow import crossed

MATCH: dict[str, fxmerge.Align | fxmerge.Zip] = {"align": fxmerge.Align(), "zip": fxmerge.Zip()}


def data() -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randn(200, 1, 8, 8, generator=g) for _ in range(2)]


def moments(net: nn.Module, layers: int) -> tuple[Tensor, Tensor]:
    """Of what the first so many linear layers give."""
    x = torch.cat(data()).flatten(1)
    linear = [(p, q) for p, q in zip(*[iter(net.parameters())] * 2, strict=True)]
    for number, (weight, bias) in enumerate(linear[:layers]):
        x = (x.relu() if number else x) @ weight.T + bias
    return x.mean(0), x.std(0, correction=0)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.8, 0.2)])
@torch.no_grad()
def test_every_layer_has_the_interpolated_means_and_deviations(weights: tuple[float, float]) -> None:
    a, b = mlp(0), mlp(1)
    recipe = fxmerge.Recipe(match=fxmerge.Align(), combine=fxmerge.Average(weights), fit=fxmerge.Repair())
    merged = fxmerge.merge(a, b, data(), recipe)
    averaged = fxmerge.merge(a, b, data(), replace(recipe, fit=None))
    aligned = fxmerge.align(b, a, data())
    for layers in (1, 2, 3):
        own, theirs = moments(a, layers), moments(aligned, layers)
        for found, first, second in zip(moments(merged, layers), own, theirs, strict=True):
            torch.testing.assert_close(found, weights[0] * first + weights[1] * second, rtol=1e-3, atol=1e-4)
        assert (moments(averaged, layers)[1] < weights[0] * own[1] + weights[1] * theirs[1]).all()
    told = fxmerge.report(merged).layers
    assert set(told) == {"1.weight", "3.weight", "5.weight"}
    assert all(layer["gain"] > 1 for layer in told.values())


@pytest.mark.parametrize(("name", "match"), crossed(NETS, MATCH.values()))
@torch.no_grad()
def test_a_network_with_itself_stays_as_it_is(name: str, match: fxmerge.Align | fxmerge.Zip) -> None:
    build, batches = NETS[name]
    net, x = build(0).eval(), batches()[0]
    merged = fxmerge.merge(net, build(0), batches(), fxmerge.Recipe(match=match, fit=fxmerge.Repair()))
    torch.testing.assert_close(merged(x), net(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_units_that_never_vary_are_not_scaled() -> None:
    a, b = mlp(0), mlp(1)
    for net in (a, b):
        for weight in list(net.parameters())[:1]:
            weight[3] = 0
    merged = fxmerge.merge(a, b, data(), recipe=fxmerge.Recipe(match=fxmerge.Align(), fit=fxmerge.Repair()))
    assert all(torch.isfinite(v).all() for v in merged.state_dict().values())
