"""Last layers fitted to probabilities of classes: a convex problem, and never worse than the squared-error fit."""

import json
import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fxmerge
from fxmerge import Average, LeastSquares, OptionError, Readout, Recipe
from fxmerge.program.capture import capture_program
from fxmerge.refitting import cross_entropy
from fxmerge.refitting.class_scores import score_layers
from fxmerge.refitting.cross_entropy import Rows, ScoreRows, fit_scores, minimise
from fxmerge.refitting.layers import find_layers
from fxmerge.refitting.selection import last_layers
from tests.networks import NETS

LOGITS, VALUES = (Recipe(fit=LeastSquares(outputs=kind)) for kind in ("logits", "values"))
GENERATOR = torch.Generator().manual_seed(3)
INPUTS = [torch.randn(400, 6, generator=GENERATOR) for _ in range(5)]
TOKENS = [torch.randint(0, 13, (24, 7), generator=GENERATOR) for _ in range(6)]


def classifier(seed: int, classes: int = 4, scale: float = 4.0) -> nn.Module:
    """A network that is sure of many answers."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, classes))
    with torch.no_grad():
        next(net[-1].parameters()).mul_(scale)
    return net.eval()


class Language(nn.Module):
    """Scores of the next token, (batch, positions, tokens)."""

    def __init__(self, seed: int, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.mix, self.norm = nn.Embedding(13, 10), nn.Linear(10, 10), nn.LayerNorm(10)
        self.head = nn.Linear(10, 13, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        with torch.no_grad():
            self.head.weight.mul_(3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        out: Tensor = self.head(self.norm(x + torch.tanh(self.mix(x.cumsum(1)))))
        return out


@torch.no_grad()
def ensemble(parents: Sequence[nn.Module], data: Sequence[Tensor], weights: Sequence[float] = (1, 1)) -> Tensor:
    """The weighted mean of the probabilities that networks give."""
    x = torch.cat(list(data))
    return sum(w * p(x).double().softmax(-1) for w, p in zip(weights, parents, strict=True)) / sum(weights)


@torch.no_grad()
def loss(net: nn.Module, target: Tensor, data: Sequence[Tensor]) -> float:
    """The mean cross-entropy from some probabilities to those of a network."""
    return -float((target * net(torch.cat(list(data))).double().log_softmax(-1)).sum(-1).mean())


def last(merged: nn.Module, name: str = "4.weight") -> Any:
    return fxmerge.report(merged).layers[name]


# -------------------------------------------------------------------------- the convex problem


def problem(rows: int = 300, features: int = 5, classes: int = 4, seed: int = 0) -> tuple[Rows, Tensor]:
    """Rows with distributions that no coefficients give exactly, and a centre."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=g, dtype=torch.float64)
    x[:, -1] = 1
    p = (2 * torch.randn(rows, classes, generator=g, dtype=torch.float64)).softmax(1)
    weights = torch.rand(rows, generator=g, dtype=torch.float64) + 0.1
    return Rows(x, p, weights), torch.randn(features, classes, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("ridge", [10.0, 1e-2, 1e-5])
@pytest.mark.parametrize("classes", [2, 7])
def test_two_starts_come_to_the_same_minimum(ridge: float, classes: int) -> None:
    rows, centre = problem(classes=classes)
    starts = (centre, 5 * torch.randn(centre.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64))
    one, two = (minimise(rows, centre, ridge, start, tolerance=1e-14) for start in starts)
    torch.testing.assert_close(one.coefficients, two.coefficients, rtol=1e-4, atol=1e-5)
    assert one.objectives[-1] == pytest.approx(two.objectives[-1], rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("far", [0.0, 30.0])
def test_the_objective_falls_with_every_step(seed: int, far: float) -> None:
    rows, centre = problem(seed=seed)
    objectives = minimise(rows, centre, 1e-3, far * centre if far else None).objectives
    assert 2 <= len(objectives) < 30
    assert all(after < before for before, after in pairwise(objectives))


def test_the_minimum_is_that_of_the_objective_written_out() -> None:
    rows, centre = problem()
    found = minimise(rows, centre, 0.1, tolerance=1e-14).coefficients.requires_grad_()
    share = rows.weights / rows.weights.sum()
    scale = ((rows.features**2).mean(1) * share).sum()
    entropies = -(rows.targets * (rows.features @ found).log_softmax(1)).sum(1)
    objective = (share * entropies).sum() + 0.1 * scale / 2 * (found - centre).square().sum()
    (gradient,) = torch.autograd.grad(objective, found)
    assert gradient.abs().max() < 1e-6
    assert rows.cross_entropy(found.detach()) == pytest.approx(float((share * entropies).sum().detach()))
    hessian = torch.autograd.functional.hessian(
        lambda w: -(share[:, None] * rows.targets * (rows.features @ w).log_softmax(1)).sum(), found.detach()
    )
    step = torch.randn(centre.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = (hessian * step).sum((2, 3))
    torch.testing.assert_close(rows.curvature((rows.features @ found.detach()).softmax(1), step), expected)


def test_distributions_that_a_layer_can_give_are_given() -> None:
    rows, truth = problem()
    rows = Rows(rows.features, (rows.features @ truth).softmax(1), rows.weights)
    found = fit_scores(rows, 60, torch.zeros_like(truth), torch.zeros_like(truth))
    assert found.coefficients is not None
    torch.testing.assert_close((rows.features @ found.coefficients).softmax(1), rows.targets, rtol=0, atol=1e-2)
    assert found.after < found.before and found.after - found.entropy < 1e-3


def test_the_squared_fit_is_kept_where_it_predicts_held_out_rows_as_well() -> None:
    rows, truth = problem()
    exact = Rows(rows.features, (rows.features @ truth).softmax(1), rows.weights)
    found = fit_scores(exact, 60, truth, truth)
    assert found.coefficients is None and found.ridge == float("inf") and found.after == found.before


@pytest.mark.parametrize("pieces", [1, 17])
def test_rows_in_pieces_give_what_they_give_together(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, centre = problem()
    whole = rows.evaluate(centre)
    monkeypatch.setattr(cross_entropy, "_ENTRIES", pieces * centre.shape[1])
    again = Rows(rows.features, rows.targets, rows.weights)
    for one, two in zip(whole, again.evaluate(centre), strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(two))
    assert again.entropy == pytest.approx(rows.entropy)


def test_rows_above_the_memory_are_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "SAMPLE_MEMORY", 4 * (5 + 3 * 4) * 100)
    kept, generator = ScoreRows(5, 4, 4), torch.Generator()
    for batch in range(4):
        kept.add(batch, torch.full((1000, 5), float(batch)), torch.full((1000, 4), 0.25), 2.0, generator)
    rows, held = kept.gathered()
    assert (len(rows), held) == (104, 26)
    assert (rows.features[:26] == 0).all()  # The rows to be held out come first.
    assert float(rows.weights.sum()) == pytest.approx(4 * 1000 * 2.0)


# -------------------------------------------------------------------------- merging


@pytest.mark.parametrize("seeds", [(0, 1), (2, 3)])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_merged_network_is_nearer_to_the_ensemble_in_cross_entropy(seeds: tuple[int, int], classes: int) -> None:
    parents = [classifier(seed, classes) for seed in seeds]
    squared, fitted = (fxmerge.merge(*parents, INPUTS, recipe) for recipe in (VALUES, LOGITS))
    unseen = [torch.randn(2000, 6, generator=torch.Generator().manual_seed(77))]
    target = ensemble(parents, unseen)
    assert loss(fitted, target, unseen) < loss(squared, target, unseen)
    told = last(fitted)
    assert told["entropy"] < told["cross_entropy_after"] < told["cross_entropy_before"]
    assert told["cross_entropy_after"] == pytest.approx(loss(fitted, target, unseen), rel=0.1)
    # All other layers, and the numbers of the squared-error fit, stay.
    same = [n for n, v in squared.state_dict().items() if torch.equal(v, fitted.state_dict()[n])]
    assert same == [n for n in squared.state_dict() if not n.startswith("4.")]
    assert {n: told[n] for n in ("before", "after", "rows")} == {
        n: last(squared)[n] for n in ("before", "after", "rows")
    }
    assert "cross_entropy_after" not in last(squared)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows", [3, 20, 100])
def test_held_out_cross_entropy_is_never_worse(seed: int, rows: int) -> None:
    data = [x[:rows] for x in INPUTS]
    told = last(fxmerge.merge(classifier(seed), classifier(seed + 9), data, LOGITS))
    assert told["cross_entropy_after"] <= told["cross_entropy_before"] + cross_entropy.NEGLIGIBLE


@pytest.mark.parametrize("name", NETS)
def test_permuted_copies_give_the_network_back(name: str) -> None:
    build, batches = NETS[name]
    net, twin, data = build(0), build(1), batches()
    symmetry = fxmerge.find_symmetry(net, (data[0],))
    twin.load_state_dict(symmetry.sample_permutation(torch.Generator().manual_seed(1)).apply(net.state_dict()))
    squared, fitted = (fxmerge.merge(net, twin, data, recipe) for recipe in (VALUES, LOGITS))
    for key, value in squared.state_dict().items():
        assert torch.equal(fitted.state_dict()[key], value)
    (told,) = (t for t in fxmerge.report(fitted).layers.values() if "entropy" in t)
    assert told["cross_entropy_after"] == told["cross_entropy_before"] == pytest.approx(told["entropy"], abs=1e-6)


def test_a_folded_network_is_nearer_to_the_network() -> None:
    net = classifier(0)
    squared, fitted = (fxmerge.fold(net, INPUTS, 0.5, recipe) for recipe in (VALUES, LOGITS))
    target = ensemble([net], INPUTS, (1,))
    assert loss(fitted, target, INPUTS) < loss(squared, target, INPUTS)


def test_the_weights_of_models_are_those_of_their_probabilities() -> None:
    parents = [classifier(0), classifier(1)]
    found = {w: fxmerge.merge(*parents, INPUTS, Recipe(combine=Average(w), fit=LOGITS.fit)) for w in ((3, 1), (1, 3))}
    for own, merged in found.items():
        losses = {w: loss(merged, ensemble(parents, INPUTS, w), INPUTS) for w in found}
        assert min(losses, key=lambda w: losses[w]) == own
        assert last(merged)["cross_entropy_after"] == pytest.approx(losses[own], rel=0.1)


def test_every_model_teaches_on_its_own_data() -> None:
    parents, loaders = [classifier(0), classifier(1)], [[x + shift for x in INPUTS] for shift in (-2, 2)]
    alone = Recipe(fit=LeastSquares(own=1.0, outputs="logits"))
    merged = fxmerge.merge(*parents, recipe=alone, loaders=loaders)
    losses = [loss(merged, ensemble([net], own, (1,)), own) for net, own in zip(parents, loaders, strict=True)]
    assert last(merged)["cross_entropy_after"] == pytest.approx(sum(losses) / 2, rel=0.1)
    squared = fxmerge.merge(*parents, recipe=Recipe(fit=LeastSquares(own=1.0)), loaders=loaders)
    before = [loss(squared, ensemble([net], own, (1,)), own) for net, own in zip(parents, loaders, strict=True)]
    assert sum(losses) < sum(before)


def test_every_head_learns_from_its_own_model() -> None:
    parents = [classifier(0, 4), classifier(1, 6)]
    squared, fitted = (fxmerge.merge(*parents, INPUTS, recipe) for recipe in (VALUES, LOGITS))
    told = [t for t in fxmerge.report(fitted).layers.values() if "entropy" in t]
    assert len(told) == 2
    for number, net in enumerate(parents):
        target = ensemble([net], INPUTS, (1,))
        of = [loss(fxmerge.head(merged, number), target, INPUTS) for merged in (fitted, squared)]
        assert of[0] < of[1]
        assert of[0] == pytest.approx(told[number]["cross_entropy_after"], rel=0.1)


def test_rows_of_a_language_model_are_all_positions() -> None:
    parents = [Language(0).eval(), Language(1).eval()]
    squared, fitted = (fxmerge.merge(*parents, TOKENS, recipe) for recipe in (VALUES, LOGITS))
    target = ensemble(parents, TOKENS)
    assert loss(fitted, target, TOKENS) < loss(squared, target, TOKENS)
    assert last(fitted, "head.weight")["cross_entropy_after"] == pytest.approx(loss(fitted, target, TOKENS), rel=0.1)


def test_half_precision_is_fitted_in_more() -> None:
    parents = [classifier(seed).to(torch.bfloat16) for seed in (0, 1)]
    told = last(fxmerge.merge(*parents, [x.bfloat16() for x in INPUTS], LOGITS))
    assert told["cross_entropy_after"] < told["cross_entropy_before"]


def test_errors_of_outputs_are_those_of_the_result() -> None:
    """They are squared distances, which the fit of probabilities makes larger."""
    parents = [classifier(0), classifier(1)]
    merged = fxmerge.merge(*parents, INPUTS, LOGITS)
    with torch.no_grad():
        mean, own = sum(p(torch.cat(INPUTS)) for p in parents) / 2, merged(torch.cat(INPUTS))
        missed = float((own - mean).square().sum() / (mean - mean.mean(0)).square().sum())
    assert fxmerge.report(merged).errors["merged"] == pytest.approx(missed, rel=0.1)


# -------------------------------------------------------------------------- what cannot be fitted


def test_classes_whose_order_is_free_are_fitted_in_the_units_of_the_first_model() -> None:
    net, other = classifier(0), classifier(1)
    swapped = classifier(1)
    with torch.no_grad():
        for tensor in (swapped[-1].weight, swapped[-1].bias):  # type: ignore[index]
            tensor.copy_(tensor[[2, 0, 3, 1]].clone())
    free = Recipe(match=fxmerge.Align(), fit=LOGITS.fit, free="output")
    one, two = (fxmerge.merge(net, twin, INPUTS, free) for twin in (other, swapped))
    assert "entropy" in last(one)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_data_of_a_model_that_does_not_count_do_not_count() -> None:
    parents, loaders = [classifier(0), classifier(1)], [INPUTS, [x + 3 for x in INPUTS]]
    alone = Recipe(combine=Average((1, 0)), fit=LOGITS.fit)
    merged = fxmerge.merge(*parents, recipe=alone, loaders=loaders)
    target = ensemble([parents[0]], INPUTS, (1,))
    assert last(merged)["cross_entropy_after"] == pytest.approx(loss(parents[0], target, INPUTS), rel=0.1)


def test_one_row_leaves_none_to_hold_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        merged = fxmerge.merge(classifier(0), classifier(1), [INPUTS[0][:1]], LOGITS)
    assert "entropy" not in last(merged) and "no layer was fitted to probabilities" in caplog.text


def test_a_head_that_is_tied_to_the_embedding_is_left(caplog: pytest.LogCaptureFixture) -> None:
    parents = [Language(0, tied=True).eval(), Language(1, tied=True).eval()]
    with caplog.at_level(logging.WARNING):
        squared, fitted = (fxmerge.merge(*parents, TOKENS, recipe) for recipe in (VALUES, LOGITS))
    assert all(torch.equal(value, fitted.state_dict()[name]) for name, value in squared.state_dict().items())
    assert "also used by aten.embedding" in fxmerge.report(fitted).left["embed.weight"]
    assert "no layer was fitted to probabilities" in caplog.text


class Over(nn.Module):
    """A classifier with something after it."""

    def __init__(self, after: Callable[[Tensor], Any], classes: int = 4) -> None:
        super().__init__()
        self.body, self.after = classifier(0, classes), after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.body(x))


CANNOT: dict[str, tuple[Callable[[Tensor], Any], int, str]] = {
    "one number": (lambda y: y, 1, "with one number to a row"),
    "one number, squeezed": (lambda y: y.squeeze(-1), 1, "with one number to a row"),
    "whole numbers": (lambda y: y.argmax(-1), 4, "no output is a floating-point number"),
    "probabilities": (lambda y: y.softmax(-1), 4, "which is no last layer"),
    "capped": (lambda y: y.tanh() * 30, 4, "which is no last layer"),
}


@pytest.mark.parametrize(("after", "classes", "why"), CANNOT.values(), ids=CANNOT)
def test_outputs_that_cannot_be_scores_are_refused_before_units_are_matched(
    after: Callable[[Tensor], Any], classes: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxmerge.api.match", lambda *args: pytest.fail("work was done"))
    with pytest.raises(OptionError, match=why):
        fxmerge.merge(Over(after, classes), Over(after, classes), INPUTS, LOGITS)


def test_without_data_it_is_refused() -> None:
    with pytest.raises(OptionError, match=r"Recipe.fit is LeastSquares, which needs data"):
        fxmerge.merge(classifier(0), classifier(1), recipe=LOGITS, example=INPUTS[0])


CAN: dict[str, Callable[[Tensor], Any]] = {
    "as it is": lambda y: y,
    "log_softmax": lambda y: y.log_softmax(-1),
    "wide": lambda y: y.double(),
    "beside classes": lambda y: (y, y.argmax(-1)),
    "in windows": lambda y: y.unflatten(0, (-1, 2)),
    "one place": lambda y: y[:, None],
}
LEFT: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "classes first": (lambda y: y.T, "do not lie along the last dimension"),
    "several kinds": (lambda y: y.unflatten(-1, (2, 2)), "do not lie along the last dimension"),
    "some classes": (lambda y: y[:, :3], "leaves out some of its scores"),
    "some rows": (lambda y: y[:2], "leaves out some of its scores"),
    "log_softmax over rows": (lambda y: y.log_softmax(0), "goes over another dimension"),
}


def of_program(net: nn.Module, x: Tensor) -> Any:
    program = capture_program(net, (x,))
    layers = find_layers(program)
    return score_layers(program, layers, last_layers(program, layers))


@pytest.mark.parametrize("after", CAN.values(), ids=CAN)
def test_scores_are_found_behind_what_keeps_them(after: Callable[[Tensor], Any]) -> None:
    assert [layer.name for layer in of_program(Over(after).eval(), INPUTS[0]).layers] == ["body.4.weight"]


@pytest.mark.parametrize(("after", "why"), LEFT.values(), ids=LEFT)
def test_what_is_no_score_of_one_class_each_is_left(after: Callable[[Tensor], Any], why: str) -> None:
    found = of_program(Over(after).eval(), INPUTS[0])
    assert not found.layers and why in found.left["body.4.weight"]


def test_scores_of_a_convolution_lie_along_its_channels() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 5, 1), nn.Flatten()).eval()
    x = torch.randn(6, 2, 8, 8)
    assert [layer.name for layer in of_program(net, x).layers] == ["3.weight"]
    assert "last dimension" in of_program(net[:-1], x).left["3.weight"]


