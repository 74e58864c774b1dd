"""Models in other bases: planted elements of the whole group are found again."""

from __future__ import annotations

import copy
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge
from fxmerge import Align, Average, LeastSquares, Recipe, Symmetry, TaskArithmetic, Zip
from fxmerge.matching.balance import balance
from fxmerge.matching.problem import nearest
from fxmerge.matching.search import match
from fxmerge.symmetry.kinds import fitting
from fxmerge.units.basis import Basis, random_matrices
from fxmerge.units.kind import Kind
from tests.oracle.continuous_networks import NETWORKS
from tests.oracle.nullity import generic
from tests.slow import but_slow

CONTINUOUS = Recipe(match=Align(alpha=1, continuous=True), combine=Average(), fit=None)
PERMUTED = Recipe(match=Align(alpha=1), combine=Average(), fit=None)

TABLE = [
    "RMSNorm, gains",
    "LayerNorm, gains and biases",
    "tied embedding, RMSNorm",
    "linear bottleneck",
    "residual without norms",
    "attention, packed, fused and causal",
    "grouped queries",
    "rotary",
    "rotary, grouped queries",
    "rotary, half of a head",
    "rotary, neighbouring units",
    "norms of queries and keys, rotary",
    "norms of queries and keys",
    "keys and values of a latent",
    "two bottlenecks of one width in a row",
    "linear recurrence",
    "convolutional stream, RMSNorm of a pixel",
    "GroupNorm of a linear layer",
    "mixture of experts",
    "image of patches",
]
"""Networks with classes of every kind: alone, in heads, in a row, tied, and beside classes that are permuted."""

QUICK = [*TABLE[:6], "rotary"]


@cache
def original(name: str) -> tuple[nn.Module, tuple[Tensor, ...], Symmetry]:
    """A network without gains, and its symmetry."""
    network = NETWORKS[name]
    model, args = generic(network.model(), network.args, network.seed)
    plain = fxmerge.canonicalize(model, args)
    return plain, args, fxmerge.find_symmetry(plain, args)


def planted(name: str, seed: int, noise: float = 0.0) -> nn.Module:
    """A copy transformed by an element of the whole group, with noise on its parameters before."""
    model, _, symmetry = original(name)
    generator = torch.Generator().manual_seed(seed)
    state = {n: noisy(t, noise, generator) for n, t in model.state_dict().items()}
    moved = copy.deepcopy(model)
    moved.load_state_dict(symmetry.sample(generator).apply(state))
    return moved


def noisy(tensor: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    if not noise or not tensor.is_floating_point() or (tensor == tensor.flatten()[0]).all():
        return tensor
    size = float(tensor.square().mean().sqrt())
    return tensor + noise * size * torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)


def error(network: nn.Module, to: nn.Module, args: tuple[Tensor, ...]) -> float:
    with torch.no_grad():
        found, expected = network(*args), to(*args)
    return float((found - expected).abs().max() / expected.abs().max())


def falls(trace: tuple[float, ...]) -> bool:
    return any(after < before - 1e-9 * abs(before) for before, after in pairwise(trace))


@pytest.mark.parametrize("name", but_slow(TABLE, QUICK))
def test_a_planted_copy_merges_back(name: str) -> None:
    model, args, _ = original(name)
    moved = planted(name, seed=5)
    for dtype, most in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        x = tuple(t.to(dtype) if t.is_floating_point() else t for t in args)
        a, b = copy.deepcopy(model).to(dtype), copy.deepcopy(moved).to(dtype)
        assert error(b, a, x) < most, "the copy computes the same"
        merged = fxmerge.merge(a, b, recipe=CONTINUOUS, example=x)
        assert error(merged, a, x) < most
        assert not any(map(falls, fxmerge.report(merged).objective))


@pytest.mark.parametrize("name", ["RMSNorm, gains", "linear bottleneck"])
def test_permutations_alone_do_not_bring_it_back(name: str) -> None:
    model, args, _ = original(name)
    merged = fxmerge.merge(model, planted(name, seed=5), recipe=PERMUTED, example=args)
    assert error(merged, model, args) > 0.05


