"""Refitting: exact where the answer is known, never worse where there is nothing to learn, and within its memory."""

import math
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxmerge
from fxmerge.capture import capture_program
from fxmerge.errors import LoaderError, NonFiniteError, OptionError
from fxmerge.refitting.refit import Lesson, refit
from fxmerge.run import Runner
from tests.networks import NETS, Attentive, Convolutional, Mixing, mlp, pictures, vectors
from tests.slow import but_slow, crossed

merge = partial(fxmerge.merge, or_parent=False)


EACH = pytest.mark.parametrize("name", NETS)


def copy_of(net: nn.Module, x: Tensor, seed: int, build: Callable[[int], nn.Module]) -> nn.Module:
    twin = build(seed)
    symmetry = fxmerge.find_symmetry(net, (x,))
    twin.load_state_dict(symmetry.sample(torch.Generator().manual_seed(seed)).apply(net.state_dict()))
    return twin


def error(merged: nn.Module, parents: list[nn.Module], data: list[Tensor]) -> float:
    """How far a merged network's outputs are from the mean of its parents', squared."""
    x = torch.cat(data)
    with torch.no_grad():
        return float((merged(x) - torch.stack([p(x) for p in parents]).mean(0)).square().mean())


@pytest.mark.parametrize(("name", "method"), crossed(NETS, ["align", "zip"]))
def test_permuted_copies_give_the_network_back(name: str, method: Any) -> None:
    build, batches = NETS[name]
    net, data = build(0), batches()
    merged = merge(net, copy_of(net, data[0], 1, build), data, method=method)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "method"), crossed(NETS, ["align", "zip"]))
def test_a_refitted_merge_is_nearer_to_its_parents_than_their_average(name: str, method: Any) -> None:
    build, batches = NETS[name]
    parents, data = [build(0), build(1)], batches()
    errors = {
        combine: error(merge(*parents, data, method=method, combine=combine), parents, data)
        for combine in ("average", "readout", "least_squares")
    }
    assert errors["readout"] < errors["average"]
    assert errors["least_squares"] < errors["average"]


@EACH
def test_all_layers_are_found_and_reported(name: str) -> None:
    build, batches = NETS[name]
    net = build(0)
    layers = merge(net, build(1), batches()).meta["fxmerge"]["layers"]
    modules = {n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))}
    assert {f"{n}.weight" for n in modules} <= layers.keys()
    for told in layers.values():
        assert 0 <= told["after"] <= told["before"] * (1 + 1e-9)
        assert 0 <= told["rank"] <= told["features"]
        assert told["rows"] > 0


def test_only_the_last_layer_is_refitted_as_a_readout() -> None:
    merged = merge(Convolutional(0), Convolutional(1), pictures(), combine="readout")
    averaged = merge(Convolutional(0), Convolutional(1), pictures(), combine="average")
    assert set(merged.meta["fxmerge"]["layers"]) == {"head.weight"}
    same = {k for k, v in merged.state_dict().items() if torch.equal(v, averaged.state_dict()[k])}
    assert same == merged.state_dict().keys() - {"head.weight", "head.bias"}


