"""Gains and shifts of norms: fitted where no layer makes up for them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.program.capture import capture_program
from fxmerge.refitting.course import Lesson
from fxmerge.refitting.gains import IN_READERS, find_gains
from fxmerge.refitting.layers import Layers, find_layers
from fxmerge.refitting.refit import refit
from tests.slow import but_slow


class Scaled(nn.Module):
    """A factor for every channel, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None]


def planes(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 2, 3))


def rows(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), norm, nn.ReLU(), nn.Linear(6, 2))


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "group norm": (lambda: planes(nn.GroupNorm(3, 6)), (2, 6, 6)),
    "instance norm": (lambda: planes(nn.InstanceNorm2d(6, affine=True)), (2, 6, 6)),
    "factors": (lambda: planes(Scaled()), (2, 6, 6)),
    "layer norm": (lambda: rows(nn.LayerNorm(6)), (5, 6)),
    "layer norm of two dimensions": (lambda: rows(nn.LayerNorm((5, 6))), (5, 6)),
    "RMS norm": (lambda: rows(nn.RMSNorm(6)), (5, 6)),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_gain_and_a_shift_are_recovered_from_what_the_network_computes(name: str) -> None:
    build, shape = NORMS[name]
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = build().double().eval()
    own = {key: value for key, value in net.state_dict().items() if key.startswith("1.")}
    wanted = net.state_dict() | {n: 1 + 0.3 * torch.randn(v.shape, generator=g).double() for n, v in own.items()}
    lessons = [Lesson(((torch.randn(64, *shape, generator=g).double(),), {}), (1.0,), 1.0) for _ in range(4)]
    program = capture_program(net, lessons[0].call[0])
    found = refit(program, [wanted], net.state_dict(), lessons)
    assert "1.weight" in found.layers and not found.left.keys() & own.keys()
    for key in own:
        assert (net.state_dict()[key] - wanted[key]).abs().max() > 0.1
        torch.testing.assert_close(found.state[key], wanted[key], rtol=0, atol=1e-4)


class Mixing(nn.Module):
    """What a norm gives is read over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rows = nn.LayerNorm(4), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rows(self.norm(x).transpose(1, 2)).mean(1)
        return out


def test_gains_are_left_to_the_layers_that_read_them() -> None:
    x = torch.randn(3, 5, 4)
    read = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    program = capture_program(read, (x,))
    layers = find_layers(program).all
    assert find_gains(program, layers) == Layers((), {"1.weight": IN_READERS, "1.bias": IN_READERS})
    assert [layer.name for layer in find_gains(program, layers[:1]).all] == ["1.weight"]  # The reader stays as it is.
    mixing = capture_program(Mixing(), (x,))
    assert find_gains(mixing, find_layers(mixing).all).all == ()
    last = capture_program(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (x,))
    assert [layer.name for layer in find_gains(last, find_layers(last).all).all] == ["1.weight"]


@pytest.mark.parametrize("match", but_slow([fxmerge.Align(), fxmerge.Zip()]))
def test_fitted_gains_bring_a_merge_nearer_to_its_parents(match: fxmerge.Align | fxmerge.Zip) -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = planes(nn.GroupNorm(3, 6)).eval()
        with torch.no_grad():
            for name in ("weight", "bias"):
                getattr(net[1], name).normal_()
        return net

    g = torch.Generator().manual_seed(0)
    data = [torch.randn(64, 2, 6, 6, generator=g) for _ in range(4)]
    told = fxmerge.report(fxmerge.merge(build(0), build(1), data, fxmerge.Recipe(match=match)))
    assert told.layers["1.weight"]["held_out"] < told.layers["1.weight"]["before"]
    assert told.layers["1.weight"]["features"] == 2
