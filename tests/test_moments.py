"""Moments, and ridge regression from normal equations."""

import math

import pytest
import torch
from torch import Tensor

from fxmerge.evidence.moments import Moments
from fxmerge.refitting import ridge, strength
from fxmerge.refitting.ridge import Fit, NormalEquations, fit


def fitted(x: Tensor, y: Tensor, centre: Tensor, few: int = 0) -> Fit:
    folds = [NormalEquations(*centre.shape, torch.device("cpu"), few) for _ in range(2)]
    for fold, part in zip(folds, zip(x.chunk(2, 1), y.chunk(2, 1), strict=True), strict=True):
        fold.add(*part, centre, 1.0)
    return fit([folds])[0]


def problem(rows: int, features: int = 6, outputs: int = 3, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, rows, features, generator=g, dtype=torch.float64)
    w = torch.randn(1, features, outputs, generator=g, dtype=torch.float64)
    return x, x @ w + noise * torch.randn(1, rows, outputs, generator=g, dtype=torch.float64), w


def test_without_noise_the_weights_are_found_with_the_weakest_ridge() -> None:
    x, y, w = problem(400)
    found = fitted(x, y, torch.zeros_like(w))
    torch.testing.assert_close(found.step, w, rtol=1e-4, atol=1e-4)
    assert (found.before, found.ridge) == (pytest.approx(1.0, rel=1e-12), 1e-5)
    assert found.after < 1e-9
    assert 5.9 < found.rank <= 6


@pytest.mark.parametrize(("features", "folds"), [(6, 5), (3_000, 3), (20_000, 2)])
def test_moments_that_take_much_memory_are_kept_in_fewer_parts(features: int, folds: int) -> None:
    assert len(NormalEquations.folds(1, features, 10, torch.device("meta"))) == folds


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("rows", [2, 7, 9])
def test_few_rows_give_what_their_sums_give(rows: int, groups: int) -> None:
    """Of 30 features, with rows that are kept; the most are too many for that, which turns out on the way."""
    g = torch.Generator().manual_seed(rows)
    x, y = (torch.randn(groups, 4 * rows, n, generator=g, dtype=torch.float64) for n in (30, 3))
    centre = torch.randn(groups, 30, 3, generator=g, dtype=torch.float64)
    found = []
    for few in (0, 15):
        folds = [NormalEquations(groups, 30, 3, torch.device("cpu"), few) for _ in range(2)]
        for i, part in enumerate(zip(x.chunk(4, 1), y.chunk(4, 1), strict=True)):
            folds[i % 2].add(*part, centre, 0.5 + i)
        found += fit([folds])
    sums, kept = found
    torch.testing.assert_close(kept.step, sums.step, rtol=1e-8, atol=1e-10)
    for name in ("ridge", "before", "after", "held_out", "rank"):
        assert getattr(kept, name) == pytest.approx(getattr(sums, name), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize(("rows", "features"), [(40, 30), (60, 30), (400, 12)])
def test_the_strength_does_not_depend_on_which_one_is_tried_first(
    rows: int, features: int, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, w = problem(rows, features, noise=noise)
    x = x * torch.logspace(0, -3, features, dtype=torch.float64)
    found = []
    for usual in range(len(strength.RIDGES)):
        monkeypatch.setattr(strength, "USUAL", usual)
        found.append(fitted(x, y, torch.zeros_like(w), few=rows).ridge)
    assert len(set(found)) == 1


def test_products_by_blocks_are_those_of_all_features(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, w = problem(50, features=10)
    whole = fitted(x, y, torch.zeros_like(w))
    monkeypatch.setattr(ridge, "BLOCK", 4)
    torch.testing.assert_close(fitted(x, y, torch.zeros_like(w)).step, whole.step, rtol=1e-12, atol=1e-12)


def test_pure_noise_leaves_the_centre() -> None:
    x, _, w = problem(40, features=30)
    y = torch.randn(1, 40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = fitted(x, y, torch.zeros_like(w))
    assert found.ridge >= 1
    assert found.rank < 15


def test_a_centre_that_is_right_stays() -> None:
    x, y, w = problem(100)
    found = fitted(x, y, w)
    assert found.ridge == 10
    assert float(found.step.abs().max()) < 1e-12


def test_directions_without_data_are_not_moved() -> None:
    x, y, w = problem(200)
    x[..., 2] = 0
    found = fitted(x, y, torch.zeros_like(w))
    assert torch.equal(found.step[:, 2], torch.zeros(1, 3, dtype=torch.float64))


def test_no_rows_are_no_step() -> None:
    (found,) = fit([[NormalEquations(1, 4, 2, torch.device("cpu")) for _ in range(2)]])
    assert torch.equal(found.step, torch.zeros(1, 4, 2, dtype=torch.float64))
    assert math.isfinite(found.after)


def test_the_told_error_is_that_of_the_fit() -> None:
    x, y, w = problem(300, noise=0.5)
    found = fitted(x, y, torch.zeros_like(w))
    expected = float((y - x @ found.step).square().sum() / y.square().sum())
    assert abs(found.after - expected) < 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_what_is_linear_is_fitted_whatever_rounding_leaves_of_the_error(seed: int) -> None:
    """The sum of squares is a difference of large numbers, which may fall below zero."""
    g = torch.Generator().manual_seed(seed)
    x, truth = torch.randn(1, 512, 7, generator=g), torch.randn(1, 7, 3, generator=g)
    folds = [NormalEquations(1, 7, 3, torch.device("cpu")) for _ in range(2)]
    for fold, part in zip(folds, x.chunk(2, 1), strict=True):
        fold.add(part, part @ truth, -truth, 1.0)
    (found,) = fit([folds])
    assert found.before > 1
    assert 0 <= found.after < 1e-5
    torch.testing.assert_close(found.step, 2 * truth.double(), atol=1e-3, rtol=1e-3)


# -------------------------------------------------------------------------- moments


def test_moments_are_those_of_all_rows_over_batches() -> None:
    batches = [torch.randn(2, 7, 3) + 3, 2 * torch.randn(2, 5, 3)]
    found = sum((Moments.of(x) for x in batches), start=Moments())
    together = torch.cat(batches, 1).double()
    assert (found.rows, found.count) == (12, 12.0)
    torch.testing.assert_close(found.mean, together.mean(1))
    torch.testing.assert_close(found.variance, together.var(1, correction=0))
    torch.testing.assert_close(found.deviation, together.std(1, correction=0))
    assert found.square == pytest.approx(float(together.square().sum()))
    assert found.spread == pytest.approx(float(together.var(1, correction=0).sum() * 12))


def test_a_batch_of_weight_two_counts_as_two() -> None:
    first, second = torch.randn(6, 3), torch.randn(6, 3) + 1
    weighted = Moments.of(first, 2.0) + Moments.of(second)
    repeated = Moments.of(first) + Moments.of(first) + Moments.of(second)
    assert (weighted.rows, weighted.count) == (12, 18.0)
    torch.testing.assert_close(weighted.variance, repeated.variance)
    assert weighted.spread == pytest.approx(repeated.spread)


def test_a_constant_has_no_spread() -> None:
    found = sum((Moments.of(torch.full((3, 2), 0.1)) for _ in range(10)), start=Moments())
    assert 0 <= found.spread < 1e-12 and (found.variance >= 0).all()
    values = 1000 + 1e-2 * torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Moments.of(values).variance, values.double().var(0, correction=0), rtol=1e-3, atol=0)
    assert (Moments().spread, float(Moments().mean), float(Moments().variance)) == (0.0, 0.0, 0.0)
