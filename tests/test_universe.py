"""Common units of three or more models: `fxmerge.matching.universe`, alone and as `merge_many` uses it."""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations, pairwise, permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge import demo
from fxmerge.combine.average import average
from fxmerge.evidence.activations import similarities
from fxmerge.matching.search import match
from fxmerge.matching.universe import find_universe
from fxmerge.program.capture import capture_program
from fxmerge.program.run import Data, batch_inputs
from fxmerge.symmetry.group import analyse
from fxmerge.units.permutation import Permutation
from fxmerge.units.unit_map import UnitMap
from tests.networks import mlp, vectors
from tests.slow import but_slow

State = Mapping[str, Tensor]


class Attentive(nn.Module):
    """A convolution with BatchNorm, attention of two heads over its pixels, and a perceptron."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x))).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        scores: Tensor = self.head(x.mean(1))
        return scores


def attentive(seed: int) -> nn.Module:
    """One whose BatchNorm statistics fit the data, as after training."""
    net = Attentive(seed).train()
    for x in images():
        net(x)
    return net.eval()


def images() -> list[Tensor]:
    g = torch.Generator().manual_seed(9)
    return [torch.randn(16, 2, 4, 4, generator=g) for _ in range(2)]


NETS = {"mlp": (mlp, vectors), "attention": (attentive, images)}

BOTH = pytest.mark.parametrize(("name", "data"), [("mlp", False), ("attention", True)])
"""An MLP matched by its weights alone, and a network with attention matched by its activations too."""


def planted(net: nn.Module, symmetry: fxmerge.Symmetry, seed: int) -> tuple[Permutation, State]:
    """A random element of the group, and the network that it makes of one that is a little off."""
    g = torch.Generator().manual_seed(seed)
    noised = {
        k: v + 0.01 * v.std() * torch.randn(v.shape, generator=g) if v.ndim > 1 else v
        for k, v in net.state_dict().items()
    }
    permutation = symmetry.sample_permutation(g)
    return permutation, permutation.apply(noised)


@BOTH
def test_planted_permutations_are_found_exactly(name: str, data: bool) -> None:
    build, batches = NETS[name]
    net, x = build(0), batches()
    symmetry = fxmerge.find_symmetry(net, (x[0],))
    plants, models = [], []
    for seed in range(4):
        permutation, state = planted(net, symmetry, seed)
        plants.append(permutation)
        models.append(build(0))
        models[-1].load_state_dict(state)
    merged = fxmerge.merge_many(
        models,
        x if data else None,
        recipe=fxmerge.Recipe(match=fxmerge.Align(), fit=None),
        example=x[0],
        run=fxmerge.Run(verify=False),
    )
    meta = fxmerge.report(merged)
    ways = [symmetry.element(image) @ plant for image, plant in zip(meta.images, plants, strict=True)]
    assert all(way == ways[0] for way in ways)
    assert symmetry.element(meta.images[meta.units_of]).is_identity()
    for key, value in ways[0].apply(net.state_dict()).items():
        if value.ndim > 1:
            torch.testing.assert_close(merged.state_dict()[key], value, rtol=0, atol=0.03 * float(value.std()))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "data"), but_slow([("mlp", False), ("attention", True)]))
def test_the_order_of_the_models_does_not_matter(name: str, data: bool) -> None:
    build, batches = NETS[name]
    models, shares, x = [build(seed) for seed in range(3)], (3, 2, 1), batches()
    merged = []
    for order in permutations(range(3)):
        ordered, weights = [models[i] for i in order], [shares[i] for i in order]
        merged.append(
            fxmerge.merge_many(
                ordered,
                x if data else None,
                recipe=fxmerge.Recipe(combine=fxmerge.Average(weights)),
                example=x[0],
                run=fxmerge.Run(verify=False),
            )
        )
        images = tuple(fxmerge.report(merged[-1]).images[order.index(i)] for i in range(3))
        assert images == fxmerge.report(merged[0]).images
        assert fxmerge.report(merged[-1]).objective == fxmerge.report(merged[0]).objective
        assert order[fxmerge.report(merged[-1]).units_of] == fxmerge.report(merged[0]).units_of
    for other in merged[1:]:
        for key, value in merged[0].state_dict().items():
            torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_images_are_what_was_done_and_every_circle_closes() -> None:
    models, x = [attentive(seed) for seed in range(4)], images()
    symmetry = fxmerge.find_symmetry(models[0], (x[0],))
    merged = fxmerge.merge_many(
        models, recipe=fxmerge.Recipe(match=fxmerge.Align()), example=x[0], run=fxmerge.Run(verify=False)
    )
    into = [symmetry.element(image) for image in fxmerge.report(merged).images]
    states = [p.apply(m.state_dict()) for p, m in zip(into, models, strict=True)]
    for key in ("stem.weight", "qkv.weight", "proj.weight", "head.2.weight"):
        torch.testing.assert_close(merged.state_dict()[key], torch.stack([s[key] for s in states]).mean(0))
    way = {(i, j): into[j].inverse() @ into[i] for i in range(4) for j in range(4)}
    assert all(way[j, k] @ way[i, j] == way[i, k] for i, j, k in permutations(range(4), 3))
    assert not way[0, 1].is_identity()


def test_a_reference_may_be_asked_for() -> None:
    models, x = [mlp(seed) for seed in range(3)], vectors()
    merged = fxmerge.merge_many(
        models, x, recipe=fxmerge.Recipe(match=fxmerge.Align(reference=2)), run=fxmerge.Run(verify=False)
    )
    meta = fxmerge.report(merged)
    assert (meta.units_of, len(meta.quality), len(meta.objective)) == (2, 2, 2)
    for i in (0, 1):
        aligned = fxmerge.align(models[i], to=models[2], loader=x, run=fxmerge.Run(verify=False))
        assert (meta.images[i],) == fxmerge.report(aligned).images
    zipped = fxmerge.report(
        fxmerge.merge_many(
            models, x, recipe=fxmerge.Recipe(match=fxmerge.Zip(reference=2)), run=fxmerge.Run(verify=False)
        )
    )
    assert (zipped.units_of, zipped.objective) == (2, meta.objective)
    without = fxmerge.report(fxmerge.merge_many(models, x, run=fxmerge.Run(verify=False)))
    assert (len(without.quality), len(without.objective)) == (3, 1)
    assert fxmerge.report(fxmerge.merge(*models[:2], x, run=fxmerge.Run(verify=False))).units_of == 0
    with pytest.raises(fxmerge.OptionError, match="reference is model 3; there are models 0 to 2"):
        fxmerge.merge_many(models, x, recipe=fxmerge.Recipe(match=fxmerge.Zip(reference=3)))
    with pytest.raises(fxmerge.OptionError, match="leave reference out"):
        fxmerge.merge_many(models, x, base=models[0], recipe=fxmerge.Recipe(match=fxmerge.Align(reference=0)))
    based = fxmerge.report(fxmerge.merge_many(models, x, base=mlp(3), run=fxmerge.Run(verify=False)))
    assert (based.units_of, len(based.images), len(based.objective)) == (None, 3, 3)


# -------------------------------------------------------------------------- trained networks

MODELS = 4


class Trained:
    """Networks trained on digits from different initialisations, and three ways to align them."""

    def __init__(self, seed: int) -> None:
        training, self.test = demo.load_split(seed)
        self.models = [trained(training, MODELS * seed + i) for i in range(MODELS)]
        self.states = [dict(m.state_dict()) for m in self.models]
        program = capture_program(self.models[0], (training.images[:8],))
        found, self.symmetry = analyse(program)
        data = Data([training.images[:512]], batch_inputs(self.models[0]), torch.device("cpu"), False)
        pairs, names = list(combinations(range(MODELS), 2)), [f"model {i}" for i in range(MODELS)]
        self.correlation = similarities(found, self.symmetry, self.states, data, names, pairs)

    def between(self, i: int, j: int) -> dict[int, Tensor]:
        return {n: c[i, j] if i < j else c[j, i].T for n, c in self.correlation.items()}

    def to(self, i: int, j: int, alpha: float) -> Permutation:
        """Model j in the units of model i."""
        return match(self.symmetry, self.states[i], self.states[j], self.between(i, j), alpha=alpha).permutation

    def total(self, ways: Sequence[Permutation], alpha: float) -> float:
        """The sum over pairs of the objective of a pair, as `search.Problem` states it."""
        total = 0.0
        movable = {axis.parameter for axis in self.symmetry.layout}
        moved = [{k: v for k, v in p.apply(s).items() if k in movable} for p, s in zip(ways, self.states, strict=True)]
        entries = {n: [s for s in self.states[0] if s in self.axes(n)] for n in self.correlation}
        for i, j in combinations(range(MODELS), 2):
            for key, a in moved[i].items():
                total += alpha * a.numel() * float(F.cosine_similarity(a.flatten(), moved[j][key].flatten(), 0))
            for n, c in self.between(i, j).items():
                units = self.symmetry.units[n].size
                per_unit = sum(self.states[0][key].numel() for key in entries[n]) / units
                at = [ways[k].inverse().images[n] for k in (i, j)]
                total += (1 - alpha) * per_unit * float(c[at[0], at[1]].sum())
        return total

    def axes(self, number: int) -> set[str]:
        return {axis.parameter for axis in self.symmetry.layout if number in (n for n, _ in axis.roles)}

    @torch.no_grad()
    def loss(self, ways: Sequence[Permutation]) -> float:
        moved = [p.apply(s) for p, s in zip(ways, self.states, strict=True)]
        merged = mlp(0, 48)
        merged.load_state_dict(average(UnitMap.still(MODELS), moved, [1 / MODELS] * MODELS, []))
        return float(F.cross_entropy(merged(self.test.images), self.test.labels))


@cache
def trained_on_digits(seed: int) -> Trained:
    return Trained(seed)


def trained(data: demo.Split, seed: int) -> nn.Module:
    model = mlp(seed, 48).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
    g = torch.Generator().manual_seed(seed)
    for _ in range(15):
        for batch in torch.randperm(len(data.labels), generator=g).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(data.images[batch]), data.labels[batch]).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("seed", but_slow(range(5)))
def test_the_objective_never_falls_and_ends_above_other_alignments(seed: int) -> None:
    for alpha in (0.0, 0.5, 1.0):
        check_objective(trained_on_digits(seed), alpha)


def check_objective(nets: Trained, alpha: float) -> None:
    found = find_universe(nets.symmetry, nets.states, nets.correlation, alpha=alpha)
    (trace,) = found.traces
    assert len(trace) > 3
    assert all(x < y for x, y in pairwise(trace))
    total = nets.total(found.permutations, alpha)
    assert trace[-1] == pytest.approx(total, rel=1e-4)
    for home in range(MODELS):
        ways = [nets.symmetry.identity() if i == home else nets.to(home, i, alpha) for i in range(MODELS)]
        assert total > nets.total(ways, alpha)
    assert total > nets.total(chain(nets, alpha), alpha)


def chain(nets: Trained, alpha: float) -> list[Permutation]:
    """Every model matched with the one before it."""
    ways = [nets.symmetry.identity()]
    for i in range(1, MODELS):
        ways.append(ways[-1] @ nets.to(i - 1, i, alpha))
    return ways


@pytest.mark.parametrize("seed", but_slow(range(5)))
def test_the_average_in_common_units_loses_less_than_along_a_chain(seed: int) -> None:
    """At the default alpha; the loss on test images, as the accuracies lie within a few images of each other."""
    nets = trained_on_digits(seed)
    found = find_universe(nets.symmetry, nets.states, nets.correlation, alpha=0.5)
    assert nets.loss(found.permutations) < nets.loss(chain(nets, 0.5))
