from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.program.capture import capture_program
from fxmerge.program.plain_norms import plain_norms

NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer_norm": lambda: nn.LayerNorm(6),
    "rms_norm": lambda: nn.RMSNorm(6),
    "group_norm": lambda: nn.GroupNorm(3, 6),
}


def build(norm: Callable[[], nn.Module]) -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 6), norm(), nn.GELU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return network.eval()


def decomposed(model: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    dynamic = ({0: torch.export.Dim.AUTO},)
    return torch.export.export(model, (example,), dynamic_shapes=dynamic).run_decompositions()


class Native(nn.Module):
    """Calls the three norms that give their statistics as well."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = torch.native_layer_norm(x, (6,), weight, weight, 1e-5)[0].relu()
        x = torch.ops.aten._fused_rms_norm.default(x, [6], weight, 1e-6)[0].relu()
        return torch.native_group_norm(x, weight, weight, 5, 6, 1, 3, 1e-4)[0]


def test_norms_that_give_their_statistics_become_plain_ones() -> None:
    example = torch.randn(5, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    graph = capture_program(Native(), example).aten
    plain = plain_norms(graph)
    torch.testing.assert_close(plain.module(*example), graph.module(*example))
    assert plain_norms(plain) is plain
    ops = {str(node.target): node.meta["val"] for node in plain.module.graph.nodes if node.op == "call_function"}
    assert list(ops) == [f"aten.{op}.default" for op in ("layer_norm", "relu", "rms_norm", "group_norm")]
    assert all(value.shape == (5, 6) for value in ops.values())


def test_a_norm_whose_statistics_are_read_is_kept() -> None:
    class Network(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            normalized, mean, _ = torch.native_layer_norm(x, (4,), None, None, 1e-5)
            return normalized + mean

    graph = capture_program(Network(), (torch.randn(5, 4),)).aten
    assert plain_norms(graph) is graph


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_an_exported_program_of_core_aten_is_merged_as_its_module_is(norm: str) -> None:
    torch.manual_seed(0)
    models = [build(NORMS[norm]) for _ in range(2)]
    data = [torch.randn(64, 4, dtype=torch.float64) for _ in range(4)]
    expected = fxmerge.merge(*models, data)
    found = fxmerge.merge(*(decomposed(model, data[0]) for model in models), data)
    assert "1.weight" in fxmerge.report(expected).layers
    torch.testing.assert_close(found.state_dict(), expected.state_dict())
