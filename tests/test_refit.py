"""Refitting: exact where the answer is known, never worse where there is nothing to learn, and within its memory."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxmerge
from fxmerge.errors import LoaderError, NonFiniteError, OptionError
from fxmerge.program.capture import capture_program
from fxmerge.program.run import Runner
from fxmerge.refitting.course import Lesson
from fxmerge.refitting.refit import refit
from tests.networks import NETS, Attentive, Convolutional, Mixing, mlp, pictures, vectors
from tests.slow import but_slow, crossed

MATCH: dict[str, fxmerge.Align | fxmerge.Zip] = {"align": fxmerge.Align(), "zip": fxmerge.Zip()}
FITS: dict[str, fxmerge.LeastSquares | fxmerge.Readout | None] = {
    "average": None,
    "readout": fxmerge.Readout(),
    "least_squares": fxmerge.LeastSquares(),
}


EACH = pytest.mark.parametrize("name", NETS)


def copy_of(net: nn.Module, x: Tensor, seed: int, build: Callable[[int], nn.Module]) -> nn.Module:
    twin = build(seed)
    symmetry = fxmerge.find_symmetry(net, (x,))
    twin.load_state_dict(symmetry.sample_permutation(torch.Generator().manual_seed(seed)).apply(net.state_dict()))
    return twin


def error(merged: nn.Module, parents: list[nn.Module], data: list[Tensor]) -> float:
    """How far a merged network's outputs are from the mean of its parents', squared."""
    x = torch.cat(data)
    with torch.no_grad():
        return float((merged(x) - torch.stack([p(x) for p in parents]).mean(0)).square().mean())


@pytest.mark.parametrize(("name", "match"), crossed(NETS, MATCH.values()))
def test_permuted_copies_give_the_network_back(name: str, match: fxmerge.Align | fxmerge.Zip) -> None:
    build, batches = NETS[name]
    net, data = build(0), batches()
    merged = fxmerge.merge(net, copy_of(net, data[0], 1, build), data, fxmerge.Recipe(match=match))
    for key, value in net.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "match"), crossed(NETS, MATCH.values()))
def test_a_refitted_merge_is_nearer_to_its_parents_than_their_average(
    name: str, match: fxmerge.Align | fxmerge.Zip
) -> None:
    build, batches = NETS[name]
    parents, data = [build(0), build(1)], batches()
    errors = {
        name: error(fxmerge.merge(*parents, data, fxmerge.Recipe(match=match, fit=fit)), parents, data)
        for name, fit in FITS.items()
    }
    assert errors["readout"] < errors["average"]
    assert errors["least_squares"] < errors["average"]


@EACH
def test_all_layers_are_found_and_reported(name: str) -> None:
    build, batches = NETS[name]
    net = build(0)
    layers = fxmerge.report(fxmerge.merge(net, build(1), batches())).layers
    modules = {n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))}
    assert {f"{n}.weight" for n in modules} <= layers.keys()
    for told in layers.values():
        assert 0 <= told["after"] <= told["before"] * (1 + 1e-9)
        assert 0 <= told["rank"] <= told["features"]
        assert told["rows"] > 0


def test_only_the_last_layer_is_refitted_as_a_readout() -> None:
    merged = fxmerge.merge(Convolutional(0), Convolutional(1), pictures(), fxmerge.Recipe(fit=fxmerge.Readout()))
    averaged = fxmerge.merge(Convolutional(0), Convolutional(1), pictures(), fxmerge.Recipe(fit=None))
    assert set(fxmerge.report(merged).layers) == {"head.weight"}
    same = {k for k, v in merged.state_dict().items() if torch.equal(v, averaged.state_dict()[k])}
    assert same == merged.state_dict().keys() - {"head.weight", "head.bias"}


@pytest.mark.slow
def test_the_first_layer_is_the_mean_as_its_inputs_are_the_same() -> None:
    a, b = mlp(0), mlp(1)
    averaged, refitted = (
        fxmerge.merge(a, b, vectors(), fxmerge.Recipe(fit=FITS[f])) for f in ("average", "least_squares")
    )
    for name in list(a.state_dict())[:2]:
        torch.testing.assert_close(refitted.state_dict()[name], averaged.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_layer_is_the_least_squares_fit_of_the_features_before_it() -> None:
    a, b = (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double() for _ in range(2))
    g = torch.Generator().manual_seed(0)
    data = [torch.randn(400, 5, generator=g, dtype=torch.float64) for _ in range(4)]
    merged = fxmerge.merge(a, b, data, fxmerge.Recipe(match=fxmerge.Align()))
    x = torch.cat(data)
    with torch.no_grad():
        features = torch.cat([torch.tanh(getattr(merged, "0")(x)), torch.ones(len(x), 1)], 1)
        target = (a(x) + b(x)) / 2
        best = torch.linalg.lstsq(features, target).solution
        least = float((features @ best - target).square().mean())
    assert error(merged, [a, b], data) < 1.05 * least


@pytest.mark.slow
def test_memory_beyond_the_budget_goes_to_disk_and_changes_nothing() -> None:
    a, b, data = Convolutional(0), Convolutional(1), pictures()
    whole, little = (fxmerge.merge(a, b, data, run=fxmerge.Run(memory=gib)) for gib in (4.0, 1e-6))
    assert all(torch.equal(v, little.state_dict()[k]) for k, v in whole.state_dict().items())


def test_every_model_teaches_on_its_own_data() -> None:
    g = torch.Generator().manual_seed(0)
    loaders = [[torch.randn(64, 64, generator=g) + shift for _ in range(4)] for shift in (-1, 1)]
    a, b = mlp(0), mlp(1)

    def missed(merged: nn.Module) -> float:
        return sum(error(merged, [net], own) for net, own in zip((a, b), loaders, strict=True))

    own = fxmerge.merge(a, b, loaders=loaders)
    joint = fxmerge.merge(a, b, [*loaders[0], *loaders[1]])
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
    refitted, averaged = (fxmerge.merge(a, b, data, fxmerge.Recipe(fit=FITS[f])) for f in ("least_squares", "average"))
    assert fxmerge.report(refitted).layers["cell.weight"]["rows"] == 3 * 1024
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
    merged = {name: fxmerge.merge(a, b, data, fxmerge.Recipe(fit=fit)) for name, fit in FITS.items()}
    assert {"cell.weight_ih_l0", "cell.weight_hh_l0"} <= fxmerge.report(merged["least_squares"]).layers.keys()
    errors = {c: error(m, [a, b], data) for c, m in merged.items()}
    assert max(errors["least_squares"], errors["readout"]) < errors["average"]
    again = fxmerge.merge(a, copy_of(a, data[0], 1, Recurrent), data)
    for key, value in a.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_dead_units_and_few_inputs_leave_the_average_where_nothing_is_known() -> None:
    a, b = (nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3)) for _ in range(2))
    with torch.no_grad():
        for net in (a, b):
            net[0].bias[:8] = -100.0
    data = [torch.randn(5, 4, generator=torch.Generator().manual_seed(0))]
    recipe = fxmerge.Recipe(match=fxmerge.Align())
    refitted, averaged = (fxmerge.merge(a, b, data, replace(recipe, fit=FITS[f])) for f in ("least_squares", "average"))
    dead = getattr(averaged, "0").bias < -40
    assert int(dead.sum()) >= 8
    same = getattr(refitted, "2").weight[:, dead], getattr(averaged, "2").weight[:, dead]
    torch.testing.assert_close(*same)
    assert error(refitted, [a, b], data) <= error(averaged, [a, b], data)


def test_the_dtype_is_kept() -> None:
    a, b = mlp(0).bfloat16(), mlp(1).bfloat16()
    merged = fxmerge.merge(a, b, [x.bfloat16() for x in vectors()])
    assert {v.dtype for v in merged.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"recipe": fxmerge.Recipe(fit=fxmerge.LeastSquares()), "loader": None},
            "fit is LeastSquares, which needs data",
        ),
        ({"loaders": [[], []]}, "Both loader and loaders"),
        ({"loader": None, "loaders": [[]]}, "loaders has 1 entries for 2 models"),
        ({"base": mlp(2), "recipe": fxmerge.Recipe(fit=fxmerge.Readout())}, "knows no base"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        fxmerge.merge(mlp(0), mlp(1), **{"loader": vectors(), "example": vectors()[0]} | options)


def test_an_empty_loader_of_one_model_is_named() -> None:
    with pytest.raises(LoaderError, match="loader of model B is empty"):
        fxmerge.merge(mlp(0), mlp(1), loaders=[vectors(), []])


def test_an_activation_that_is_no_number_is_refused_with_the_name_of_the_layer() -> None:
    class Logarithm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log()

    a, b = (nn.Sequential(nn.Linear(4, 8), Logarithm(), nn.Linear(8, 3)) for _ in range(2))
    with pytest.raises(NonFiniteError, match=r"'2\.weight'"):
        fxmerge.merge(a, b, [torch.randn(16, 4)], fxmerge.Recipe(match=fxmerge.Zip(alpha=1)))


def test_what_is_not_refitted_is_told_with_the_reason() -> None:
    told = fxmerge.report(fxmerge.merge(Attentive(0), Attentive(1), pictures()))
    assert set(told.left) == {"norm.weight", "norm.bias"}
    assert told.left["norm.weight"] == "the layers that read what it gives are fitted"


def test_layers_over_whose_rows_merged_units_lie_are_refitted() -> None:
    told = fxmerge.report(fxmerge.merge(Mixing(0), Mixing(1), pictures(), fxmerge.Recipe(match=fxmerge.Zip())))
    assert told.left == {}
    assert told.layers["places.weight"]["held_out"] < told.layers["places.weight"]["before"]


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
    merged = fxmerge.merge(a, b, x, fxmerge.Recipe(match=fxmerge.Align())).state_dict()
    wanted = sum(m.scale.diag() ** 2 + m.layer.weight for m in (a, b)).detach() / 2
    reached = merged["scale"].diag() ** 2 + merged["layer.weight"]
    torch.testing.assert_close(reached, wanted, atol=1e-3, rtol=1e-3)
    averaged = ((a.scale + b.scale) / 2).diag().detach() ** 2 + sum(m.layer.weight for m in (a, b)).detach() / 2
    assert (averaged - wanted).abs().max() > 0.1


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


@pytest.mark.parametrize(
    ("match", "passes"),
    crossed(MATCH.values(), [(None, 3), (fxmerge.LeastSquares(), 4), (fxmerge.Readout(), 4)]),
)
def test_data_are_read_once_for_the_activations_and_once_for_the_fit(match: Any, passes: tuple[Any, int]) -> None:
    fit, times = passes
    """And before, for the first batch and for the shapes of all."""

    class Counted:
        """Batches that tell how often they were read."""

        def __init__(self) -> None:
            self.times = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.times += 1
            yield from pictures()

    loader = Counted()
    fxmerge.merge(Convolutional(0), Convolutional(1), loader, fxmerge.Recipe(match=match, fit=fit))
    assert loader.times == times


def test_a_zip_leaves_a_last_layer_over_tokens_and_an_alignment_fits_it() -> None:
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

    aligned, zipped = (
        fxmerge.report(fxmerge.merge(Last(0), Last(1), pictures(), fxmerge.Recipe(match=match)))
        for match in MATCH.values()
    )
    assert "no layer after it" in zipped.left["tokens.weight"]
    assert (aligned.held_out, zipped.held_out) == (True, False)
    assert "tokens.weight" in aligned.layers and aligned.left == {}


def test_one_batch_of_each_models_own_data_is_enough_to_choose_a_ridge() -> None:
    apart = [[torch.randn(400, 1, 8, 8, generator=torch.Generator().manual_seed(k))] for k in range(2)]
    recipe = fxmerge.Recipe(fit=fxmerge.LeastSquares(own=0.5))
    _, *later = fxmerge.report(fxmerge.merge(mlp(0), mlp(1), recipe=recipe, loaders=apart)).layers.values()
    assert len(later) == 2
    assert all(told["ridge"] < 1 and told["after"] < 0.9 * told["before"] for told in later)
