"""What the output of a layer is added to."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxmerge.capture import capture_program
from fxmerge.refitting.layers import find_layers
from fxmerge.refitting.sums import Summand, summand_of


class Adding(nn.Module):
    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.combine = nn.Linear(4, 4), combine

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(torch.sin(x), self.layer(x))


def found(combine: Callable[[Tensor, Tensor], Tensor]) -> Summand | None:
    program = capture_program(Adding(combine), (torch.randn(3, 4, 4),))
    layers = find_layers(program)
    ((use,),) = (layer.uses for layer in layers.all)
    return summand_of(use.node, layers.derived)


@pytest.mark.parametrize(
    "combine",
    [
        lambda x, y: x + y,
        lambda x, y: y + x,
        lambda x, y: x + y.transpose(1, 2),
        lambda x, y: x + y.permute(0, -1, 1),
        lambda x, y: x + y.transpose(0, 1).transpose(1, 2).permute(1, 2, 0).transpose(0, -1).transpose(0, 1),
    ],
)
def test_what_an_output_is_added_to_is_found_and_laid_out_like_it(combine: Callable[[Tensor, Tensor], Tensor]) -> None:
    summand = found(combine)
    assert summand is not None
    assert "sin" in str(summand.node.target)
    x, y = torch.randn(4, 4, 4), torch.zeros(4, 4, 4)
    assert torch.equal(combine(torch.zeros_like(x), summand.placed(x)), combine(x, y))


@pytest.mark.parametrize(
    "combine",
    [
        lambda x, y: x * y,
        lambda x, y: x + y.relu(),
        lambda x, y: x + y + y.sum(),
        lambda x, y: torch.add(x, y, alpha=2),
        lambda x, y: y + 1,
        lambda x, y: x[:, :1] + y,
        lambda x, y: y + y,
    ],
)
def test_other_uses_of_an_output_have_no_summand(combine: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert found(combine) is None


def test_a_parameter_is_no_summand() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.shift = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x) + self.shift
            return y

    program = capture_program(Shifted(), (torch.randn(2, 3, 4),))
    layers = find_layers(program)
    assert summand_of(layers.all[0].uses[0].node, layers.derived) is None