@pytest.mark.parametrize("name", but_slow(TABLE, QUICK[:4]))
def test_a_noisy_copy_comes_back_to_its_place(name: str) -> None:
    model, _, symmetry = original(name)
    a, b = (balance(symmetry, m.state_dict()).apply(m.state_dict()) for m in (model, planted(name, seed=6, noise=0.01)))
    found = match(symmetry, a, b, {}, alpha=1, continuous=True)
    back = found.basis.apply(found.permutation.apply(b))
    assert not falls(found.trace)
    assert found.trace[-1] >= found.trace[0]
    moved = sorted({axis.parameter for axis in symmetry.layout})
    distance = sum(float((back[n] - a[n]).square().sum()) for n in moved) ** 0.5
    assert distance <= 0.05 * sum(float(a[n].square().sum()) for n in moved) ** 0.5


@pytest.mark.parametrize("reference", [None, 1])
def test_three_models(reference: int | None) -> None:
    name = "RMSNorm, gains"
    model, args, _ = original(name)
    models = [model, planted(name, seed=7), planted(name, seed=8)]
    recipe = Recipe(match=Align(alpha=1, continuous=True, reference=reference), combine=Average(), fit=None)
    assert error(fxmerge.merge_many(models, recipe=recipe, example=args), model, args) < 1e-9


def test_a_zip_keeps_the_width_of_one_model() -> None:
    name = "RMSNorm, gains"
    model, args, _ = original(name)
    recipe = Recipe(match=Zip(alpha=1, continuous=True), combine=Average(), fit=None)
    merged = fxmerge.merge(model, planted(name, seed=7), recipe=recipe, example=args)
    assert error(merged, model, args) < 1e-9
    assert {n: t.shape for n, t in merged.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_activations_alone_bring_a_copy_back() -> None:
    name = "RMSNorm, gains"
    model, args, _ = original(name)
    loader = [torch.randn(64, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))]
    recipe = Recipe(match=Align(alpha=0, continuous=True), combine=Average(), fit=None)
    merged = fxmerge.merge(model, planted(name, seed=9), loader, recipe)
    assert error(merged, model, args) < 1e-3


