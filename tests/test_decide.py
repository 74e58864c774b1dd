"""What is returned of what could be, by a score of the user's own."""

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, fx, nn

import fxmerge
from fxmerge.choose import CANDIDATES
from fxmerge.decide import decide
from fxmerge.matching.universe import canonical_order
from fxmerge.merger import Plan
from fxmerge.refitting.rivals import Refitted
from tests.networks import mlp, vectors
from tests.slow import but_slow

X = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def nearness(target: nn.Module) -> Callable[[fx.GraphModule], Tensor]:
    """A score that is highest for a network that answers like another."""
    return lambda network: -(network(X) - target(X)).square().mean()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_model_with_the_highest_score_is_returned(number: int, caplog: pytest.LogCaptureFixture) -> None:
    models = [mlp(k) for k in (0, 2, 1)]
    order = canonical_order([model.state_dict() for model in models])
    assert [order[n] for n in order] != [0, 1, 2]  # They are worked on in an order that is not its own inverse.
    with caplog.at_level(logging.WARNING):
        merged = fxmerge.merge_many(models, vectors(), score=nearness(models[number]))
    told = merged.meta["fxmerge"]
    torch.testing.assert_close(merged(X), models[number](X))
    assert told["parent"] == number
    assert told["layers"] == {}
    assert f"model {'ABC'[number]} is returned as it is. Its score is" in caplog.text
    scores = {(one["parent"], one["refitted"]): one["score"] for one in told["scores"]}
    assert list(scores) == [(None, True), *((j, kind) for kind in (False, True) for j in range(3))]
    assert f"the merged network's {scores[None, True]:.6g}." in caplog.text
    assert max(scores, key=lambda option: scores[option]) == (number, False)
    assert scores[number, False] == pytest.approx(0, abs=1e-10)


def test_what_the_scores_are_of_is_what_would_be_returned() -> None:
    models = [mlp(k) for k in range(2)]
    given: list[Tensor] = []

    def last_wins(network: fx.GraphModule) -> int:
        assert not network.training
        assert not torch.is_grad_enabled()
        given.append(network(X))
        return len(given)

    merged = fxmerge.merge_many(models, vectors(), score=last_wins)
    told = merged.meta["fxmerge"]
    assert [one["score"] for one in told["scores"]] == [1, 2, 3, 4, 5]
    assert told["scores"][-1] == {"parent": 1, "refitted": True, "method": "zip", "score": 5}
    assert told["layers"].keys() == {"5.weight"}
    torch.testing.assert_close(merged(X), given[-1])
    torch.testing.assert_close(given[1], models[0](X))
    torch.testing.assert_close(given[2], models[1](X))
    torch.testing.assert_close(given[0], fxmerge.merge_many(models, vectors(), or_parent=False)(X))


def test_of_equal_scores_the_merged_network_wins() -> None:
    merged = fxmerge.merge(mlp(0), mlp(1), vectors(), score=lambda network: 1)
    assert merged.meta["fxmerge"]["parent"] is None
    assert len(merged.meta["fxmerge"]["layers"]) == 3


@pytest.mark.parametrize("method", ["zip", "align"])
def test_a_score_chooses_the_method(method: str) -> None:
    a, b = mlp(0), mlp(1)
    wanted = fxmerge.merge(a, b, vectors(), method=method, or_parent=False)  # type: ignore[arg-type]
    other = fxmerge.merge(a, b, vectors(), method="align" if method == "zip" else "zip", or_parent=False)
    assert not torch.allclose(wanted(X), other(X))
    merged = fxmerge.merge(a, b, vectors(), method="auto", or_parent=False, score=nearness(wanted))
    assert merged.meta["fxmerge"]["method"] == method
    assert {one["method"] for one in merged.meta["fxmerge"]["scores"]} == {"zip", "align"}
    torch.testing.assert_close(merged(X), wanted(X))


@pytest.mark.parametrize("alpha", but_slow(CANDIDATES))
def test_a_score_chooses_alpha(alpha: float) -> None:
    a, b = mlp(0), mlp(1)
    wanted = fxmerge.merge(a, b, vectors(), alpha=alpha, combine="average")
    merged = fxmerge.merge(a, b, vectors(), alpha="auto", combine="average", score=nearness(wanted))
    told = merged.meta["fxmerge"]
    assert tuple(told["alpha_scores"]) == CANDIDATES
    assert told["alpha_errors"] == {}
    assert told["alpha_scores"][told["alpha"]] == max(told["alpha_scores"].values())
    torch.testing.assert_close(merged(X), wanted(X))


def test_networks_without_a_score_are_not_returned() -> None:
    values = iter([math.nan, -math.inf, -7.0, math.nan, -math.inf])
    told = fxmerge.merge(mlp(0), mlp(1), vectors(), score=lambda network: next(values)).meta["fxmerge"]
    assert told["parent"] == 1


@pytest.mark.parametrize(("place", "name"), [(0, "the merged network"), (2, "model B"), (4, "model B with its last")])
def test_it_is_told_which_network_has_no_score(place: int, name: str) -> None:
    values = iter([1.0] * place + [None])
    with pytest.raises(fxmerge.OptionError, match=f"for {name}"):
        fxmerge.merge(mlp(0), mlp(1), vectors(), score=lambda network: next(values))  # type: ignore[arg-type,return-value]


