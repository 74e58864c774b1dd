"""Graphs that follow the path of an example: batches that take another path are refused, by their inputs."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fxmerge
from fxmerge.program.capture import capture_program
from fxmerge.program.reads import find_reads, fixed_inputs
from tests.slow import but_slow, crossed


class Packed(nn.Module):
    """A recurrent network over sequences of several lengths."""

    def __init__(self, kind: type[nn.RNNBase], padded: bool, enforce_sorted: bool) -> None:
        super().__init__()
        self.rnn, self.out = kind(3, 6, batch_first=True), nn.Linear(6, 2)
        self.padded, self.enforce_sorted = padded, enforce_sorted

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.enforce_sorted)
        outputs, hidden = self.rnn(packed)
        if self.padded:
            return self.out(pad_packed_sequence(outputs, batch_first=True)[0])  # type: ignore[no-any-return]
        return self.out((hidden[0] if isinstance(hidden, tuple) else hidden)[-1])  # type: ignore[no-any-return]


def sequences(*lengths: int) -> tuple[tuple[Tensor, Tensor], int]:
    return (torch.randn(4, 5, 3), torch.tensor(lengths)), 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "padded", "enforce_sorted"), crossed([nn.GRU, nn.LSTM, nn.RNN], [False, True], [False, True])
)
def test_lengths_of_packed_sequences(kind: type[nn.RNNBase], padded: bool, enforce_sorted: bool) -> None:
    torch.manual_seed(0)
    a, b, c = (Packed(kind, padded, enforce_sorted) for _ in range(3))
    alike = [sequences(5, 4, 3, 2) for _ in range(3)]
    merged = fxmerge.merge(a, b, alike)
    c.load_state_dict(merged.state_dict())
    torch.testing.assert_close(merged(*alike[1][0]), c(*alike[1][0]), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        fxmerge.LoaderError, match=r"input 'lengths': \[5, 4, 4, 1\], and \[5, 4, 3, 2\] in .* values of 'lengths' are"
    ):
        fxmerge.merge(a, b, [*alike, sequences(5, 4, 4, 1)])


@pytest.mark.slow
def test_a_packed_sequence_as_input() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.GRU(3, 6), nn.Linear(6, 2)

        def forward(self, packed: PackedSequence) -> Tensor:
            return self.out(self.rnn(packed)[1][0])  # type: ignore[no-any-return]

    def batch(*lengths: int) -> Any:
        return pack_padded_sequence(torch.randn(5, 3, 3), torch.tensor(lengths))

    def inputs(batch: Any) -> Any:
        return (batch,), {}

    torch.manual_seed(0)
    fxmerge.merge(Net(), Net(), [batch(5, 3, 2), batch(5, 3, 2)], inputs=inputs)
    with pytest.raises(fxmerge.LoaderError, match=r"packed\.batch_sizes"):
        fxmerge.merge(Net(), Net(), [batch(5, 3, 2), batch(5, 4, 1)], inputs=inputs)


class Messages(nn.Module):
    """Sums what nodes send along edges; how many nodes there are is read from the edges."""

    def __init__(self, count: Callable[[Tensor], int] = lambda to: int(to.max()) + 1) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
        self.count = count

    def forward(self, graph: dict[str, Tensor]) -> Tensor:
        start, end = graph["edges"]
        h = torch.relu(self.a(graph["x"]))
        return self.b(h.new_zeros(self.count(end), 6).index_add(0, end, h[start]))  # type: ignore[no-any-return]


def graph(nodes: int, last: int) -> dict[str, Tensor]:
    return {"x": torch.randn(nodes, 3), "edges": torch.tensor([[0, 1, 2, 3], [1, 2, 3, last]])}


COUNTS: dict[str, Callable[[Tensor], int]] = {
    "int": lambda to: int(to.max()) + 1,
    "numpy": lambda to: int(to.numpy().max()) + 1,
    "unique": lambda to: len(torch.unique(to)) + 1,
    "item": lambda to: to.max().item() + 1,  # type: ignore[return-value]
    "tolist": lambda to: max(to.tolist()) + 1,
    "bincount": lambda to: torch.bincount(to).shape[0],
}


@pytest.mark.parametrize("name", but_slow(COUNTS, 3))
def test_sizes_that_depend_on_values(name: str) -> None:
    count = COUNTS[name]
    torch.manual_seed(0)
    a, b, c = Messages(count), Messages(count), Messages(count)
    program = capture_program(a, (graph(6, 4),))
    if program.follows_path:
        assert fixed_inputs(find_reads(program.aten)) == ["graph['edges']"]
    alike = [graph(6, 4) for _ in range(3)]
    merged = fxmerge.merge(a, b, alike)
    c.load_state_dict(merged.state_dict())
    torch.testing.assert_close(merged(alike[1]), c(alike[1]))
    with pytest.raises(fxmerge.LoaderError, match=r"graph\['edges'\]"):
        fxmerge.merge(a, b, [*alike, graph(6, 3)])


def test_other_numbers_of_nodes() -> None:
    with pytest.raises(fxmerge.LoaderError, match=r"Input \"graph\['x'\]\" of a batch has shape \(7, 3\)"):
        fxmerge.merge(Messages(), Messages(), [graph(6, 4), graph(7, 4)])


class Branches(nn.Module):
    """Takes one of two layers by the sign of a sum, or of what its parameters make of it."""

    def __init__(self, learnt: bool) -> None:
        super().__init__()
        self.a, self.b, self.learnt = nn.Linear(3, 6), nn.Linear(6, 2), learnt

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if (h if self.learnt else x).sum().item() > 0:
            return self.b(torch.relu(h))  # type: ignore[no-any-return]
        return self.b(torch.tanh(h))  # type: ignore[no-any-return]


def test_other_numbers_on_the_same_path_are_taken() -> None:
    torch.manual_seed(0)
    positive = [torch.rand(8, 3) for _ in range(3)]
    assert torch.isfinite(fxmerge.merge(Branches(False), Branches(False), positive)(positive[0])).all()
    with pytest.raises(fxmerge.LoaderError, match=r"leads model A on another path .* result of sum from input 'x': -"):
        fxmerge.merge(Branches(False), Branches(False), [*positive, -positive[0]])


def test_a_model_that_takes_another_path_on_the_same_batch() -> None:
    torch.manual_seed(0)
    a, b, x = Branches(True), Branches(True), torch.rand(8, 3)
    with torch.no_grad():
        a.a.bias.fill_(1.0)
        b.a.bias.fill_(-5.0)
    with pytest.raises(fxmerge.FxmergeError, match=r"leads model B on another path .* from input 'x' and parameters"):
        fxmerge.merge(a, b, [x])


@pytest.mark.slow
def test_batches_that_come_in_another_order_are_checked_each_time() -> None:
    """A loader that shuffles may give later what it did not give at first."""

    class Later:
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            yield graph(6, 4)
            yield graph(6, 3 if self.passes > 2 else 4)

    torch.manual_seed(0)
    with pytest.raises(fxmerge.LoaderError, match="another path"):
        fxmerge.merge(Messages(), Messages(), Later())


def test_the_warning_names_what_is_fixed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fxmerge"):
        captured = fxmerge.capture(Messages(lambda to: int(to.numpy().max()) + 1), (graph(6, 4),))
    assert "whatever depends on the values of \"graph['edges']\"" in caplog.text
    assert captured(graph=graph(6, 4)).shape == (5, 2)


@pytest.mark.parametrize("width", [0.5, {"stem.*": 0.5}], ids=["share", "named"])
def test_a_fold_says_what_stands_in_the_way_of_other_widths(width: Any) -> None:
    """Also where directions would be left out."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.head(-x if float(x.sum()) > 1e9 else x)

    with pytest.raises(fxmerge.OptionError, match=r"Another width than 1 needs a model that torch\.export can capture"):
        fxmerge.fold(Branch(), [torch.randn(8, 4)], width)
