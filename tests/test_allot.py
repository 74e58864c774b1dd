"""Widths that follow from what the result may cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fxmerge
from fxmerge import Budget, Recipe, Zip
from fxmerge.emit.costs import flops_of
from fxmerge.matching.allot import widths_to_try, zip_losses
from fxmerge.program.capture import capture_program
from fxmerge.recipe import Run
from tests.slow import but_slow

X = torch.randn(64, 6)
QUIET = Run(progress=False)


def network(seed: int, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, classes)
    return nn.Sequential(*layers).eval()


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_what_is_lost_of_units() -> None:
    """Of pairs of equal units nothing, of units with nothing in common as much as noise of half the signal's power."""
    pairs = np.kron(np.eye(4), np.ones((2, 2)))
    blocks = np.zeros((1, 8), np.int64)
    assert zip_losses(pairs, blocks, [8, 4], 1.0, 0.5) == [0.0, 0.0]
    assert zip_losses(np.eye(8), blocks, [8, 4], 1.0, 0.5) == [0.0, 1.0]


def test_widths_to_choose_from() -> None:
    symmetry = fxmerge.find_symmetry(network(0), (X,))
    asked = {"fewer": True, "more": True, "step": 1}
    assert widths_to_try(symmetry, 0, 2, **asked) == list(range(32, 0, -2))  # type: ignore[arg-type]
    asked = {"fewer": False, "more": True, "step": 8}
    assert widths_to_try(symmetry, 0, 2, **asked) == [32, 24, 16]  # type: ignore[arg-type]
    asked = {"fewer": True, "more": True, "step": 64}
    assert widths_to_try(symmetry, 0, 2, **asked) == [32, 16]  # type: ignore[arg-type]


@pytest.mark.parametrize("share", but_slow([0.3, 0.5, 0.9]))
def test_a_fold_within_a_number_of_parameters(share: float) -> None:
    model = network(0)
    folded = fxmerge.fold(model, [X], Budget(parameters=share), run=QUIET)
    assert 0.6 * share < count(folded) / count(model) <= share


def test_a_fold_within_a_number_of_operations() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    x = torch.randn(5, 1, 6, 6)
    folded = fxmerge.fold(model, width=Budget(flops=0.5), example=x, run=QUIET)
    work = [
        sum(flops_of(p, p.aten.state, ((x,), {})).values()) for p in (capture_program(m, (x,)) for m in (model, folded))
    ]
    assert 0.3 < work[1] / work[0] <= 0.5
    assert flops_of(capture_program(model, (x,)), model.state_dict(), ((x,), {}))["2.weight"] == 2 * 5 * 8 * 8 * 9 * 4


def test_units_go_where_they_cost_nothing() -> None:
    """Half of the first layer's units are copies: these go, and nothing is lost."""
    model = network(0).double()
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias, model[2].weight.T):
            tensor[8:] = tensor[:8]
    folded = fxmerge.fold(model, width=Budget(parameters=0.65), example=X.double(), run=QUIET)
    assert fxmerge.report(folded).widths == {"0.weight[0]": (16, 8)}
    torch.testing.assert_close(folded(X.double()), model(X.double()))


@pytest.mark.slow
def test_a_merge_within_a_budget() -> None:
    a, b = network(0), network(1, classes=4)
    sizes = []
    for parameters in (0.7, 1.2, 2.0, 9.0):
        recipe = Recipe(match=Zip(width=Budget(parameters=parameters)))
        merged = fxmerge.merge(a, b, [X], recipe, run=QUIET)
        sizes.append(count(merged) / count(a))
        assert sizes[-1] <= parameters
        if parameters > 1:  # What only heads read counts, too.
            assert all(after > before / 2 for before, after in fxmerge.report(merged).widths.values())
    assert sizes == sorted(sizes)
    assert fxmerge.report(merged).widths == {"0.weight[0]": (16, 32), "2.weight[0]": (16, 32)}
    torch.testing.assert_close(merged(X)[1], b(X))


def test_a_budget_that_cannot_be_kept() -> None:
    with pytest.raises(
        fxmerge.OptionError, match=r"Budget\(parameters=0\.01.*the smallest widths that classes may have cost more"
    ):
        fxmerge.fold(network(0), [X], Budget(parameters=0.01), run=QUIET)
    flat = nn.Sequential(nn.Embedding(11, 8), nn.LayerNorm(8))
    with pytest.raises(fxmerge.OptionError, match="torch counts no operations of these models: pass parameters"):
        fxmerge.fold(flat, width=Budget(flops=0.5), example=torch.randint(0, 11, (4, 5)), run=QUIET)
    with pytest.raises(fxmerge.OptionError, match="Budget with a distance"):
        Zip(width=Budget(distance=0.1))


def test_a_recipe_with_a_budget_to_text_and_back() -> None:
    recipe = Recipe(match=Zip(width=Budget(parameters=0.5)))
    assert recipe.to_dict()["match"] == {"kind": "Zip", "width": {"kind": "Budget", "parameters": 0.5}}
    assert Recipe.from_json(recipe.to_json()) == recipe
    with pytest.raises(fxmerge.OptionError, match=r"recipe\.match\.width has no field 'parameter'"):
        Recipe.from_dict({"match": {"kind": "Zip", "width": {"kind": "Budget", "parameter": 0.5}}})