class Headed(nn.Module):
    """A stream with rotations, and a head of some classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed, self.inner = nn.Linear(6, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.inner(F.rms_norm(x, (4,)))
        y: Tensor = self.head(F.rms_norm(x, (4,)))
        return y


def test_heads_apart_are_rotated_with_the_trunk() -> None:
    torch.manual_seed(0)
    a, b = Headed(3).double(), Headed(5).double()
    x = torch.randn(16, 6, dtype=torch.float64)
    trunk = {n: t for n, t in a.state_dict().items() if not n.startswith("head")}
    b.load_state_dict(trunk, strict=False)
    basis = fxmerge.find_symmetry(b, (x,)).sample(torch.Generator().manual_seed(0)).basis
    assert basis.matrices
    with torch.no_grad():
        expected = a(x), b(x)
    b.load_state_dict(basis.apply(b.state_dict()))
    recipe = Recipe(match=Align(alpha=1, continuous=True), combine=Average(), fit=None, share="trunk")
    merged = fxmerge.merge(a, b, recipe=recipe, example=x)
    for found, own in zip(merged(x), expected, strict=True):
        assert torch.allclose(found, own, rtol=0, atol=1e-9)


def test_gains_that_differ_allow_permutations_only() -> None:
    """A symmetry of a fresh network, whose gains are all one, is given for trained ones."""
    network = NETWORKS["post-norm, RMSNorm, gains"]
    fresh = fxmerge.find_symmetry(network.model().double(), tuple(x.double() for x in network.args))
    assert Kind.ORTHOGONAL in {own.kind for own in fresh.kinds}
    model, args = generic(network.model(), network.args)
    smaller = fitting(fresh, [model.state_dict()])
    assert Kind.ORTHOGONAL not in {own.kind for own in smaller.kinds}
    assert Kind.GENERAL_LINEAR in {own.kind for own in smaller.kinds}
    assert fitting(fresh, [network.model().state_dict()]).kinds == fresh.kinds
    moved = copy.deepcopy(model)
    moved.load_state_dict(smaller.sample().apply(model.state_dict()))
    merged = fxmerge.merge(model, moved, recipe=CONTINUOUS, symmetry=fresh, example=args)
    assert error(merged, model, args) < 1e-9


def test_a_fit_follows() -> None:
    name = "RMSNorm, gains"
    model, args, _ = original(name)
    recipe = Recipe(match=Align(continuous=True), combine=Average(), fit=LeastSquares())
    loader = [torch.randn(64, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))]
    merged = fxmerge.merge(model, planted(name, seed=9), loader, recipe)
    assert error(merged, model, args) < 1e-3


@pytest.mark.parametrize("kind", [Kind.CENTRED, Kind.ORTHOGONAL])
def test_the_nearest_matrix_of_a_group(kind: Kind) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    best = nearest(scores, kind)
    assert torch.allclose(best @ best.T, torch.eye(5, dtype=torch.float64))
    assert torch.allclose(best.sum(1), torch.ones(5, dtype=torch.float64)) == (kind == Kind.CENTRED)
    for other in random_matrices(kind, 200, 5, generator):
        assert float((scores * other).sum()) <= float((scores * best).sum()) + 1e-9


@pytest.mark.parametrize("kind", [Kind.UNITARY, Kind.COMPLEX])
def test_the_nearest_turn(kind: Kind) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 2, dtype=torch.float64, generator=generator)
    best = nearest(scores, kind)
    for other in random_matrices(Kind.UNITARY, 200, 2, generator):
        assert float((scores * other).sum()) <= float((scores * best).sum()) + 1e-9
    assert torch.allclose(nearest(3 * best, kind), best)
    nothing = nearest(torch.zeros(2, 2, dtype=torch.float64), kind)
    assert torch.equal(nothing, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("name", QUICK[:3])
def test_align_gives_the_basis_of_the_reference(name: str) -> None:
    model, args, _ = original(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    aligned = fxmerge.align(planted(name, seed=11), to=model, recipe=CONTINUOUS, example=args)
    for n, tensor in aligned.state_dict().items():
        assert torch.allclose(tensor, before[n], rtol=0, atol=1e-9), n
        assert torch.equal(model.state_dict()[n], before[n])


def loader_of(args: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(64, *x.shape[1:], dtype=x.dtype, generator=generator) for x in args]


@pytest.mark.parametrize("twin", [True, False])
def test_auto_keeps_what_is_nearer_to_the_ensemble(twin: bool) -> None:
    name = "RMSNorm, gains"
    model, args, _ = original(name)
    network = NETWORKS[name]
    other = planted(name, seed=12) if twin else generic(network.model(), network.args, 12)[0]
    data = loader_of(args)
    errors = {}
    for way in (True, False, "auto"):
        merged = fxmerge.merge(model, other, data, Recipe(match=Zip(continuous=way)))  # type: ignore[arg-type]
        told = fxmerge.report(merged)
        errors[way] = told.errors["merged"]
        if way != "auto":
            assert bool(told.bases) == way
    assert errors["auto"] == min(errors[True], errors[False])
    assert not twin or errors[True] < errors[False]


def test_auto_permutes_without_a_fit() -> None:
    model, args, _ = original("linear bottleneck")
    recipe = Recipe(match=Align(continuous="auto"), combine=Average(), fit=None)
    merged = fxmerge.merge(model, planted("linear bottleneck", seed=1), loader_of(args), recipe)
    assert not fxmerge.report(merged).bases


def test_all_units_of_all_models_are_matched_with_none() -> None:
    """At full width nothing is lost, in whatever bases the models are."""
    name = "RMSNorm, gains"
    model, args, _ = original(name)
    other, _ = generic(NETWORKS[name].model(), NETWORKS[name].args, 13)
    recipe = Recipe(match=Zip(width=2.0, continuous=True), fit=None, share="trunk")
    merged = fxmerge.merge(model, other, recipe=recipe, example=args)
    for found, own in zip(merged(*args), (model, other), strict=True):
        assert torch.allclose(found, own(*args), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", but_slow([n for n in NETWORKS if len(NETWORKS[n].args) == 1], QUICK))
def test_each_of_two_unrelated_models_is_kept(name: str) -> None:
    """A model that counts alone comes back, whatever basis the other one has."""
    network = NETWORKS[name]
    first, args = generic(network.model(), network.args, network.seed)
    second, _ = generic(network.model(), network.args, network.seed + 1)
    for weights, model in (((1.0, 0.0), first), ((0.0, 1.0), second)):
        recipe = Recipe(match=Align(continuous=True), combine=Average(weights=weights), fit=None)
        merged = fxmerge.merge(first, second, recipe=recipe, example=args)
        assert error(merged, model, args) < 1e-9


def test_a_class_that_cannot_be_balanced_stays() -> None:
    """What is written to a bottleneck is zero, as in a fresh adapter."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 4)) for _ in range(2)]
    for model in models:
        nn.init.zeros_(model[0].weight)  # type: ignore[arg-type]
    x = torch.randn(7, 5)
    recipe = Recipe(match=Align(continuous=True), combine=Average(weights=(1, 0)), fit=None)
    merged = fxmerge.merge(*models, recipe=recipe, example=x)
    assert error(merged, models[0], (x,)) < 1e-5


