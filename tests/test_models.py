"""What may be given as a model: wrappers are seen through, mistakes are told, and calls leave no trace."""

import copy
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import fxmerge
from fxmerge import inspection
from fxmerge.program.models import apart, run
from tests.slow import but_slow, crossed

X = torch.randn(16, 3)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))


WRAP: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": torch.compile,
    "data-parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "compiled, data-parallel": lambda m: torch.compile(nn.DataParallel(m)),
    "averaged, compiled": lambda m: AveragedModel(torch.compile(m)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", but_slow(WRAP, 1))
def test_wrappers_are_seen_through(kind: str) -> None:
    wrapped, plain = WRAP[kind](net(1)), net(0)
    merged = fxmerge.merge(wrapped, plain, [X])
    assert list(merged.state_dict()) == list(plain.state_dict())
    expected = fxmerge.merge(net(1), plain, [X]).state_dict()
    assert all(torch.equal(expected[n], t) for n, t in merged.state_dict().items())
    symmetry = fxmerge.find_symmetry(wrapped, (X,)).verify(wrapped, (X,))
    assert symmetry.names == ("0.weight[0]",) and not symmetry.demoted
    assert fxmerge.explain(wrapped, (X,)) == fxmerge.explain(net(1), (X,))
    assert list(fxmerge.capture(wrapped, (X,)).state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(fxmerge.align(wrapped, to=plain, example=X)(X), net(1)(X))


def test_distributed_models_are_seen_through(tmp_path: Path) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net(1))
        assert list(fxmerge.merge(wrapped, net(0), [X]).state_dict()) == list(net().state_dict())
    finally:
        dist.destroy_process_group()


def quantized() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), torch.ao.nn.quantized.dynamic.Linear(6, 2))


def stored_in_eight_bits() -> nn.Module:
    model = net()
    model.register_buffer("table", torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8))
    return model


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "state dict": (lambda: net().state_dict(), "is a OrderedDict, not a module; .*load_state_dict"),
    "dict": (lambda: dict(net().state_dict()), "is a dict, not a module"),
    "text": (lambda: "checkpoint.pt", r"is the path 'checkpoint\.pt'; build the module and load it"),
    "path": (lambda: Path("checkpoint.pt"), r"is the path 'checkpoint\.pt'"),
    "list": (lambda: [net(), net()], r"is a list of 2; .*fxmerge\.merge_many"),
    "class": (lambda: nn.Linear, "is the class Linear; pass an instance"),
    "function": (lambda: lambda x: x, r"is a function, which has no parameters; pass the torch\.nn\.Module"),
    "bound method": (lambda: net().forward, "is a method, which has no parameters"),
    "nothing": (lambda: None, r"is a NoneType; pass a torch\.nn\.Module"),
    "number": (lambda: 3, "is a int; pass"),
    "traced": (
        lambda: torch.jit.trace(net(), X),
        r"is a TopLevelTracedModule, which torch\.jit has compiled; pass the module that it was made from",
    ),
    "quantized": (quantized, r"is quantized \(its module '1' is a Linear\); merge the models first"),
    "stored in eight bits": (stored_in_eight_bits, r"has the parameter 'table', which is a tensor of torch\.qint8"),
}


@cache
def symmetry_of_net() -> fxmerge.Symmetry:
    return fxmerge.find_symmetry(net(), (X,))


@pytest.mark.filterwarnings("ignore")  # torch is about to remove some of these.
@pytest.mark.parametrize("kind", MISTAKES)
def test_what_is_no_model_is_refused_by_every_verb(kind: str) -> None:
    make, message = MISTAKES[kind]
    wrong, right, symmetry = make(), net(), symmetry_of_net()
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("[Mm]odel A", lambda: fxmerge.merge(wrong, right, [X])),
        ("[Mm]odel B", lambda: fxmerge.merge(right, wrong, [X])),
        ("[Mm]odel C", lambda: fxmerge.merge_many([right, right, wrong], [X])),
        ("[Mm]odel B", lambda: fxmerge.align(wrong, to=right, loader=[X])),
        ("The model", lambda: fxmerge.find_symmetry(wrong, (X,))),
        ("The model", lambda: fxmerge.explain(wrong, (X,))),
        ("The model", lambda: fxmerge.capture(wrong, (X,))),
        ("The model", lambda: inspection.inspect(wrong, (X,))),
        ("The model", lambda: symmetry.verify(wrong, (X,))),
    ]
    if wrong is not None:
        calls.append(("The base", lambda: fxmerge.merge(right, right, [X], base=wrong)))
    for called, call in calls:
        with pytest.raises(fxmerge.OptionError, match=f"^{called} {message}"):
            call()


def test_models_without_values() -> None:
    model, x = net().to("meta"), X.to("meta")
    with pytest.raises(fxmerge.OptionError, match="model A is on the meta device"):
        fxmerge.merge(model, net(), [X])
    with pytest.raises(fxmerge.OptionError, match="The model is on the meta device"):
        fxmerge.find_symmetry(model, (x,)).verify(model, (x,))


@pytest.mark.parametrize("args", [X, {"x": X}, "x"])
def test_example_inputs_are_a_tuple(args: Any) -> None:
    for call in (fxmerge.find_symmetry, fxmerge.explain, fxmerge.capture, fxmerge.find_symmetry(net(), (X,)).verify):
        with pytest.raises(fxmerge.OptionError, match=r"args is a \w+; give a tuple of the inputs, such as \(x,\)"):
            call(net(), args)  # type: ignore[operator]


def test_an_example_is_a_batch() -> None:
    expected = fxmerge.merge(net(0), net(1), example=X).state_dict()
    for batch in ((X, torch.zeros(len(X))), [X], {"input": X}):
        merged = fxmerge.merge(net(0), net(1), example=batch).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in merged.items())
    with pytest.raises(fxmerge.LoaderError, match="A batch is a str"):
        fxmerge.merge(net(0), net(1), example="x")


