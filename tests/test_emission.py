"""What is emitted, on every capture route: the state dict of the class, its buffers, and its training mode."""

import copy
import io
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxmerge
from fxmerge.program.capture import capture_program
from fxmerge.program.emission import duplicate
from fxmerge.program.memory import write_out_of_place, writes
from tests.slow import crossed

ROUTES = {
    "symbolic": "symbolic_trace",
    "export": "torch.export",
    "leaves": "symbolic_trace (leaf modules)",
    "whole": "whole",
}


def steer(route: str, x: Tensor) -> Tensor:
    """Nothing, but so that only one route captures it."""
    if route == "export":
        return x + 0 if x.shape[0] > 0 else x
    if route == "whole":
        return x + 0 if x.sum() > -1e9 else x
    return x


class OnValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0 if x.sum() > -1e9 else x


class Routed(nn.Module):
    """A network that is captured by one route; `body` makes of it what a test is of."""

    def __init__(self, route: str, body: nn.Module) -> None:
        super().__init__()
        self.route, self.body = route, body
        self.on_values = OnValues() if route == "leaves" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.on_values(steer(self.route, x)))  # type: ignore[no-any-return]


def emit(model: nn.Module, *args: Any, route: str | None = None) -> fx.GraphModule:
    program = capture_program(model, args)
    assert route is None or program.route.removesuffix(" (fixed batch)") == ROUTES[route]
    return program.module


# ------------------------------------------------------------------------------------ buffers


class Standardized(nn.Module):
    """Buffers that are computed with before they meet an input, at the root and below, saved and not saved."""

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("scale", torch.rand(4) + 0.5)
        self.register_buffer("fixed", torch.rand(4), persistent=False)
        self.linear, self.out = nn.Linear(4, 6), nn.Linear(6, 2)
        self.norm = Frozen(6)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean[None]) / self.scale.square().reshape(1, -1).sqrt() * self.fixed
        return self.out(self.norm(self.linear(x)).relu())  # type: ignore[no-any-return]


