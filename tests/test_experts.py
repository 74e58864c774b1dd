"""Mixtures of experts: which experts may be exchanged, and which units inside of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fxmerge
from tests.oracle.exact import exact_log_order
from tests.slow import but_slow
from tests.test_deferred import linear, net, orders

# ------------------------------------------------------------------------------------ one layer, against the oracle

Forward = Callable[[Any, Tensor], Tensor]
CASES: dict[str, tuple[Forward, int, dict[str, Any], float]] = {}


def case(name: str, order: float, forward: Forward, rows: int = 1, **parts: Any) -> None:
    CASES[name] = forward, rows, parts, order


ROUTED = {"enc": linear(3, 4), "gate": linear(4, 3), "up": (3, 4, 3), "down": (3, 3, 4), "dec": linear(4, 2)}
APART = orders(4, 3, 3, 3, 3)


def by_slots(s: Any, h: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """The experts that each row chose, by a product of matrices for each of the chosen."""
    rows, i = h.repeat_interleave(chosen.shape[1], 0), chosen.reshape(-1)
    y = torch.bmm(F.silu(torch.bmm(rows[:, None], s.up[i])), s.down[i])[:, 0]
    return s.dec(h + (y * weights.reshape(-1, 1)).view(*chosen.shape, -1).sum(1))  # type: ignore[no-any-return]


def by_sorted_slots(s: Any, h: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """The same, with the chosen in the order of their experts."""
    ids, order = chosen.reshape(-1).sort()
    rows = h[order // chosen.shape[1]]
    y = torch.bmm(F.silu(torch.bmm(rows[:, None], s.up[ids])), s.down[ids])[:, 0]
    y = y * weights.reshape(-1)[order][:, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return s.dec(h + y[back].view(*chosen.shape, -1).sum(1))  # type: ignore[no-any-return]


def in_no_order(mix: Callable[..., Tensor]) -> Forward:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.enc(x)
        scores = s.gate(h).sigmoid()
        chosen = (scores + s.bias).topk(2, -1, sorted=False)[1]
        weights = scores.gather(1, chosen)
        return mix(s, h, weights / weights.sum(-1, keepdim=True), chosen)

    return forward


def of_groups(fill: float) -> Forward:
    """The two largest of the scores of one group of three experts, which has the largest sum of two scores."""

    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.enc(x)
        scores = s.gate(h).softmax(-1) if fill == 0 else s.gate(h).sigmoid() + s.bias
        best = scores.view(-1, 2, 3).topk(2, -1)[0].sum(-1).topk(1, -1, sorted=False)[1]
        group = torch.zeros(len(h), 2).scatter_(1, best, 1)
        mask = group.unsqueeze(-1).expand(-1, 2, 3).reshape(-1, 6)
        weights, chosen = scores.masked_fill(~mask.bool(), fill).topk(2, -1, sorted=False)
        return by_slots(s, h, weights, chosen)

    return forward


def without_the_first(s: Any, x: Tensor) -> Tensor:
    """The largest score, then the largest of the others."""
    h = s.enc(x)
    scores = s.gate(h)
    values, one = scores.max(-1, keepdim=True)
    others = scores.masked_fill(scores < values - 1, -math.inf).softmax(-1).gather(-1, one)
    rest = scores.scatter(-1, one, -math.inf)
    two = rest.max(-1, keepdim=True)[1]
    weights = torch.cat([others, rest.softmax(-1).gather(-1, two)], -1)
    return by_slots(s, h, weights, torch.cat([one, two], -1))


SIX = {"enc": linear(3, 4), "gate": linear(4, 6), "up": (6, 4, 2), "down": (6, 2, 4), "dec": linear(4, 2)}

case("in no order", APART, in_no_order(by_slots), **ROUTED, bias=(3,))
case("in no order, sorted by experts", APART, in_no_order(by_sorted_slots), **ROUTED, bias=(3,))
case("of groups", orders(4, 2, 3, 3, *[2] * 6), of_groups(-math.inf), **SIX, bias=(6,))
case("of groups, zeros elsewhere", orders(4, 2, 3, 3, *[2] * 6), of_groups(0.0), **SIX)
case("the first, then another one", APART, without_the_first, **ROUTED)


@pytest.mark.parametrize("name", but_slow(CASES, ["in no order", "of groups"]))
def test_experts_move_with_the_units_inside_of_each(name: str) -> None:
    forward, rows, parts, order = CASES[name]
    model, x = net(forward, parts), torch.randn(rows, 3)
    symmetry = fxmerge.find_symmetry(model, (x,))
    assert symmetry.log_order() == pytest.approx(order, rel=1e-9), symmetry
    assert order == pytest.approx(exact_log_order(model, (x,)), rel=1e-9)
    verified = symmetry.verify(model, (torch.randn(32, 3),) if rows == 1 else (x,), trials=4)
    assert not verified.demoted
    assert verified.error is not None
    assert verified.error < 1e-9
