from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.evidence import weights
from fxmerge.evidence.activations import MAX_ROWS, _consumed, find_taps, similarities
from fxmerge.matching.assignment import assign, descendants, propose
from fxmerge.matching.mix import Mix
from fxmerge.matching.problem import Problem, floats
from fxmerge.matching.search import search
from fxmerge.program.capture import capture_program
from fxmerge.program.run import Data, batch_inputs
from fxmerge.symmetry.group import Symmetry, analyse
from fxmerge.symmetry.propagation import Propagation
from tests.oracle.architectures import CASES
from tests.oracle.inferred import each, inferred


def analysed(model: nn.Module, x: Tensor) -> tuple[Propagation, Symmetry]:
    return analyse(capture_program(model.eval(), (x,)))


def cnn(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 3)).eval()


def test_activation_correlations_equal_numpy_on_all_data_at_once() -> None:
    a, b = cnn(0), cnn(1)
    batches = [torch.randn(4, 2, 6, 6) for _ in range(3)]
    found, symmetry = analysed(a, batches[0])
    states, pairs = (a.state_dict(), b.state_dict()), [(0, 0), (0, 1)]
    got = similarities(found, symmetry, states, Data(batches, batch_inputs(a)), ("model A", "model B"), pairs)[0]
    with torch.no_grad():
        units = [m[:3](torch.cat(batches)).transpose(0, 1).reshape(5, -1).numpy() for m in (a, b)]
    expected = np.corrcoef(*units)
    np.testing.assert_allclose(got[0, 0], expected[:5, :5], atol=1e-5)
    np.testing.assert_allclose(got[0, 1], expected[:5, 5:], atol=1e-5)


def test_cosines_equal_numpy_on_all_data_at_once() -> None:
    a, b = cnn(0), cnn(1)
    batches = [torch.randn(4, 2, 6, 6) for _ in range(3)]
    found, symmetry = analysed(a, batches[0])
    states, names = (a.state_dict(), b.state_dict()), ("model A", "model B")
    # Each batch counts in units of the first, which for all data at once is the whole.
    data = Data([torch.cat(batches)], batch_inputs(a))
    got = similarities(found, symmetry, states, data, names, [(0, 1)], "cosine")[0][0, 1]
    with torch.no_grad():
        x, y = (m[:3](torch.cat(batches)).transpose(0, 1).reshape(5, -1).double().numpy() for m in (a, b))
    expected = x @ y.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)
    np.testing.assert_allclose(got, expected, atol=1e-5)


class Twice(nn.Module):
    """A class that two activations show."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.inner, self.outer = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        out: Tensor = self.head(x + self.outer(self.inner(x).tanh()))
        return out


def test_all_activations_of_a_class_count_alike() -> None:
    a, b, x = Twice(0), Twice(1), torch.randn(40, 3)
    found, symmetry = analysed(a, x)
    states, data, names = (a.state_dict(), b.state_dict()), Data([x], batch_inputs(a)), ("A", "B")
    every = similarities(found, symmetry, states, data, names, [(0, 1)])
    (stream,) = (n for n in every if symmetry.units[n].size == 6)

    def ends(m: Twice) -> tuple[Tensor, Tensor]:
        early = m.stem(x).tanh()
        return early, early + m.outer(m.inner(early).tanh())

    with torch.no_grad():
        early, late = (np.corrcoef(u.T, v.T)[:6, 6:] for u, v in zip(ends(a), ends(b), strict=True))
    np.testing.assert_allclose(every[stream][0, 1], (early + late) / 2, atol=1e-5)


def test_activations_are_taken_where_a_contraction_consumes_them() -> None:
    found, symmetry = analysed(cnn(0), torch.randn(4, 2, 6, 6))
    (tap,) = find_taps(found, symmetry)
    # After the flatten, every channel shows at 16 places.
    assert tap.order.shape == (5, 16)
    assert tap.order[1].tolist() == list(range(16, 32))


class Written(nn.Module):
    """Two linear layers that are written out, with weights that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(3, 8))
        self.norm = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.first.t()).relu() @ (self.second * self.norm).t()


def test_weights_are_no_activations() -> None:
    found, symmetry = analysed(Written(), torch.randn(4, 5))
    (tap,) = find_taps(found, symmetry)
    assert tap.node.name == "relu"


