"""Values that are there while an op uses them."""

import pytest
import torch
from torch import Tensor, nn

from fxmerge.program import models, on_use
from fxmerge.program.on_use import OnDemand, fill, is_stand_in, with_stand_ins


class Layer(nn.Module):
    """Uses a parameter by views of it, twice, and gives it as an output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(1))
        self.tied = self.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.weight.view(2, 6)[:, 1:] + self.tied.sum() + self.bias, self.weight


class Writes(Layer):
    """Writes into its parameter in place, whole and through a view, before it is used."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            self.weight.mul_(2)
            self.weight.t()[1].zero_()
        return super().forward(x)


class WritesByKeyword(Layer):
    """Gives its parameter to an op as what this is to write into."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            torch.mul(self.weight, 2, out=self.weight.data)
        return super().forward(x)


def anew(model: nn.Module) -> OnDemand:
    state = model.state_dict()
    return OnDemand(state, lambda name: state[name].clone())


@pytest.fixture(autouse=True)
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_use, "LARGE", 4)


@pytest.mark.parametrize("kind", [Layer, Writes, WritesByKeyword])
def test_a_module_computes_with_stand_ins_what_it_does_with_values(kind: type[Layer]) -> None:
    model, other, x = kind(), kind(), torch.randn(5, 2)
    light = with_stand_ins(model)
    assert is_stand_in(light.weight) and light.tied is light.weight and not is_stand_in(light.bias)
    assert light.weight.untyped_storage().nbytes() == 4
    with torch.no_grad(), fill(models.tensors(light, keep_vars=True), anew(other)) as filled:
        got = filled.with_values(light(x))
    with torch.no_grad():
        expected = other(x)
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


def test_the_model_is_as_it_was() -> None:
    model = Writes()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    light = with_stand_ins(model)
    with torch.no_grad(), fill(models.tensors(light, keep_vars=True), anew(Layer())):
        light(torch.randn(5, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_recurrent_layer_in_another_dtype() -> None:
    model, x = nn.LSTM(3, 5), torch.randn(2, 1, 3, dtype=torch.float64)
    light = with_stand_ins(model, lambda dtype: torch.float64).double()
    with torch.no_grad(), fill(models.tensors(light, keep_vars=True), anew(model)):
        got = light(x)[0]
    torch.testing.assert_close(got, model.double()(x)[0])


def test_a_run_keeps_no_value_that_it_is_done_with() -> None:
    model, alive = nn.Sequential(Layer(), nn.Identity()), []
    light = with_stand_ins(model)
    mode = fill(models.tensors(light, keep_vars=True), anew(model))
    light[1].register_forward_hook(lambda *_: alive.extend(own[0].expired() for own in mode._lent.values()))
    with mode:
        models.run(light, (torch.randn(5, 2),), {})
    assert alive and all(alive)
