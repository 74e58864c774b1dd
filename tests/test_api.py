"""The verbs: their signatures, and what each takes and leaves as it is."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge

VERBS = {"merge": fxmerge.merge, "merge_many": fxmerge.merge_many, "align": fxmerge.align}
X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)).eval()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_takes_ten_arguments_at_most(name: str) -> None:
    parameters = inspect.signature(VERBS[name]).parameters
    assert len(parameters) <= 10
    by_position = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position[-2:] == ["loader", "recipe"]
    assert all(parameters[n].default is None for n in list(parameters)[len(by_position) - 2 :])
    assert {p.kind for p in parameters.values()} == {
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    }
    assert set(parameters) <= set(inspect.signature(fxmerge.merge).parameters) | {"models", "model", "to"}


def test_merging_two_is_merging_many() -> None:
    a, b = net(0), net(1)
    recipe, run = fxmerge.Recipe(match=fxmerge.Align(alpha=0.3)), fxmerge.Run(seed=4)
    assert equal(fxmerge.merge(a, b, [X], recipe, run=run), fxmerge.merge_many([a, b], [X], recipe, run=run))


def test_the_defaults_are_a_recipe_and_a_run() -> None:
    a, b = net(0), net(1)
    assert equal(fxmerge.merge(a, b, [X]), fxmerge.merge(a, b, [X], fxmerge.Recipe(), run=fxmerge.Run()))
    written = fxmerge.Recipe(fxmerge.Zip(), fxmerge.Average(), fxmerge.LeastSquares())
    assert equal(fxmerge.merge(a, b, [X]), fxmerge.merge(a, b, [X], written))
    without = fxmerge.Recipe(fxmerge.Zip(), fxmerge.Average(), None)
    assert equal(fxmerge.merge(a, b, example=X), fxmerge.merge(a, b, recipe=without, example=X))


def test_an_alignment_is_matched_as_the_recipe_says_and_the_rest_is_of_merging() -> None:
    a, b = net(0), net(1)
    by_weights = fxmerge.align(b, a, [X], fxmerge.Recipe(match=fxmerge.Align(alpha=1)))
    others = [
        fxmerge.Recipe(match=fxmerge.Align(alpha=1), fit=fxmerge.Repair()),
        fxmerge.Recipe(match=fxmerge.Align(alpha=1), combine=fxmerge.Ties()),
        fxmerge.Recipe(match=fxmerge.Align(alpha=1), targets="standardized"),
    ]
    assert all(equal(by_weights, fxmerge.align(b, a, [X], recipe)) for recipe in others)
    torch.testing.assert_close(by_weights(X), b(X))
    report = fxmerge.report(by_weights)
    assert (report.recipe, len(report.images), report.layers, report.errors) == (None, 1, {}, {})
    assert equal(fxmerge.align(b, a, [X]), fxmerge.align(b, a, [X], fxmerge.Recipe(match=fxmerge.Align())))
    assert not torch.equal(fxmerge.align(b, a, [X])(X), a(X))


class Counting:
    """A loader that counts how often it is read from the start."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        yield from (X, X + 1)


def test_models_stay_as_they_are_and_the_loader_is_read_a_few_times() -> None:
    a, b = net(0), net(1)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (a, b)]
    # The first batch, the shapes, the activations; then the fit, or the statistics of the average.
    for recipe in (fxmerge.Recipe(), fxmerge.Recipe(fit=None)):
        loader = Counting()
        fxmerge.merge(a, b, loader, recipe)
        assert loader.passes == 4
    # By weights alone, no activations are needed.
    loader = Counting()
    fxmerge.merge(a, b, loader, fxmerge.Recipe(match=fxmerge.Zip(alpha=1)))
    assert loader.passes == 3
    assert all(torch.equal(m.state_dict()[k], v) for m, s in zip((a, b), before, strict=True) for k, v in s.items())


def test_an_iterator_is_read_once() -> None:
    a, b = net(0), net(1)
    assert equal(fxmerge.merge(a, b, iter([X, X + 1])), fxmerge.merge(a, b, [X, X + 1]))


@pytest.mark.slow
def test_several_inputs_of_an_example_are_those_of_a_batch() -> None:
    class Two(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net = net(seed)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            out: Tensor = self.net(x) * scale
            return out

    scale = torch.rand(24, 1)
    examples: list[Any] = [((X, scale),), {"x": X, "scale": scale}]
    first, second = (fxmerge.merge(Two(0), Two(1), example=example) for example in examples)
    assert equal(first, second)
    given = fxmerge.merge(Two(0), Two(1), example=(X, scale), inputs=lambda batch: (batch, {}))
    assert equal(given, first)
    torch.testing.assert_close(first(X, scale), second(x=X, scale=scale))


def test_align_refuses_to_merge_units() -> None:
    with pytest.raises(fxmerge.OptionError, match=r"Recipe\.match is Zip, which merges units; align moves them"):
        fxmerge.align(net(0), to=net(1), recipe=fxmerge.Recipe(match=fxmerge.Zip()), example=X)