class Biased(nn.Module):
    """Attention whose mask is computed, and a product to which an activation is added."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far, self.mask, self.added = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        near, far = self.near(x), self.far(x)
        mask = self.mask(x).tanh()
        x = nn.functional.scaled_dot_product_attention(near, far, x, attn_mask=mask)
        return torch.baddbmm(self.added(x).tanh(), near, far)


def test_what_is_only_added_is_not_consumed() -> None:
    program = capture_program(Biased().eval(), (torch.randn(2, 4, 4),))
    consumed = {node.name for node in _consumed(program)}
    added = {n.name for n in program.graph.graph.nodes if "tanh" in n.name}
    assert len(added) == 2
    assert added.isdisjoint(consumed)
    assert {"linear", "linear_1"} <= consumed


def test_a_unit_that_never_varies_correlates_with_nothing() -> None:
    a, b = cnn(0), cnn(1)
    with torch.no_grad():
        a[1].bias[2] = -1e4
    x = torch.randn(4, 2, 6, 6)
    found, symmetry = analysed(a, x)
    got = similarities(
        found, symmetry, (a.state_dict(), b.state_dict()), Data([x], batch_inputs(a)), ("A", "B"), [(0, 1)]
    )[0][0, 1]
    assert torch.equal(got[2], torch.zeros(5))
    assert torch.isfinite(got).all()


def test_rows_are_subsampled_above_the_limit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3 * MAX_ROWS, 3)
    found, symmetry = analysed(model, x)
    state = model.state_dict()
    got = similarities(found, symmetry, (state, state), Data([x], batch_inputs(model)), ("A", "B"), [(0, 1)])[0][0, 1]
    assert torch.allclose(got.diagonal(), torch.ones(4), atol=1e-4)


def test_the_order_and_size_of_batches_do_not_matter_for_what_streams() -> None:
    a, b = cnn(0), cnn(1)
    x = torch.randn(8, 2, 6, 6)
    found, symmetry = analysed(a, x)
    states = (a.state_dict(), b.state_dict())
    one = similarities(found, symmetry, states, Data([x], batch_inputs(a)), ("A", "B"), [(0, 1)])[0][0, 1]
    two = similarities(found, symmetry, states, Data([x[:5], x[5:]], batch_inputs(a)), ("A", "B"), [(0, 1)])[0][0, 1]
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_a_nan_activation_is_refused_with_its_place() -> None:
    model = cnn(0)
    x = torch.randn(4, 2, 6, 6)
    found, symmetry = analysed(model, x)
    bad = x.clone()
    bad[0] = float("inf")
    state = model.state_dict()
    with pytest.raises(fxmerge.NonFiniteError, match=r"model B|model A.*graph node"):
        similarities(
            found, symmetry, (state, state), Data([bad], batch_inputs(model)), ("model A", "model B"), [(0, 1)]
        )


def test_weight_similarity_is_the_scaled_inner_product_of_slices() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    symmetry = fxmerge.find_symmetry(model, (torch.zeros(2, 3),))
    a = dict(model.state_dict())
    b = {k: torch.randn_like(v) for k, v in a.items()}
    scales = {"0.weight": 2.0, "0.bias": 3.0, "2.weight": 5.0}
    got = weights.similarity(a, b, weights.slices(symmetry)[0], scales)
    expected = (
        2 * a["0.weight"] @ b["0.weight"].T
        + 3 * torch.outer(a["0.bias"], b["0.bias"])
        + 5 * a["2.weight"].T @ b["2.weight"]
    )
    torch.testing.assert_close(got, expected)


@each(CASES)
def test_similarities_found_from_what_changed_are_those_found_anew(name: str) -> None:
    """Random moves and mixtures of random classes, of few units or of all, with room for all, some or none; at first
    only some slices count."""
    torch.manual_seed(0)
    model, symmetry = inferred(name).model, inferred(name).symmetry
    state = {n: t.double() for n, t in floats(symmetry, model.state_dict()).items()}
    a, b = ({n: torch.randn_like(t) for n, t in state.items()} for _ in range(2))
    scales = {n: 1.0 + k for k, n in enumerate(a)}
    where = weights.slices(symmetry)
    problem = Problem(symmetry, a, b, {}, Mix.of(1.0, {}), symmetry.identity().images, scales, where)
    kept = [weights.Similarities(a, scales, room) for room in (weights.ROOM, 10_000, 0)]
    roots = [n for n, c in enumerate(symmetry.units) if not c.parents]
    rng = np.random.default_rng(0)
    for step in range(12):
        root, still = int(rng.choice(roots)), rng.choice([0.0, 2.0])
        tree = [n for n in descendants(symmetry, root) if n in symmetry.choices]
        sizes = {n: symmetry.units[n].size for n in tree}
        scores = {n: rng.normal(size=(k, k)) + still * np.eye(k) for n, k in sizes.items()}
        before = problem.position
        move = propose(symmetry, root, scores)
        problem.take(move)
        mixed = [n for n in tree if n in problem.matrices]
        problem.rotate(mixed, where)
        if rng.random() < 0.3:
            problem.position = before
        else:
            for found in kept:
                for n in tree:
                    found.follow(n, problem.placing(n))
        for number, slices in where.items():
            usable = [s for s in slices if step > 5 or rng.random() < 0.5]
            if usable and rng.random() < 0.7:
                expected = weights.similarity(a, problem.b, usable, scales)
                for found in kept:
                    got = found.of(number, usable, problem.placing(number))
                    torch.testing.assert_close(got, expected)


def two_layers() -> tuple[Problem, int, int]:
    """Two hidden layers, with the numbers of their classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    symmetry = fxmerge.find_symmetry(model, (torch.zeros(1, 5),))
    state = floats(symmetry, model.state_dict())
    a, b = ({n: torch.randn_like(t) for n, t in state.items()} for _ in range(2))
    where, images = weights.slices(symmetry), symmetry.identity().images
    problem = Problem(symmetry, a, b, {}, Mix.of(1.0, {}), images, dict.fromkeys(a, 1.0), where)
    first, second = (symmetry.names.index(n) for n in ("0.weight[0]", "2.weight[0]"))
    return problem, first, second


