"""The pieces of benchmarks/tasks.py that are easily wrong without being noticed."""

import gzip
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import compression
import limits
import pytest
import torch
from tasks_suite import dense, images, judging, partial, report, text, training
from tasks_suite.methods import BY_ALPHA, METHODS, Pair, result
from tasks_suite.suite import NETWORKS, PROBLEMS
from torch import nn

from fxmerge.demo import recalibrated


def quiet(stage: str, **found: Any) -> None:
    """Notes nothing."""


# ---------------------------------------------------------------------- data


def test_batches_of_a_task_hold_its_classes_only() -> None:
    problem = images.digits()
    generator = torch.Generator().manual_seed(0)
    seen = {part: set(problem.batch(part, 500, generator)[1].tolist()) for part in images.PARTS}
    assert seen == {"a": set(range(5)), "b": set(range(5, 10)), "both": set(range(10))}


def test_calibration_and_test_images_are_apart() -> None:
    problem = images.digits()
    calibration = {tuple(image.flatten().tolist()) for image in torch.cat(problem.calibration())}
    shared = sum(tuple(image.flatten().tolist()) in calibration for image in problem.test.images)
    assert shared == 0
    assert all(torch.equal(x, y) for x, y in zip(problem.calibration(), problem.calibration(), strict=True))


def test_validation_images_are_neither_learnt_nor_tested_on() -> None:
    problem = images.digits()
    train, validation, test = (
        {tuple(image.flatten().tolist()) for image in split.images}
        for split in (problem.train, problem.validation, problem.test)
    )
    assert validation
    assert validation.isdisjoint(train)
    assert validation.isdisjoint(test)


def test_shares_have_no_image_in_common() -> None:
    problem = images.digits()
    shares = [problem.share(number).train for number in range(images.SHARES)]
    seen = [{tuple(image.flatten().tolist()) for image in share.images} for share in shares]
    assert min(len(share) for share in seen) > 50
    assert sum(len(share) for share in seen) == len(set().union(*seen))
    of_all = {
        tuple(x.flatten().tolist()): int(y) for x, y in zip(problem.train.images, problem.train.labels, strict=True)
    }
    assert all(
        of_all[tuple(x.flatten().tolist())] == y for x, y in zip(shares[1].images, shares[1].labels, strict=True)
    )


def test_an_idx_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(">HBBIII", 0, 8, 3, 3, 2, 2) + bytes(range(12)))
    assert images.read_idx(path, 10).tolist() == torch.arange(12).view(3, 2, 2).tolist()
    assert images.read_idx(path, 1).tolist() == [[[0, 1], [2, 3]]]


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(">HBBI", 0, 13, 1, 0))
    with pytest.raises(ValueError, match="IDX"):
        images.read_idx(path, 1)


def test_maps_of_an_image_are_itself_and_its_edges() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[..., 4:] = 0.5
    same, edges = dense.maps(image)[0]
    assert torch.equal(same, image[0, 0])
    # A step of one half, seen from both of its sides.
    assert edges[4].tolist() == [0, 0, 0, 0.5, 0.5, 0, 0, 0, 0.5]


def test_a_task_that_is_not_learnt_has_zeros_as_its_map() -> None:
    problem = dense.DenseProblem(torch.rand(8, 1, 6, 6), torch.rand(4, 1, 6, 6), torch.rand(4, 1, 6, 6))
    _, targets = problem.batch("a", 4, torch.Generator().manual_seed(0))
    other = targets * torch.tensor([1.0, 0.0])[:, None, None]
    assert problem.objective(other, targets, "a") == 0
    assert problem.objective(targets, targets, "both") == 0
    assert problem.objective(other, targets, "b") > 0


def test_what_is_explained_of_a_map_does_not_depend_on_its_scale() -> None:
    x, noise = torch.randn(2, 4, 100, 100, generator=torch.Generator().manual_seed(0))
    assert dense.explained(3 * x + 1, x) == pytest.approx(1)
    assert dense.explained(x + noise, x) == pytest.approx(0.5, abs=0.02)
    assert dense.explained(torch.zeros_like(x), x) == 0


def test_text_for_testing_is_not_trained_on() -> None:
    numbers = torch.arange(10 * text.BLOCK * 3 + 7)
    train, test = text.split_blocks(numbers)
    assert sorted([*train.tolist(), *test.tolist()]) == numbers.tolist()
    assert len(test) == 3 * text.BLOCK + 7


