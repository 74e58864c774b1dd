"""Where attention reads keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxmerge.emit.kv_sites import Attentions
from fxmerge.program.capture import capture_program
from fxmerge.symmetry.group import analyse
from tests.test_kv_heads import Apart, einsums, joined, products, sdpa, split, tokens


def flat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores that are scaled, viewed and cut before they meet the values."""
    scores = (q @ k.mT).unflatten(-1, (1, -1)).flatten(-2)
    scores = torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).softmax(-1)[..., :-1]
    return scores.to(v.dtype) @ v


def test_keys_and_values_are_told_from_queries() -> None:
    """By what the second product sums over, wherever the operands stand; a product with weights is no attention."""
    for attend in (sdpa, products, einsums, flat):
        program = capture_program(Apart(attend), (tokens().float(),))
        found, symmetry = analyse(program, continuous=False)
        number = symmetry.names.index("blocks of q.weight[0]")
        names = [operand.value.name for operand in Attentions(found, symmetry).kv_operands(number)]
        layers = [n.name for n in program.graph.graph.nodes if n.op == "call_function" and "linear" in n.name][2:4]
        reached = [{m.name for m in _before(found.program.graph, name)} for name in names]
        assert [own & set(layers) for own in reached] == [{layers[0]}, {layers[1]}]


def _before(module: Any, name: str) -> set[Any]:
    (node,) = (n for n in module.graph.nodes if n.name == name)
    found, open_ = {node}, [node]
    while open_:
        for other in open_.pop().all_input_nodes:
            if other not in found:
                found.add(other)
                open_.append(other)
    return found


class Weighted(nn.Module):
    """Each head is multiplied by a matrix of its own, twice, which is no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(6, 16), nn.Linear(16, 3)
        self.first, self.second = nn.Parameter(torch.randn(4, 4, 4)), nn.Parameter(torch.randn(4, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.o(joined(split(self.q(x)) @ self.first @ self.second))
        return y


def test_products_with_weights_are_no_attention() -> None:
    found, symmetry = analyse(capture_program(Weighted(), (tokens().float(),)), continuous=False)
    attentions = Attentions(found, symmetry)
    assert any(c.size == 4 for c in symmetry.units)
    assert not any(attentions.kv_operands(n) for n in range(len(symmetry.units)))


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values are multiplied first, and summed over places; then over the dimensions of heads."""
    return (nn.functional.elu(q) + 1) @ ((nn.functional.elu(k) + 1).mT @ v)


def test_linear_attention_has_no_heads_of_keys_and_values_apart() -> None:
    """What its second product sums over lies in heads: what stands there are queries, and no values."""
    found, symmetry = analyse(capture_program(Apart(linear), (tokens().float(),)), continuous=False)
    attentions = Attentions(found, symmetry)
    assert any(c.size == 4 for c in symmetry.units)
    assert not any(attentions.kv_operands(n) for n in range(len(symmetry.units)))