class Frozen(nn.Module):
    """As torchvision's FrozenBatchNorm2d: everything is a buffer."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.rand(n) + 0.5)
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.randn(n))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale + (self.bias - self.running_mean * scale)


@pytest.mark.parametrize("route", ROUTES)
def test_buffers_are_read_when_the_graph_runs(route: str) -> None:
    x = torch.randn(5, 4)
    first, second = Routed(route, Standardized()).eval(), Routed(route, Standardized()).eval()
    second.body.fixed = first.body.fixed
    emitted = emit(first, x, route=route)
    emitted.load_state_dict(second.state_dict())
    torch.testing.assert_close(emitted(x), second(x))


@pytest.mark.parametrize("route", ROUTES)
def test_aligned_and_merged_networks_are_what_their_class_computes(route: str) -> None:
    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = Routed(route, Standardized()).eval()
        model.body.fixed = torch.linspace(0.5, 1, 4)
        return model

    a, b, fresh, x = net(0), net(1), net(2), torch.randn(64, 4)
    aligned = fxmerge.align(b, to=a, loader=[x])
    torch.testing.assert_close(aligned(x), b(x))
    merged = fxmerge.merge(a, b, [x])
    fresh.load_state_dict(merged.state_dict())
    torch.testing.assert_close(merged(x), fresh(x))


class Reads(nn.Module):
    """Takes the value of a parameter out of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.linear = nn.Parameter(torch.tensor(2.0)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale.item()  # type: ignore[no-any-return]


class Caches(nn.Module):
    """Keeps what it derives from a parameter, outside of any buffer, and never drops it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.shift = nn.Linear(3, 2), nn.Parameter(torch.ones(2))
        self.kept = self.shift.detach() * 3

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.kept  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [Reads, Caches])
def test_values_of_parameters_are_not_baked_in(make: type[nn.Module]) -> None:
    model, other, x = make(), make(), torch.randn(4, 3)
    emitted = emit(model, x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    emitted.load_state_dict(other.state_dict())
    torch.testing.assert_close(emitted(x), other(x))


# ------------------------------------------------------------------------------------ state dicts


class Constants(nn.Module):
    """Constants that a trace meets, tensors that are no buffers, and parameters in another order than they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.last = nn.Linear(3, 2)
        self.register_parameter("nothing", None)
        self.first = nn.Linear(4, 3)
        self.again = self.first
        self.second = nn.Linear(3, 3)
        self.second.weight = nn.Parameter(torch.randn(3, 3))
        self.second.bias = self.first.bias
        self.plain = torch.linspace(0, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(x) * torch.tensor([1.0, 2.0, 3.0]) + self.plain
        return self.last(self.second(x).relu())  # type: ignore[no-any-return]


class Versioned(nn.Module):
    """Has a version, and reads no state dict without one."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.inner = Counted(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).relu()  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *more: Any) -> None:
        assert metadata["version"] == 3
        super()._load_from_state_dict(state, prefix, metadata, *more)


class Counted(nn.Linear):
    """Has extra state."""

    _version = 2

    def get_extra_state(self) -> dict[str, Any]:
        return {"steps": 7}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert state == {"steps": 7}

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *more: Any) -> None:
        assert metadata["version"] == 2
        super()._load_from_state_dict(state, prefix, metadata, *more)


class Renamed(nn.Linear):
    """Saves its bias under another name."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}shift"] = destination.pop(f"{prefix}bias")

    def _load_from_state_dict(self, state: Any, prefix: str, *more: Any) -> None:
        state[f"{prefix}bias"] = state.pop(f"{prefix}shift")
        super()._load_from_state_dict(state, prefix, *more)


@pytest.mark.parametrize(
    ("route", "make"), crossed(ROUTES, [Constants, Versioned, lambda: Counted(4, 2), lambda: Renamed(4, 2)])
)
def test_the_state_dict_is_that_of_the_class(route: str, make: Callable[[], nn.Module]) -> None:
    model, fresh, x = Routed(route, make()).eval(), Routed(route, make()).eval(), torch.randn(3, 4)
    emitted = emit(model, x, route=route)
    saved = emitted.state_dict()
    assert list(saved) == list(model.state_dict())
    assert saved._metadata == model.state_dict()._metadata
    fresh.load_state_dict(saved)
    torch.testing.assert_close(emitted(x), fresh(x))
    again = duplicate(emitted)
    assert list(again.state_dict()) == list(saved)
    assert again.state_dict()._metadata == saved._metadata


def test_extra_state_at_the_root() -> None:
    merged = fxmerge.merge(Counted(4, 2), Counted(4, 2), [torch.randn(8, 4)])
    assert merged.state_dict()["_extra_state"] == {"steps": 7}
    Counted(4, 2).load_state_dict(merged.state_dict())
    merged.load_state_dict(Counted(4, 2).state_dict())


def test_tied_parameters_stay_tied() -> None:
    emitted = emit(Constants(), torch.randn(2, 4))
    assert emitted.get_parameter("second.bias") is emitted.get_parameter("first.bias")
    assert emitted.get_submodule("again") is emitted.get_submodule("first")


@pytest.mark.slow
def test_what_is_emitted_can_be_merged_again() -> None:
    x = torch.randn(16, 4)
    for make in (Constants, Versioned):
        first, second = emit(make().eval(), x), emit(make().eval(), x)
        merged = fxmerge.merge(first, second, [x])
        assert list(merged.state_dict()) == list(make().state_dict())
        assert merged.state_dict()._metadata == make().state_dict()._metadata
        make().load_state_dict(merged.state_dict())


def test_an_exported_program_keeps_its_keys() -> None:
    model, x = Constants().eval(), torch.randn(3, 4)
    emitted = emit(torch.export.export(model, (x,)), x)  # type: ignore[arg-type]
    fresh = Constants()
    fresh.load_state_dict(emitted.state_dict())
    torch.testing.assert_close(emitted(x), fresh(x))


def test_constants_move_along_with_the_module() -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(steer("export", x)) * torch.tensor([1.0, 2.0])

    assert {b.dtype for b in emit(Shifted(3, 2), torch.randn(4, 3)).double().buffers()} == {torch.float64}


# ------------------------------------------------------------------------------------ pickles


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_emitted_can_be_saved(route: str) -> None:
    x = torch.randn(3, 4)
    emitted = emit(Routed(route, nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2))), x, route=route)
    file = io.BytesIO()
    torch.save(emitted, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), emitted(x))


def test_a_class_that_cannot_be_imported_is_not_in_the_pickle() -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)  # type: ignore[no-any-return]

    for route in ("symbolic", "export"):
        torch.save(emit(Routed(route, nn.Sequential(Local())), torch.randn(2, 4), route=route), io.BytesIO())


def test_a_copy_of_a_whole_model_has_tensors_of_its_own() -> None:
    x = torch.randn(3, 4)
    emitted = emit(Routed("whole", Standardized()), x, route="whole")
    for other in (duplicate(emitted), copy.deepcopy(emitted)):
        expected = emitted(x)
        assert list(other.state_dict()) == list(emitted.state_dict())
        for tensor in other.state_dict().values():
            tensor.zero_()
        torch.testing.assert_close(emitted(x), expected)
        assert not torch.equal(other(x), expected)
    emitted.double()
    assert emitted(x.double()).dtype == torch.float64


# ------------------------------------------------------------------------------------ training


class Trained(nn.Module):
    """Dropout in all its forms, and BatchNorm as a function."""

    mean: Tensor
    variance: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.drop, self.norm = kind, nn.Dropout(0.5), nn.BatchNorm1d(4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "module":
            return self.drop(x)  # type: ignore[no-any-return]
        if self.kind == "function":
            return F.dropout(x, 0.5, self.training)
        if self.kind == "torch":
            return torch.dropout(x, 0.5, train=self.training)
        if self.kind == "attention":
            p = 0.5 if self.training else 0.0
            heads = x.reshape(-1, 1, 4, 1)
            return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=p).reshape(-1, 4)
        if self.kind == "norm":
            return self.norm(x)  # type: ignore[no-any-return]
        return F.batch_norm(x, self.mean, self.variance, training=self.training and self.kind == "norm function")


