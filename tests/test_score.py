"""Choosing by a score of the user's own."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxmerge
from fxmerge.choose import CANDIDATES
from fxmerge.score import judged
from tests.test_universe import mlp, vectors

X = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def nearness(target: nn.Module) -> Callable[[fx.GraphModule], Tensor]:
    """A score that is highest for a network that answers like another."""
    return lambda network: -(network(X) - target(X)).square().mean()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_model_with_the_highest_score_is_returned(number: int, caplog: pytest.LogCaptureFixture) -> None:
    models = [mlp(k) for k in range(3)]
    with caplog.at_level(logging.WARNING):
        merged = fxmerge.merge_many(models, vectors(), score=nearness(models[number]))
    told = merged.meta["fxmerge"]
    torch.testing.assert_close(merged(X), models[number](X))
    assert told["parent"] == number
    assert told["layers"] == {}
    assert f"model {'ABC'[number]} is returned as it is. It has the highest score" in caplog.text
    scores = {(one["parent"], one["refitted"]): one["score"] for one in told["scores"]}
    assert next(iter(scores)) == (None, True)
    assert scores.keys() == {(None, True), *((j, kind) for j in range(3) for kind in (False, True))}
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
    assert [one["method"] for one in merged.meta["fxmerge"]["scores"]] == ["zip", "align"]
    torch.testing.assert_close(merged(X), wanted(X))


@pytest.mark.parametrize("alpha", CANDIDATES)
def test_a_score_chooses_alpha(alpha: float) -> None:
    a, b = mlp(0), mlp(1)
    wanted = fxmerge.merge(a, b, vectors(), alpha=alpha, combine="average")
    merged = fxmerge.merge(a, b, vectors(), alpha="auto", combine="average", score=nearness(wanted))
    told = merged.meta["fxmerge"]
    assert tuple(told["alpha_scores"]) == CANDIDATES
    assert told["alpha_errors"] == {}
    assert told["alpha_scores"][told["alpha"]] == max(told["alpha_scores"].values())
    torch.testing.assert_close(merged(X), wanted(X))


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "good", torch.zeros(2)])
def test_a_score_that_is_no_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(fxmerge.OptionError, match=r"score gave .* for the merged network; it must give a finite"):
        judged(lambda network: value, fx.symbolic_trace(nn.ReLU()), "the merged network")


def test_it_is_told_which_network_has_no_score() -> None:
    values = iter([1.0, 2.0, 2.0, 2.0, math.nan])
    with pytest.raises(fxmerge.OptionError, match="for model B with its last layers refitted"):
        fxmerge.merge(mlp(0), mlp(1), vectors(), score=lambda network: next(values))


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
