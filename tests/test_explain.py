"""Chains of ops from what does not move to where it was pinned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.program.capture import capture_program
from fxmerge.symmetry.explain import chains
from fxmerge.symmetry.group import analyse
from tests.oracle.inferred import FACTORIES, each, inferred


def told(model: nn.Module, *args: Tensor) -> list[str]:
    return [str(chain) for chain in fxmerge.explain(model, args)]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        out: Tensor = self.c(torch.cumsum(x + self.b(torch.relu(x)), -1))
        return out


def test_a_chain_leads_over_the_ops_that_tied_the_units() -> None:
    lines = told(Residual(), torch.zeros(2, 3))
    assert "a.weight[1] (3 indices) <- pinned: linear" in lines
    (weight,) = (line for line in lines if line.startswith("b.weight[0] (5 indices)"))
    assert "add" in weight
    assert weight.endswith("a.weight[0] <- pinned: cumsum: order along the dimension")
    (bias,) = (line for line in lines if line.startswith("b.bias[0]"))
    assert bias.startswith("b.bias[0] (5 indices) <- linear_1: b.weight[0] <- ")


def test_the_shortest_chain_is_taken() -> None:
    """All parameters are tied to each other, but each norm pins its own."""
    net = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6))
    lines = told(net.eval(), torch.zeros(2, 6))
    assert len(lines) == 8
    assert all(line.count("<-") == 1 for line in lines)


def test_steps_name_node_and_op() -> None:
    chain = next(c for c in fxmerge.explain(nn.Linear(3, 2), (torch.zeros(1, 3),)) if c.start == "bias[0]")
    assert [(s.node, s.op, s.to) for s in chain.steps] == [("linear", "aten.linear.default", "weight[0]")]
    assert (chain.node, chain.op, chain.reason, chain.count) == ("output", "output", "output", 2)


def test_a_conclusion_says_so_and_what_holds_the_units() -> None:
    norms = nn.Sequential(nn.Conv1d(2, 6, 1), nn.GroupNorm(2, 6), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv1d(6, 2, 1))
    chain = next(c for c in fxmerge.explain(norms, (torch.zeros(2, 2, 4),)) if c.start == "0.weight[0]")
    assert chain.node == "conclusion"
    assert str(chain) == (
        "0.weight[0] (2 indices) <- concluded: each is alone at a fixed position, "
        "held by blocks of group_norm (2 units) <- concluded: two kinds of block overlap irregularly"
    )


def test_what_has_nothing_to_be_exchanged_with_has_no_steps() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.out = nn.Parameter(torch.zeros(4)), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(x)
            return out

    assert "unused[0] (4 indices) <- pinned: not used for the example inputs" in told(Once(), torch.zeros(2, 3))


@each(FACTORIES)
def test_every_pinned_axis_has_a_chain_that_ends_where_its_reason_was_given(name: str) -> None:
    found, symmetry = inferred(name).propagation, inferred(name).symmetry
    given = {(reason, node) for (_, reason), node in zip(found.units.pinned, found.units.pinned_at, strict=True)}
    explained = chains(found, symmetry)
    assert [(c.start, c.reason) for c in explained] == [
        (f"{parameter}[{dim}]", reason) for (parameter, dim), reasons in symmetry.stuck.items() for reason in reasons
    ]
    nodes = {n.name for n in found.program.graph.graph.nodes}
    for chain in explained:
        assert (chain.reason, chain.node) in given or chain.reason == "nothing to exchange it with"
        assert {step.node for step in chain.steps} <= nodes | {"conclusion"}


def test_a_class_that_was_demoted_is_explained_by_that() -> None:
    from fxmerge.symmetry.freeze import demote

    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(1, 3)
    found, symmetry = analyse(capture_program(net, (x,)))
    lines = [str(chain) for chain in chains(found, demote(symmetry, [0]))]
    assert "2.weight[1] (4 indices) <- pinned: 0.weight[0] failed verification" in lines