class Adapted(nn.Module):
    """A frozen layer behind a norm with gains, and an adapter of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.frozen, self.head = nn.RMSNorm(6), nn.Linear(6, 8), nn.Linear(8, 2)
        self.a, self.b = nn.Linear(6, 3, bias=False), nn.Linear(3, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out: Tensor = self.head((self.frozen(y) + self.b(self.a(y))).relu())
        return out


def test_a_frozen_base_stays_bit_by_bit() -> None:
    first = generic(Adapted(), (torch.randn(4, 6),))[0]
    second = generic(Adapted(), (torch.randn(4, 6),), 1)[0]
    frozen = [n for n in first.state_dict() if n.startswith(("norm", "frozen", "head"))]
    second.load_state_dict({n: first.state_dict()[n] if n in frozen else t for n, t in second.state_dict().items()})
    x = torch.randn(4, 6, dtype=torch.float64)
    merged = fxmerge.merge(first, second, recipe=CONTINUOUS, example=x)
    assert all(torch.equal(merged.state_dict()[n], first.state_dict()[n]) for n in frozen)
    assert fxmerge.report(merged).bases
    assert set(frozen) <= set(fxmerge.report(merged).shared)


def test_gains_stay_where_units_are_only_permuted() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 2)) for _ in range(2)]
    for model in models:
        nn.init.uniform_(model[2].weight, 0.5, 2)  # type: ignore[arg-type]
    x = torch.randn(3, 4)
    made = [
        fxmerge.merge(*models, recipe=Recipe(match=Align(alpha=1, continuous=way), fit=None), example=x)
        for way in (True, False)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in made), strict=True))


def test_the_reference_stays_bit_by_bit_in_half_precision() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 5)).bfloat16() for _ in range(2)]
    recipe = Recipe(match=Align(continuous=True, reference=0), combine=Average(weights=(1, 0)), fit=None)
    merged = fxmerge.merge(*models, recipe=recipe, example=torch.randn(3, 6).bfloat16())
    assert all(torch.equal(merged.state_dict()[n], t) for n, t in models[0].state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_activations_are_compared_in_the_precision_of_the_models(dtype: torch.dtype) -> None:
    """Also if matrices are balanced first."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    loader = [torch.randn(64, 6) for _ in range(2)]
    symmetry, two = fxmerge.find_symmetry(one, (loader[0].double(),)), copy.deepcopy(one)
    two.load_state_dict(symmetry.sample(torch.Generator().manual_seed(0)).basis.apply(one.state_dict()))
    merged = fxmerge.merge(
        one.to(dtype), two.to(dtype), [x.to(dtype) for x in loader], Recipe(match=Align(continuous=True), fit=None)
    )
    with torch.no_grad():
        expected, got = (model(loader[0].to(dtype)).float() for model in (one, merged))
    assert float((expected - got).abs().max()) < 0.05 * float(expected.abs().max())


