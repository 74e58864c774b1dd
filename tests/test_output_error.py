"""How far outputs are from the mean of all models' outputs: of the merged network and of each model."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.matching.universe import canonical_order
from fxmerge.refitting.output_error import feature_rows
from tests.networks import mlp, vectors

RECIPES = {"zip": fxmerge.Recipe(), "align": fxmerge.Recipe(match=fxmerge.Align())}
EACH = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


def muted(net: nn.Module) -> nn.Module:
    """A network whose outputs are next to nothing."""
    with torch.no_grad():
        for parameter in list(net.parameters())[-2:]:
            parameter.mul_(1e-3)
    return net


def shares_missed(outputs: Sequence[Tensor], mean: Tensor) -> list[float]:
    """What outputs miss of the variance of a mean, features along the last dimension."""
    variance = (mean - mean.flatten(0, -2).mean(0)).abs().square().sum()
    return [float((own - mean).abs().square().sum() / variance) for own in outputs]


def assert_errors(merged: nn.Module, wanted: Sequence[float], *, rel: float = 1e-4) -> None:
    """Of the merged network, and of each model."""
    errors = fxmerge.report(merged).errors
    assert errors["merged"] == pytest.approx(wanted[0], rel=rel)
    assert errors["models"] == pytest.approx(dict(enumerate(wanted[1:])), rel=rel)


# -------------------------------------------------------------------------- last layers


@EACH
@torch.no_grad()
def test_errors_of_last_layers_are_those_of_the_outputs(recipe: fxmerge.Recipe) -> None:
    a, b, x = mlp(0), mlp(1), torch.cat(vectors())
    merged = fxmerge.merge(a, b, vectors(), recipe)
    told = fxmerge.report(merged)
    fitted, *models = shares_missed([merged(x), a(x), b(x)], (a(x) + b(x)) / 2)
    assert told.errors["models"] == pytest.approx(dict(enumerate(models)), rel=1e-3)
    # On rows that the last layer was not fitted to, it misses more than on those that it was.
    assert told.held_out
    assert fitted < told.errors["merged"] < 2 * fitted
    new = torch.cat([torch.randn_like(x, generator=None) for _ in range(5)])
    (unseen,) = shares_missed([merged(new)], (a(new) + b(new)) / 2)
    assert told.errors["merged"] == pytest.approx(unseen, rel=0.25)


@torch.no_grad()
def test_the_error_is_of_the_variance_and_not_of_the_square() -> None:
    """The held-out error of the last layer is a share of the square of the targets."""
    a, b, x = mlp(0), mlp(1), torch.cat(vectors())
    told = fxmerge.report(fxmerge.merge(a, b, vectors()))
    mean = (a(x) + b(x)) / 2
    ratio = float(mean.square().sum() / (mean - mean.mean(0)).square().sum())
    assert ratio > 1.01
    assert told.errors["merged"] == pytest.approx(ratio * told.layers["5.weight"]["held_out"], rel=1e-4)


@EACH
def test_a_constant_added_to_all_outputs_changes_nothing(recipe: fxmerge.Recipe) -> None:
    def lifted(net: nn.Module) -> nn.Module:
        with torch.no_grad():
            list(net.parameters())[-1].add_(torch.linspace(-20, 30, 10))
        return net

    plain = fxmerge.report(fxmerge.merge(mlp(0), mlp(1), vectors(), recipe))
    moved = fxmerge.report(fxmerge.merge(lifted(mlp(0)), lifted(mlp(1)), vectors(), recipe))
    assert moved.errors["merged"] == pytest.approx(plain.errors["merged"], rel=1e-2)
    assert moved.errors["models"] == pytest.approx(plain.errors["models"], rel=1e-3)
    assert moved.layers["5.weight"]["held_out"] < 0.1 * plain.layers["5.weight"]["held_out"]


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0)])
@torch.no_grad()
def test_it_is_told_that_a_model_is_nearer_and_the_merge_is_returned(
    numbers: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    telling, silent = mlp(0), muted(mlp(1))
    pair = [(telling, silent)[n] for n in numbers]
    quarter = fxmerge.Recipe(combine=fxmerge.Average([(0.9, 0.1)[n] for n in numbers]))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        merged = fxmerge.merge(*pair, vectors(), quarter)
    told, nearest = fxmerge.report(merged), numbers.index(0)
    assert told.errors["models"][nearest] < told.errors["merged"] < told.errors["models"][1 - nearest]
    assert f"Model {'AB'[nearest]} alone is nearer to the mean of all models' outputs than the merged" in caplog.text
    assert f"its squared distance is {told.errors['models'][nearest]:.3g} times their variance" in caplog.text
    assert len(told.layers) == 3
    x = torch.cat(vectors())
    assert all(not torch.allclose(merged(x), net(x), atol=1e-2) for net in pair)


@pytest.mark.parametrize("fit", [fxmerge.LeastSquares(), fxmerge.Readout()], ids=str)
def test_a_merged_network_that_is_nearer_is_no_warning(fit: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        told = fxmerge.report(fxmerge.merge(mlp(0), mlp(1), vectors(), fxmerge.Recipe(fit=fit)))
    assert 0 < told.errors["merged"] < min(told.errors["models"].values()) and told.held_out
    assert "nearer" not in caplog.text


def test_of_permuted_copies_none_misses_anything(caplog: pytest.LogCaptureFixture) -> None:
    net, twin = mlp(0), mlp(1)
    symmetry = fxmerge.find_symmetry(net, (vectors()[0],))
    twin.load_state_dict(symmetry.sample_permutation(torch.Generator().manual_seed(1)).apply(net.state_dict()))
    told = fxmerge.report(fxmerge.merge(net, twin, vectors()))
    assert max(told.errors["merged"], *told.errors["models"].values()) < 1e-6 and told.held_out
    assert "nearer" not in caplog.text


@pytest.mark.parametrize("fit", [None, fxmerge.Repair()], ids=str)
def test_what_is_not_fitted_is_not_measured(fit: Any) -> None:
    told = fxmerge.report(fxmerge.merge(mlp(0), mlp(1), vectors(), fxmerge.Recipe(fit=fit)))
    assert (told.errors, told.held_out) == ({}, False)


def test_a_model_that_does_not_count_has_no_error() -> None:
    recipe = fxmerge.Recipe(combine=fxmerge.Average((1, 0)))
    assert set(fxmerge.report(fxmerge.merge(mlp(0), mlp(1), vectors(), recipe)).errors["models"]) == {0}


@torch.no_grad()
def test_models_keep_their_numbers_where_they_are_worked_on_in_another_order() -> None:
    models = [mlp(k) for k in (0, 2, 1)]
    order = canonical_order([model.state_dict() for model in models])
    assert [order[n] for n in order] != [0, 1, 2]
    told = fxmerge.report(fxmerge.merge_many(models, vectors(), fxmerge.Recipe(combine=fxmerge.Average((3, 2, 1)))))
    outputs = [model(torch.cat(vectors())) for model in models]
    wanted = shares_missed(outputs, sum(w * y for w, y in zip((3, 2, 1), outputs, strict=True)) / 6)  # type: ignore[arg-type]
    assert list(told.errors["models"]) == [0, 1, 2]
    assert told.errors["models"] == pytest.approx(dict(enumerate(wanted)), rel=1e-3)


@torch.no_grad()
def test_last_layers_beside_each_other_count_alike() -> None:
    class Wide(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.wide, self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.wide(x) + self.second(torch.tanh(self.first(x)))
            return out

    a, b = Wide(0), Wide(1)
    data = [torch.randn(256, 6, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    told, x = fxmerge.report(fxmerge.merge(a, b, data)), torch.cat(data)
    wanted = [0.0, 0.0]
    for parts in ([net.wide(x) for net in (a, b)], [net.second(torch.tanh(net.first(x))) for net in (a, b)]):
        for j, missed in enumerate(shares_missed(parts, (parts[0] + parts[1]) / 2)):
            wanted[j] += missed / 2
    assert told.held_out
    assert told.errors["models"] == pytest.approx(dict(enumerate(wanted)), rel=1e-3)


# -------------------------------------------------------------------------- outputs


class Gained(nn.Module):
    """A parameter after the last layer, whose outputs are therefore in units of the network's own."""

    def __init__(self, seed: int, shift: float = 0.0) -> None:
        super().__init__()
        self.net, self.shift = mlp(seed), shift
        self.gain = nn.Parameter(torch.rand(10, generator=torch.Generator().manual_seed(seed)) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.net(x) * self.gain
        return scaled + self.shift


@EACH
@torch.no_grad()
def test_outputs_in_units_of_a_networks_own_are_compared_as_they_are(recipe: fxmerge.Recipe) -> None:
    a, b = Gained(0), muted(Gained(1))
    merged = fxmerge.merge(a, b, vectors(), recipe)
    x = torch.cat(vectors())
    assert_errors(merged, shares_missed([merged(x), a(x), b(x)], (a(x) + b(x)) / 2))
    assert not fxmerge.report(merged).held_out
    moved = fxmerge.report(fxmerge.merge(Gained(0, 20.0), muted(Gained(1, 20.0)), vectors(), recipe)).errors
    assert moved["merged"] == pytest.approx(fxmerge.report(merged).errors["merged"], rel=1e-2)
    assert moved["models"] == pytest.approx(fxmerge.report(merged).errors["models"], rel=1e-2)


@torch.no_grad()
def test_on_data_of_its_own_each_model_counts_most() -> None:
    a, b, (x, y) = Gained(0), Gained(1), vectors()[0].chunk(2)
    merged = fxmerge.merge(a, b, loaders=[[x], [y]], recipe=fxmerge.Recipe(fit=fxmerge.LeastSquares(own=0.6)))
    mean = torch.cat([0.8 * a(x) + 0.2 * b(x), 0.2 * a(y) + 0.8 * b(y)])
    both = torch.cat([x, y])
    assert_errors(merged, shares_missed([merged(both), a(both), b(both)], mean))


class Tied(nn.Module):
    """An output layer that is the embedding, as in many language models: it is not refitted."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(12, 6)
        self.hidden, self.back = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.embedding(tokens)
        scores: Tensor = (y + self.back(torch.relu(self.hidden(y)))) @ self.embedding.weight.T
        return scores


def tokens() -> list[Tensor]:
    return [torch.randint(12, (30, 5), generator=torch.Generator().manual_seed(k)) for k in range(4)]


@pytest.mark.parametrize(
    ("recipe", "run"),
    [(RECIPES["zip"], None), (RECIPES["align"], None), (RECIPES["zip"], fxmerge.Run(memory=1e-6))],
    ids=["zip", "align", "little memory"],
)
@torch.no_grad()
def test_tied_models_that_answer_alike_are_nearer_than_their_merge(
    recipe: fxmerge.Recipe, run: fxmerge.Run | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Two networks with the same scores of each token, in bases of their own: averages of these are no network."""
    first, second = Tied(0), Tied(1)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2))).Q
    second.load_state_dict(first.state_dict())
    second.embedding.weight.copy_(first.embedding.weight @ turn)
    second.hidden.weight.copy_(first.hidden.weight @ turn)
    second.back.weight.copy_(turn.T @ first.back.weight)
    second.back.bias.copy_(first.back.bias @ turn)
    x = torch.cat(tokens())
    torch.testing.assert_close(first(x), second(x), atol=1e-4, rtol=1e-4)
    with caplog.at_level(logging.WARNING):
        merged = fxmerge.merge(first, second, tokens(), recipe, run=run)
    told = fxmerge.report(merged)
    assert max(told.errors["models"].values()) < 1e-6 < 0.01 < told.errors["merged"]
    assert told.errors["merged"] == pytest.approx(shares_missed([merged(x)], first(x))[0], rel=1e-3)
    assert "alone is nearer" in caplog.text
    assert not torch.allclose(merged(x), first(x), atol=0.1)