def test_models_of_transformers_have_scores() -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32)
    torch.manual_seed(0)
    parents = [transformers.AutoModelForCausalLM.from_config(config).eval() for _ in range(2)]
    g = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(0, 40, (4, n), generator=g)} for n in (8, 12, 8, 12)]
    assert "entropy" in last(fxmerge.merge(*parents, data, LOGITS), "lm_head.weight")


# -------------------------------------------------------------------------- the recipe


def test_the_recipe_goes_to_data_and_back() -> None:
    assert LOGITS.to_dict() == {"version": 1, "fit": {"kind": "LeastSquares", "outputs": "logits"}}
    assert Recipe.from_dict(LOGITS.to_dict()) == Recipe.from_json(LOGITS.to_json()) == LOGITS
    assert VALUES == Recipe(fit=LeastSquares()) != LOGITS
    merged = fxmerge.merge(classifier(0), classifier(1), INPUTS, LOGITS)
    told = fxmerge.report(merged).recipe
    assert told is not None and told["fit"] == {"kind": "LeastSquares", "outputs": "logits"}
    assert json.loads(json.dumps(told)) == told


@pytest.mark.parametrize("word", ["probabilities", "", None, 1, "Logits"])
def test_another_word_is_refused(word: Any) -> None:
    with pytest.raises(OptionError) as raised:
        LeastSquares(outputs=word)
    assert str(raised.value) == f"LeastSquares.outputs is {word!r}; it must be 'values' or 'logits'."


def test_a_wrong_word_in_a_recipe_names_its_place() -> None:
    with pytest.raises(OptionError, match=r"recipe.fit: LeastSquares.outputs is 'logit'; it must be"):
        Recipe.from_dict({"fit": {"kind": "LeastSquares", "outputs": "logit"}})
    with pytest.raises(OptionError, match=r"recipe.fit has no field 'outputs'"):
        Recipe.from_dict({"fit": {"kind": "Readout", "outputs": "logits"}})
    with pytest.raises(TypeError):
        Readout(outputs="logits")  # type: ignore[call-arg]