def test_characters_outside_of_the_vocabulary_are_question_marks() -> None:
    assert len(set(text.VOCABULARY)) == 96
    assert "".join(text.VOCABULARY[n] for n in text.encode("a = 'ä'\n\t")) == "a = '?'\n?"


def test_targets_of_text_are_the_next_characters() -> None:
    problem = text.TextProblem({"a": torch.arange(500), "b": torch.arange(1000, 1500)}, {})
    inputs, targets = problem.batch("both", 8, torch.Generator().manual_seed(0))
    assert torch.equal(inputs + 1, targets)
    assert inputs.shape == (8, text.CONTEXT)
    assert (inputs[:4] < 500).all() and (inputs[4:] >= 1000).all()


# ---------------------------------------------------------------------- training


def test_no_two_pairs_of_a_setting_share_a_parent() -> None:
    for setting in training.SETTINGS:
        parents = [parent for seed in range(4) for parent in training.parents_of("mlp", setting, seed)]
        assert len(set(parents)) == 8


def test_a_trained_parent_is_kept_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "digits-mlp", replace(NETWORKS["digits-mlp"], steps=2))
    parents = training.parents_of("digits-mlp", "disjoint", 0)
    todo = training.missing([*parents, parents[0]], tmp_path)
    assert [(task["part"], task["seed"]) for task in todo] == [("a", 0), ("b", 1)]
    training.work(todo[0], quiet)
    assert training.missing(parents, tmp_path) == todo[1:]
    model = training.build("digits-mlp", 0)
    problem = images.digits()
    training.train(NETWORKS["digits-mlp"], model, problem, "a", 0, 2)
    kept = training.load(parents[0], tmp_path).state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    monkeypatch.setitem(NETWORKS, "digits-mlp", replace(NETWORKS["digits-mlp"], steps=3))
    assert len(training.missing(parents, tmp_path)) == 2


@pytest.mark.parametrize("name", NETWORKS)
def test_the_place_of_a_parent_is_the_same_in_every_process(name: str, tmp_path: Path) -> None:
    assert " at 0x" not in repr(training.build(name, 0))
    assert training.path_of((name, "a", 0), tmp_path) == training.path_of((name, "a", 0), tmp_path)


# ---------------------------------------------------------------------- judging


def test_a_straight_line_has_no_barrier() -> None:
    assert judging.barrier([1.0, 2.0, 3.0]) == pytest.approx(0.0)
    assert judging.barrier([1.0, 0.0, 3.0]) == pytest.approx(0.0)
    assert judging.barrier([1.0, 4.0, 3.0]) == pytest.approx(2.0)
    assert judging.barrier([0.0, 3.0, 5.0, 9.0]) == pytest.approx(0.0)


