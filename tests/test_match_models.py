"""Matching the units of several models: alpha for all classes, or for some by name."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.matching.models import alpha_by_class, match_models, pairs_to_correlate
from fxmerge.matching.search import match
from fxmerge.program.capture import capture_program
from fxmerge.recipe import Align, Zip
from fxmerge.symmetry.flow import flows
from fxmerge.symmetry.group import analyse
from tests.slow import crossed

MATCH: dict[str, type[Align] | type[Zip]] = {"align": Align, "zip": Zip}
EACH = pytest.mark.parametrize("kind", MATCH.values(), ids=MATCH.keys())


class Net(nn.Module):
    """Two classes that share a parameter, normalised by running statistics, and one of which no two know anything."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.norm, self.b = nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Linear(12, 10)
        self.head, self.apart = nn.Linear(10, 3), nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.b(torch.relu(self.norm(self.a(x)))))) + self.apart(x)
        return out


def data() -> list[Tensor]:
    torch.manual_seed(9)
    return [torch.randn(24, 5) for _ in range(3)]


def nets() -> tuple[Net, Net]:
    return Net(0).eval(), Net(1).eval()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


# -------------------------------------------------------------------------- what is matched with what


def test_the_pairs_that_are_correlated() -> None:
    assert pairs_to_correlate(Zip(), 3, 1) == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
    assert pairs_to_correlate(Align(), 3, None) == [(0, 1), (0, 2), (1, 2)]
    assert pairs_to_correlate(Align(), 3, 1) == [(0, 1), (1, 2)]


@pytest.mark.parametrize(("part", "reference"), crossed([Align(alpha=1), Zip(alpha=1, damping=1.0)], [0, 1, 2, None]))
def test_permuted_copies_are_matched_with_each_other(part: Align | Zip, reference: int | None) -> None:
    net = nets()[0]
    found, symmetry = analyse(capture_program(net, (data()[0],)))
    permutations = [symmetry.sample_permutation(torch.Generator().manual_seed(seed)) for seed in range(3)]
    states = [p.apply(net.state_dict()) for p in permutations]
    matching = match_models(symmetry, flows(found), states, {}, part, reference)
    assert matching.reference in (0, 1, 2)
    assert reference in (None, matching.reference)
    assert matching.alignment.permutation(matching.reference).is_identity()
    assert not matching.merged.moving
    assert matching.units == matching.alignment
    home = permutations[matching.reference]
    for m, planted in enumerate(permutations):
        assert matching.units.permutation(m) @ planted == home
    for name, value in matching.units.merge(states).items():
        torch.testing.assert_close(value, states[matching.reference][name])
    assert len(matching.quality) == (3 if reference is None else 2)
    assert bool(matching.zip_objective) == isinstance(part, Zip)
    assert set(matching.within.values()) == ({0} if isinstance(part, Zip) else set())


# -------------------------------------------------------------------------- alpha


@pytest.mark.parametrize(("kind", "alpha"), crossed([Align, Zip], [{"a.weight[0]": 0.0}, 0.25]))
def test_without_a_loader_alpha_is_one(kind: type[Align] | type[Zip], alpha: Any) -> None:
    merged, by_weights = (
        fxmerge.merge(*nets(), recipe=fxmerge.Recipe(match=kind(alpha=own)), example=data()[0]) for own in (alpha, 1)
    )
    assert equal(merged, by_weights)


@pytest.mark.slow
def test_a_permuted_copy_is_the_same_at_every_alpha() -> None:
    """On the data: units that are never active there are alike by activations, and any of them is as good."""
    net, _ = nets()
    planted = fxmerge.find_symmetry(net, (data()[0],)).sample_permutation(torch.Generator().manual_seed(0))
    twin = Net(1).eval()
    twin.load_state_dict(planted.apply(net.state_dict()))
    recipes = [fxmerge.Recipe(match=Align(alpha=alpha), fit=None) for alpha in (0.0, 0.5, 1.0)]
    first, *others = (fxmerge.merge(net, twin, data(), recipe)(torch.cat(data())) for recipe in recipes)
    for other in others:
        torch.testing.assert_close(other, first)


def test_alphas_of_classes_by_number() -> None:
    symmetry = fxmerge.find_symmetry(Net(0).eval(), (data()[0],))
    name = symmetry.names[1]
    assert alpha_by_class(Zip(alpha={name: 0.2}), symmetry) == {0: 0.5, 1: 0.2, 2: 0.5}
    assert alpha_by_class(Align(alpha=0.2), symmetry) == 0.2


@pytest.mark.slow
def test_equal_alphas_by_class_are_one_alpha() -> None:
    names = fxmerge.find_symmetry(Net(0).eval(), (data()[0],)).names

    def merged(alpha: Any) -> nn.Module:
        return fxmerge.merge(*nets(), data(), fxmerge.Recipe(match=Zip(alpha=alpha)))

    for alpha in (0.0, 0.3, 0.5, 1.0):
        assert equal(merged(dict.fromkeys(names, alpha)), merged(alpha))
    assert equal(merged({}), merged(0.5))


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_class_apart_from_all_others_is_matched_by_its_own_alpha(alpha: float) -> None:
    a, b = nets()
    name = "apart.0.weight[0]"
    mixed, all_alike, default = (
        fxmerge.report(fxmerge.align(b, a, data(), fxmerge.Recipe(match=Align(alpha=own)))).images[0]
        for own in ({name: alpha}, alpha, 0.5)
    )
    assert mixed[name] == all_alike[name]
    assert {n: i for n, i in mixed.items() if n != name} == {n: i for n, i in default.items() if n != name}


def test_alphas_by_class_still_raise_one_objective() -> None:
    a, b = nets()
    symmetry = fxmerge.find_symmetry(a, (data()[0],))
    rng = np.random.default_rng(0)
    for _ in range(10):
        correlation = {n: torch.from_numpy(rng.uniform(-1, 1, (c.size,) * 2)) for n, c in enumerate(symmetry.units)}
        alpha = dict(enumerate(rng.uniform(size=len(symmetry.units)).tolist()))
        trace = match(symmetry, a.state_dict(), b.state_dict(), correlation, alpha=alpha).trace
        assert list(trace) == sorted(trace)


def test_nested_classes_have_names_too() -> None:
    def grouped(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        layers = [nn.Conv2d(2, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 2, 1)]
        return nn.Sequential(*layers).eval()

    a, b, x = grouped(0), grouped(1), torch.randn(8, 2, 3, 3)
    names = fxmerge.find_symmetry(a, (x,)).names
    assert len(names) == 2
    for name in names:
        recipe = fxmerge.Recipe(match=Zip(alpha={name: 0.75}))
        assert fxmerge.report(fxmerge.merge(a, b, [x], recipe)).images[0].keys() == set(names)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (
            {"a.weight": 0.3},
            r"alpha names 'a\.weight', which is no class of the symmetry\. Near it are 'a.*\[0\]'",
        ),
        ({"nothing like it": 1}, "no class of the symmetry"),
    ],
)
@EACH
def test_names_that_are_of_no_class(kind: type[Align] | type[Zip], alpha: Any, message: str) -> None:
    for call in (fxmerge.merge, fxmerge.align):
        if call is fxmerge.merge or kind is Align:
            with pytest.raises(fxmerge.OptionError, match=message):
                call(*nets(), data(), fxmerge.Recipe(match=kind(alpha=alpha)))
