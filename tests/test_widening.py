"""Networks that differ in the numbers of their units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import Recipe, Zip
from fxmerge.recipe import Run
from fxmerge.widening import of_equal_width
from tests.slow import but_slow

QUIET = Run(progress=False)


def mlp(first: int, second: int, classes: int = 3) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(4, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, classes))
    )


class Residual(nn.Module):
    """A stream of features with BatchNorm, depthwise convolutions and a flattened end."""

    def __init__(self, width: int, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.inner = nn.Sequential(
            *(nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()),
            *(nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width), nn.ReLU()),
            *(nn.Conv2d(2 * width, width, 1),),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.inner(x)).relu())  # type: ignore[no-any-return]


class Block(nn.Module):
    """A transformer's layer, with heads of four dimensions."""

    def __init__(self, width: int, hidden: int, size: int = 4) -> None:
        super().__init__()
        self.size, self.embed, self.norm = size, nn.Linear(3, width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.head = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, -1, self.size)).permute(2, 0, 3, 1, 4).unbind()
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.down(self.up(x).relu())).mean(1))  # type: ignore[no-any-return]


PAIRS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "MLPs, each wider somewhere": (mlp(6, 9), mlp(8, 5, 4), (4,)),
    "residual CNNs": (Residual(3), Residual(7, 4), (3, 5, 5)),
}


@pytest.mark.parametrize("name", but_slow(PAIRS, ["residual CNNs"]))
def test_with_all_units_apart_nothing_is_lost(name: str) -> None:
    *models, shape = PAIRS[name]
    a, b = (model.double().eval() for model in models)
    x = torch.randn(6, *shape, dtype=torch.float64)
    merged = fxmerge.merge(a, b, recipe=Recipe(match=Zip(width=2.0)), example=x, run=QUIET)
    for own, model in zip(merged(x), (a, b), strict=True):
        torch.testing.assert_close(own, model(x))


def test_the_result_has_the_size_of_the_widest() -> None:
    a, b, wide = mlp(6, 9), mlp(8, 5), mlp(8, 9)
    x = torch.randn(64, 4)
    merged = fxmerge.merge(a, b, [x], run=QUIET)
    wide.load_state_dict(merged.state_dict())
    torch.testing.assert_close(wide(x), merged(x))
    assert not fxmerge.report(merged).widths


def test_a_network_merged_with_a_wider_copy_of_itself_is_that_network() -> None:
    torch.manual_seed(0)
    a = mlp(6, 8).double()
    x = torch.randn(64, 4, dtype=torch.float64)
    _, wide = of_equal_width([mlp(12, 16).double(), a], ["a", "b"], ((x,), {}), ())
    assert wide is not a and next(iter(wide.parameters())).shape == (12, 4)
    torch.testing.assert_close(wide(x), a(x))
    merged = fxmerge.merge(a, wide, recipe=Recipe(match=Zip(width=0.5)), example=x, run=QUIET)
    torch.testing.assert_close(merged(x), a(x))


def test_transformers_of_twice_the_width_and_heads() -> None:
    """A LayerNorm's statistics stay what they are where every unit is there as often."""
    a, b = Block(8, 12).double().eval(), Block(16, 20).double().eval()
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    wide, same = of_equal_width([a, b], ["a", "b"], ((x,), {}), ())
    assert same is b
    torch.testing.assert_close(wide(x), a(x))
    assert {n: p.shape for n, p in wide.named_parameters()} == {n: p.shape for n, p in b.named_parameters()}
    assert fxmerge.merge(a, b, [x], run=QUIET)(x).shape == (5, 2)


@pytest.mark.slow
def test_networks_in_half_precision() -> None:
    a, b = mlp(6, 9).bfloat16(), mlp(12, 18).bfloat16()
    x = torch.randn(64, 4).bfloat16()
    assert fxmerge.merge(a, b, [x], run=QUIET)(x).dtype is torch.bfloat16


NOT: dict[str, tuple[nn.Module, nn.Module, str]] = {
    "units that a norm counts": (Block(8, 12), Block(12, 12), "the network is then another one, as if an op counted"),
    "dimensions of heads": (Block(8, 12), Block(16, 12, size=8), "they lie in blocks, such as heads"),
}


@pytest.mark.parametrize("name", but_slow(NOT))
def test_what_cannot_have_as_many_units_is_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    a, b, why = NOT[name]
    example: dict[str, Any] = {"example": torch.randn(5, 6, 3)}
    with pytest.raises(fxmerge.ArchitectureMismatchError, match="no layer in common"):
        fxmerge.merge(a, b, **example)
    (message,) = (r.getMessage() for r in caplog.records if r.name == "fxmerge.widening")
    assert message.startswith("model A has 8 units of class") and why in message


def test_what_comes_before_is_merged(caplog: pytest.LogCaptureFixture) -> None:
    """A stem in common, then a stream that has units that a norm counts."""
    a, b = (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), Block(width, 12)) for width in (8, 12))
    x = torch.randn(5, 6, 4)
    merged = fxmerge.merge(a, b, [x], run=QUIET)
    assert any("model A has 8 units" in r.getMessage() for r in caplog.records)
    assert [y.shape for y in merged(x)] == [(5, 2), (5, 2)]
    a.load_state_dict(fxmerge.head(merged, 0).state_dict())


def test_networks_that_differ_in_more_than_sizes_are_left_alone() -> None:
    """They have heads of their own, which keep their sizes."""
    a = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    b = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 7), nn.Softmax(-1), nn.Linear(7, 2))
    x = torch.randn(8, 4)
    assert of_equal_width([a, b], ["a", "b"], ((x,), {}), ()) == (a, b)
    assert len(fxmerge.merge(a, b, [x], run=QUIET)(x)) == 2
