"""Every form of product is recovered: a layer refitted to a network's outputs gets the network's weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxmerge.program.capture import capture_program
from fxmerge.refitting.course import Lesson
from fxmerge.refitting.layers import find_layers
from fxmerge.refitting.refit import refit


class Product(nn.Module):
    """A parameter `weight`, and a function of it and the input."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor], bias: int = 0) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(shape)), function
        if bias:
            self.bias = nn.Parameter(torch.randn(bias))

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(x, self.weight)
        return y + self.bias if hasattr(self, "bias") else y


class Experts(nn.Module):
    """A linear layer for each expert, all in one tensor, and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x.expand(3, -1, -1), self.weight)


class Packed(nn.Module):
    """Two products with parts of one parameter, of which each is used apart."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.weight.split([6, 4])
        return torch.cat([F.linear(x, a), torch.tanh(F.linear(x, b))], -1)


ROWS, IMAGES = (200, 4), (40, 4, 9, 9)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 5), ROWS),
    "linear over places": (lambda: nn.Linear(4, 5, bias=False), (20, 7, 4)),
    "weight on the right": (lambda: Product((4, 5), lambda x, w: x @ w), ROWS),
    "weight on the left": (lambda: Product((5, 4), lambda x, w: w @ x), (60, 4, 7)),
    "addmm": (lambda: Product((4, 5), lambda x, w: torch.addmm(x.new_ones(5), x, w)), ROWS),
    "einsum": (lambda: Product((2, 3, 5), lambda x, w: torch.einsum("bhi,hio->boh", x, w)), (200, 2, 3)),
    "batched": (Experts, ROWS),
    "packed": (Packed, ROWS),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1), IMAGES),
    "strided": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(0, 1)), IMAGES),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same", bias=False), IMAGES),
    "even kernel": (lambda: nn.Conv2d(4, 6, 4, padding="same"), IMAGES),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), IMAGES),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), IMAGES),
    "point": (lambda: nn.Conv2d(4, 6, 1), IMAGES),
    "one channel": (lambda: nn.Conv2d(1, 6, 3), (40, 1, 9, 9)),
    "1d": (lambda: nn.Conv1d(4, 6, 5, padding=2), (60, 4, 20)),
    "3d": (lambda: nn.Conv3d(2, 3, 2, stride=2), (60, 2, 6, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), IMAGES),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=(1, 3), dilation=2, groups=2), IMAGES),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=3, bias=False), (60, 4, 20)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_weights_behind_outputs_are_found(case: str) -> None:
    build, shape = CASES[case]
    torch.manual_seed(0)
    net, other = build().double().eval(), build().double().eval()
    inputs = [torch.randn(shape, dtype=torch.float64) for _ in range(4)]
    program = capture_program(net, (inputs[0],))
    refitted = refit(program, [net.state_dict()], other.state_dict(), [Lesson(((x,), {}), (1.0,), 1.0) for x in inputs])
    assert refitted.layers
    assert all(layer["after"] < 1e-6 < layer["before"] for layer in refitted.layers.values())
    for name, value in net.state_dict().items():
        torch.testing.assert_close(refitted.state[name], value, rtol=1e-3, atol=1e-3)


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "computed with": (lambda: Product((5, 4), lambda x, w: F.linear(x, w.abs())), "computed with"),
    "added elsewhere": (lambda: Product((5, 4), lambda x, w: F.linear(x, w) + w.sum()), "also used by aten.add"),
    "on both sides": (lambda: Product((4, 4), lambda x, w: x @ w @ w.T), "used in several ways"),
    "scaled product": (lambda: Product((4, 5), lambda x, w: torch.addmm(torch.ones(5), x, w, alpha=2)), "also used by"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_no_plain_weight_is_left_with_a_reason(case: str) -> None:
    build, reason = LEFT[case]
    layers = find_layers(capture_program(build().eval(), (torch.randn(3, 4),)))
    assert layers.all == ()
    assert reason in layers.left["weight"]
