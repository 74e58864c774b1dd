"""Layers whose outputs are multiplied with each other, fitted for what their product becomes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge
from fxmerge import Align, LeastSquares, Recipe
from fxmerge.errors import OptionError
from fxmerge.program.capture import capture_program
from fxmerge.refitting.course import Lesson
from fxmerge.refitting.refit import refit

PRODUCTS = Recipe(match=Align(), fit=LeastSquares(products=True))


class Attention(nn.Module):
    """Attention with projections apart or in one, written out or not."""

    def __init__(self, seed: int, *, packed: bool = False, written_out: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.packed, self.written_out = packed, written_out
        if packed:
            self.qkv = nn.Linear(6, 18)
        else:
            self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.out = nn.Linear(6, 6)
        for p in self.parameters():
            nn.init.normal_(p, std=0.8)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1) if self.packed else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (2, 3)).transpose(1, 2) for part in parts)
        if self.written_out:
            y = (q @ k.transpose(-1, -2) / 3**0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


def inputs(count: int = 5, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(40, 5, 6, generator=g) for _ in range(count)]


def missed(merged: nn.Module, parents: list[nn.Module]) -> float:
    """The squared error on other inputs."""
    x = torch.cat(inputs(seed=1))
    with torch.no_grad():
        return float((merged(x) - torch.stack([net(x) for net in parents]).mean(0)).square().mean())


@pytest.mark.parametrize("options", [{}, {"packed": True}, {"written_out": True}], ids=["apart", "packed", "written"])
def test_attention_fitted_for_its_products_is_nearer_to_the_parents(options: dict[str, bool]) -> None:
    parents: list[nn.Module] = [Attention(seed, **options).eval() for seed in range(2)]
    alone, together = (
        fxmerge.merge(*parents, inputs(), recipe) for recipe in (Recipe(match=Align(), fit=LeastSquares()), PRODUCTS)
    )
    told = fxmerge.report(together).layers["qkv.weight" if "packed" in options else "q.weight"]
    assert told["read_after"] < 0.9 * told["read_before"]
    assert missed(together, parents) < 0.95 * missed(alone, parents)


def test_a_product_is_fitted_whose_factors_are_in_two_bases() -> None:
    """The mean of queries in two bases, and that of keys, have another product."""
    net = Attention(0).double().eval()
    start = net.state_dict()
    g = torch.Generator().manual_seed(1)
    turn = torch.randn(6, 6, generator=g, dtype=torch.float64)
    turn[:3, 3:] = turn[3:, :3] = 0.0  # Of each head.
    state = dict(start)
    for name in ("weight", "bias"):
        state[f"q.{name}"] = torch.linalg.inv(turn).T @ start[f"q.{name}"]
        state[f"k.{name}"] = turn @ start[f"k.{name}"]
    near = {
        k: v + 0.05 * torch.randn(v.shape, generator=g, dtype=v.dtype) if k[0] in "qkv" else v for k, v in start.items()
    }
    program = capture_program(net, (inputs()[0].double(),))
    lessons = [Lesson(((x.double(),), {}), (0.5, 0.5), 1.0) for x in inputs()]
    told = refit(program, [start, state], near, lessons, products=True).layers["q.weight"]
    assert told["read_after"] < 0.2 * told["read_before"]


class Cross(nn.Module):
    """Keys are known before queries are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.q, self.k, self.out = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(torch.tanh(self.first(x))), self.k(x)
        out: Tensor = self.out((q @ k.transpose(-1, -2)).softmax(-1) @ x)
        return out


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))


@pytest.mark.parametrize(("build", "names"), [(Cross, {"q.weight"}), (perceptron, set())])
def test_only_layers_whose_product_is_known_by_then_are_fitted_together(
    build: Callable[[], nn.Module], names: set[str]
) -> None:
    torch.manual_seed(0)
    nets = [build().eval() for _ in range(2)]
    layers = fxmerge.report(fxmerge.merge(*nets, inputs(), PRODUCTS)).layers
    assert {name for name, told in layers.items() if "read_before" in told} == names


def test_one_batch_leaves_none_to_hold_out() -> None:
    layers = fxmerge.report(fxmerge.merge(Attention(0), Attention(1), inputs(1), PRODUCTS)).layers
    assert not any("read_before" in told for told in layers.values())


def test_another_word_is_refused() -> None:
    with pytest.raises(OptionError, match=r"LeastSquares\.products is 'all'; it must be True or False"):
        LeastSquares(products="all")  # type: ignore[arg-type]


class Mixing(nn.Module):
    """Places of the input mixed by products of queries and keys."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.q, self.k, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out((self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ x)
        return y


def test_layers_that_nothing_reads_stay() -> None:
    a, b = Mixing(0).eval(), Mixing(1).eval()
    with torch.no_grad():  # The mean of what reads the products is zero.
        b.out.weight.copy_(-a.out.weight)
    told = fxmerge.report(fxmerge.merge(a, b, inputs(), PRODUCTS)).layers["q.weight"]
    assert told["read_after"] == told["read_before"]
