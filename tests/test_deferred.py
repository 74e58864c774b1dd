"""Networks that look things up by indices that were computed over them, against the exact oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge
from tests.golden.refused import Net
from tests.oracle.exact import exact_log_order
from tests.slow import but_slow

Forward = Callable[[Any, Tensor], Tensor]
Parts = dict[str, Any]

CASES: dict[str, tuple[Forward, int, Parts, float]] = {}
"""By name: a forward, how many rows of three numbers it is given, its layers and parameters, and the order."""

PINNED: dict[str, tuple[Forward, int, Parts]] = {}
"""Likewise, where numbers that name units are used as numbers, so that the units must not move."""


def orders(*sizes: int) -> float:
    """The order of a product of symmetric groups."""
    return sum(math.lgamma(n + 1) for n in sizes)


def case(name: str, order: float, forward: Forward, rows: int = 1, **parts: Any) -> None:
    CASES[name] = forward, rows, parts, order


def pinned(name: str, forward: Forward, rows: int = 1, **parts: Any) -> None:
    PINNED[name] = forward, rows, parts


def net(forward: Forward, parts: Parts, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(forward, **{k: p() if callable(p) else p for k, p in parts.items()})


def linear(a: int, b: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(a, b)


# ------------------------------------------------------------------------------------ vector quantization

BOOK = {"enc": linear(3, 4), "book": (3, 4), "dec": linear(4, 2)}


def code(s: Any, x: Tensor) -> Tensor:
    return (s.enc(x)[:, None] - s.book).pow(2).sum(-1).argmin(-1)


case("codes by index", orders(3, 4), lambda s, x: s.dec(s.book[code(s, x)]), rows=2, **BOOK)
case("codes by embedding", orders(3, 4), lambda s, x: s.dec(F.embedding(code(s, x), s.book)), **BOOK)
case("codes by one_hot", orders(3, 4), lambda s, x: s.dec(F.one_hot(code(s, x), 3).float() @ s.book), **BOOK)
case("codes by index_select", orders(3, 4), lambda s, x: s.dec(s.book.index_select(0, code(s, x))), **BOOK)


def straight_through(s: Any, x: Tensor) -> Tensor:
    z = s.enc(x)
    _, chosen = (z @ s.book.T * 2 - s.book.square().sum(-1)).max(-1)
    y = s.dec(z + (s.book[chosen] - z).detach())
    return y  # type: ignore[no-any-return]


case("codes in a straight-through estimator", orders(3, 4), straight_through, **BOOK)


def in_groups(s: Any, x: Tensor) -> Tensor:
    z = s.enc(x).unflatten(-1, (2, 2))
    chosen = torch.einsum("bgd,gkd->bgk", z, s.books).argmax(-1)
    y = s.dec(torch.einsum("bgk,gkd->bgd", F.one_hot(chosen, 3).float(), s.books).flatten(-2))
    return y  # type: ignore[no-any-return]


case(
    "codes in groups of their own",
    orders(2, 3, 3, 2, 2),
    in_groups,
    enc=linear(3, 4),
    books=(2, 3, 2),
    dec=linear(4, 2),
)
case(
    "codes of which only a number is looked up",
    orders(3, 4),
    lambda s, x: s.bias[code(s, x)][:, None] * s.dec(s.enc(x)),
    **BOOK,
    bias=(3,),
)

# ------------------------------------------------------------------------------------ experts

EXPERTS = {"enc": linear(3, 4), "gate": linear(4, 3), "up": (3, 4, 3), "down": (3, 3, 4), "dec": linear(4, 2)}
APART = orders(4, 3, 3, 3, 3)
"""The stream, the experts, and the units inside of each."""
TWO = orders(4, 4, 3, 3, 3, 3)
"""Likewise, where what comes out of the experts is not added to what goes in."""


def first(s: Any, h: Tensor) -> Tensor:
    return s.gate(h).argmax(-1)  # type: ignore[no-any-return]


def by_einsum(s: Any, x: Tensor) -> Tensor:
    h = s.enc(x)
    i = first(s, h)
    y = torch.einsum("bi,bio->bo", h, s.up[i]).relu()
    return s.dec(h + torch.einsum("bi,bio->bo", y, s.down[i]))  # type: ignore[no-any-return]


def by_bmm(s: Any, x: Tensor) -> Tensor:
    h = s.enc(x)
    weights, chosen = s.gate(h).softmax(-1).topk(2, -1)
    i = chosen.reshape(-1)
    rows = h.repeat_interleave(2, 0)
    y = torch.bmm(F.silu(torch.bmm(rows[:, None], s.up[i])), s.down[i])[:, 0]
    mixed = (y * (weights / weights.sum(-1, keepdim=True)).reshape(-1, 1)).view(-1, 2, 4).sum(1)
    return s.dec(h + mixed)  # type: ignore[no-any-return]


def with_biases(s: Any, x: Tensor) -> Tensor:
    h = s.enc(x)
    i = first(s, h)
    y = (torch.bmm(h[:, None], s.up[i])[:, 0] + s.up_bias[i]).relu()
    return s.dec(torch.bmm(y[:, None], s.down[i])[:, 0] + s.down_bias[i])  # type: ignore[no-any-return]


def halves(s: Any, x: Tensor) -> Tensor:
    h = s.enc(x)
    i = first(s, h)
    a, b = torch.matmul(h[:, None, :], s.both[i]).squeeze(1).chunk(2, -1)
    return s.dec(torch.matmul((a.sigmoid() * b)[:, None, :], s.down[i]).squeeze(1))  # type: ignore[no-any-return]


def dense(s: Any, h: Tensor) -> Tensor:
    return torch.einsum("teh,eho->teo", torch.einsum("ti,eih->teh", h, s.up).relu(), s.down)


def by_gather(s: Any, x: Tensor) -> Tensor:
    h = s.enc(x)
    weights, chosen = s.gate(h).topk(2, -1)
    y = dense(s, h).gather(1, chosen[..., None].expand(-1, -1, 4))
    return s.dec((y * weights.softmax(-1)[..., None]).sum(1))  # type: ignore[no-any-return]


def by_scatter(s: Any, x: Tensor) -> Tensor:
    h = s.enc(x)
    weights, chosen = s.gate(h).topk(2, -1)
    gates = torch.zeros(len(x), 3).scatter(-1, chosen, weights.softmax(-1))
    return s.dec((dense(s, h) * gates[..., None]).sum(1))  # type: ignore[no-any-return]


def by_mask(s: Any, x: Tensor) -> Tensor:
    h = s.enc(x)
    values, chosen = s.gate(h).topk(2, -1)
    gates = ((chosen[..., None] == torch.arange(3)) * values.softmax(-1)[..., None]).sum(1)
    return s.dec((dense(s, h) * gates[..., None]).sum(1))  # type: ignore[no-any-return]


def product(rows: Tensor, stack: Tensor, offs: Tensor) -> Tensor:
    return torch._grouped_mm(rows.bfloat16(), stack.bfloat16(), offs=offs).float()


def grouped(s: Any, x: Tensor) -> Tensor:
    h = s.enc(x)
    values, i = s.gate(h).max(-1)
    order = i.argsort()
    ends = torch.bincount(i, minlength=2).cumsum(0).to(torch.int32)
    y = product(product(h[order], s.up, offs=ends).relu(), s.down, offs=ends)
    mixed = torch.zeros_like(h).index_add(0, order, y * values[order][:, None])
    return s.dec(h + mixed)  # type: ignore[no-any-return]


def sorted_and_back(s: Any, x: Tensor) -> Tensor:
    h = s.enc(x)
    weights, chosen = s.gate(h).softmax(-1).topk(1, -1)
    ids, order = chosen.reshape(-1).sort()
    ends = torch.histc(ids.float(), 2, 0, 1).cumsum(0, dtype=torch.int32)
    y = product(h[order // 1], s.up, offs=ends) + s.up_bias[ids]
    y = product(F.silu(y), s.down, offs=ends) * weights.reshape(-1)[order][:, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return s.dec(h + y[back].view(len(x), 1, 8).sum(1))  # type: ignore[no-any-return]


def argsorted_and_back(s: Any, x: Tensor) -> Tensor:
    h = s.enc(x)
    i = first(s, h)
    order = i.argsort()
    y = torch.bmm(h[order][:, None], s.up[i[order]])[:, 0].relu()
    return s.dec(torch.bmm(y[:, None], s.down[i[order]])[:, 0][order.argsort()])  # type: ignore[no-any-return]


WITH_BIASES = {**EXPERTS, "up_bias": (3, 3), "down_bias": (3, 4)}
HALVES = {**EXPERTS, "both": (3, 4, 6)}
del HALVES["up"]
PAIR = {"enc": linear(3, 8), "gate": linear(8, 2), "up": (2, 8, 8), "down": (2, 8, 8), "dec": linear(8, 2)}
PAIR_APART = orders(8, 2, 8, 8)

case("experts by einsum", APART, by_einsum, **EXPERTS)
case("experts by bmm", APART, by_bmm, **EXPERTS)
case("experts with biases", TWO, with_biases, **WITH_BIASES)
case("experts in halves", TWO, halves, **HALVES)
case("experts by gather", TWO, by_gather, **EXPERTS)
case("experts by scatter", TWO, by_scatter, **EXPERTS)
case("experts by a mask", TWO, by_mask, **EXPERTS)
case("experts of grouped rows", PAIR_APART, grouped, rows=2, **PAIR)
case("experts of sorted rows, and back", PAIR_APART, sorted_and_back, rows=2, **PAIR, up_bias=(2, 8))
case("experts of sorted rows, and back by argsort", PAIR_APART + orders(8), argsorted_and_back, rows=2, **PAIR)
case(
    "experts that end where the stream does",
    orders(3, 4),
    lambda s, x: s.o(torch.einsum("bi,bio->bo", x, s.w[s.r(x).argmax(-1)]).relu()),
    r=linear(3, 3),
    w=(3, 3, 4),
    o=linear(4, 1),
)
case(
    "how often each expert is chosen",
    orders(3),
    lambda s, x: torch.bincount(s.r(x).argmax(-1), minlength=3) * 1.0 @ s.w,
    rows=2,
    r=linear(3, 3),
    w=(3, 2),
)
case(
    "sums of what each expert is given",
    orders(3),
    lambda s, x: (torch.zeros(3, 3).index_add(0, s.r(x).argmax(-1), x) * s.w).sum(0),
    rows=2,
    r=linear(3, 3),
    w=(3, 3),
)
case(
    "units by rank",
    orders(4),
    lambda s, x: s.b(s.a(x).gather(-1, s.a(x).argsort(-1, descending=True))),
    a=linear(3, 4),
    b=lambda: nn.Linear(4, 2, bias=False),
)
case(
    "units of a median",
    orders(3),
    lambda s, x: s.w[s.a(x).median(-1)[1]],
    a=linear(3, 3),
    w=(3, 2),
)
case(
    "units of which one is told from the others",
    orders(2, 3),
    lambda s, x: (s.a(x).argmax(-1) > 0)[:, None] * s.w.sum(0),
    a=linear(3, 3),
    w=(3, 1),
)


@pytest.mark.parametrize("name", but_slow(CASES, 8))
def test_what_is_named_by_numbers_moves(name: str) -> None:
    forward, rows, parts, order = CASES[name]
    model, x = net(forward, parts), torch.randn(rows, 3)
    symmetry = fxmerge.find_symmetry(model, (x,))
    assert symmetry.log_order() == pytest.approx(order, rel=1e-9), symmetry
    assert order == pytest.approx(exact_log_order(model, (x,)), rel=1e-9)
    verified = symmetry.verify(model, (torch.randn(32, 3),) if rows == 1 else (x,), trials=4)
    assert not verified.demoted
    assert verified.error is not None
    assert verified.error < 1e-9


# ------------------------------------------------------------------------------------ numbers as numbers

ROUTED = {"a": linear(3, 3), "w": (3, 2)}

pinned("multiplied", lambda s, x: s.a(x).argmax(-1)[:, None] * s.w.sum(0), **ROUTED)
pinned("returned", lambda s, x: s.a(x).argmax(-1) + 0 * s.w.sum().long(), a=linear(3, 3), w=(3, 2))
pinned("the next one is looked up", lambda s, x: s.w[(s.a(x).argmax(-1) + 1) % 3], **ROUTED)
pinned("the larger of two", lambda s, x: s.w[torch.maximum(s.a(x).argmax(-1), s.a(x).argmin(-1))], **ROUTED)
pinned("of equal values", lambda s, x: s.w[s.a(x).relu().argmax(-1)], **ROUTED)
pinned("of values cut off", lambda s, x: s.w[s.a(x).clamp(-0.1, 0.1).argmax(-1)], **ROUTED)
pinned("in an order that is not told", lambda s, x: s.a(x).topk(2, sorted=False)[0] @ s.w[:2], **ROUTED)
pinned(
    "rows in order, counted from the first",
    lambda s, x: (x[s.a(x).argmax(-1).argsort()] * torch.arange(1.0, 5.0)[:, None]).sum(0) @ s.w,
    rows=4,
    a=linear(3, 3),
    w=(3, 2),
)
pinned(
    "rows in two orders",
    lambda s, x: (x[s.a(x).argmax(-1).argsort(stable=True)] * x[s.b(x).argmax(-1).argsort(stable=True)]).sum(0) @ s.w,
    rows=4,
    a=linear(3, 3),
    b=linear(3, 3),
    w=(3, 2),
)
pinned(
    "rows in order, in pairs",
    lambda s, x: x[s.a(x).argmax(-1).argsort(stable=True)].unflatten(0, (2, 2)).sum(1).square().sum(0) @ s.w,
    rows=4,
    a=linear(3, 3),
    w=(3, 2),
)
pinned(
    "the first row in order",
    lambda s, x: x[s.a(x).argmax(-1).argsort(stable=True)][0] @ s.w,
    rows=4,
    a=linear(3, 3),
    w=(3, 2),
)
pinned(
    "rows in order, as the output",
    lambda s, x: x[s.a(x).argmax(-1).argsort(stable=True)] @ s.w,
    rows=4,
    a=linear(3, 3),
    w=(3, 2),
)


@pytest.mark.parametrize("name", PINNED)
def test_numbers_that_are_no_names_pin_what_they_name(name: str) -> None:
    forward, rows, parts = PINNED[name]
    model, x = net(forward, parts), torch.randn(rows, 3)
    symmetry = fxmerge.find_symmetry(model, (x,))
    assert ("a.weight", 0) in symmetry.stuck, symmetry
    assert not any(a.parameter.startswith(("a.", "b.")) for a in symmetry.layout), symmetry
    assert symmetry.verify(model, (x,), trials=4).demoted == ()
