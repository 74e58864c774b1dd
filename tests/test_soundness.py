"""Small networks on which earlier versions claimed permutations that were none: kept so that they stay caught."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from tests.exact import exact_log_order


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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_nothing_is_claimed_that_is_no_symmetry(case: Callable[[], tuple[Net, Tensor]]) -> None:
    torch.manual_seed(0)
    model, x = case()
    symmetry = fxmerge.find_symmetry(model, (x,))
    assert symmetry.verify(model, (x,), trials=8).demoted == ()
    assert symmetry.log_order() <= exact_log_order(model, (x,)) + 1e-9
