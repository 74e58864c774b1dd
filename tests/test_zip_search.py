import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.combine.average import average
from fxmerge.demo import ViT
from fxmerge.evidence.activations import similarities, whole
from fxmerge.evidence.weights import slices
from fxmerge.matching.mergeable import zipped_classes
from fxmerge.matching.mix import Mix
from fxmerge.matching.problem import Problem, floats
from fxmerge.matching.room import Room
from fxmerge.matching.zip_search import ZipProblem, match_zip
from fxmerge.program.capture import capture_program
from fxmerge.program.run import Data, batch_inputs
from fxmerge.symmetry.flow import Flow, flows
from fxmerge.symmetry.group import analyse
from fxmerge.symmetry.units import Ids
from fxmerge.units.unit_map import UnitMap
from tests.published_zip import published_zip
from tests.slow import crossed


def mlp(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 3))


def grouped(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 16, 3, groups=4), nn.GroupNorm(4, 16), nn.GELU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 16, 4))


def vit(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return ViT(dim=16, heads=2)


class Tied(nn.Module):
    """An embedding that is the output layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.hidden = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.hidden(self.embedding(x))) @ self.embedding.weight.T


@pytest.mark.parametrize(
    ("network", "alpha"),
    crossed([(mlp, (64, 6)), (grouped, (64, 3, 8, 8)), (vit, (64, 1, 8, 8))], [0.0, 0.5, 1.0]),
)
def test_a_model_zipped_with_a_permuted_copy_is_the_model(network, alpha) -> None:  # type: ignore[no-untyped-def]
    make, shape = network
    a, b, x = make(0).eval(), make(1).eval(), torch.randn(shape)
    symmetry = fxmerge.find_symmetry(a, (x,))
    b.load_state_dict(symmetry.sample_permutation(torch.Generator().manual_seed(2)).apply(a.state_dict()))
    merged = fxmerge.merge(a, b, [x], recipe=fxmerge.Recipe(match=fxmerge.Zip(alpha=alpha)))
    torch.testing.assert_close(merged(x), a(x), rtol=1e-4, atol=1e-5)
    assert set(fxmerge.report(merged).zipped_within.values()) == {0}


@pytest.mark.parametrize("count", [2, 3])
def test_units_that_a_model_has_several_times_are_merged_without_loss(count: int) -> None:
    models, x = [mlp(i) for i in range(count)], torch.randn(200, 6)
    with torch.no_grad():
        for model in models:
            for layer in (model[0], model[2]):
                layer.weight.copy_(layer.weight[: 12 // count].repeat(count, 1))
                layer.bias.copy_(layer.bias[: 12 // count].repeat(count))
    merged = fxmerge.merge_many(models, [x], recipe=fxmerge.Recipe(match=fxmerge.Zip(alpha=0.0, damping=1.0)))
    expected = torch.stack([m(x) for m in models]).mean(0)
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)


def test_with_alpha_0_every_class_is_zipped_as_published() -> None:
    a, b, x = mlp(0), mlp(1), torch.randn(100, 6)
    found, symmetry = analyse(capture_program(a, (x,)))
    states = [m.state_dict() for m in (a, b)]
    pairs = [(0, 0), (0, 1), (1, 1)]
    shown = similarities(found, symmetry, states, Data([x], batch_inputs(a)), ("A", "B"), pairs)
    correlation = {n: whole(blocks, 2) for n, blocks in shown.items()}
    got = match_zip(symmetry, states, correlation, flows(found), alpha=0.0, budget=1.0, damping=0.5)
    with torch.no_grad():
        features = [torch.cat([m[:depth](x) for m in (a, b)], dim=1).numpy() for depth in (2, 4)]
    for n, seen in enumerate(features):
        expected, _ = published_zip(np.corrcoef(seen.T), 2, budget=1.0, damping=0.5)
        np.testing.assert_array_equal(np.stack([own[n] for own in got.units.maps]), expected)


def test_zipped_parameters_are_those_of_the_merge_and_unmerge_matrices() -> None:
    models, x = [mlp(0), mlp(1)], torch.randn(5, 6)
    found, symmetry = analyse(capture_program(models[0], (x,)))
    rng = np.random.default_rng(0)
    labels = [
        [np.concatenate([rng.permutation(12)[:6], rng.integers(0, 12, 6)]) for _ in symmetry.units] for _ in models
    ]
    for own in zip(*labels, strict=True):  # Every merged unit has a member.
        own[1][:] = np.r_[np.setdiff1d(np.arange(12), own[0]), own[1]][:12]
    consumed = frozenset(axis for axis, kind in flows(found).items() if kind is Flow.CONSUMES)
    widths = tuple(c.size for c in symmetry.units)
    units = UnitMap(symmetry.names, symmetry.layout, consumed, tuple(map(tuple, labels)), widths)
    got = average(units, [m.state_dict() for m in models], [0.5, 0.5], [])
    one_hot = [[torch.eye(12)[torch.from_numpy(own)] for own in row] for row in labels]
    sizes = [sum(o.sum(0) for o in own) for own in zip(*one_hot, strict=True)]
    merge = [[(o / s).T for o, s in zip(row, sizes, strict=True)] for row in one_hot]
    first = sum(m[0] @ model[0].weight for m, model in zip(merge, models, strict=True))
    second = sum(m[1] @ model[2].weight @ u[0] for m, u, model in zip(merge, one_hot, models, strict=True))
    last = sum(model[4].weight @ u[1] for u, model in zip(one_hot, models, strict=True)) / 2
    for name, expected in (("0.weight", first), ("2.weight", second), ("4.weight", last)):
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(got[name], expected)


def test_after_the_first_sweep_the_objective_never_falls() -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    trace = fxmerge.report(
        fxmerge.merge(mlp(0), mlp(1), [x], recipe=fxmerge.Recipe(match=fxmerge.Zip(alpha=0.7)))
    ).zip_objective
    assert len(trace) > 1
    assert list(trace) == sorted(trace)


def test_a_class_is_zipped_again_only_after_others_on_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two classes, the one that comes first meets units of the other that are not merged yet. One class alone meets
    nothing that moves."""
    zipped = []

    def count(self: ZipProblem, number: int, budget: float, damping: float) -> list[dict[int, Ids]]:
        zipped.append(number)
        return own(self, number, budget, damping)

    own = ZipProblem.zipped
    monkeypatch.setattr(ZipProblem, "zipped", count)
    fxmerge.merge(mlp(0), mlp(1), example=torch.zeros(2, 6))
    assert len(zipped) > 2
    assert len(set(zipped)) == 2
    zipped.clear()
    fxmerge.merge(mlp(0)[2:], mlp(1)[2:], example=torch.zeros(2, 12))
    assert len(zipped) == 1


def test_an_axis_that_both_produces_and_consumes_is_aligned_only() -> None:
    model, x = Tied(), torch.randint(0, 7, (4, 3))
    found, symmetry = analyse(capture_program(model, (x,)))
    flow = flows(found)
    assert flow["embedding.weight", 1] is Flow.BOTH
    assert (flow["hidden.weight", 0], flow["hidden.weight", 1]) == (Flow.PRODUCES, Flow.CONSUMES)
    tied = [n for n in zipped_classes(symmetry, flow) for r in symmetry.units[n].roles if "embedding" in r.axis[0]]
    assert tied == []


class OverChannels(nn.Module):
    """Channels are scaled by a convolution over channels, as in efficient channel attention (arXiv 1910.03151)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.over, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv1d(1, 1, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        gate = self.over(x.mean((2, 3))[:, None])[:, 0].sigmoid()
        out: Tensor = self.head((x * gate[:, :, None, None]).mean((2, 3)))
        return out


def test_units_that_may_only_be_reversed_are_not_merged_with_their_mirror_images() -> None:
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    a, b = OverChannels(0), OverChannels(1)
    report = fxmerge.report(fxmerge.merge(a, b, [x], fxmerge.Recipe(fit=None)))
    for images in report.images:
        for units in images.values():
            assert sorted(units) == list(range(len(units)))
    turned = copy.deepcopy(a)
    turned.load_state_dict(
        {
            "stem.weight": a.stem.weight.flip(0),
            "stem.bias": a.stem.bias.flip(0),
            "over.weight": a.over.weight.flip(2),
            "over.bias": a.over.bias,
            "head.weight": a.head.weight.flip(1),
            "head.bias": a.head.bias,
        }
    )
    with torch.no_grad():
        torch.testing.assert_close(turned(x), a(x))
        torch.testing.assert_close(fxmerge.merge(a, turned, [x])(x), a(x), rtol=1e-4, atol=1e-5)


def test_what_activations_give_is_a_trace_however_units_are_merged() -> None:
    """The trace of T' correlations T, with T as in the docstring of `ZipProblem`; also where units are permuted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    symmetry = fxmerge.find_symmetry(model, (torch.randn(2, 3),))
    states = [floats(symmetry, model.state_dict()) for _ in range(3)]
    rng = np.random.default_rng(0)
    features = {n: rng.normal(size=(3 * symmetry.units[n].size, 7)) for n in symmetry.choices}
    correlation = {n: np.corrcoef(x) for n, x in features.items()}
    problem = ZipProblem(symmetry, states, correlation, Mix.of(0.5, correlation), Room.of(symmetry))
    for _ in range(20):
        number = int(rng.choice(symmetry.choices))
        size = symmetry.units[number].size
        labels = rng.permutation(np.concatenate([np.arange(size), rng.integers(size, size=2 * size)]))
        problem.take([{number: own} for own in labels.reshape(3, size)])
        for n in symmetry.choices:
            merged = np.concatenate([own[n] for own in problem.labels])
            t = np.eye(symmetry.units[n].size)[merged]
            t /= np.sqrt(t.sum(0))
            assert problem.agreed[n] == pytest.approx(np.trace(t.T @ correlation[n] @ t))

    scales, identity = dict.fromkeys(states[0], 1.0), symmetry.identity().images
    pairs = {
        n: torch.from_numpy(c[: symmetry.units[n].size, symmetry.units[n].size :][:, : symmetry.units[n].size])
        for n, c in correlation.items()
    }
    moved = Problem(symmetry, states[0], states[1], pairs, Mix.of(0.5, pairs), identity, scales, slices(symmetry))
    for seed in range(5):
        moved.take(symmetry.sample_permutation(torch.Generator().manual_seed(seed)).images)
        for n, c in pairs.items():
            assert moved.agreed[n] == pytest.approx(float(c[torch.arange(len(c)), np.argsort(moved.images[n])].sum()))
