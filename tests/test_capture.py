import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxmerge
from fxmerge.program.capture import capture_program


class Branches(nn.Module):
    """Symbolic tracing fails on its control flow, torch.export does not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == 3:
            x = self.linear(x)
        return x.flatten(1) if x.ndim > 2 else x


def test_a_graph_module_is_kept() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    captured = fxmerge.capture(gm)
    assert [n.op for n in captured.graph.nodes] == [n.op for n in gm.graph.nodes]
    assert captured is not gm


def test_symbolic_trace_comes_first_and_keeps_the_modules() -> None:
    captured = fxmerge.capture(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), (torch.zeros(1, 2),))
    assert isinstance(captured.get_submodule("1"), nn.ReLU)


@pytest.mark.parametrize("example", [1, 2])
def test_export_takes_what_tracing_cannot_at_any_batch_size(example: int) -> None:
    model = Branches()
    captured = fxmerge.capture(model, (torch.randn(example, 3),))
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3)
        torch.testing.assert_close(captured(x), model(x))
    assert set(captured.state_dict()) == set(model.state_dict())


class Specialises(Branches):
    """A model that torch.export captures for one batch size only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.ones(len(x), 1)


@pytest.mark.parametrize("example", [1, 3])
def test_a_batch_size_that_is_baked_in_is_that_of_the_example_and_reported(example: int) -> None:
    program = capture_program(Specialises(), (torch.randn(example, 3),))
    assert program.route == "torch.export (fixed batch)"
    assert program.module(torch.randn(example, 3)).shape == (example, 4)


def test_an_exported_program_is_captured_with_its_own_example() -> None:
    program = torch.export.export(nn.Linear(2, 3).eval(), (torch.zeros(4, 2),))
    assert set(fxmerge.capture(program).state_dict()) == {"weight", "bias"}
    assert capture_program(program).route == "exported program"


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no way")


def test_the_error_names_every_route() -> None:
    with pytest.raises(fxmerge.CaptureError) as error:
        fxmerge.capture(Raises(), (torch.ones(2),))
    for route in ("symbolic_trace: ", "torch.export: ", r"symbolic_trace (leaf modules): ", "whole: "):
        assert f"{route}" in str(error.value)
    assert str(error.value).count("no way") == 4


class DataDependent(nn.Module):
    """A branch on values, an operation in place, a buffer that is not saved, and inputs and outputs that are nested."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 5), nn.Linear(5, 2)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, xs: list[Tensor], *, shift: Tensor) -> dict[str, Tensor]:
        h = self.inner(xs[0] + shift).relu_()
        h = h * self.scale if h.sum() > 0 else h - 1
        return {"y": self.outer(h)}


def test_what_depends_on_values_is_analysed_along_the_path_of_the_example(caplog: pytest.LogCaptureFixture) -> None:
    model, args, kwargs = DataDependent(), ([torch.randn(4, 3)],), {"shift": torch.ones(3)}
    program = capture_program(model, args, kwargs)
    assert program.route == "whole"
    assert "whatever depends on the values of 'xs[0]', 'shift'." in caplog.text
    for sign in (1, -1):  # The branches of both signs.
        other = ([sign * torch.rand(2, 3)],)
        torch.testing.assert_close(program.module(*other, **kwargs), model(*other, **kwargs))
    assert set(program.module.state_dict()) == set(model.state_dict())
    symmetry = fxmerge.find_symmetry(model, args, kwargs)
    assert [c.size for c in symmetry.classes if c.structure == "free"] == [5]
    assert symmetry.verify(model, args, kwargs).demoted == ()


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(3, 3), OnValues()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x))  # type: ignore[no-any-return]


class OnValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_a_submodule_that_depends_on_values_is_left_whole() -> None:
    model = Outer()
    program = capture_program(model, (torch.ones(2, 3),))
    assert program.route == "symbolic_trace (leaf modules)"
    for x in (torch.randn(5, 3), torch.randn(5, 3)):
        torch.testing.assert_close(program.module(x), model(x))


def test_the_model_is_not_changed() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout()).train()
    before = copy.deepcopy(model.state_dict())
    capture_program(model, (torch.randn(4, 2),))
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_tied_parameters_are_one() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    program = capture_program(model, (torch.zeros(2, 3),))
    assert program.aliases["2.weight"] == program.aliases["0.weight"]
    assert len(program.parameters) == 3


def test_the_meta_device() -> None:
    model = nn.Sequential(nn.Linear(3, 50), nn.ReLU(), nn.Linear(50, 2)).to("meta")
    assert fxmerge.find_symmetry(model, (torch.zeros(2, 3, device="meta"),)).classes[0].size == 50


class Config:
    def __init__(self, use_cache: bool) -> None:
        self.use_cache = use_cache


class Cache:
    """No type that a graph can give."""


class Caching(nn.Module):
    """Returns a cache where its configuration, or that of a part, says so."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.config, self.linear, self.fails = Config(True), nn.Linear(3, 4), fails
        self.linear.config = Config(True)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> dict[str, Any]:
        if self.fails:
            raise ValueError("no way")
        y = self.linear(x)
        return {"y": y, "cache": Cache()} if self.config.use_cache or self.linear.config.use_cache else {"y": y}


def test_models_are_worked_on_without_a_cache_and_configurations_are_put_back() -> None:
    model, x = Caching(), torch.randn(4, 3)
    module = capture_program(model, (x,)).module
    assert set(module(x)) == {"y"}
    assert fxmerge.find_symmetry(model, (x,)).verify(model, (x,)).demoted == ()
    assert set(fxmerge.merge(model, Caching(), [x])(x)) == {"y"}
    failing = Caching(fails=True)
    with pytest.raises(fxmerge.CaptureError):
        fxmerge.capture(failing, (x,))
    for net in (model, failing):
        assert net.config.use_cache is True
        assert net.linear.config.use_cache is True
    assert isinstance(model(x)["cache"], Cache)


def test_a_configuration_that_cannot_be_changed_is_left() -> None:
    @dataclass(frozen=True)
    class Frozen:
        use_cache: bool = True

    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    model.config = Frozen()  # type: ignore[assignment]
    assert capture_program(model, (torch.randn(2, 3),)).route == "symbolic_trace"
    assert model.config.use_cache is True


class Positions:
    """An object that is no module."""

    last: Tensor | None = None


class Keeps(nn.Module):
    """Keeps the positions that it has computed last, in an object that torch does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.positions = Positions()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 0:
            self.positions.last = torch.arange(x.shape[1], device=x.device) + 0.5
        return self.linear(x + self.positions.last[:, None])  # type: ignore[no-any-return]


def test_what_a_model_keeps_of_a_trace_is_not_kept() -> None:
    model, x = Keeps(), torch.randn(2, 5, 3)
    program = capture_program(model, (x,))
    assert model.positions.last is None
    torch.testing.assert_close(program.module(x), model(x))
