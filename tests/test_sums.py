"""What the output of a layer is added to."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxmerge.program.capture import capture_program
from fxmerge.refitting.layers import find_layers
from fxmerge.refitting.sums import Summand, summand_of


class Adding(nn.Module):
    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.scale, self.combine = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), combine

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(torch.sin(x * self.scale), self.layer(x))


def found(model: nn.Module, x: Tensor) -> Summand | None:
    program = capture_program(model, (x,))
    layers = find_layers(program)
    (layer,) = layers.all
    return summand_of(layer.uses[0].node, program.learnt)


@pytest.mark.parametrize(
    "combine",
    [
        lambda x, y: x + y,
        lambda x, y: y + x,
        lambda x, y: x + y.transpose(1, 2),
        lambda x, y: x + y.permute(0, -1, 1),
        lambda x, y: x + y.permute(0, 2, 1).contiguous().flatten(1).view(-1, 4, 4).transpose(1, 2),
    ],
)
def test_what_an_output_is_added_to_is_found_and_laid_out_like_it(combine: Callable[[Tensor, Tensor], Tensor]) -> None:
    summand = found(Adding(combine), torch.randn(3, 4, 4))
    assert summand is not None
    assert "sin" in str(summand.node.target)
    x = torch.randn(5, 4, 4)
    assert torch.equal(combine(torch.zeros_like(x), summand.placed(x)), x)


@pytest.mark.parametrize(
    "combine",
    [
        lambda x, y: x * y,
        lambda x, y: x + y.relu(),
        lambda x, y: x + y + y.sum(),
        lambda x, y: torch.add(x, y, alpha=2),
        lambda x, y: y + 1,
        lambda x, y: y + y.shape[0],
        lambda x, y: x[:, :1] + y,
        lambda x, y: y + y,
        lambda x, y: x.double() + y,
        lambda x, y: (x > 0) + y,
        lambda x, y: torch.fft.fft(x) + y,
    ],
)
def test_other_uses_of_an_output_have_no_summand(combine: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert found(Adding(combine), torch.randn(3, 4, 4)) is None


def test_what_is_the_same_in_every_network_is_no_summand() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x) + torch.where(x > 0, 0.0, -torch.inf)
            return y

    assert found(Masked(), torch.randn(3, 4)) is None


def test_a_parameter_is_no_summand() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.shift = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x) + self.shift
            return y

    assert found(Shifted(), torch.randn(2, 3, 4)) is None
