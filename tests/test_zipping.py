from itertools import permutations

import numpy as np
import pytest

import fxmerge
from fxmerge.matching import agglomerate
from fxmerge.matching.assignment import Scores
from fxmerge.matching.blocks import match_blocks, nest
from fxmerge.matching.zipping import zip_blocks, zip_groups, zip_units
from fxmerge.symmetry.units import Ids
from tests.published_zip import published_zip

OPTIONS = [(1.0, 0.5), (0.125, 0.3), (0.5, 1.0), (0.5, 0.0), (0.0, 1.0), (0.0, 0.0), (1.0, 0.001)]
"""Pairs of budget and damping; the first is the default, the second that of ZipIt!."""


def uniform(rng: np.random.Generator, size: int) -> Scores:
    """Of both signs, so that damping raises as often as it lowers."""
    return _symmetric(rng.uniform(-1, 1, size=(size, size)))


def correlated(rng: np.random.Generator, size: int) -> Scores:
    features = rng.normal(size=(size, 20))
    features[size // 2 :] += 1.5 * features[: size - size // 2]
    return _symmetric(np.corrcoef(features))


def tied(rng: np.random.Generator, size: int) -> Scores:
    return _symmetric(rng.integers(-2, 3, size=(size, size)) / 4)


def negative(rng: np.random.Generator, size: int) -> Scores:
    """Every merged unit is nearer to all others than its members were."""
    return _symmetric(-rng.uniform(0.1, 1, size=(size, size)))


def crowded(rng: np.random.Generator, size: int) -> Scores:
    """All units are most similar to one and the same few."""
    hubs = np.where(np.arange(size) % 7 == 3, 0.5, 0.0)
    return _symmetric(rng.uniform(0, 0.5, size=(size, size)) + hubs[:, None] + hubs)


def _symmetric(x: Scores) -> Scores:
    x = np.triu(x, 1)
    return x + x.T + np.eye(len(x))


@pytest.fixture(params=[agglomerate.CHUNK, 3])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units are few here: only with small chunks are there several, and is what is left of many merges made compact."""
    monkeypatch.setattr(agglomerate, "CHUNK", request.param)


KINDS = [uniform, correlated, tied, negative, crowded]


def partition(labels: Ids) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels.reshape(-1) == k).tolist()) for k in np.unique(labels)}


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(("budget", "damping"), OPTIONS)
@pytest.mark.parametrize("models", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_zip_is_the_published_one(kind, models: int, budget: float, damping: float) -> None:
    rng = np.random.default_rng(0)
    for units in (1, 2, 7, 80 // models):
        similarity = kind(rng, models * units)
        labels, forced = published_zip(similarity, models, budget, damping)
        zipped = zip_units(similarity, models, budget=budget, damping=damping)
        np.testing.assert_array_equal(zipped.labels, labels)
        assert zipped.forced == forced


@pytest.mark.parametrize("damping", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_zip_in_single_precision_is_the_published_one(kind, damping: float) -> None:  # type: ignore[no-untyped-def]
    """What a damping gives is rounded as the published code rounds it."""
    similarity = kind(np.random.default_rng(0), 80).astype(np.float32)
    labels, _ = published_zip(similarity, 2, 0.5, damping)
    np.testing.assert_array_equal(zip_units(similarity, 2, budget=0.5, damping=damping).labels, labels)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(("budget", "damping"), OPTIONS)
@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_zip_of_groups_is_the_published_one(kind, models: int, budget: float, damping: float) -> None:
    rng = np.random.default_rng(0)
    for blocks, members in ((1, 6), (4, 1), (3, 5), (5, 4)):
        similarity = kind(rng, models * blocks * members)
        labels, forced = published_zip(similarity, models, budget, damping, blocks)
        numbers = np.arange(blocks).repeat(members)
        zipped = zip_groups(similarity, models, numbers, budget=budget, damping=damping)
        np.testing.assert_array_equal(zipped.labels, labels)
        assert zipped.forced == forced


def test_a_budget_of_no_merge_is_all_that_differs_from_the_published_code() -> None:
    """That code looks at a budget only when it was used, so that one merge inside of each model is always made."""
    rng = np.random.default_rng(0)
    similarity = _symmetric(rng.uniform(0.5, 1, size=(16, 16)))
    similarity[0, 1] = similarity[1, 0] = 2.0
    published, _ = published_zip(similarity, 2, budget=0.0, damping=0.5, late=True)
    assert published[0, 0] == published[0, 1]
    assert sorted(zip_units(similarity, 2, budget=0.0).labels[0]) == list(range(8))
    for budget in (0.25, 0.5, 1.0):
        published, _ = published_zip(similarity, 2, budget, damping=0.5, late=True)
        np.testing.assert_array_equal(zip_units(similarity, 2, budget=budget).labels, published)


@pytest.mark.parametrize(("budget", "damping"), OPTIONS)
@pytest.mark.parametrize("models", [2, 3, 5])
def test_every_merged_unit_has_a_member_and_weights_that_sum_to_one(models: int, budget: float, damping: float) -> None:
    units = 12
    zipped = zip_units(uniform(np.random.default_rng(1), models * units), models, budget=budget, damping=damping)
    assert zipped.sizes.shape == (units,)
    assert zipped.sizes.min() >= 1
    assert zipped.merge.shape == zipped.unmerge.T.shape == (units, models * units)
    np.testing.assert_allclose(zipped.merge.sum(axis=1), 1)
    np.testing.assert_array_equal(zipped.unmerge.sum(axis=1), 1)
    np.testing.assert_allclose(zipped.merge @ zipped.unmerge, np.eye(units), atol=1e-15)
    # Numbered by their first members.
    first = [zipped.labels.reshape(-1).tolist().index(k) for k in range(units)]
    assert first == sorted(first)
    assert zipped.forced == 0 or models > 2


@pytest.mark.parametrize("budget", [0.0, 0.2, 0.5, 1.0])
def test_the_budget_is_respected(budget: float) -> None:
    """Without it, all units of the first model would be one."""
    units = 20
    similarity = uniform(np.random.default_rng(2), 2 * units)
    similarity[:units, :units] = 2.0
    labels = zip_units(similarity, 2, budget=budget, damping=1.0).labels
    merges = units - len(np.unique(labels[0]))
    assert merges == int(budget * (units // 2) + 1e-4)


def test_without_a_budget_two_models_are_aligned() -> None:
    rng = np.random.default_rng(3)
    for damping in (0.0, 0.5, 1.0):
        labels = zip_units(uniform(rng, 40), 2, budget=0.0, damping=damping).labels
        assert labels[0].tolist() == list(range(20))
        assert sorted(labels[1]) == list(range(20))


def test_permuted_units_give_the_permuted_zip() -> None:
    rng = np.random.default_rng(4)
    models, units = 3, 15
    similarity = uniform(rng, models * units)
    order = np.concatenate([m * units + rng.permutation(units) for m in range(models)])
    plain = partition(zip_units(similarity, models).labels)
    permuted = partition(zip_units(similarity[np.ix_(order, order)], models).labels)
    assert {frozenset(order[list(own)].tolist()) for own in permuted} == plain


@pytest.mark.parametrize("models", [2, 3])
def test_a_planted_permutation_is_found(models: int) -> None:
    rng = np.random.default_rng(5)
    features = rng.normal(size=(10, 30))
    planted = [np.arange(10), *(rng.permutation(10) for _ in range(models - 1))]
    similarity = np.corrcoef(np.concatenate([features[p] for p in planted]))
    np.testing.assert_array_equal(zip_units(similarity, models).labels, planted)


def test_only_what_is_above_the_diagonal_is_read() -> None:
    similarity = uniform(np.random.default_rng(6), 20)
    half = np.where(np.tri(20, dtype=bool), np.nan, similarity)
    np.testing.assert_array_equal(zip_units(half, 2).labels, zip_units(similarity, 2).labels)


def test_the_similarity_is_not_modified() -> None:
    similarity = uniform(np.random.default_rng(7), 20)
    before = similarity.copy()
    zip_units(similarity, 2)
    zip_groups(similarity, 2, np.arange(10) // 5)
    np.testing.assert_array_equal(similarity, before)


def test_units_of_one_merged_unit_are_of_one_block() -> None:
    rng = np.random.default_rng(8)
    models, blocks = 3, rng.permutation(np.arange(24) // 6)
    zipped = zip_groups(uniform(rng, models * 24), models, blocks)
    for m in range(models):
        # The block of the first model in whose places the units of each block are.
        into = {(int(b), int(blocks[k])) for b, k in zip(blocks, zipped.labels[m], strict=True)}
        assert len(into) == 4
        assert len({b for _, b in into}) == 4


def test_blocks_may_have_any_numbers_and_lie_anywhere() -> None:
    rng = np.random.default_rng(9)
    similarity = uniform(rng, 24)
    plain = zip_groups(similarity, 2, np.arange(12) // 4)
    order = rng.permutation(12)
    both = np.concatenate([order, 12 + order])
    moved = zip_groups(similarity[np.ix_(both, both)], 2, np.array([10, 20, 70])[order // 4])
    assert {frozenset(both[list(own)].tolist()) for own in partition(moved.labels)} == partition(plain.labels)


def test_blocks_in_blocks_are_matched_as_the_best_of_all_nested_permutations() -> None:
    """Two blocks of two blocks of two units have 2 * 2**2 * 2**4 = 128 nested permutations: try them all."""
    rng = np.random.default_rng(10)
    nested = nest([np.arange(8) // 4, np.arange(8) // 2])
    for _ in range(10):
        scores = rng.normal(size=(8, 8))
        best = -np.inf
        for outer in permutations(range(2)):
            for inner in np.ndindex(2, 2):
                places = [2 * outer[k // 2] + (k + inner[k // 2]) % 2 for k in range(4)]
                gain = sum(
                    max(
                        scores[2 * p, 2 * k] + scores[2 * p + 1, 2 * k + 1],
                        scores[2 * p, 2 * k + 1] + scores[2 * p + 1, 2 * k],
                    )
                    for k, p in enumerate(places)
                )
                if gain > best:
                    best, expected = gain, places
        assert match_blocks(scores, nested).tolist() == expected


def test_a_planted_nested_permutation_is_found() -> None:
    rng = np.random.default_rng(11)
    levels = np.stack([np.arange(24) // 12, np.arange(24) // 4])
    image = np.arange(24).reshape(2, 3, 4)[rng.permutation(2)]
    image = np.stack([outer[rng.permutation(3)] for outer in image])
    planted = np.stack([[rng.permutation(block) for block in outer] for outer in image]).reshape(-1)
    features = rng.normal(size=(24, 40))
    similarity = np.corrcoef(np.concatenate([features, features[planted]]))
    assert zip_groups(similarity, 2, levels).labels[1].tolist() == planted.tolist()


def test_the_budget_of_groups_is_for_all_of_them_together() -> None:
    """Each of two blocks may have two merges inside of each model; with half of the budget both are of the first."""
    similarity = uniform(np.random.default_rng(12), 16)
    blocks = np.arange(8) // 4
    for m in (0, 8):
        for b in (0, 4):
            similarity[m + b : m + b + 4, m + b : m + b + 4] = 2.0
    for budget, merges in ((1.0, [2, 2]), (0.5, [2, 0]), (0.25, [1, 0])):
        labels = zip_groups(similarity, 2, blocks, budget=budget, damping=1.0).labels
        assert [4 - len(np.unique(labels[0][blocks == b])) for b in range(2)] == merges


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: zip_units(s[:5], 2), r"shape \(5, 6\); it must be square"),
        (lambda s: zip_units(s, 4), "as many rows for each of 4 models"),
        (lambda s: zip_units(s[:0, :0], 2), r"shape \(0, 0\)"),
        (lambda s: zip_units(s, 0), "at least 1"),
        (lambda s: zip_units(s, 2, budget=1.5), r"budget is 1.5; it must be in \[0, 1\]"),
        (lambda s: zip_units(s, 2, budget=float("nan")), "budget is nan"),
        (lambda s: zip_units(s, 2, damping=-0.1), "damping is -0.1"),
        (lambda s: zip_groups(s, 2, np.arange(4)), r"one number for each of the 3 units"),
        (lambda s: zip_groups(s, 2, np.array([0, 0, 1])), "differ in size"),
        (lambda s: zip_groups(s, 3, np.array([[0, 1], [0, 0]])), "lies across several outer blocks"),
        (lambda s: zip_blocks(s, np.array([[0, 0, 1], [0, 1, 1]])), "as many units in every model"),
        (lambda s: zip_blocks(s, np.zeros((2, 4))), r"The blocks have shape \(2, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(call, message: str) -> None:
    with pytest.raises(fxmerge.OptionError, match=message):
        call(uniform(np.random.default_rng(0), 6))


def test_nan_is_refused() -> None:
    similarity = uniform(np.random.default_rng(0), 6)
    similarity[1, 2] = np.nan
    with pytest.raises(fxmerge.NonFiniteError, match="above the diagonal is NaN"):
        zip_units(similarity, 2)
