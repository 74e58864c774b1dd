"""Outputs of mean zero and equal deviation, whatever the models' own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.errors import NonFiniteError, OptionError
from tests.networks import mlp, vectors


def scaled(net: nn.Module, scale: float, shift: float) -> nn.Module:
    """A network with its outputs scaled and shifted."""
    weight, bias = list(net.parameters())[-2:]
    with torch.no_grad():
        weight.mul_(scale)
        bias.mul_(scale).add_(shift)
    return net


def data() -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(100, 1, 8, 8, generator=g) for _ in range(3)]


@pytest.mark.parametrize("fit", [None, fxmerge.Readout(), fxmerge.LeastSquares()], ids=str)
def test_scales_and_shifts_of_the_models_do_not_count(fit: Any) -> None:
    recipe = fxmerge.Recipe(fit=fit, targets="standardized")
    plain = fxmerge.merge(mlp(0), mlp(0), data(), recipe)
    moved = fxmerge.merge(scaled(mlp(0), 3.0, 7.0), mlp(0), data(), recipe)
    x = torch.cat(data())
    with torch.no_grad():
        y, other = mlp(0)(x), moved(x)
    torch.testing.assert_close(plain(x), y - y.mean(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other, 2 * (y - y.mean(0)), rtol=1e-3, atol=1e-4)  # (3 + 1) / 2: the mean deviation
    assert (fxmerge.report(moved).recipe or {})["targets"] == "standardized"


class Dense(nn.Module):
    """An answer for every pixel, and a second one for the whole."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.pixels, self.whole = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 2, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.stem(x))
        return self.pixels(x), self.whole(x.mean((2, 3)))


def test_all_last_layers_and_all_places_count() -> None:
    merged = fxmerge.merge(Dense(0), Dense(0), data(), recipe=fxmerge.Recipe(fit=None, targets="standardized"))
    x = torch.cat(data())
    with torch.no_grad():
        pixels, whole = merged(x)
        own_pixels, own_whole = Dense(0)(x)
    torch.testing.assert_close(pixels, own_pixels - own_pixels.mean((0, 2, 3), keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole, own_whole - own_whole.mean(0), rtol=1e-4, atol=1e-5)


def test_the_models_stay_as_they_are() -> None:
    a, b = mlp(0), mlp(1)
    before = {k: v.clone() for k, v in a.state_dict().items()}
    fxmerge.merge(a, b, vectors(), recipe=fxmerge.Recipe(targets="standardized"))
    assert all(torch.equal(v, before[k]) for k, v in a.state_dict().items())


class Logarithm(nn.Module):
    """The logarithm: of a negative number there is none."""

    def forward(self, x: Tensor) -> Tensor:
        return x.log()


@pytest.mark.parametrize("options", [{"targets": "standardized"}, {"fit": fxmerge.Repair()}])
def test_outputs_that_are_no_numbers_are_refused_with_the_name_of_the_layer(options: dict[str, Any]) -> None:
    a, b = (nn.Sequential(nn.Linear(4, 8), Logarithm(), nn.Linear(8, 3)) for _ in range(2))
    with pytest.raises(NonFiniteError, match=r"'2\.weight'"):
        fxmerge.merge(a, b, [torch.randn(16, 4)], fxmerge.Recipe(match=fxmerge.Zip(alpha=1), **options))


def unbiased() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))


def normalized() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8))


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ((unbiased(), unbiased()), {}, r"'3\.weight' has no bias"),
        ((normalized(), normalized()), {}, "no last layer after which no parameter"),
        ((mlp(0), mlp(1)), {"loader": None}, "'standardized', which needs data"),
        ((mlp(0), mlp(1)), {"base": mlp(2)}, "'standardized', but TaskArithmetic has a base"),
    ],
)
def test_what_cannot_be_standardized_is_refused(
    models: tuple[nn.Module, nn.Module], options: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"loader": vectors(), "example": vectors()[0]} | options
    with pytest.raises(OptionError, match=message):
        fxmerge.merge(*models, recipe=fxmerge.Recipe(targets="standardized"), **given)
