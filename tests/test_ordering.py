"""NaN wins no comparison."""

import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.choose import best, highest
from fxmerge.ordering import error_of, score_of
from fxmerge.decide import decide
from fxmerge.matching.mix import Mix
from fxmerge.matching.search import Problem, floats, search
from fxmerge.merger import Merger
from fxmerge.refitting.moments import Moments, fit
from fxmerge.refitting.rivals import Refitted, Rivals
from fxmerge.evidence import weights

NAN = math.nan


def test_what_is_no_number_is_the_worst() -> None:
    for values in ([NAN, 1.0, 2.0], [1.0, NAN, 2.0], [2.0, 1.0, NAN]):
        assert min(values, key=error_of) == 1.0
        assert max(values, key=score_of) == 2.0


def test_no_candidate_for_alpha_wins_with_nan() -> None:
    assert best({0.0: NAN, 0.25: 0.3, 0.5: 0.6}) == 0.25
    assert best({0.0: NAN, 0.25: 0.9, 0.5: NAN}) == 0.25
    assert best({0.0: NAN, 0.5: NAN}) == 0.5
    assert highest({0.0: NAN, 0.25: 0.3, 0.5: 0.2}) == 0.25


@pytest.mark.parametrize("order", [1, -1])
def test_no_refit_wins_with_nan(order: int) -> None:
    refits = [Refitted({}, {}, {}, error=error) for error in (NAN, 0.5)][::order]
    number, chosen, _ = decide([cast(Merger, None)] * 2, refits, None)
    assert chosen.error == 0.5 and refits[number] is chosen


def test_a_merged_network_whose_outputs_are_nan_loses_to_a_parent() -> None:
    class Told:
        def error(self, number: int | None) -> float:
            return NAN if number is None else 0.4

    state = {"w": torch.ones(1)}
    rivals = Rivals([], [state, state], [], [(0.5, 0.5)], cast(Any, Told()))
    chosen = rivals.choose(Refitted(state, {}, {}))
    assert chosen.parent == 0
    assert replace(chosen, options=()).errors[0] == 0.4


def test_a_ridge_whose_error_is_nan_is_not_chosen() -> None:
    torch.manual_seed(0)
    folds = []
    for _ in range(3):
        own = Moments.none(1, 4, 2, torch.device("cpu"))
        x = torch.randn(1, 20, 4)
        own.add(x, x @ torch.randn(4, 2), torch.zeros(1, 4, 2), 1.0)
        folds.append(own)
    expected = fit(folds)
    assert math.isfinite(expected.ridge)

    class Broken(Moments):
        """Its error is NaN for the strong ridges."""

        def error(self, step: torch.Tensor) -> float:
            return NAN if float(step.norm()) < 0.5 * float(expected.step.norm()) else super().error(step)

    broken = [Broken(f.features, f.cross, f.residuals, f.targets, f.rows) for f in folds]
    found = fit(broken)
    assert math.isfinite(found.held_out) and torch.isfinite(found.step).all()


def test_matching_does_not_move_to_where_the_objective_is_nan() -> None:
    class Broken(Problem):
        def objective(self) -> float:
            return super().objective() if all((i == range(len(i))).all() for i in self.images) else NAN

    def net(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return dict(nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)).state_dict())

    model = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1))
    symmetry = fxmerge.find_symmetry(model, (torch.zeros(1, 2),))
    a, b = (floats(symmetry, net(seed)) for seed in (0, 1))
    scales = {name: weights.scale(a[name], b[name]) for name in a}
    images = symmetry.identity().images
    moved = Problem(symmetry, a, b, {}, Mix.of(1.0, {}), images, scales, weights.slices(symmetry))
    search(moved)
    assert not all((i == range(len(i))).all() for i in moved.images)
    problem = Broken(symmetry, a, b, {}, Mix.of(1.0, {}), images, scales, weights.slices(symmetry))
    trace = search(problem)
    assert all(map(math.isfinite, trace)) and all((i == range(len(i))).all() for i in problem.images)
