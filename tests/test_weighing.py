"""What each op says of signs and positive scales: a network of one op, and how many of each its units have.

Every network is verified, so none of these groups is too large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxmerge import find_symmetry
from tests.test_mixing import CONV, TWO, WV, G, Net, between, both, gained, image, lin

Case = tuple[Callable[..., Tensor], dict[str, Any], str]
"""A function, its parameters, and for every class on a parameter its size with the signs and scales of each unit."""

GAINS: dict[str, Any] = {**WV, "g": (4,), "b": (4,)}
DEEP: dict[str, Any] = {"w": (4, 3, 1, 1), "d": (4, 1, 3, 3), "v": (2, 4, 1, 1)}

OPS: dict[str, Case] = {
    # Of one operand.
    "relu": (between(torch.relu), WV, "4 R"),
    "leaky relu": (between(F.leaky_relu), WV, "4 R"),
    "relu6": (between(F.relu6), WV, "4"),
    "clamp at zero": (between(lambda y: y.clamp(min=0)), WV, "4 R"),
    "clamp at one": (between(lambda y: y.clamp(min=1)), WV, "4"),
    "threshold": (between(lambda y: F.threshold(y, 0, 0)), WV, "4 R"),
    "threshold, another value": (between(lambda y: F.threshold(y, 0, 1)), WV, "4"),
    "gelu": (between(F.gelu), WV, "4"),
    "silu": (between(F.silu), WV, "4"),
    "tanh": (between(torch.tanh), WV, "4 S"),
    "sin": (between(torch.sin), WV, "4 S"),
    "erf": (between(torch.erf), WV, "4 S"),
    "asinh": (between(torch.asinh), WV, "4 S"),
    "softsign": (between(F.softsign), WV, "4 S"),
    "tanhshrink": (between(F.tanhshrink), WV, "4 S"),
    "softshrink": (between(F.softshrink), WV, "4 S"),
    "hardshrink": (between(F.hardshrink), WV, "4 S"),
    "hardtanh": (between(F.hardtanh), WV, "4 S"),
    "hardtanh, other bounds": (between(lambda y: F.hardtanh(y, -1.0, 2.0)), WV, "4"),
    "clamp on both sides": (between(lambda y: y.clamp(-2, 2)), WV, "4 S"),
    "cos": (between(torch.cos), WV, "4 S"),
    "abs": (between(torch.abs), WV, "4 SR"),
    "x * |x|": (between(lambda y: y * y.abs()), WV, "4 SR"),
    "square": (between(torch.square), WV, "4 SR"),
    "cube": (between(lambda y: y**3), WV, "4 SR"),
    "x * x": (between(lambda y: y * y), WV, "4 SR"),
    "square root of a square": (between(lambda y: y.square().sqrt()), WV, "4 SR"),
    "square root of a square and a number": (between(lambda y: (y.square() + 1).sqrt()), WV, "4 S"),
    "one over": (between(lambda y: 1 / (y + y**3)), WV, "4 S"),
    "reciprocal": (between(torch.reciprocal), WV, "4 SR"),
    "sigmoid": (between(torch.sigmoid), WV, "4"),
    "x tanh x": (between(lambda y: y * y.tanh()), WV, "4 S"),
    "x relu x": (between(lambda y: y * y.relu()), WV, "4 R"),
    "a number is added behind": (between(lambda y: y.relu() + 1), WV, "4"),
    "neg": (between(lambda y: -(y.relu())), WV, "4 R"),
    "softmax": (between(lambda y: y.relu().softmax(-1)), WV, "4"),
    "a slice is doubled": (between(lambda y: torch.cat([y[:, :2] * 2, y[:, 2:]], -1).relu()), WV, "2 R, 2 R"),
    "a sum over units": (between(lambda y: y.relu() + y.relu().sum(-1, keepdim=True)), WV, "4"),
    "a mean over rows": (between(lambda y: y.relu() - y.relu().mean(0)), WV, "4 R"),
    "a maximum over rows": (between(lambda y: y - y.amax(0)), WV, "4 R"),
    "a maximum over units": (between(lambda y: y.relu() - y.amax(-1, keepdim=True)), WV, "4"),
    "an order over rows": (between(lambda y: y.relu().sort(0)[0]), WV, "4"),
    "where": (between(lambda y: torch.where(y > 0, y, 0.1 * y)), WV, "4"),
    "where its size is": (between(lambda y: torch.where(y.abs() > 0.5, y, 0.1 * y)), WV, "4 S"),
    "where its size is, of two": (both(lambda y, z: torch.where(y.abs() > 0.5, y, z.relu())), TWO, "4"),
    "a parameter's size": (gained(lambda m, y: y.relu() * m.b.abs()), {**WV, "b": (4,)}, "4 RR"),
    "RMSNorm, tanh": (between(lambda y: F.rms_norm(y, (4,)).tanh()), WV, "4 S"),
    "LayerNorm, tanh": (between(lambda y: F.layer_norm(y, (4,)).tanh()), WV, "4"),
    # Of several.
    "add of relus": (both(lambda y, z: y.relu() + z.relu()), TWO, "4 R"),
    "mul": (both(lambda y, z: y * z), TWO, "4 SSRR"),
    "div": (both(lambda y, z: y / z), TWO, "4 SSRR"),
    "gate": (both(lambda y, z: y * z.sigmoid()), TWO, "4 SR"),
    "ReGLU": (both(lambda y, z: y * z.relu()), TWO, "4 SRR"),
    "maximum": (both(torch.maximum), TWO, "4"),
    "gains": (gained(lambda m, y: (m.g * y).relu()), {**WV, "g": (4,)}, "4 SRR"),
    "gains and shifts": (gained(lambda m, y: (m.g * y + m.b).relu()), GAINS, "4 SRR"),
    "shifts before tanh": (gained(lambda m, y: (y + m.b).tanh()), GAINS, "4 S"),
    "uniform gains of a relu": (gained(lambda m, y: m.g * y.relu()), {**WV, "g": G}, "4 SRR"),
    "prelu": (gained(lambda m, y: F.prelu(y, m.b.abs())), GAINS, "4 R"),
    "a constant vector": (between(lambda y: y.relu() * torch.tensor([1.0, 2.0, 2.0, 1.0])), WV, "4 R"),
    # Images.
    "max pooling": (image(lambda y: F.max_pool2d(y, 2)), CONV, "4 R"),
    "max pooling of relus, over windows that overlap": (image(lambda y: F.max_pool2d(y.relu(), 3, 1, 1)), CONV, "4 R"),
    "average pooling of relus": (image(lambda y: F.avg_pool2d(y.relu(), 2)), CONV, "4 R"),
    "adaptive max pooling": (image(lambda y: F.adaptive_max_pool2d(y, 1)), CONV, "4 R"),
    "where the maximum is": (
        image(lambda y: F.max_pool2d(y, 2) * F.max_pool2d(y, 2, return_indices=True)[1]),
        CONV,
        "4",
    ),
    "interpolation of relus": (image(lambda y: F.interpolate(y.relu(), scale_factor=2)), CONV, "4 R"),
    "padding with ones": (image(lambda y: F.pad(y.relu(), (1, 1), value=1.0)), CONV, "4"),
    "padding with zeros": (image(lambda y: F.pad(y.relu(), (1, 1))), CONV, "4 R"),
    "depthwise, relus on both sides": (
        lambda m, x: F.conv2d(F.conv2d(F.conv2d(x, m.w).relu(), m.d, padding=1, groups=4).relu(), m.v),
        DEEP,
        "4 RR",
    ),
    "depthwise": (
        lambda m, x: F.conv2d(F.conv2d(F.conv2d(x, m.w), m.d, padding=1, groups=4), m.v),
        DEEP,
        "4 SSRR",
    ),
    "a diagonal": (
        lambda m, x: lin(lin(x, m.w).relu()[:, None] * m.s, m.v).diagonal(0, -2, -1),
        {"w": (3, 5), "s": (3, 3), "v": (3, 3)},
        "3 SRR",
    ),
    "a diagonal that an index takes": (
        lambda m, x: lin(lin(x, m.w).relu() + m.s[torch.arange(4), torch.arange(4)], m.v),
        {**WV, "s": (4, 4)},
        "4",
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_op(name: str) -> None:
    function, parameters, expected = OPS[name]
    net = Net(function, parameters)
    images = any(isinstance(p, tuple) and len(p) == 4 for p in parameters.values())
    inputs = (2, 3, 4, 4) if images else (6, 5)
    x = torch.randn(inputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    symmetry = find_symmetry(net, (x,))
    found = [
        f"{c.size} {'S' * c.signs}{'R' * c.stretches}".strip() for c in symmetry.classes if c.structure != "pinned"
    ]
    assert ", ".join(found) == expected, symmetry
    assert symmetry.dimension() == sum(c.size * c.stretches for c in symmetry.classes)
    proven = symmetry.verify(net, (x,), trials=2)
    assert proven.demoted == () and proven.kinds == symmetry.kinds
    assert proven.error is not None and proven.error < 1e-9


def test_a_class_whose_signs_change_the_outputs_has_none(caplog: pytest.LogCaptureFixture) -> None:
    """A rule that is wrong: it takes a sigmoid for an odd function."""

    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(torch.tanh(self.a(x)))
            return y

    class Right(Wrong):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(torch.sigmoid(self.a(x)))
            return y

    x = torch.randn(5, 3)
    symmetry = find_symmetry(Wrong(), (x,))
    assert symmetry.classes[0].signs == 1
    proven = symmetry.verify(Right(), (x,))
    assert proven.classes[0].signs == 0 and proven.demoted == ()
    assert "only permuted" in caplog.text