@pytest.mark.parametrize(("route", "kind"), crossed(ROUTES, ["module", "function", "torch", "attention"]))
def test_dropout_follows_the_mode(route: str, kind: str) -> None:
    x = torch.randn(32, 4)
    emitted = emit(Routed(route, nn.Sequential(nn.Linear(4, 4), Trained(kind))), x, route=route)
    torch.testing.assert_close(emitted(x), emitted(x))
    emitted.train()
    assert not torch.equal(emitted(x), emitted(x))
    emitted.eval()
    torch.testing.assert_close(emitted(x), emitted(x))


@pytest.mark.parametrize(("route", "kind"), crossed(ROUTES, ["norm", "norm function", "frozen"]))
def test_batch_norm_follows_the_mode_of_the_model(route: str, kind: str) -> None:
    x = torch.randn(32, 4) * 3 + 1
    model = Routed(route, Trained(kind))
    emitted = emit(model, x, route=route)
    for module in (model, emitted):
        module.train()
    torch.testing.assert_close(emitted(x), model(x))
    for module in (model, emitted):
        module.eval()
    torch.testing.assert_close(emitted(x), model(x))  # Statistics have moved alike.


@pytest.mark.parametrize("route", ROUTES)
def test_training_goes_on(route: str) -> None:
    torch.manual_seed(3)
    x = torch.randn(64, 4)
    nets = [Routed(route, nn.Sequential(nn.Linear(4, 4), Trained("function"), nn.Linear(4, 2))) for _ in range(2)]
    merged = fxmerge.merge(*nets, [x]).train()
    optimizer = torch.optim.SGD(merged.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = merged(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_other_ops_in_training_mode_change_nothing() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                x = F.dropout(self.b(x), 0.5, True)
            return F.dropout(self.a(x), 0.5, self.training)

    x = torch.randn(32, 4)
    emitted = emit(Auxiliary(), x).train()
    torch.testing.assert_close(emitted(x), emitted(x))


# ------------------------------------------------------------------------------------ sizes and buffers that change


def test_sizes_for_which_an_exported_graph_does_not_hold_are_refused() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if x.shape[0] > 4 else 1)

    emitted = emit(Doubled(3, 2), torch.randn(8, 3), route="export")
    assert emitted(torch.randn(6, 3)).shape == (6, 2)
    with pytest.raises(AssertionError, match=r"x.size\(\)\[0\] >= 5"):
        emitted(torch.randn(4, 3))
    torch.save(emitted, io.BytesIO())


@pytest.mark.parametrize("route", ["symbolic", "export", "whole"])
def test_buffers_that_a_forward_assigns_are_assigned(route: str) -> None:
    class Counts(nn.Linear):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__(4, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) / self.calls

    model, x = Routed(route, Counts()).eval(), torch.randn(3, 4)
    emitted = emit(model, x)
    for _ in range(3):
        torch.testing.assert_close(emitted(x), model(x))
    assert emitted.state_dict()["body.calls"] == 3


def test_arguments_that_a_decorator_fills_in_are_passed_by_name() -> None:
    def filled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(forward)
        def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            return forward(self, *args, **{**kwargs, "scale": kwargs.get("scale") or 2.0})

        return wrapper

    class Decorated(nn.Linear):
        @filled
        def forward(
            self, x: Tensor, shift: Tensor | None = None, scale: float | None = None, *, sign: int = 1
        ) -> Tensor:
            y = super().forward(steer("whole", x)) * scale * sign
            return y if shift is None else y + shift

    model, x = Decorated(4, 2), torch.randn(3, 4)
    emitted = emit(model, x, route="whole")
    torch.testing.assert_close(emitted(x), model(x))
    torch.testing.assert_close(emitted(x, x[:, :2], sign=-1), model(x, x[:, :2], sign=-1))


def after_add(x: Tensor) -> Tensor:
    y = x + 1
    y.mul_(2)
    return y * y.relu_()


def through_view(x: Tensor) -> Tensor:
    y = x + 1
    y[:, :1].mul_(3)
    return y


def read_again(x: Tensor) -> Tensor:
    y = x.exp()
    z = y.neg_()
    return y + z


def of_input(x: Tensor) -> Tensor:
    return (x * 1).view(3, 4).relu_() + x.clone().tanh_().add_(x, alpha=2)


@pytest.mark.parametrize(
    ("function", "left"),
    [(after_add, []), (through_view, ["mul_"]), (read_again, []), (of_input, ["relu_"])],
)
def test_writes_in_place_are_taken_out_where_nothing_sees_them(
    function: Callable[[Tensor], Tensor], left: list[str]
) -> None:
    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    x = torch.randn(3, 4)
    module = torch.export.export(Calls(), (x,)).module()
    assert isinstance(module, fx.GraphModule)
    write_out_of_place(module.graph)
    module.recompile()
    assert [n.target._schema.name.partition("::")[2] for n in module.graph.nodes if writes(n)] == left
    torch.testing.assert_close(module(x.clone()), function(x.clone()))
