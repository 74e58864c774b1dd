"""What graphs have in common: by ops, arguments and shapes, never by names."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxmerge.program.capture import capture_ops
from fxmerge.program.common import common_part

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    """A function of layers, of which each is used by its number."""

    def __init__(self, forward: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = forward, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.layers)


class Otherwise(nn.Module):
    """As `nn.Sequential`, written by somebody else."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        for number, layer in enumerate(reversed(layers)):
            self.add_module(f"part_{number}", layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(list(self.children())):
            x = F.linear(x, layer.weight, layer.bias) if isinstance(layer, nn.Linear) else F.relu(x)
        return x


def ops(model: nn.Module, x: Tensor = X) -> fx.GraphModule:
    return capture_ops(model.eval(), (x,))


def common(a: nn.Module, b: nn.Module) -> list[str]:
    """The names of the ops of a that b has too, and that there are as many in both directions."""
    first, other = ops(a), ops(b)
    pairs = common_part(first, other)
    assert len({id(n) for n in pairs.values()}) == len(pairs)
    for node, theirs in pairs.items():
        assert node.op == theirs.op and (node.op in ("get_attr", "placeholder") or node.target == theirs.target)
        for own, other_own in zip(node.all_input_nodes, theirs.all_input_nodes, strict=True):
            assert pairs[own] is other_own
    return [n.name for n in first.graph.nodes if n in pairs and n.op == "call_function" and "aten" in str(n.target)]


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_the_layer_of_another_shape_is_the_first_that_differs() -> None:
    assert common(mlp(4, 5, 6, 2), mlp(4, 5, 6, 3)) == ["linear", "relu", "linear_1", "relu_1"]
    assert common(mlp(4, 5, 6, 2), mlp(4, 5, 7, 2)) == ["linear", "relu"]
    assert common(mlp(4, 5, 2), mlp(4, 6, 2)) == []


def test_names_and_code_do_not_matter() -> None:
    layers = nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)
    assert common(nn.Sequential(*layers), Otherwise(*layers)) == ["linear", "relu", "linear_1"]


def test_numbers_in_the_graph_matter() -> None:
    assert common(Calls(lambda x: (x * 2).relu()), Calls(lambda x: (x * 3).relu())) == []
    assert common(Calls(lambda x: x.sum(1)), Calls(lambda x: x.sum(1, keepdim=True))) == []
    assert common(Calls(lambda x: x.narrow(1, 1, 2)), Calls(lambda x: x.narrow(1, 2, 2))) == []


def test_constants_are_the_same_by_their_values() -> None:
    one, same, two = torch.arange(4.0), torch.arange(4.0), torch.arange(4.0) + 1
    assert common(Calls(lambda x: x * one), Calls(lambda x: x * same)) == ["mul"]
    assert common(Calls(lambda x: x * one), Calls(lambda x: x * two)) == []


def test_a_weight_that_is_used_twice_is_none_that_is_used_once() -> None:
    def twice(x: Tensor, a: nn.Module, b: nn.Module) -> Any:
        return b(a(x))

    shared, again = nn.Linear(4, 4), nn.Linear(4, 4)
    assert common(Calls(twice, shared, shared), Calls(twice, nn.Linear(4, 4), again)) == ["linear"]
    assert common(Calls(twice, shared, shared), Calls(twice, again, again)) == ["linear", "linear_1"]


def test_of_several_that_would_do_it_is_the_one_with_the_same_consumers() -> None:
    """Two layers of one shape read the input; only what comes after tells which is which."""

    def forth(x: Tensor, a: nn.Module, b: nn.Module) -> Any:
        return a(x).tanh() * b(x).exp()

    def back(x: Tensor, a: nn.Module, b: nn.Module) -> Any:
        second = b(x).exp()
        return a(x).tanh() * second

    layers = nn.Linear(4, 5), nn.Linear(4, 5)
    first, other = ops(Calls(forth, *layers)), ops(Calls(back, *layers))
    pairs = common_part(first, other)
    reads = {str(n.target): str(m.target) for n, m in pairs.items() if n.op == "get_attr"}
    assert reads["layers.0.weight"] == "layers.0.weight" and reads["layers.1.weight"] == "layers.1.weight"
    assert "mul" in {n.name for n in pairs}


def test_a_parameter_is_no_parameter_of_another_dtype() -> None:
    class Table(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(4, dtype=dtype))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table  # type: ignore[operator]

    assert common(Table(torch.float32), Table(torch.float32)) == ["add"]
    assert common(Table(torch.float32), Table(torch.float64)) == []


@pytest.mark.parametrize("inputs", [1, 2])
def test_inputs_are_the_same_by_their_places(inputs: int) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 5)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            out: Tensor = self.a(x if inputs == 1 else y)
            return out

    a, b = (capture_ops(Two().eval(), (X, X)) for _ in range(2))
    assert "linear" in {n.name for n in common_part(a, b)}