def moved(problem: Problem, number: int, places: list[int]) -> None:
    step = [np.arange(len(image)) for image in problem.images]
    step[number] = np.array(places)
    problem.take(step)


def test_only_the_terms_of_units_that_moved_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, first, second = two_layers()
    kept = weights.Similarities(problem.a, problem.scales)
    changed: list[int] = []
    updated = weights.Similarities._updated

    def counted(self: Any, total: Tensor, s: Any, before: Tensor, at: Any) -> Tensor:
        changed.append(int((before != s.of(at.b[s.axis.parameter])).any(0).sum()))
        return updated(self, total, s, before, at)

    monkeypatch.setattr(weights.Similarities, "_updated", counted)
    for number in (first, second):
        kept.of(number, problem.slices[number], problem.placing(number))
    assert changed == []
    # Units that only moved themselves are found again in their new places.
    moved(problem, second, [3, 0, 1, 2, 5, 4])
    kept.of(second, problem.slices[second], problem.placing(second))
    assert changed == []
    kept.of(first, problem.slices[first], problem.placing(first))
    assert sum(changed) == 6
    changed.clear()
    moved(problem, second, [1, 0, 2, 3, 4, 5])
    kept.of(first, problem.slices[first], problem.placing(first))
    assert sum(changed) == 2


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_units_that_certainly_stay_are_where_an_assignment_puts_them(noise: float) -> None:
    """Of a copy of a, with noise, of which the other class is moved by a few units."""
    problem, first, second = two_layers()
    problem.b = {name: t + noise * torch.randn_like(t) for name, t in problem.a.items()}
    kept = weights.Similarities(problem.a, problem.scales)
    assert not kept.stay(first, problem.slices[first], problem.placing(first))  # Nothing is known yet.
    certain = 0
    for order in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 5, 4], [1, 0, 3, 2, 5, 4], [5, 4, 3, 2, 1, 0]):
        kept.of(first, problem.slices[first], problem.placing(first))
        moved(problem, second, order)
        if kept.stay(first, problem.slices[first], problem.placing(first)):
            certain += 1
            own = weights.similarity(problem.a, problem.b, problem.slices[first], problem.scales)
            assert np.array_equal(assign(own.double().numpy()), np.arange(8))
    assert certain > 0 if noise == 0 else certain < 4


def test_a_class_is_not_matched_again_before_what_it_depends_on_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, first, second = two_layers()
    solved: list[int] = []
    scores = Problem.scores

    def counted(self: Problem, number: int, usable: Any) -> Any:
        solved.append(number)
        return scores(self, number, usable)

    monkeypatch.setattr(Problem, "scores", counted)
    search(problem)
    # The one that comes later in the first sweep is matched by all of its slices there.
    assert sorted(solved[:2]) == sorted([first, second])
    assert solved[2] == solved[0]


def test_what_was_seen_least_recently_makes_room() -> None:
    problem, first, second = two_layers()

    def visit(kept: weights.Similarities, *numbers: int) -> list[int]:
        for number in numbers:
            kept.of(number, problem.slices[number], problem.placing(number))
        return list(kept._seen)

    both = weights.Similarities(problem.a, problem.scales)
    assert visit(both, first, second, first) == [second, first]
    sizes = {number: seen.total.nbytes for number, seen in both._seen.items()}  # The search holds the parameters.
    one = weights.Similarities(problem.a, problem.scales, sum(sizes.values()) - 1)
    assert visit(one, first, second) == [second]
    # What has no room at all does not drive out the rest.
    small, large = sorted(sizes, key=lambda number: sizes[number])
    less = weights.Similarities(problem.a, problem.scales, sizes[large] - 1)
    assert visit(less, small, large) == [small]


def test_slices_of_grouped_weights_take_the_rows_of_their_group() -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1, groups=2), nn.ReLU(), nn.Conv2d(4, 1, 1))
    symmetry = fxmerge.find_symmetry(model, (torch.zeros(1, 1, 2, 2),))
    weight = torch.arange(12.0).reshape(4, 3, 1, 1)
    on_columns = [
        s
        for found in weights.slices(symmetry).values()
        for s in found
        if (s.axis.parameter, s.axis.dim) == ("2.weight", 1)
    ]
    (columns,) = (s for s in on_columns if len(s.slots) == 6)
    assert sorted(map(tuple, columns.of(weight).tolist())) == [(0, 3), (1, 4), (2, 5), (6, 9), (7, 10), (8, 11)]
