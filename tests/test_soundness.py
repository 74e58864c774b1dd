"""Small networks on which earlier versions claimed permutations that were none: kept so that they stay caught."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxmerge
from tests.oracle.exact import exact_log_order
from tests.slow import but_slow


class Net(nn.Module):
    """Layers by name, and a forward over them."""

    def __init__(self, forward: Callable[["Net", Tensor], object], **layers: nn.Module) -> None:
        super().__init__()
        self.compute = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> object:
        return self.compute(self, x)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def glu_and_flatten() -> tuple[Net, Tensor]:
    def forward(s: Net, x: Tensor) -> object:
        y = s.a(x)
        p, q = y.chunk(2, -1)
        return s.h(y.flatten(1)), s.o(p * q.sin())

    return Net(forward, a=linear(3, 4), h=linear(12, 1), o=nn.Linear(2, 1)), torch.randn(2, 3, 3)


def flip_and_flatten() -> tuple[Net, Tensor]:
    def forward(s: Net, x: Tensor) -> object:
        y = s.a(x)
        return s.h((y + torch.tanh(y.flip(-1))).flatten(1))

    return Net(forward, a=linear(3, 4), h=linear(8, 1)), torch.randn(2, 2, 3)


def neighbours_and_flatten() -> tuple[Net, Tensor]:
    def forward(s: Net, x: Tensor) -> object:
        y = s.a(x)
        return s.h((y[..., 1:] + torch.tanh(y[..., :-1])).flatten(1))

    return Net(forward, a=linear(3, 3), h=linear(6, 2)), torch.randn(2, 3, 3)


def outer_sum() -> tuple[Net, Tensor]:
    def forward(s: Net, x: Tensor) -> object:
        y = s.a(x)
        y = torch.tanh(y[..., :, None] + y[..., None, :]).flatten(-2)
        return s.w(y - y[..., :2].mean(-1, keepdim=True))

    return Net(forward, a=linear(3, 4), w=linear(16, 1)), torch.randn(3, 3)


def mask_and_flatten() -> tuple[Net, Tensor]:
    def forward(s: Net, x: Tensor) -> object:
        return s.h((s.a(x).sin() * torch.ones(2, 3).tril()).flatten(1))

    return Net(forward, a=linear(3, 3), h=linear(6, 1)), torch.randn(2, 2, 3)


def triangle_and_flatten() -> tuple[Net, Tensor]:
    return Net(lambda s, x: s.h(s.a(x).tril().flatten(1)), a=linear(3, 3), h=linear(6, 1)), torch.randn(2, 2, 3)


def one_unit_twice() -> tuple[Net, Tensor]:
    return Net(lambda s, x: s.a(x)[..., torch.tensor([0, 0])], a=nn.Linear(3, 2)), torch.randn(2, 3)


def mirrored_blocks() -> tuple[Net, Tensor]:
    def forward(s: Net, x: Tensor) -> object:
        y = s.a(x)
        y = y - y[..., :2].mean(-1, keepdim=True)
        y = y + torch.tanh(y.flip(-1))
        return s.h(y.reshape(*y.shape[:-1], 2, 2))

    return Net(forward, a=nn.Linear(3, 4), h=linear(2, 4)), torch.randn(2, 2, 3)


def groups_of_different_sizes() -> tuple[Net, Tensor]:
    def forward(s: Net, x: Tensor) -> object:
        y = s.stem(x)
        return s.out(s.two(y).relu() + s.three(y).relu())

    layers = {
        "stem": nn.Conv2d(1, 12, 1),
        "two": nn.GroupNorm(2, 12),
        "three": nn.GroupNorm(3, 12),
        "out": nn.Conv2d(12, 1, 1),
    }
    return Net(forward, **layers), torch.randn(1, 1, 2, 2)


def rows_of_a_factor(turn: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Net, Tensor]]:
    """A layer that reads units times a factor with rows of its own, and the units themselves in another order."""

    def make() -> tuple[Net, Tensor]:
        def forward(s: Net, x: Tensor) -> object:
            h = s.a(x)
            return s.h(torch.einsum("bij,ij->bij", h, s.rows.weight)), s.h(turn(h))

        return Net(forward, a=linear(3, 4), rows=linear(4, 2), h=linear(4, 2)), torch.randn(2, 2, 3)

    return make


def orders_side_by_side(turn: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Net, Tensor]]:
    """Units in two orders, stacked, and numbers that tell places of each order apart."""

    def make() -> tuple[Net, Tensor]:
        def forward(s: Net, x: Tensor) -> object:
            h = s.a(x)
            y = (torch.stack([h, turn(h)], 1) + torch.arange(4.0)).tanh()
            return y.sum(-1), (y * torch.tensor([1.0, 2.0])[:, None, None]).sum((1, -1))

        return Net(forward, a=linear(3, 4)), torch.randn(2, 2, 3)

    return make


def weight_and_its_turn(turn: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Net, Tensor]]:
    """A square weight, used as it is and turned."""

    def make() -> tuple[Net, Tensor]:
        def forward(s: Net, x: Tensor) -> object:
            h = s.a(x)
            w = s.w.weight
            return s.o(functional.linear(h, w).tanh()), s.o(functional.linear(h, turn(w)).tanh())

        return Net(forward, a=linear(3, 4), w=linear(4, 4), o=linear(4, 2)), torch.randn(2, 3)

    return make


TURNS: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda h: h.flip(-1),
    "roll": lambda h: h.roll(1, -1),
    "index": lambda h: h[..., [1, 0, 3, 2]],
    "rotation": lambda h: h.unflatten(-1, (2, 2)).rot90(1, (-2, -1)).flatten(-2),
    "transposition": lambda h: h.unflatten(-1, (2, 2)).mT.flatten(-2),
}
"""Orders of four units."""

TURNED = {
    **{f"rows of a factor, {name}": rows_of_a_factor(turn) for name, turn in TURNS.items()},
    **{f"side by side, {name}": orders_side_by_side(turn) for name, turn in TURNS.items()},
    **{f"weight, {name}": weight_and_its_turn(turn) for name, turn in TURNS.items()},
    "weight, turned round": weight_and_its_turn(lambda w: w.rot90(1)),
    "weight, transposed": weight_and_its_turn(lambda w: w.T),
    "weight, both reversed": weight_and_its_turn(lambda w: w.flip(0, 1)),
}

CASES = [
    glu_and_flatten,
    flip_and_flatten,
    neighbours_and_flatten,
    outer_sum,
    mask_and_flatten,
    triangle_and_flatten,
    one_unit_twice,
    mirrored_blocks,
    groups_of_different_sizes,
]


NAMED = {**{case.__name__: case for case in CASES}, **TURNED}
SOME = ["weight, flip"]


@pytest.mark.parametrize("name", but_slow(NAMED, [*(case.__name__ for case in CASES), *SOME]))
def test_nothing_is_claimed_that_is_no_symmetry(name: str) -> None:
    torch.manual_seed(0)
    model, x = NAMED[name]()
    symmetry = fxmerge.find_symmetry(model, (x,))
    assert symmetry.verify(model, (x,), trials=8).demoted == ()
    assert symmetry.log_order() <= exact_log_order(model, (x,)) + 1e-9


@pytest.mark.parametrize("function", [torch.linalg.inv, torch.linalg.matrix_exp])
def test_functions_of_a_matrix_hold_at_full_size(function: Callable[[Tensor], Tensor]) -> None:
    def forward(s: Net, x: Tensor) -> object:
        h = s.a(x)
        return s.b(h @ function(h.mT @ h / len(h) + torch.eye(256, dtype=h.dtype)))

    torch.manual_seed(0)
    model, x = Net(forward, a=nn.Linear(32, 256), b=nn.Linear(256, 4)), torch.randn(64, 32)
    symmetry = fxmerge.find_symmetry(model, (x,))
    assert symmetry.log_order() == pytest.approx(math.lgamma(257))
    verified = symmetry.verify(model, (x,), trials=3)
    assert not verified.demoted and verified.error is not None and verified.error < 1e-9
