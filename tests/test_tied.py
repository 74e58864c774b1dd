"""Layers whose weights are looked up as well: one fit from all uses, and no worse a network for it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge
from fxmerge.program.capture import capture_program
from fxmerge.refitting.course import Lane, Lesson
from fxmerge.refitting.gather import Teacher
from fxmerge.refitting.layers import find_layers
from fxmerge.refitting.tied import LOOKUPS, fit_tied

WORDS, WIDTH = 7, 5


class Tied(nn.Module):
    """The scores of words, by the weight that they are looked up in."""

    def __init__(self, seed: int, *, biased: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.hidden = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scores = nn.Linear(WIDTH, WORDS, bias=biased)
        self.scores.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.scores(torch.tanh(self.hidden(self.table(ids))))
        return out


def tokens(count: int = 4) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(WORDS, (6, 4), generator=g) for _ in range(count)]


@pytest.mark.parametrize("biased", [True, False])
def test_the_fit_is_the_least_squares_solution_of_all_uses_together(biased: bool) -> None:
    parents = [Tied(seed, biased=biased).double().eval() for seed in range(2)]
    data = tokens()
    program = capture_program(parents[0], (data[0],))
    states = [net.state_dict() for net in parents]
    start = {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}
    layers = find_layers(program)
    assert [layer.name for layer in layers.all] == ["hidden.weight"]
    lessons = [Lesson(((ids,), {}), (0.5, 0.5), 1.0) for ids in data]
    lanes, teachers = [Lane(program, own) for own in states], [Teacher(own, {}) for own in states]
    found = fit_tied(program, layers.tied, start, lanes, teachers, lessons, 0)
    told = found.layers["table.weight"]

    ids = torch.cat([x.flatten() for x in data])
    with torch.no_grad():
        features = sum(torch.tanh(net.hidden(net.table(ids))) for net in parents) / 2
        wanted = sum(net(ids) for net in parents) / 2
    weights = [start["table.weight"], *([start["scores.bias"][:, None]] if biased else [])]
    x, table = torch.cat([features, torch.ones(len(ids), 1)][: 1 + biased], 1), torch.cat(weights, 1)
    looked_up, goal = F.one_hot(ids, WORDS).double(), table[ids]  # The mean of the parents is the start.
    count = LOOKUPS * float(wanted.square().sum() / goal.square().sum())
    ridge = told["ridge"] * float(x.square().sum(0).mean())
    # Every entry of the table is an unknown: equations of outputs, of lookups and of the ridge, one upon the other.
    eye = torch.eye(x.shape[1], dtype=torch.float64)
    rows = torch.eye(WORDS, dtype=torch.float64)
    equations = torch.cat(
        [torch.kron(rows, x), (count / len(data)) ** 0.5 * torch.kron(looked_up, eye) * len(data) ** 0.5]
    )
    equations = torch.cat([equations, (ridge * 1.0) ** 0.5 * torch.kron(rows, eye)])
    right = torch.cat([(wanted - x @ table.T).T.reshape(-1), torch.zeros(len(equations) - wanted.numel())])
    best = table + torch.linalg.lstsq(equations, right.double(), driver="gelsd").solution.reshape(table.shape)
    reached = torch.cat(
        [found.tensors["table.weight"], *([found.tensors["scores.bias"][:, None]] if biased else [])], 1
    )
    assert (reached - table).abs().max() > 1e-2
    torch.testing.assert_close(reached, best, rtol=0, atol=1e-9)


def test_a_merge_puts_the_fitted_weight_under_all_of_its_names() -> None:
    merged = fxmerge.merge(Tied(0), Tied(1), tokens(), fxmerge.Recipe(match=fxmerge.Align()))
    told = fxmerge.report(merged)
    assert "table.weight" in told.layers and "table.weight" not in told.left
    state = merged.state_dict()
    assert torch.equal(state["table.weight"], state["scores.weight"])
    averaged = fxmerge.merge(Tied(0), Tied(1), tokens(), fxmerge.Recipe(match=fxmerge.Align(), fit=None)).state_dict()
    assert not torch.allclose(state["table.weight"], averaged["table.weight"])


def test_a_layer_with_two_names_is_fitted_under_both() -> None:
    class Twice(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.first = nn.Linear(4, 4)
            self.second, self.last = self.first, nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))
            return out

    g = torch.Generator().manual_seed(0)
    data = [torch.randn(64, 4, generator=g) for _ in range(4)]
    merged = fxmerge.merge(Twice(0), Twice(1), data)
    assert fxmerge.report(merged).layers["first.weight"]["ridge"] < float("inf")
    averaged = fxmerge.merge(Twice(0), Twice(1), data, fxmerge.Recipe(fit=None))
    state, before = merged.state_dict(), averaged.state_dict()
    assert torch.equal(state["first.weight"], state["second.weight"])
    assert not torch.allclose(state["first.weight"], before["first.weight"])


def test_a_copy_gives_the_network_back() -> None:
    net = Tied(0)
    merged = fxmerge.merge(net, Tied(0), tokens())
    for name, value in net.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=1e-5, atol=1e-6)


LEFT: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "looked up by columns": lambda net, ids: F.linear(F.embedding(ids, net.weight.T), net.weight),
    "looked up in a part": lambda net, ids: F.linear(F.embedding(ids, net.weight[:4]), net.weight),
    "added to something": lambda net, ids: F.linear(F.embedding(ids, net.weight) + net.weight.sum(), net.weight),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_uses_are_left_and_named(name: str) -> None:
    class Other(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)))

        def forward(self, ids: Tensor) -> Tensor:
            return LEFT[name](self, ids)

    program = capture_program(Other(0), (torch.zeros(2, 3, dtype=torch.long),))
    layers = find_layers(program)
    whole = name == "looked up in a part"  # Of all rows, it is the whole.
    assert bool(layers.tied) is whole
    assert "also used by" in layers.left["weight"]
