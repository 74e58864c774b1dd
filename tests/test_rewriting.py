import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.combine.average import average
from fxmerge.combine.batch_norm import batch_norm_statistics
from fxmerge.emit.bake import bake
from fxmerge.program.capture import capture_program
from fxmerge.refitting.course import Lesson
from fxmerge.refitting.refit import with_statistics
from fxmerge.symmetry.flow import Flow, flows
from fxmerge.symmetry.group import analyse
from fxmerge.units.unit_map import UnitMap


def bn_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
    )


def estimated(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    program = capture_program(model, (batches[0],))
    lessons = [Lesson(((x,), {}), (), 1.0) for x in batches]
    return with_statistics(program, program.aten.state, lessons)


def test_statistics_are_those_of_all_data_however_it_comes() -> None:
    """Batches that differ in their mean, such as those of several domains, have more variance together."""
    model = bn_net().eval().double()
    batches = [torch.randn(4, 3, 7, 7, dtype=torch.float64) * 3 + shift for shift in (-5, 1, 9)]
    state = estimated(model, batches)
    assert state.keys() == model.state_dict().keys()
    model.load_state_dict(state)
    x = torch.cat(batches)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.BatchNorm2d):
                torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))
                torch.testing.assert_close(layer.running_var, x.var((0, 2, 3), correction=0))
            x = layer(x)
    for name, value in estimated(model, [torch.cat(batches)]).items():
        torch.testing.assert_close(value, state[name])


def test_statistics_of_a_model_that_was_exported() -> None:
    model = bn_net().eval()
    batches = [torch.randn(4, 3, 7, 7) * 3 + 1 for _ in range(2)]
    exported = estimated(torch.export.export(model, (batches[0],)), batches)
    for name, value in estimated(model, batches).items():
        torch.testing.assert_close(value, exported[name])


def test_pooled_moments_are_those_of_the_pooled_data() -> None:
    x, y = torch.randn(1000, 3) * 2 + 1, torch.randn(1000, 3) - 3
    states = [{"mean": data.mean(0), "var": data.var(0, correction=0)} for data in (x, y)]
    pooled = average(UnitMap.still(2), states, [0.5, 0.5], [("mean", "var")])
    both = torch.cat([x, y])
    torch.testing.assert_close(pooled["mean"], both.mean(0))
    torch.testing.assert_close(pooled["var"], both.var(0, correction=0))


def test_pooled_moments_of_merged_units_are_those_of_all_members() -> None:
    """The units of a convolution are merged at random; the inputs of BatchNorm show what moments these have."""
    models = [bn_net().eval() for _ in range(2)]
    data = [torch.randn(500, 6) * torch.rand(6) + torch.randn(6) for _ in models]
    for model, x in zip(models, data, strict=True):
        model[1].running_mean, model[1].running_var = x.mean(0), x.var(0, correction=0)
    found, symmetry = analyse(capture_program(models[0], (torch.randn(2, 3, 7, 7),)))
    consumed = frozenset(axis for axis, kind in flows(found).items() if kind is Flow.CONSUMES)
    into = [np.array([0, 0, 1, 2, 3, 5]), np.array([4, 0, 4, 4, 3, 5])]
    (size,) = (c.size for c in symmetry.units)
    units = UnitMap(symmetry.names, symmetry.layout, consumed, tuple((own,) for own in into), (size,))
    states = [model.state_dict() for model in models]
    pooled = average(units, states, [0.5, 0.5], [("1.running_mean", "1.running_var")])
    for unit in range(size):
        members = torch.cat([x[:, u] for x, own in zip(data, into, strict=True) for u in np.flatnonzero(own == unit)])
        torch.testing.assert_close(pooled["1.running_mean"][unit], members.mean())
        torch.testing.assert_close(pooled["1.running_var"][unit], members.var(correction=0))


def test_the_average_pools_statistics_and_keeps_counters_and_dtypes() -> None:
    state = {
        "w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        "mean": torch.tensor([0.0, 0.0]),
        "var": torch.tensor([1.0, 1.0]),
        "n": torch.tensor(7),
    }
    other = {"w": torch.tensor([3.0, 2.0], dtype=torch.bfloat16), "mean": torch.tensor([2.0, 0.0])}
    merged = average(UnitMap.still(2), [state, state | other], [0.5, 0.5], [("mean", "var")])
    assert merged["w"].tolist() == [2.0, 2.0]
    assert merged["w"].dtype is torch.bfloat16
    assert merged["mean"].tolist() == [1.0, 0.0]
    assert merged["var"].tolist() == [2.0, 1.0]
    assert merged["n"] == 7


def test_batch_norm_statistics_are_found_in_the_graph() -> None:
    names = batch_norm_statistics(capture_program(bn_net(), (torch.randn(2, 3, 7, 7),)))
    assert names == [("1.running_mean", "1.running_var"), ("4.running_mean", "4.running_var")]


def test_one_value_per_channel_has_no_variance() -> None:
    model, other = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval() for _ in range(2))
    with pytest.raises(fxmerge.LoaderError, match=r"'1\.running_mean' and '1\.running_var' cannot be estimated"):
        fxmerge.merge(model, other, [torch.randn(1, 3)], fxmerge.Recipe(fit=None))
    estimated(model, [torch.randn(1, 3), torch.randn(1, 3)])


def test_parameters_that_the_graph_does_not_use_are_kept() -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.used(x)
            return out

    model = Extra()
    merged = bake(capture_program(model, (torch.zeros(1, 2),)), model.state_dict())
    Extra().load_state_dict(merged.state_dict())
