"""Models of which something must not move, with the reason in their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Args = tuple[Tensor, ...]


class Net(nn.Module):
    """Layers and parameters by name, and a forward over them."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | tuple[int, ...]) -> None:
        super().__init__()
        self.compute = forward
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(torch.randn(part)))

    def forward(self, *args: Tensor) -> Any:
        return self.compute(self, *args)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Args]] = {}
"""By name: what makes the model, and example inputs."""


def case(name: str, forward: Callable[..., Any], example: Args, **parts: Callable[[], Any]) -> None:
    REFUSED[name] = lambda: Net(forward, **{n: part() for n, part in parts.items()}), example


def hidden(
    name: str, op: Callable[[Tensor], Tensor], units: int = 4, outputs: int = 1, after: int | None = None
) -> None:
    """A linear layer, an op on its units, and a linear layer without a bias."""
    case(
        name,
        lambda s, x: s.b(op(s.a(x))),
        (torch.zeros(2, 3),),
        a=lambda: nn.Linear(3, units),
        b=lambda: nn.Linear(units if after is None else after, outputs, bias=False),
    )


@torch.library.custom_op("fxmerge_tests::refuses_doubles", mutates_args=())
def refuses_doubles(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise ValueError("float32 only")
    return x.softmax(-1)


refuses_doubles.register_fake(torch.empty_like)

ROPE = torch.stack([torch.tensor([1.0, 0.5, 0.25, 0.125]) * t for t in range(3)])


def rotated(x: Tensor) -> Tensor:
    turned = torch.cat([-x[..., 2:], x[..., :2]], -1)
    return x * ROPE.cos() + turned * ROPE.sin()


def rope(s: Any, x: Tensor) -> Tensor:
    out: Tensor = s.o((rotated(s.q(x)) @ rotated(s.k(x)).mT).softmax(-1) @ s.v(x))
    return out


class Quantized(nn.Module):
    """A layer whose weight is kept in whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.weight: Tensor
        self.register_buffer("weight", torch.randint(-8, 8, (1, 4), dtype=torch.int8))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x).relu(), self.weight.float() * self.scale)


def written(x: Tensor) -> Tensor:
    y = torch.zeros(2, 4)
    y[:, 0] = x[:, 0]
    return x + y


hidden("units are flipped against themselves", lambda h: h + torch.tanh(h.flip(-1)))
hidden("units are rolled against themselves", lambda h: h * h.roll(1, -1))
hidden("units are sorted with their indices", lambda h: h.sort(-1)[1] * h)
hidden("cumsum along the units", lambda h: h.cumsum(-1))
hidden("differences of neighbours", lambda h: h.diff(dim=-1), after=3)
hidden("argmax over units that may be equal", lambda h: F.one_hot(h.relu().argmax(-1), 4).float())
hidden("argmax over the units as a number", lambda h: h * h.argmax(-1, keepdim=True))
hidden("topk of the units in no order that is told", lambda h: h.topk(2, -1, sorted=False)[0], after=2)
hidden("reduction over sliding windows", lambda h: F.avg_pool1d(F.pad(h[:, None], (0, 1)), 2, 1)[:, 0])
hidden("windows by unfold", lambda h: h.unfold(-1, 2, 1).sum(-1), after=3)
hidden("convolution over the units", lambda h: F.conv1d(h[:, None], torch.tensor([[[1.0, 2.0, 4.0]]]), padding=1)[:, 0])
hidden("causal convolution over the units", lambda h: F.conv1d(F.pad(h[:, None], (2, 0)), torch.ones(1, 1, 3))[:, 0])
hidden("constant that is not uniform", lambda h: h * torch.tensor([1.0, 2.0, 3.0, 4.0]))
hidden("constant of two values", lambda h: h * torch.tensor([1.0, 1.0, 2.0, 2.0]))
hidden("position table", lambda h: h + torch.arange(4.0).sin())
hidden("mask over the units", lambda h: h * torch.tensor([1.0, 1.0, 1.0, 0.0]))
hidden("single unit read", lambda h: h[:, 1:2] * h)
hidden("dropped units", lambda h: h[:, :3], after=3)
hidden("op that cannot be probed", torch.ops.fxmerge_tests.refuses_doubles)
hidden("Fourier transform of the units", lambda h: torch.fft.rfft(h, dim=-1).abs(), after=3)
hidden("units written one by one", written)
hidden("values of data in order", lambda h: h.masked_scatter(h < 1, h.abs()))
hidden("values of data put in order", lambda h: h.index_put((h > -9,), h.reshape(-1).sin()))
hidden("units written over by their neighbours", lambda h: h.index_copy(1, torch.tensor([0, 1, 2]), h[:, 1:]))
hidden("units transformed two by two", lambda h: torch.fft.fft(h.reshape(2, 2, 2)).abs().flatten(1))
hidden(
    "matrix exponential of units and their neighbours",
    lambda h: torch.linalg.matrix_exp(h[:, :, None] * h[:, None].roll(1, -1)).sum(-1),
)
hidden("units are the output", lambda h: h, outputs=4)
hidden("groups and halves overlap", lambda h: F.group_norm(h, 3) + F.group_norm(h, 2).relu(), units=6)
hidden("pairs against neighbours", lambda h: h.reshape(2, 2, 2).softmax(-1).reshape(2, 4) * h.roll(1, -1))
case("tied square layer used twice", lambda s, x: s.a(s.a(x).relu()), (torch.zeros(2, 4),), a=lambda: nn.Linear(4, 4))
case(
    "cat of a siamese net",
    lambda s, x, y: s.h(torch.cat([s.f(x).relu(), s.f(y).relu()], -1)),
    (torch.zeros(2, 3), torch.zeros(2, 3)),
    f=lambda: nn.Linear(3, 4),
    h=lambda: nn.Linear(8, 1),
)
case(
    "difference of two orders",
    lambda s, x: s.o(s.a(x).relu() + s.a(x).reshape(-1, 2, 2).mT.reshape(-1, 4).sin()),
    (torch.zeros(2, 3),),
    a=lambda: nn.Linear(3, 4),
    o=lambda: nn.Linear(4, 1),
)
case(
    "rotary positions",
    rope,
    (torch.zeros(1, 3, 2),),
    q=lambda: nn.Linear(2, 4, bias=False),
    k=lambda: nn.Linear(2, 4, bias=False),
    v=lambda: nn.Linear(2, 4, bias=False),
    o=lambda: nn.Linear(4, 1),
)
case(
    "rows looked up by data",
    lambda s, i: s.o(s.e(i).relu()),
    (torch.tensor([[0, 3]]),),
    e=lambda: nn.Embedding(5, 4),
    o=lambda: nn.Linear(4, 1),
)
case(
    "units looked up by data",
    lambda s, x, i: s.b(s.a(x).relu().index_select(1, i)),
    (torch.zeros(2, 3), torch.tensor([0, 2])),
    a=lambda: nn.Linear(3, 4),
    b=lambda: nn.Linear(2, 1),
)
case(
    "units scattered by data",
    lambda s, x, i: s.b(torch.zeros(2, 6).scatter(1, i, s.a(x))),
    (torch.zeros(2, 3), torch.tensor([[0, 1, 2, 3], [5, 4, 3, 2]])),
    a=lambda: nn.Linear(3, 4),
    b=lambda: nn.Linear(6, 1),
)
case(
    "inputs added to the units",
    lambda s, x, y: s.b((s.a(x) + y).relu()),
    (torch.zeros(2, 3), torch.zeros(2, 4)),
    a=lambda: nn.Linear(3, 4),
    b=lambda: nn.Linear(4, 1),
)
case(
    "weight through a triangle",
    lambda s, x: s.o(F.linear(s.a(x), s.w.tril()).relu()),
    (torch.zeros(2, 3),),
    a=lambda: nn.Linear(3, 4),
    w=lambda: (4, 4),
    o=lambda: nn.Linear(4, 1),
)
case(
    "weight and its transpose",
    lambda s, x: s.o(F.linear(F.linear(x, s.w).relu(), s.w.mT).relu()),
    (torch.zeros(2, 4),),
    w=lambda: (4, 4),
    o=lambda: nn.Linear(4, 1),
)
hidden("units with noise of few values", lambda h: h * torch.randint(0, 2, (4,)))
hidden("units with noise like a constant", lambda h: h * (torch.rand_like(torch.zeros(4)) < 0.5))
hidden("units with two draws compared", lambda h: torch.where(torch.rand(4) < torch.rand(4), h, h.tanh()))
hidden("units in a random order", lambda h: h[:, torch.randperm(4)].sigmoid() * torch.arange(4))
hidden("units with dropout that is always on", lambda h: F.dropout(h, 0.5, training=True))
hidden("units with slopes that are always random", lambda h: torch.rrelu(h - 1, training=True))
case(
    "memory with dropout that is always on",
    lambda s, x: F.scaled_dot_product_attention(x, s.k, s.v, dropout_p=0.5),
    (torch.zeros(2, 3),),
    k=lambda: (4, 3),
    v=lambda: (4, 3),
)
REFUSED["whole numbers as a weight"] = Quantized, (torch.zeros(2, 3),)
