"""Buffers that follow from the parameters, such as the vectors of power iterations."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as with_hook
from torch.nn.utils.parametrizations import spectral_norm

import fxmerge
from fxmerge.combine.derived import Derived, not_averaged
from fxmerge.program.capture import capture_program

Spectral = Callable[[nn.Module], nn.Module]
X = torch.randn(64, 4, generator=torch.Generator().manual_seed(3))


def net(seed: int, spectral: Spectral = spectral_norm) -> nn.Sequential:
    torch.manual_seed(seed)
    m = nn.Sequential(spectral(nn.Linear(4, 16)), nn.ReLU(), nn.Dropout(), spectral(nn.Linear(16, 3))).train()
    with torch.no_grad():
        for _ in range(300):
            m(X)
    return m.eval()


def vectors(m: nn.Module) -> list[str]:
    return [name for name, _ in m.named_buffers()]


def flipped(m: nn.Sequential) -> nn.Sequential:
    for name, buffer in m.named_buffers():
        if name.startswith("3"):
            buffer.neg_()
    return m


def _not_in_train_mode(m: nn.Module, _: object) -> None:
    if m.training:
        raise RuntimeError("not in train mode")


class Mixed(nn.Module):
    """Buffers of every kind: derived, a counter, a statistic of the data, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = spectral_norm(nn.Linear(4, 4))
        for name in ("calls", "mean", "grid", "smooth"):
            self.register_buffer(name, torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.mean.lerp_(x.mean(0), 0.3)
            self.smooth.lerp_(self.layer.bias.detach(), 0.3)
        out: Tensor = self.layer(x - self.mean + self.grid * self.smooth)
        return out


def test_derived_buffers_are_found_by_what_they_do() -> None:
    model, before = Mixed(), {k: v.clone() for k, v in Mixed().state_dict().items()}
    found = Derived.find(model, (X,), {}, among=set(before))
    assert found is not None
    power = {"layer.parametrizations.weight.0._u", "layer.parametrizations.weight.0._v"}
    assert set(found.names) == power | {"smooth"}
    assert torch.equal(model.calls, torch.ones(4))
    settled = found.settle(model.state_dict())
    torch.testing.assert_close(settled["smooth"], model.layer.bias.detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(settled["calls"], torch.ones(4))


def test_there_is_nothing_to_find_in_ordinary_networks() -> None:
    assert Derived.find(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), (X,), {}, among=()) is None

    class Fails(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("not in train mode")
            return super().forward(x)

    assert Derived.find(Fails(), (X,), {}, among={"grid"}) is None


@pytest.mark.slow
@pytest.mark.parametrize("spectral", [spectral_norm, with_hook], ids=["parametrization", "hook"])
@pytest.mark.parametrize(
    "recipe", [fxmerge.Recipe(), fxmerge.Recipe(match=fxmerge.Align(), fit=None)], ids=["fitted", "averaged"]
)
def test_equal_networks_merge_to_themselves_if_vectors_differ_in_sign(
    spectral: Spectral, recipe: fxmerge.Recipe
) -> None:
    a, b = net(0, spectral), flipped(net(0, spectral))
    merged = fxmerge.merge(a, b, [X], recipe)
    torch.testing.assert_close(merged(X), a(X), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("spectral", [spectral_norm, with_hook], ids=["parametrization", "hook"])
def test_merged_layers_have_the_norm_that_they_are_to_have(spectral: Spectral) -> None:
    merged = fxmerge.merge(net(0, spectral), net(1, spectral), [X])
    original = net(2, spectral)
    original.load_state_dict(merged.state_dict())
    torch.testing.assert_close(original.eval()(X), merged(X))
    with torch.no_grad():
        original(X)
        for layer in (original[0], original[3]):
            assert abs(float(torch.linalg.matrix_norm(layer.weight, 2)) - 1) < 1e-3  # type: ignore[arg-type]


def test_three_networks_without_data() -> None:
    merged = fxmerge.merge_many([net(0), flipped(net(1)), net(2)], example=X)
    assert torch.isfinite(merged(X)).all()


@pytest.mark.parametrize("reason", ["exported", "no train mode"])
def test_where_buffers_cannot_be_derived_those_of_one_model_are_taken(
    reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = net(0), flipped(net(1))
    given: list[Any] = [a, b]
    if reason == "exported":
        given = [torch.export.export(m, (X,)) for m in given]
    else:
        for m in given:
            m.register_forward_pre_hook(_not_in_train_mode)
    symmetry = fxmerge.find_symmetry(net(0), (X,))
    with caplog.at_level(logging.WARNING):
        merged = fxmerge.merge(
            *given, [X], recipe=fxmerge.Recipe(match=fxmerge.Align(), combine=fxmerge.Average((0.3, 0.7)), fit=None)
        )
    (record,) = [r for r in caplog.records if "part of how weights are computed" in r.getMessage()]
    assert "3.parametrizations.weight.0._u" in record.getMessage()
    aligned = symmetry.element(fxmerge.report(merged).images[1]).apply(b.state_dict())
    for name in vectors(b):
        assert torch.equal(merged.state_dict()[name], aligned[name]), name


def test_only_what_weights_are_computed_with_is_not_averaged() -> None:
    a = net(0)
    assert not_averaged(capture_program(a, (X,)), set(vectors(a))) == sorted(vectors(a))
    frozen = nn.BatchNorm1d(4)
    assert not_averaged(capture_program(frozen.eval(), (X,)), {"running_mean", "running_var"}) == []


def test_a_fold_of_layers_beside_derived_buffers() -> None:
    """Other layers get other sizes, and the weights that the buffers follow from are those of the network."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 16), spectral_norm(nn.Linear(16, 16)), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    model = nn.Sequential(*layers).train()
    with torch.no_grad():
        for _ in range(1000):
            model(X)
    model.eval()
    small = fxmerge.fold(model, [X], {"2.weight[0]": 0.5})
    assert small.state_dict()["2.weight"].shape == (8, 16)
    for name in vectors(model):
        torch.testing.assert_close(small.state_dict()[name], model.state_dict()[name], atol=1e-3, rtol=0)
