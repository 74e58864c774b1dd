"""Sequences of several lengths: what is captured takes any, and what is gathered is gathered over all."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.errors import LoaderError
from fxmerge.program.capture import capture_program
from fxmerge.program.captured import Program
from fxmerge.program.run import Data, Runner, batch_inputs, fixed_sizes
from fxmerge.refitting.course import Lesson
from fxmerge.refitting.refit import with_statistics
from tests.slow import but_slow


def filled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Tokenwise(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class Attention(nn.Module):
    """Attention over tokens that holds samples and heads in one dimension."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.q, self.k, self.v, self.o = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 2)
        nn.init.normal_(self.q.weight)
        nn.init.normal_(self.k.weight)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (4, 2)).transpose(1, 2).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        y = torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1), v)
        out: Tensor = self.o(y.unflatten(0, (-1, 4)).transpose(1, 2).flatten(2))
        return out


class HeadsFirst(Attention):
    """Heads and tokens in one dimension: which head is where depends on the length."""

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (4, 2)).transpose(1, 2).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.heads(self.q(x))) @ self.k.weight[:2, :2]
        out: Tensor = self.o((torch.tanh(h) + self.heads(self.v(x))).unflatten(1, (4, -1)).transpose(1, 2).flatten(2))
        return out


class Words(nn.Module):
    """Embeddings of words and of positions, a mask, and attention."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.places = nn.Embedding(20, 3), nn.Embedding(12, 3)
        self.attention = Attention(seed)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if ids.shape[1] > 100:  # No symbolic tracing.
            raise ValueError
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        out: Tensor = self.attention(x * mask[..., None])
        return out


def words(samples: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(20, (samples, length), generator=torch.Generator().manual_seed(length))
    return {"ids": ids, "mask": ids > 2}


def takes(program: Program) -> list[list[int | None]]:
    return [fixed_sizes(n.meta["val"]) for n, (kind, _) in program.sources.items() if kind == "input"]


@pytest.mark.slow
def test_tokens_and_masks_come_in_any_length_and_images_in_one() -> None:
    batch = words(3, 4)
    assert takes(capture_program(Words(0), (), batch)) == [[None, None], [None, None]]
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert takes(capture_program(conv, (filled(2, 3, 8, 8),))) == [[None, 3, 8, 8]]
    assert takes(capture_program(conv, (filled(2, 3, 8, 8),), varying={(0, 2), (0, 3)})) == [[None, 3, None, None]]


def test_what_is_merged_takes_lengths_that_were_not_in_the_loader() -> None:
    merged = fxmerge.merge(Words(0), Words(1), [words(6, 4), words(5, 7), words(6, 1)])
    assert fxmerge.report(merged).route == "torch.export"
    fresh = Words(2).eval()
    fresh.load_state_dict(merged.state_dict())
    for samples, length in ((6, 4), (2, 7), (1, 12), (3, 1), (1, 1)):
        torch.testing.assert_close(merged(**words(samples, length)), fresh(**words(samples, length)))


@pytest.mark.parametrize("first", [4, 1])
def test_the_example_is_a_batch_whose_sizes_are_none_of_one(first: int) -> None:
    loader = [words(6, first), words(5, 7), words(6, 9)]
    net = Words(0)
    example, shapes = Data(loader, batch_inputs(net)).survey()
    assert example[1]["ids"].shape == ((6, 4) if first == 4 else (5, 7))
    assert shapes[0] == {(6, first), (5, 7), (6, 9)}


@pytest.mark.parametrize("length", but_slow([2, 3, 4, 8], [3, 4]))
def test_lengths_equal_to_other_sizes_give_the_same_classes(length: int) -> None:
    symmetry = fxmerge.find_symmetry(Words(0), (), words(5, length)).verify(Words(0), (), words(5, length))
    assert math.isclose(symmetry.log_order(), math.log(6 * 24 * 2**4 * 2**4))
    assert not symmetry.demoted


BY_LENGTH = [filled(4, 6, 3, seed=1), filled(4, 9, 3, seed=2), filled(3, 5, 3, seed=3)]


@pytest.mark.parametrize("fit", but_slow([fxmerge.LeastSquares(), None, fxmerge.Repair()]), ids=str)
def test_tokens_count_alike_in_whatever_lengths_they_come(fit: Any) -> None:
    loaders = BY_LENGTH, [x.flatten(0, 1) for x in BY_LENGTH]
    by_length, apart = (fxmerge.merge(Tokenwise(0), Tokenwise(1), own, fxmerge.Recipe(fit=fit)) for own in loaders)
    errors, expected = (fxmerge.report(merged).errors for merged in (by_length, apart))
    assert errors.keys() == expected.keys() and bool(errors) == isinstance(fit, fxmerge.LeastSquares)
    if errors:
        assert errors["merged"] == pytest.approx(expected["merged"], rel=1e-4)
        assert errors["models"] == pytest.approx(expected["models"], rel=1e-4)
    for name, value in by_length.state_dict().items():
        torch.testing.assert_close(value, apart.state_dict()[name])


@pytest.mark.slow
def test_batches_sorted_by_length_and_activations_on_disk_give_the_same_merge() -> None:
    mixed = [filled(4, n, 3, seed=i) for i, n in enumerate((6, 9, 6, 9))]
    by_length = sorted(mixed, key=lambda x: x.shape[1])
    first = fxmerge.merge(Attention(0), Attention(1), mixed)
    for loader, memory in ((by_length, 4.0), (mixed, 1e-9)):
        again = fxmerge.merge(Attention(0), Attention(1), loader, run=fxmerge.Run(memory=memory))
        assert fxmerge.report(again).layers.keys() == fxmerge.report(first).layers.keys() != set()
        for name, value in first.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "sizes"),
    but_slow(product([Attention, HeadsFirst], [((8, 6), (5, 6)), ((8, 6), (8, 9)), ((8, 6), (3, 4))])),
)
def test_heads_beside_samples_or_tokens_are_found_again(
    build: Callable[[int], nn.Module], sizes: tuple[tuple[int, int], ...]
) -> None:
    alpha = 0.25 if build is Attention else 0.5
    net, twin = build(0), build(1)
    loader = [filled(*size, 3, seed=i) for i, size in enumerate(sizes)]
    symmetry = fxmerge.find_symmetry(net, (loader[0],))
    twin.load_state_dict(symmetry.sample_permutation(torch.Generator().manual_seed(0)).apply(net.state_dict()))
    for match in (fxmerge.Align(alpha=alpha), fxmerge.Zip(alpha=alpha)):
        merged = fxmerge.merge(net, twin, loader, fxmerge.Recipe(match=match))
        for x in loader:
            torch.testing.assert_close(merged(x), net(x), rtol=1e-3, atol=1e-4)


def test_statistics_of_batch_norm_are_those_of_all_places() -> None:
    net = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4))
    loader = [filled(4, 3, 6, seed=1), 1 + filled(2, 3, 20, seed=2)]
    program = capture_program(net, (loader[0],), varying={(0, 2)})
    state = with_statistics(program, net.state_dict(), [Lesson(((x,), {}), (), 1.0) for x in loader])
    seen = torch.cat([net[0](x).transpose(0, 1).flatten(1) for x in loader], dim=1)
    torch.testing.assert_close(state["1.running_mean"], seen.mean(1))


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0]
        for t in range(x.shape[1]):
            h = torch.tanh(self.cell(h) + x[:, t])
        out: Tensor = self.out(h)
        return out


class Halved(Tokenwise):
    """Long sequences are cut, short ones are not: a graph holds for one of these only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :8] * 2 if x.shape[1] > 8 else x)


