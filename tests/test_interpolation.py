"""Networks on the line between two networks."""

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.errors import ArchitectureMismatchError, LoaderError, OptionError


def net(seed: int, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    own = nn.BatchNorm1d(8) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(4, 8), own, nn.ReLU(), nn.Linear(8, 2)).eval()


X = list(torch.randn(4, 32, 4, generator=torch.Generator().manual_seed(0)))


def distance(network: nn.Module, a: nn.Module, b: nn.Module) -> float:
    with torch.no_grad():
        x = torch.cat(X)
        mean = (a(x) + b(x)) / 2
        return float((network(x) - mean).square().sum() / (mean - mean.mean(0)).square().sum())


def test_the_distances_are_those_of_the_interpolated_parameters() -> None:
    a, b = net(0), net(1)
    line = fxmerge.interpolate(a, b, X, points=4)
    assert line.fractions == pytest.approx((0, 1 / 3, 2 / 3, 1)) and line.seconds > 0
    aligned = fxmerge.align(b, a, X)
    for other, values in ((b.state_dict(), line.before), (aligned.state_dict(), line.after)):
        for t, value in zip(line.fractions, values, strict=True):
            between = net(2)
            between.load_state_dict({k: (1 - t) * v + t * other[k] for k, v in a.state_dict().items()})
            assert value == pytest.approx(distance(between, a, b), rel=1e-3)


def test_running_statistics_are_those_of_the_data() -> None:
    a, b = net(0, norm=True), net(1, norm=True)
    line = fxmerge.interpolate(a, b, X, points=3)
    between, other = net(2, norm=True), b.state_dict()
    between.load_state_dict({k: (v + other[k]) / 2 if v.is_floating_point() else v for k, v in a.state_dict().items()})
    hidden = between[0](torch.cat(X))
    between[1].running_mean, between[1].running_var = hidden.mean(0).detach(), hidden.var(0).detach()
    assert line.before[1] == pytest.approx(distance(between, a, b), rel=1e-2)


def test_a_score_takes_the_place_of_the_distance() -> None:
    seen = []

    def score(network: nn.Module) -> float:
        assert not network.training
        seen.append(network)
        return float(len(seen))

    line = fxmerge.interpolate(net(0), net(1), X, points=3, score=score)
    assert line.what == "score" and line.before == (1, 3, 2) and line.after == (1, 4, 2)


def test_what_does_not_fit_is_refused() -> None:
    a, b = net(0), net(1)
    for points in (1, 2.5):
        with pytest.raises(OptionError, match=r"points is .*; it must be a whole number from 2 on"):
            fxmerge.interpolate(a, b, X, points=points)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"score is 3; it must be a function"):
        fxmerge.interpolate(a, b, X, score=3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"Align.continuous is set, and a change of basis leaves no line"):
        fxmerge.interpolate(a, b, X, fxmerge.Recipe(match=fxmerge.Align(continuous=True)))
    with pytest.raises(LoaderError):
        fxmerge.interpolate(a, b, [])
    with pytest.raises(ArchitectureMismatchError):
        fxmerge.interpolate(a, nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), X)