def test_of_tied_models_a_network_with_itself_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        errors = fxmerge.report(fxmerge.merge(Tied(0), Tied(0), tokens())).errors
    assert max(errors["merged"], *errors["models"].values()) < 1e-6
    assert "nearer" not in caplog.text


class Recurrent(nn.Module):
    """No layer is the last one, since each reads what the other gave before; outputs are nested, of several kinds. That
    which does not depend on parameters does not count."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.cells = nn.Embedding(12, 6), nn.LSTM(6, 8, batch_first=True)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        y = self.cells(self.embedding(tokens))[0]
        return {"sum": y.sum(-1), "rest": [tokens.float(), self.gain, y.argmax(-1), (y[:, -1],)]}


@pytest.mark.slow
@torch.no_grad()
def test_outputs_of_networks_without_a_last_layer_count_alike() -> None:
    a, b = Recurrent(0), Recurrent(1)
    merged = fxmerge.merge(a, b, tokens())
    x, wanted = torch.cat(tokens()), [0.0, 0.0, 0.0]
    found = [net(x) for net in (merged, a, b)]
    for outputs in ([y["sum"] for y in found], [y["rest"][3][0] for y in found]):
        for j, missed in enumerate(shares_missed(outputs, (outputs[1] + outputs[2]) / 2)):
            wanted[j] += missed / 2
    assert_errors(merged, wanted, rel=1e-3)


class Complex(nn.Module):
    """Complex outputs; complex layers are not fitted."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Parameter(torch.randn(6, 4, dtype=torch.cfloat))
        self.b = nn.Parameter(torch.randn(2, 6, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.linear(x.to(torch.complex64), self.a)
        return nn.functional.linear(h * h.abs(), self.b)


@torch.no_grad()
def test_complex_outputs_are_compared_by_their_absolute_differences() -> None:
    a, b, x = Complex(0), Complex(1), torch.randn(64, 4)
    merged = fxmerge.merge(a, b, [x])
    assert_errors(merged, shares_missed([merged(x), a(x), b(x)], (a(x) + b(x)) / 2))


class Masked(Tied):
    """A score that is ruled out."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).masked_fill(torch.arange(12) == 3, -torch.inf)


@torch.no_grad()
def test_what_is_ruled_out_in_all_networks_does_not_count() -> None:
    recipe = fxmerge.Recipe(match=fxmerge.Align(alpha=1))
    a, b, x = Masked(0), Masked(1), torch.cat(tokens())
    merged = fxmerge.merge(a, b, tokens(), recipe)
    outputs = [net(x)[..., torch.arange(12) != 3] for net in (merged, a, b)]
    assert_errors(merged, shares_missed(outputs, (outputs[1] + outputs[2]) / 2), rel=1e-3)


def test_outputs_of_half_precision_are_compared_in_single() -> None:
    """Squares of these are beyond the largest number of half precision."""

    class Large(Tied):
        def forward(self, tokens: Tensor) -> Tensor:
            return (100 * super().forward(tokens)).half()

    half = fxmerge.report(fxmerge.merge(Large(0), Large(1), tokens())).errors
    single = fxmerge.report(fxmerge.merge(Tied(0), Tied(1), tokens())).errors
    assert half["merged"] == pytest.approx(single["merged"], rel=1e-2)
    assert half["models"] == pytest.approx(single["models"], rel=1e-2)


class TwoHeads(Tied):
    """A second head is a last layer. It does not tell what the first one, which is tied, knows."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.value = nn.Linear(10, 1)

    def forward(self, tokens: Tensor) -> Any:
        return super().forward(tokens), self.value(torch.relu(self.hidden(self.embedding(tokens))))


@torch.no_grad()
def test_a_last_layer_does_not_answer_for_a_head_that_is_tied() -> None:
    a, b, x = TwoHeads(0), TwoHeads(1), torch.cat(tokens())
    merged = fxmerge.merge(a, b, tokens())
    told = fxmerge.report(merged)
    assert not told.held_out
    assert "embedding.weight" in told.layers
    wanted = [0.0, 0.0, 0.0]
    for outputs in zip(merged(x), a(x), b(x), strict=True):
        for j, missed in enumerate(shares_missed(outputs, (outputs[1] + outputs[2]) / 2)):
            wanted[j] += missed / 2
    assert_errors(merged, wanted, rel=1e-3)


@pytest.mark.parametrize("kind", [Tied, "last layers"])
def test_outputs_that_do_not_vary_are_not_measured(kind: Any) -> None:
    if kind is Tied:
        silent, data = Tied(0), tokens()
        nn.init.zeros_(silent.embedding.weight)
    else:
        silent, data = mlp(0), vectors()
        nn.init.zeros_(list(silent.parameters())[-2])
    told = fxmerge.report(fxmerge.merge(silent, silent, data))
    assert told.errors == {}
    assert not told.held_out


# -------------------------------------------------------------------------- features


@pytest.mark.parametrize(
    ("shape", "features"), [((7,), 1), ((7, 3), 3), ((7, 5, 3), 3), ((7, 3, 2, 4), 3), ((7, 3, 2, 4, 2), 3)]
)
def test_features_of_tokens_are_last_and_of_images_second(shape: tuple[int, ...], features: int) -> None:
    value = torch.randn(shape)
    rows = feature_rows(value)
    assert rows.shape == (value.numel() // features, features) and rows.dtype is torch.float64
    if features > 1:
        columns = value.unbind(1 if value.ndim > 3 else -1)
        torch.testing.assert_close(rows, torch.stack([column.flatten() for column in columns], 1).double())


def test_real_and_imaginary_parts_are_features() -> None:
    value = torch.tensor([[1 + 2j, 3 + 4j]])
    assert feature_rows(value).tolist() == [[1, 2, 3, 4]]