def test_the_first_layer_is_the_mean_as_its_inputs_are_the_same() -> None:
    a, b = mlp(0), mlp(1)
    averaged, refitted = (merge(a, b, vectors(), combine=c) for c in ("average", "least_squares"))
    for name in list(a.state_dict())[:2]:
        torch.testing.assert_close(refitted.state_dict()[name], averaged.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_layer_is_the_least_squares_fit_of_the_features_before_it() -> None:
    a, b = (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double() for _ in range(2))
    g = torch.Generator().manual_seed(0)
    data = [torch.randn(400, 5, generator=g, dtype=torch.float64) for _ in range(4)]
    merged = merge(a, b, data, method="align")
    x = torch.cat(data)
    with torch.no_grad():
        features = torch.cat([torch.tanh(getattr(merged, "0")(x)), torch.ones(len(x), 1)], 1)
        target = (a(x) + b(x)) / 2
        best = torch.linalg.lstsq(features, target).solution
        least = float((features @ best - target).square().mean())
    assert error(merged, [a, b], data) < 1.05 * least


def test_memory_beyond_the_budget_goes_to_disk_and_changes_nothing() -> None:
    a, b, data = Convolutional(0), Convolutional(1), pictures()
    whole, little = (merge(a, b, data, max_memory=gib) for gib in (4.0, 1e-6))
    assert all(torch.equal(v, little.state_dict()[k]) for k, v in whole.state_dict().items())


def test_every_model_teaches_on_its_own_data() -> None:
    g = torch.Generator().manual_seed(0)
    loaders = [[torch.randn(64, 64, generator=g) + shift for _ in range(4)] for shift in (-1, 1)]
    a, b = mlp(0), mlp(1)

    def missed(merged: nn.Module) -> float:
        return sum(error(merged, [net], own) for net, own in zip((a, b), loaders, strict=True))

    own = merge(a, b, loaders=loaders)
    joint = merge(a, b, [*loaders[0], *loaders[1]])
    assert missed(own) < missed(joint)


def test_a_tied_weight_is_fitted_from_all_of_its_uses() -> None:
    class Tied(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.stem, self.cell, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.stem(x))
            for _ in range(3):
                h = torch.tanh(self.cell(h))
            out: Tensor = self.head(h)
            return out

    g = torch.Generator().manual_seed(0)
    a, b, data = Tied(0), Tied(1), [torch.randn(256, 3, generator=g) for _ in range(4)]
    refitted, averaged = (merge(a, b, data, combine=c) for c in ("least_squares", "average"))
    assert refitted.meta["fxmerge"]["layers"]["cell.weight"]["rows"] == 3 * 1024
    assert error(refitted, [a, b], data) < error(averaged, [a, b], data)


@pytest.mark.parametrize("cell", but_slow([nn.RNN, nn.GRU, nn.LSTM]))
def test_recurrent_layers_are_refitted(cell: Callable[..., nn.Module]) -> None:
    class Recurrent(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.cell, self.out = cell(3, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.cell(x)[0])
            return out

    g = torch.Generator().manual_seed(0)
    a, b, data = Recurrent(0), Recurrent(1), [torch.randn(64, 6, 3, generator=g) for _ in range(4)]
    merged = {c: merge(a, b, data, combine=c) for c in ("average", "readout", "least_squares")}
    assert {"cell.weight_ih_l0", "cell.weight_hh_l0"} <= merged["least_squares"].meta["fxmerge"]["layers"].keys()
    errors = {c: error(m, [a, b], data) for c, m in merged.items()}
    assert max(errors["least_squares"], errors["readout"]) < errors["average"]
    again = merge(a, copy_of(a, data[0], 1, Recurrent), data)
    for key, value in a.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_dead_units_and_few_inputs_leave_the_average_where_nothing_is_known() -> None:
    a, b = (nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3)) for _ in range(2))
    with torch.no_grad():
        for net in (a, b):
            net[0].bias[:8] = -100.0
    data = [torch.randn(5, 4, generator=torch.Generator().manual_seed(0))]
    refitted, averaged = (merge(a, b, data, method="align", combine=c) for c in ("least_squares", "average"))
    dead = getattr(averaged, "0").bias < -40
    assert int(dead.sum()) >= 8
    same = getattr(refitted, "2").weight[:, dead], getattr(averaged, "2").weight[:, dead]
    torch.testing.assert_close(*same)
    assert error(refitted, [a, b], data) <= error(averaged, [a, b], data)