class Quiet(nn.Sequential):
    """Its methods return nothing, as many do."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)

    def eval(self) -> None:  # type: ignore[override]
        super().eval()


class Trainer(nn.Sequential):
    """Has methods of its own by the names of `nn.Module`'s."""

    def train(self, data: Any) -> Any:  # type: ignore[override]
        raise AssertionError("fxmerge trains nothing")

    def eval(self, data: Any) -> Any:  # type: ignore[override]
        raise AssertionError("fxmerge evaluates nothing")

    def parameters(self) -> Any:  # type: ignore[override]
        return "none of your business"


@pytest.mark.parametrize(("kind", "branch"), crossed([Quiet, Trainer], [False, True]))
def test_methods_of_the_users_own(kind: type[nn.Sequential], branch: bool) -> None:
    class Net(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Any:
            if branch and x.shape[1] > 2:
                x = x + 0
            return super().forward(x)

    a, b = Net(*net(0), nn.Dropout(0.5)), Net(*net(1), nn.Dropout(0.5))
    merged = fxmerge.merge(a, b, [X])
    assert torch.equal(merged(X), merged(X))  # In eval mode.
    assert all(m.training for m in (*a.modules(), *b.modules()))


class Noisy(nn.Module):
    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        if self.branch and x.shape[1] > 2:
            x = x + 0
        x = x + 0.5 * torch.randn_like(x)
        return self.b(torch.relu(self.a(x)) * torch.rand(()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("branch", but_slow([True, False]))
def test_forwards_that_draw_random_numbers(branch: bool) -> None:
    torch.manual_seed(0)
    a, b = Noisy(branch), Noisy(branch)
    before = torch.get_rng_state()
    first = fxmerge.merge(a, b, [X]).state_dict()
    assert torch.equal(torch.get_rng_state(), before)  # None was drawn from the user's generator.
    torch.manual_seed(1)
    second = fxmerge.merge(a, b, [X]).state_dict()
    assert all(torch.equal(first[n], second[n]) for n in first)


class Counting(nn.Module):
    """Changes buffers and attributes when it is called, also where it fails."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.branch = nn.Linear(3, 6), nn.Linear(6, 2), branch
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(1, 3), persistent=False)
        self.times, self.shapes = 0, list[Any]()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.copy_(x[:1].detach())
        self.times += 1
        self.shapes.append(x.shape)
        if self.branch and x.shape[1] > 2:
            x = x + 0
        return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]

    def trace(self) -> Any:
        return float(self.calls), self.seen.tolist(), self.times, len(self.shapes)


@pytest.mark.slow
@pytest.mark.parametrize("branch", but_slow([True, False]))
def test_no_call_modifies_a_model(branch: bool) -> None:
    a, b = Counting(branch), Counting(branch)
    untouched = a.trace()
    fxmerge.merge(a, b, [X])
    symmetry = fxmerge.find_symmetry(a, (X,)).verify(a, (X,))
    fxmerge.explain(a, (X,))
    fxmerge.align(a, to=b, loader=[X])
    for wrong in ([X[:, :2]], [X, X[:, :2]]):
        with pytest.raises(fxmerge.LoaderError):
            fxmerge.merge(a, b, wrong)
    with pytest.raises(fxmerge.CaptureError):
        fxmerge.find_symmetry(a, (X[:, :2],))
    assert a.trace() == b.trace() == untouched
    assert symmetry.names == ("a.weight[0]",)


@pytest.mark.slow
def test_results_do_not_depend_on_how_often_a_model_was_called() -> None:
    class Fades(Counting):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / (1 + self.calls)

    torch.manual_seed(0)
    a, b = Fades(), Fades()
    first = fxmerge.merge(a, b, [X]).state_dict()
    second = fxmerge.merge(copy.deepcopy(a), b, [X]).state_dict()
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_extra_state_of_any_kind() -> None:
    class Extra(nn.Linear):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.state: Any = {"version": 2, "name": "first"}

        def get_extra_state(self) -> Any:
            return self.state

        def set_extra_state(self, state: Any) -> None:
            self.state = state

    other = Extra(3, 2)
    other.state = torch.ones(3)  # Which is no parameter.
    merged = fxmerge.merge(nn.Sequential(Extra(3, 2)), nn.Sequential(other), [X])
    assert merged(X).shape == (16, 2)
    assert not fxmerge.find_symmetry(nn.Sequential(Extra(3, 2)), (X,)).verify(nn.Sequential(Extra(3, 2)), (X,)).demoted


def test_copies_share_parameters_only() -> None:
    model = Counting()
    copied = apart(model)
    assert copied.a.weight is model.a.weight and copied.calls is not model.calls
    assert torch.equal(run(model, (X,), {}), run(model, (X,), {})) and float(model.calls) == 0


def test_a_sharded_model_is_refused(tmp_path: Path) -> None:
    fsdp, dist = pytest.importorskip("torch.distributed.fsdp"), torch.distributed
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        sharded = net()
        fsdp.fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(fxmerge.OptionError, match="Model A is sharded by FSDP; gather"):
            fxmerge.merge(sharded, net(), [X])
    finally:
        dist.destroy_process_group()


def test_a_model_that_is_yet_to_be_quantized_is_an_ordinary_one() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 3)
            self.skip = torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.skip.add_relu(x, self.b(self.a(x).relu()))
            return y

    x = torch.randn(5, 3)
    merged = fxmerge.merge(Residual(), Residual(), [x])
    Residual().load_state_dict(merged.state_dict())
    assert fxmerge.find_symmetry(Residual(), (x,)).log_order() > 6