def test_covariances_around_a_large_mean_are_exact() -> None:
    """A stream with a constant that is many times its deviations."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5))
    nn.init.constant_(net[0].bias, 1000.0)  # type: ignore[arg-type]
    x = torch.randn(256, 6)
    twin = copy.deepcopy(net)
    symmetry = fxmerge.find_symmetry(net, (x,))
    turn = random_matrices(Kind.ORTHOGONAL, 1, 4, torch.Generator().manual_seed(1))
    twin.load_state_dict(Basis(symmetry.mixed, {0: turn}).apply(net.state_dict()))
    recipe = Recipe(match=Align(alpha=0, continuous=True), fit=None)
    merged = fxmerge.merge(net, twin, [x], recipe)
    assert error(merged, net, (x,)) < 1e-4


def test_images_tell_where_blocks_went() -> None:
    name = "attention, packed, fused and causal"
    model, args, symmetry = original(name)
    generator = torch.Generator().manual_seed(3)
    order = symmetry.sample_permutation(generator)
    twin = copy.deepcopy(model)
    twin.load_state_dict(order.apply(model.state_dict()))
    aligned = fxmerge.align(twin, to=model, recipe=CONTINUOUS, example=args)
    images = fxmerge.report(aligned).images[0]
    blocks = next(n for n in symmetry.names if n.startswith("blocks of"))
    number = symmetry.names.index(blocks)
    assert images[blocks] == order.inverse().images[number].tolist()
    assert set(fxmerge.report(aligned).bases).isdisjoint(images)
    assert not any(map(falls, fxmerge.report(aligned).objective))


def test_a_symmetry_with_gains_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5), nn.Linear(5, 2)).double()
    nn.init.uniform_(model[1].weight, 0.5, 2)  # type: ignore[arg-type]
    x = torch.randn(3, 4, dtype=torch.float64)
    given = fxmerge.find_symmetry(model, (x,))
    merged = fxmerge.merge(model, copy.deepcopy(model), recipe=CONTINUOUS, symmetry=given, example=x)
    assert "pass find_symmetry(canonicalize(model, args), args)" in caplog.text
    assert torch.equal(merged.state_dict()["1.weight"], model[1].weight)  # type: ignore[arg-type]


def test_align_makes_one_network_only() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(fxmerge.OptionError, match="align makes none"):
        fxmerge.align(model, model, recipe=Recipe(match=Align(continuous="auto")), example=torch.zeros(1, 2))


def test_there_are_not_more_units_of_a_mixed_class() -> None:
    name = "RMSNorm, gains"
    model, args, symmetry = original(name)
    stream = next(n for n, own in zip(symmetry.names, symmetry.kinds, strict=True) if own.kind == Kind.ORTHOGONAL)
    recipe = Recipe(match=Zip(width={stream: 1.5}, continuous=True))
    with pytest.raises(fxmerge.OptionError, match="cannot have more units"):
        fxmerge.merge(model, planted(name, seed=2), loader_of(args), recipe)


def test_a_base_stays_in_its_basis() -> None:
    """Task vectors of networks that were tuned and then moved by elements of the whole group."""
    name = "RMSNorm, gains"
    base, args, symmetry = original(name)
    generator = torch.Generator().manual_seed(4)
    tuned, moved = [], []
    for _ in range(2):
        state = {n: noisy(t, 0.01, generator) for n, t in base.state_dict().items()}
        tuned.append(state)
        other = copy.deepcopy(base)
        other.load_state_dict(symmetry.sample(generator).apply(state))
        moved.append(other)
    recipe = Recipe(match=Align(alpha=1, continuous=True), combine=TaskArithmetic(scale=1.0), fit=None)
    merged = fxmerge.merge(*moved, base=base, recipe=recipe, example=args).state_dict()
    for n, tensor in base.state_dict().items():
        expected = tensor + sum(state[n] - tensor for state in tuned)
        assert float((merged[n] - expected).norm()) <= 0.02 * float(expected.norm()), n
