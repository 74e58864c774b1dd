from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.matching.assignment import propose
from fxmerge.matching.search import match
from tests.oracle.architectures import CASES
from tests.oracle.inferred import each, inferred


def test_a_nested_assignment_is_the_best_element_of_the_group() -> None:
    """GroupNorm(3, 6) has a group of 3! 2!^3 = 48 elements: try them all."""
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    symmetry = fxmerge.find_symmetry(model, (torch.zeros(1, 2, 2, 2),))
    (root,) = (n for n, c in enumerate(symmetry.units) if not c.parents)
    (units,) = (n for n, c in enumerate(symmetry.units) if c.parents)
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.normal(size=(6, 6))
        image = propose(symmetry, root, {units: scores})[units]
        best = max(
            sum(scores[2 * g + (i if flip[h] == 0 else 1 - i), 2 * h + i] for h, g in enumerate(groups) for i in (0, 1))
            for groups in permutations(range(3))
            for flip in np.ndindex(2, 2, 2)
        )
        assert scores[image, np.arange(6)].sum() == pytest.approx(best)


@each(CASES)
def test_a_planted_permutation_gives_the_model_back(name: str) -> None:
    """Aligning a permuted copy gives parameters that are the model's own, whatever the architecture."""
    model, symmetry = inferred(name).model, inferred(name).symmetry
    g = torch.Generator().manual_seed(0)
    state = model.state_dict(keep_vars=True)
    shared = {id(v): torch.randn(v.shape, generator=g) if v.is_floating_point() else v for v in state.values()}
    a = {k: shared[id(v)] for k, v in state.items()}
    planted = symmetry.sample_permutation(g)
    found = match(symmetry, a, planted.apply(a), {}, alpha=1.0)
    back = found.permutation.apply(planted.apply(a))
    assert all(torch.equal(back[k], a[k]) for k in a)


def test_the_objective_never_falls() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3)]
    model = nn.Sequential(*layers)
    symmetry = fxmerge.find_symmetry(model, (torch.zeros(1, 5),))
    a = dict(model.state_dict())
    b = {k: torch.randn_like(v) for k, v in a.items()}
    trace = match(symmetry, a, b, {}, alpha=1.0).trace
    assert len(trace) > 1
    assert all(x < y for x, y in pairwise(trace))


def test_the_same_seed_gives_the_same_permutation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 3))
    symmetry = fxmerge.find_symmetry(model, (torch.zeros(1, 5),))
    a = dict(model.state_dict())
    b = {k: torch.randn_like(v) for k, v in a.items()}
    first, second = (match(symmetry, a, b, {}, alpha=1.0, seed=3).permutation for _ in range(2))
    assert first == second


def test_a_model_near_its_reference_stays_where_it_is() -> None:
    """Fine-tuned models share a base: the identity is the best start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 3))
    symmetry = fxmerge.find_symmetry(model, (torch.zeros(1, 5),))
    a = dict(model.state_dict())
    b = {k: v + 0.3 * v.std() * torch.randn_like(v) for k, v in a.items()}
    assert match(symmetry, a, b, {}, alpha=1.0).permutation.is_identity()


def test_activations_alone_can_match() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 9), nn.ReLU(), nn.Linear(9, 3))
    symmetry = fxmerge.find_symmetry(model, (torch.zeros(1, 2),))
    a = dict(model.state_dict())
    planted = symmetry.sample_permutation(torch.Generator().manual_seed(0))
    correlation = torch.eye(9)[:, planted.inverse().images[0]]
    found = match(symmetry, a, planted.apply(a), {0: correlation}, alpha=0.0)
    assert (found.permutation @ planted).is_identity()
    assert found.quality["0.weight[0]"]["activations"] == pytest.approx(1.0)