def test_the_weights_of_a_point_of_a_plane_give_the_point_back() -> None:
    points = torch.randn(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = judging.coordinates(*points)
    for number in range(3):
        weights = judging.barycentric(places[number], places)
        assert weights == pytest.approx([float(number == n) for n in range(3)])
        for other in range(3):
            distance = math.dist(places[number], places[other])
            assert distance == pytest.approx(float((points[number] - points[other]).norm()))


def small_pair() -> Pair:
    """Two networks with BatchNorm and some inputs."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3))
        models.append(net.eval())
    batches = [torch.randn(16, 1, 8, 8), torch.randn(16, 1, 8, 8)]
    return Pair(models[0], models[1], batches, (batches[:1], batches[1:]), 0)


def test_the_ends_of_the_way_are_the_parents() -> None:
    pair = small_pair()
    states = [pair.a.state_dict(), pair.b.state_dict()]
    for number, parent in enumerate((pair.a, pair.b)):
        end = judging.combined(pair.a, states, [float(number == n) for n in range(2)], pair.batches)
        expected = recalibrated(parent, pair.batches)
        assert torch.allclose(end(pair.batches[0]), expected(pair.batches[0]))


def test_alignment_changes_no_output_and_another_parent_does() -> None:
    pair = small_pair()
    method = METHODS[BY_ALPHA[0.5]]
    (merged,), aligned = result(method, pair)
    assert aligned is not None and judging.change(pair, aligned) < 1e-12
    assert judging.change(pair, pair.a) > 1e-3
    states = [network.state_dict()["0.weight"] for network in (merged, pair.a, aligned)]
    assert torch.allclose(states[0], (states[1] + states[2]) / 2)


# ---------------------------------------------------------------------- results


def row(method: str, seed: int, accuracy: float) -> dict[str, Any]:
    key = {"network": "mlp", "setting": "disjoint", "seed": seed, "method": method, "measure": "merge"}
    return {**key, "stage": "done", "scores": {"per_task": accuracy}, "seconds": 1.0, "parameters": 8}


def test_the_best_of_the_grid_is_chosen_for_each_pair() -> None:
    scores = {0.0: (0.1, 0.6), 0.25: (0.2, 0.2), 0.5: (0.5, 0.1), 0.75: (0.3, 0.3), 1.0: (0.4, 0.4)}
    rows = [row(BY_ALPHA[alpha], seed, both[seed]) for alpha, both in scores.items() for seed in (0, 1)]
    found = report.Results(rows).numbers("mlp", "disjoint", report.BEST, "per_task")
    assert found == {0: 0.5, 1: 0.6}


def test_failed_rows_do_not_count_and_later_rows_replace_earlier_ones() -> None:
    rows = [row("fxmerge", 0, 0.5), row("fxmerge", 0, 0.7), {**row("fxmerge", 1, 0.1), "stage": "merge"}]
    assert report.Results(rows).numbers("mlp", "disjoint", "fxmerge", "per_task") == {0: 0.7}


def test_differences_are_those_of_pairs() -> None:
    difference, error = report.advantage({0: 0.5, 1: 0.9, 2: 0.1}, {0: 0.4, 1: 0.8})
    assert [difference, error] == pytest.approx([0.1, 0.0])


def test_every_network_takes_its_data() -> None:
    shapes = {"fashion": torch.zeros(2, 1, 28, 28), "digits": torch.zeros(2, 1, 8, 8)}
    shapes["dense"] = shapes["fashion"]
    shapes["text"] = torch.zeros(2, text.CONTEXT, dtype=torch.long)
    assert shapes.keys() == PROBLEMS.keys()
    for name, entry in NETWORKS.items():
        assert training.build(name, 0).eval()(shapes[entry.data]).isfinite().all()


# ---------------------------------------------------------------------- parents


class Constant(nn.Module):
    """A network with one output, always the same."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full((len(x), 1), self.value)


def test_the_network_nearest_to_the_mean_is_found() -> None:
    networks = [Constant(value) for value in (1.0, 3.0, 8.0)]
    batches = [torch.zeros(2, 1), torch.zeros(3, 1)]
    assert limits.nearest(networks, batches) == 1


def test_a_network_learns_what_the_mean_of_all_answers() -> None:
    torch.manual_seed(0)
    network, x = nn.Linear(3, 2), torch.randn(200, 3)
    targets = x @ torch.randn(3, 2)

    def miss(model: nn.Module) -> float:
        return float((model(x) - targets).detach().square().sum())

    before = network.weight.clone()
    errors = limits.distilled(network, x, targets, 0.05, miss)
    assert len(errors) == len(limits.EPOCHS)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * miss(network)
    assert torch.equal(network.weight, before)


# ---------------------------------------------------------------------- trunks, and networks made smaller


def test_shares_are_of_the_parameters_of_whole_layers() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 5))
    of_one, of_two = 9 / 50, 25 / 50
    assert partial.shares(model, partial.DEPTHS) == [0, of_one, of_one, of_two, of_two, "trunk"]


def test_heads_are_named_for_all_projections_but_the_last() -> None:
    for name, projections in (("vit-fused", 1), ("vit-separate", 3), ("mlp", 0)):
        model = training.build(name, 0)
        heads = compression.heads_of(model)
        assert len(heads) == 3 * projections
        assert set(heads.values()) <= {4}


def test_means_are_over_networks_for_which_every_method_is_possible() -> None:
    whole, half, quarter = (compression.Measured(1, 1, accuracy, accuracy, 0) for accuracy in (0.8, 0.4, 0.2))
    made = {
        ("one", compression.WHOLE): whole,
        ("one", "fold"): half,
        ("one", "pruning"): None,
        ("one", "pruning" + compression.HEADS_NAMED): quarter,
        ("two", compression.WHOLE): whole,
        ("two", "fold"): whole,
        ("two", "pruning"): None,
    }
    results = [
        compression.Result(network, 0, 1 if method == compression.WHOLE else 0.5, method, measured)
        for (network, method), measured in made.items()
    ]
    rows = compression.means(results)
    assert [(row[""], row["networks"], row["accuracy"]) for row in rows] == [
        ("fold", "1 of 2", "50.0%"),
        ("pruning", "1 of 2", "25.0%"),
    ]