def test_it_is_told_which_alpha_has_no_score() -> None:
    with pytest.raises(fxmerge.OptionError, match=r"for the average for alpha 0\.0"):
        fxmerge.merge(mlp(0), mlp(1), vectors(), alpha="auto", score=lambda network: None)  # type: ignore[arg-type,return-value]


def test_of_equal_scores_the_default_alpha_wins() -> None:
    told = fxmerge.merge(mlp(0), mlp(1), vectors(), alpha="auto", combine="average", score=lambda network: 1.0)
    assert told.meta["fxmerge"]["alpha"] == 0.5


def test_networks_are_scored_with_the_statistics_that_they_are_returned_with() -> None:
    def normal(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)).eval()

    given: list[Tensor] = []

    def first_wins(network: fx.GraphModule) -> int:
        given.append(network(X))
        return -len(given)

    merged = fxmerge.merge(normal(0), normal(1), vectors(), score=first_wins)
    assert merged.meta["fxmerge"]["parent"] is None
    torch.testing.assert_close(merged(X), given[0])


def test_either_method_offers_its_parents() -> None:
    """The zip leaves the last layer, which is over tokens, and so has no parents with last layers refitted."""

    class Last(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.channels, self.tokens = nn.Linear(1, 8), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.channels(x.flatten(2).transpose(1, 2)))
            out: Tensor = self.tokens(x.transpose(1, 2)).mean(1)
            return out

    def last_wins(network: fx.GraphModule) -> int:
        nonlocal calls
        calls += 1
        return calls

    calls = 0
    told = fxmerge.merge(Last(0), Last(1), vectors(), method="auto", score=last_wins).meta["fxmerge"]
    options = [(one["parent"], one["refitted"], one["method"]) for one in told["scores"]]
    assert set(options[:2]) == {(None, True, "zip"), (None, True, "align")}
    assert options[2:] == [(0, False, "zip"), (1, False, "zip"), (0, True, "align"), (1, True, "align")]
    assert told["parent"] == 1
    assert told["method"] == "align"


LAST: Literal["last layers"] = "last layers"
OUTPUTS: Literal["outputs"] = "outputs"


@pytest.mark.parametrize(
    ("errors", "number"),
    [
        (((0.2, 0.5, LAST), (0.1, 0.9, LAST)), 1),
        (((math.nan, 0.1, OUTPUTS), (0.4, 0.4, LAST)), 1),
        (((0.1, 0.4, OUTPUTS), (0.2, 0.3, OUTPUTS)), 1),
        (((math.nan, math.nan, OUTPUTS), (math.nan, 0.9, OUTPUTS)), 1),
        (((math.nan, 0.2, None), (0.3, 0.1, None)), 1),
        (((math.nan, 0.2, None), (math.nan, 0.1, None)), 0),
    ],
)
def test_the_refit_with_the_smaller_error_is_returned(
    errors: tuple[tuple[float, float, Literal["last layers", "outputs"] | None], ...], number: int
) -> None:
    """Of outputs if all were compared by these, else of last layers if these were fitted."""
    refits = [Refitted({}, {}, {}, error=last, errors={None: out}, compared=compared) for last, out, compared in errors]
    assert decide((), refits, None) == (number, refits[number], [])


@pytest.mark.parametrize("errors", [(0.1, 0.2), (0.2, 0.1)])
def test_of_equal_scores_the_merged_network_with_the_smaller_error_wins(errors: tuple[float, float]) -> None:
    merger = Unnamed()
    options = [Refitted({}, {"layer": {}}, {}, error=error) for error in errors]
    refits = [replace(option, options=(option,)) for option in options]
    number, _, told = decide((merger, merger), refits, lambda network: 1.0)  # type: ignore[arg-type]
    assert number == errors.index(min(errors))
    assert [one["score"] for one in told] == [1.0, 1.0]


class Unnamed:
    """What a decision needs of a merger."""

    plan = Plan((0.5, 0.5))
    job = property(lambda self: self)

    def finish(self, state: dict[str, Tensor], *, calibrate: bool) -> fx.GraphModule:
        return fx.symbolic_trace(nn.Identity())

    def timed(self, stage: str) -> AbstractContextManager[None]:
        return nullcontext()


def test_a_single_option_is_not_scored() -> None:
    calls: list[fx.GraphModule] = []

    def score(network: fx.GraphModule) -> int:
        calls.append(network)
        return 1

    told = fxmerge.merge(mlp(0), mlp(1), vectors(), alpha="auto", combine="readout", score=score).meta["fxmerge"]
    assert len(calls) == len(CANDIDATES)
    assert told["scores"] == []


@pytest.mark.parametrize(
    "options",
    [
        {"or_parent": False},
        {"combine": "average"},
        {"combine": "readout"},
        {"combine": "repair", "method": "align"},
    ],
)
def test_a_score_without_a_choice_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(fxmerge.OptionError, match="nothing to choose"):
        fxmerge.merge(mlp(0), mlp(1), vectors(), score=lambda network: 1.0, **options)


def test_a_score_that_is_no_function_is_refused() -> None:
    with pytest.raises(fxmerge.OptionError, match=r"score is 0\.9; it must be a function"):
        fxmerge.merge(mlp(0), mlp(1), vectors(), score=0.9)  # type: ignore[arg-type]


def test_without_data_there_is_nothing_to_choose() -> None:
    with pytest.raises(fxmerge.OptionError, match="nothing to choose"):
        fxmerge.merge(mlp(0), mlp(1), args=(X,), alpha="auto", score=lambda network: 1.0)
