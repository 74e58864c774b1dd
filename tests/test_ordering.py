"""NaN wins no comparison."""

import logging
import math

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.evidence import weights
from fxmerge.matching.mix import Mix
from fxmerge.matching.problem import Problem, floats
from fxmerge.matching.search import search
from fxmerge.notices import warn_of_nearer_parent
from fxmerge.ordering import error_of, score_of
from fxmerge.refitting.ridge import Many, NormalEquations, fit

NAN = math.nan


def test_what_is_no_number_is_the_worst() -> None:
    for values in ([NAN, 1.0, 2.0], [1.0, NAN, 2.0], [2.0, 1.0, NAN]):
        assert min(values, key=error_of) == 1.0
        assert max(values, key=score_of) == 2.0


@pytest.mark.parametrize(
    ("errors", "nearer"),
    [
        ({None: 0.5, 0: NAN, 1: 0.4}, "Model B"),
        ({None: NAN, 0: 0.4, 1: NAN}, "Model A"),
        ({None: 0.5, 0: NAN, 1: NAN}, None),
        ({None: NAN, 0: NAN, 1: NAN}, None),
        ({None: 0.4, 0: 0.4, 1: 0.5}, None),
        ({None: 1e-9, 0: 0.0, 1: 0.0}, None),
        ({}, None),
    ],
)
def test_a_network_whose_error_is_nan_is_not_nearer(
    errors: dict[int | None, float], nearer: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_nearer_parent(errors, ["model A", "model B"])
    assert [text.partition(" alone")[0] for text in caplog.messages] == ([nearer] if nearer else [])


def test_a_ridge_whose_error_is_nan_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    folds = []
    for _ in range(3):
        own = NormalEquations(1, 4, 2, torch.device("cpu"))
        x = torch.randn(1, 20, 4)
        own.add(x, x @ torch.randn(4, 2), torch.zeros(1, 4, 2), 1.0)
        folds.append(own)
    (expected,) = fit([folds])
    assert math.isfinite(expected.ridge)

    class Broken(Many):
        """Its error is NaN for the strong ridges."""

        def error(self, step: torch.Tensor) -> float:
            return NAN if float(step.norm()) < 0.5 * float(expected.step.norm()) else super().error(step)

    for fold in folds:
        sums = fold.sums()
        monkeypatch.setattr(fold, "sums", lambda own=sums: Broken(own.features, own.cross, own.squares))
    (found,) = fit([folds])
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