def test_the_dtype_is_kept() -> None:
    a, b = mlp(0).bfloat16(), mlp(1).bfloat16()
    merged = merge(a, b, [x.bfloat16() for x in vectors()])
    assert {v.dtype for v in merged.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "sum"}, "combine is 'sum'"),
        ({"method": "auto", "combine": "average"}, "method is 'auto', which compares refits"),
        ({"method": "auto", "loader": None}, "method is 'auto', which compares refits"),
        ({"combine": "least_squares", "loader": None}, "needs data"),
        ({"max_memory": 0}, "max_memory is 0"),
        ({"loaders": [[], []]}, "Both loader and loaders"),
        ({"loader": None, "loaders": [[]]}, "loaders has 1 entries for 2 models"),
        ({"base": mlp(2), "combine": "readout"}, "knows no base"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        merge(mlp(0), mlp(1), **{"loader": vectors(), "args": (vectors()[0],)} | options)


def test_an_empty_loader_of_one_model_is_named() -> None:
    with pytest.raises(LoaderError, match="loader of model B is empty"):
        merge(mlp(0), mlp(1), loaders=[vectors(), []])


def test_an_activation_that_is_no_number_is_refused_with_the_name_of_the_layer() -> None:
    class Logarithm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log()

    a, b = (nn.Sequential(nn.Linear(4, 8), Logarithm(), nn.Linear(8, 3)) for _ in range(2))
    with pytest.raises(NonFiniteError, match=r"'2\.weight'"):
        merge(a, b, [torch.randn(16, 4)], alpha=1)


def test_what_is_not_refitted_is_told_with_the_reason() -> None:
    told = merge(Attentive(0), Attentive(1), pictures()).meta["fxmerge"]
    assert set(told["left"]) == {"norm.weight", "norm.bias"}
    assert "layer_norm" in told["left"]["norm.weight"]


def test_layers_over_whose_rows_merged_units_lie_are_refitted() -> None:
    told = merge(Mixing(0), Mixing(1), pictures(), method="zip").meta["fxmerge"]
    assert told["left"] == {}
    assert told["layers"]["places.weight"]["held_out"] < told["layers"]["places.weight"]["before"]


def test_a_layer_that_is_added_to_something_makes_up_for_what_that_is_off() -> None:
    class Stream(nn.Module):
        """What is averaged wrongly, the square of a parameter, is within reach of the layer beside it."""

        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.scale, self.layer, self.last = nn.Parameter(torch.randn(6)), nn.Linear(6, 6), nn.Linear(6, 6)
            with torch.no_grad():
                self.last.weight.copy_(torch.eye(6))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last((x * self.scale**2 + self.layer(x)).exp())
            return out

    x = [torch.randn(64, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    a, b = Stream(0), Stream(1)
    merged = merge(a, b, x, method="align").state_dict()
    wanted = sum(m.scale.diag() ** 2 + m.layer.weight for m in (a, b)).detach() / 2
    reached = merged["scale"].diag() ** 2 + merged["layer.weight"]
    torch.testing.assert_close(reached, wanted, atol=1e-3, rtol=1e-3)
    averaged = ((a.scale + b.scale) / 2).diag().detach() ** 2 + sum(m.layer.weight for m in (a, b)).detach() / 2
    assert (averaged - wanted).abs().max() > 0.1


@pytest.mark.parametrize("first", but_slow([0, 2, 4]))
def test_of_two_methods_that_with_the_smaller_error_is_taken(first: int) -> None:
    a, b = Convolutional(first), Convolutional(first + 1)
    found = {method: merge(a, b, pictures(), method=method) for method in ("zip", "align", "auto")}
    told = found["auto"].meta["fxmerge"]
    errors = {m: found[m].meta["fxmerge"]["layers"]["head.weight"]["held_out"] for m in ("zip", "align")}
    assert told["method_errors"] == pytest.approx(errors)
    assert told["method"] == min(errors, key=lambda m: errors[m])
    torch.testing.assert_close(found["auto"].state_dict(), found[told["method"]].state_dict())


def test_what_no_stage_needs_any_more_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chain of ops, only what the next one reads is held, beside what all batches of all networks keep."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), *(nn.Tanh() for _ in range(8)), nn.Linear(64, 3))
    batch = torch.randn(50, 1, 8, 8)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0
    compute = Runner.run_node

    def counted(self: Runner, node: fx.Node) -> Any:
        nonlocal most
        found = compute(self, node)
        if isinstance(found, Tensor) and len(found) == len(batch):
            alive.add(found)
            most = max(most, len(alive))
        return found

    monkeypatch.setattr(Runner, "run_node", counted)
    program = capture_program(net, (batch,))
    most = 0
    refit(program, [net.state_dict()] * 2, net.state_dict(), [Lesson(((batch,), {}), (0.5, 0.5), 1.0)] * 3)
    assert most == 3 * 3 + 2


def test_both_methods_are_made_of_one_pass_over_the_activations() -> None:
    """The data are read once more than for a zip alone, by the second refit."""

    class Counted:
        """Batches that tell how often they were read."""

        def __init__(self) -> None:
            self.times = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.times += 1
            return iter(pictures())

    times = {}
    for method in ("zip", "auto"):
        loader = Counted()
        merge(Convolutional(0), Convolutional(1), loader, method=method)
        times[method] = loader.times
    assert times["auto"] == times["zip"] + 1


def test_a_method_that_leaves_a_last_layer_is_not_taken() -> None:
    class Last(nn.Module):
        """The last layer is over tokens; its rows are channels."""

        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.channels, self.tokens = nn.Linear(2, 8), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.channels(x.flatten(2).transpose(1, 2)))
            out: Tensor = self.tokens(x.transpose(1, 2)).mean(1)
            return out

    zipped, either = (merge(Last(0), Last(1), pictures(), method=m).meta["fxmerge"] for m in ("zip", "auto"))
    assert "no layer after it" in zipped["left"]["tokens.weight"]
    assert either["method"] == "align"
    assert math.isnan(either["method_errors"]["zip"])


def test_one_batch_of_each_models_own_data_is_enough_to_choose_a_ridge() -> None:
    apart = [[torch.randn(400, 1, 8, 8, generator=torch.Generator().manual_seed(k))] for k in range(2)]
    _, *later = merge(mlp(0), mlp(1), loaders=apart).meta["fxmerge"]["layers"].values()
    assert len(later) == 2
    assert all(told["ridge"] < 1 and told["after"] < 0.9 * told["before"] for told in later)