class OnValues(Tokenwise):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > -1e9 else -x) + torch.eye(x.shape[1])[:, :2]


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (Loop, r"Input 'x' .* \(4, 7, 3\) .* \(any, 5, 3\)\. Dimension 1 is fixed to 5: .* as with a constant"),
        (
            OnValues,
            r"Input 'x' .* \(4, 7, 3\) .* \(4, 5, 3\)\. Dimension 1 is fixed to 5: the graph follows the path .* since",
        ),
    ],
)
def test_a_length_that_has_to_be_fixed_is_named_before_any_work(net: Any, says: str) -> None:
    nets = [net() if net is Loop else net(seed) for seed in (0, 1)]
    with pytest.raises(LoaderError, match=says):
        fxmerge.merge(*nets, [filled(4, 5, 3), filled(4, 7, 3)])


def test_lengths_for_which_the_graph_does_not_hold_are_refused() -> None:
    with pytest.raises(LoaderError, match=r"for some sizes only.* x\.size\(\)\[1\] <= 8"):
        fxmerge.merge(Halved(0), Halved(1), [filled(4, 5, 3), filled(4, 7, 3), filled(4, 9, 3)])
    program = capture_program(Halved(0), (filled(4, 5, 3),), varying={(0, 1)})
    x = filled(2, 8, 3)
    torch.testing.assert_close(Runner(program).call({}, (x,), {})[0], Halved(0)(x))
