"""Networks with heads of their own: one trunk, every head, and each network taken out again."""

import copy
import io
import pickle
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxmerge
from fxmerge import Align, Average, Budget, LeastSquares, Readout, Recipe, Repair, Run
from fxmerge.combine.batch_norm import statistics_nodes
from fxmerge.emit.trunk import flops, learnt
from fxmerge.program.capture import capture_ops, capture_program
from tests.oracle.generator import build, random_recipe
from tests.slow import but_slow, crossed, examples

GENERATOR = torch.Generator().manual_seed(5)
IMAGES = torch.randn(48, 2, 8, 8, generator=GENERATOR)
TOKENS = torch.randint(0, 11, (16, 6), generator=GENERATOR)
ALIGNED, ZIPPED = Recipe(match=Align(), fit=None), Recipe(fit=None)


class Convolutional(nn.Module):
    """A residual stage with BatchNorm, another stage, and a head."""

    def __init__(self, classes: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.down = nn.Sequential(nn.Conv2d(6, 10, 3, 2, 1), nn.BatchNorm2d(10), nn.ReLU(inplace=True))
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(10, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.down(F.relu_(x + self.block(x)))
        out: Tensor = self.head(self.drop(x.mean((2, 3))))
        return out


class Grouped(nn.Module):
    """Grouped convolutions and GroupNorm; the head has a hidden layer."""

    def __init__(self, classes: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.norm = nn.Conv2d(2, 12, 3, padding=1), nn.GroupNorm(3, 12)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.head = nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, classes))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.grouped(self.norm(self.stem(x)).relu()).relu().mean((2, 3)))
        return out


class Attentive(nn.Module):
    """A transformer over tokens, with a norm before its head."""

    def __init__(self, classes: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 8)
        self.body = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.body(self.embed(x))))
        return out


class Tied(nn.Module):
    """A language model whose head is its embedding, or a classifier of the same trunk."""

    def __init__(self, classes: int | None, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.hidden = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11 if classes is None else classes, bias=False)
        if classes is None:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.hidden(self.embed(x)).relu())
        return out


class Recurrent(nn.Module):
    def __init__(self, classes: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.cell, self.head = nn.Embedding(11, 5), nn.LSTM(5, 6, batch_first=True), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.cell(self.embed(x))[0][:, -1])
        return out


NETWORKS = {
    "BatchNorm": (Convolutional, IMAGES),
    "groups": (Grouped, IMAGES),
    "attention": (Attentive, TOKENS),
    "recurrent": (Recurrent, TOKENS),
}


def twin(network: Any, x: Tensor, classes: int) -> tuple[nn.Module, nn.Module]:
    """A network, and one of another head whose trunk is that of the first, its units moved."""
    first, second = network(5).double().eval(), network(classes, seed=1).double().eval()
    own = first.state_dict()
    second.load_state_dict({n: own[n] if own[n].shape == t.shape else t for n, t in second.state_dict().items()})
    symmetry = fxmerge.find_symmetry(second, (x,))
    moved = symmetry.sample_permutation(torch.Generator().manual_seed(3))
    assert any(not (torch.as_tensor(image).diff() == 1).all() for image in moved.images)
    second.load_state_dict(moved.apply(second.state_dict()))
    return first, second


def wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def same(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------ nothing is lost


@pytest.mark.parametrize(("name", "recipe"), crossed(NETWORKS, [ALIGNED, ZIPPED]))
def test_of_one_trunk_in_two_orders_every_head_gives_what_its_network_does(name: str, recipe: Recipe) -> None:
    network, x = NETWORKS[name]
    x = wide(x)
    models = twin(network, x, 7)
    merged = fxmerge.merge(*models, recipe=recipe, example=x)
    outputs = merged(x)
    for number, model in enumerate(models):
        same(outputs[number], model(x))
        alone = fxmerge.head(merged, number)
        same(alone(x), model(x))
        assert list(alone.state_dict()) == list(model.state_dict())
        fresh = network([5, 7][number], seed=9).double().eval()
        fresh.load_state_dict(alone.state_dict())
        same(fresh(x), model(x))


@pytest.mark.parametrize("fit", but_slow([LeastSquares(), Readout()]))
def test_fitting_leaves_what_is_right(fit: Any) -> None:
    models = twin(Grouped, wide(IMAGES), 7)
    merged = fxmerge.merge(*models, [wide(IMAGES)], Recipe(fit=fit))
    for output, model in zip(merged(wide(IMAGES)), models, strict=True):
        same(output, model(wide(IMAGES)), 1e-6)


@pytest.mark.parametrize("share", but_slow(["block", 0.4, "stem", "down", "trunk", 0.99]))
def test_the_cut_may_be_anywhere(share: str | float) -> None:
    x = wide(IMAGES)
    models = twin(Convolutional, x, 5)
    for match in (Align(), fxmerge.Zip()):
        merged = fxmerge.merge(*models, recipe=Recipe(match=match, share=share, fit=None), example=x)
        for number, model in enumerate(models):
            same(merged(x)[number], model(x))
            other = Convolutional(5, seed=9).double().eval()
            other.load_state_dict(fxmerge.head(merged, number).state_dict())
            same(other(x), model(x))


def seeds(count: int) -> list[int]:
    plain = (s for s in range(10**6) if all("batch" not in more for _, _, more in random_recipe(Random(s)).steps))
    return [next(plain) for _ in range(count)]


@pytest.mark.parametrize("seed", examples(seeds, quick=2, count=40))
def test_random_architectures_at_random_cuts(seed: int) -> None:
    net, args = build(random_recipe(Random(seed)))
    net, args = net.double().eval(), tuple(a.double() for a in args)
    assert not statistics_nodes(capture_program(net, args))
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(net)
    symmetry = fxmerge.find_symmetry(net, args).verify(net, args)
    other.load_state_dict(symmetry.sample_permutation(generator).apply(net.state_dict()))
    graph = capture_ops(net, args).graph
    by_parameters = learnt(graph)
    nodes = [n.name for n in graph.nodes if n.op == "call_function" and n in by_parameters and n.all_input_nodes]
    share = Random(seed).choice(nodes)
    for match in (Align(), fxmerge.Zip()):
        try:
            merged = fxmerge.merge(net, other, recipe=Recipe(match=match, share=share, fit=None), example=(args,))
        except fxmerge.ArchitectureMismatchError as error:
            assert "no layer in common" in str(error)  # The cut comes before the first layer.
            return
        with torch.no_grad():
            expected = net(*args)
            for output in merged(*args):
                same(output, expected, 1e-7)


# ------------------------------------------------------------------------------------ what is asked for


def test_outputs_are_a_tuple_or_a_dict_by_names() -> None:
    models = [Grouped(n, seed=n) for n in (3, 4, 5)]
    merged = fxmerge.merge_many(models, recipe=ZIPPED, example=IMAGES)
    assert [o.shape[1] for o in merged(IMAGES)] == [3, 4, 5]
    names = ("x", "y", "z")
    by_name = fxmerge.merge_many(models, recipe=Recipe(fit=None, outputs="dict", names=names), example=IMAGES)
    found = by_name(IMAGES)
    assert list(found) == list(names)
    assert [o.shape[1] for o in found.values()] == [3, 4, 5]
    same(fxmerge.head(by_name, "y")(IMAGES), found["y"], 1e-6)
    same(fxmerge.head(by_name, 1)(IMAGES), found["y"], 1e-6)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_a_budget_finds_the_shortest_trunk_that_is_within_it() -> None:
    def net(seed: int, classes: int) -> nn.Module:
        torch.manual_seed(seed)
        inner = [layer for _ in range(2) for layer in (nn.Linear(6, 6), nn.ReLU())]
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), *inner, nn.Linear(6, classes))

    narrow, sizes = (net(0, 2), net(1, 3)), {}
    for times in (1.2, 1.6, 5.0):
        recipe = Recipe(share=Budget(parameters=times), fit=None)
        merged = fxmerge.merge(*narrow, recipe=recipe, example=torch.randn(2, 4))
        sizes[times] = size(merged) / size(narrow[0])
        assert sizes[times] <= times
    assert sorted(sizes.values()) == list(sizes.values()) and len(set(sizes.values())) == 3
    a, b = Convolutional(3, 0).eval(), Convolutional(4, 1).eval()
    # By operations it is the first convolutions, on large images, that are worth sharing.
    merged = fxmerge.merge(a, b, recipe=Recipe(share=Budget(flops=1.4), fit=None), example=IMAGES)
    work = [flops(capture_ops(m, (IMAGES,)), (IMAGES,), {}) for m in (merged, a)]
    assert sum(work[0].values()) <= 1.4 * sum(work[1].values())
    with pytest.raises(fxmerge.OptionError, match=r"with the longest trunk the result has 1\.\d+ times the parameters"):
        fxmerge.merge(a, b, recipe=Recipe(share=Budget(parameters=1.001), fit=None), example=IMAGES)


@pytest.mark.slow
def test_a_budget_finds_the_longest_trunk_within_a_distance(caplog: pytest.LogCaptureFixture) -> None:
    a, b = Grouped(3, 0), Grouped(4, 1)
    data = [torch.randn(200, 2, 8, 8, generator=torch.Generator().manual_seed(0))]
    found = {}
    for share in ("stem", "grouped", "head.0"):
        report = fxmerge.report(fxmerge.merge(a, b, data, Recipe(share=share)))
        found[share] = report.errors["merged"]
    assert found["stem"] < found["grouped"] < found["head.0"]
    limit = (found["grouped"] + found["stem"]) / 2
    merged = fxmerge.merge(a, b, iter(data), Recipe(share=Budget(distance=limit)))
    assert fxmerge.report(merged).errors["merged"] <= limit
    assert any(n.startswith("heads.0.grouped") for n in merged.state_dict())
    assert not any(n.startswith("heads.0.stem") for n in merged.state_dict())
    with pytest.raises(fxmerge.OptionError, match="measured while layers are fitted"):
        fxmerge.merge(a, b, data, Recipe(share=Budget(distance=0.1), fit=None))


def test_a_budget_that_no_trunk_is_within_says_what_is_nearest() -> None:
    def net(seed: int, classes: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, classes))

    a, b, data = net(0, 2), net(1, 3), [torch.randn(200, 4)]
    both = fxmerge.merge(a, b, data, Recipe(share=Budget(distance=1, parameters=1.6)))
    assert size(both) <= 1.6 * size(a)
    with pytest.raises(fxmerge.OptionError, match="no trunk is within that distance: the nearest ends with"):
        fxmerge.merge(a, b, data, Recipe(share=Budget(distance=1e-9)))


def test_equal_networks_are_merged_all_through_unless_heads_are_asked_for() -> None:
    a, b = Grouped(3, seed=0), Grouped(3, seed=1)
    assert isinstance(fxmerge.merge(a, b, recipe=ZIPPED, example=IMAGES)(IMAGES), Tensor)
    merged = fxmerge.merge(a, b, recipe=Recipe(share="trunk", fit=None), example=IMAGES)
    assert len(merged(IMAGES)) == 2
    assert [n for n, _ in merged.named_parameters() if n.startswith("heads")] == [
        *("heads.0.head.2.weight", "heads.0.head.2.bias", "heads.1.head.2.weight", "heads.1.head.2.bias")
    ]


def test_networks_of_other_names_are_merged_all_through() -> None:
    class Renamed(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            own = Grouped(3, seed)
            self.classify, self.mix, self.scale, self.first = own.head, own.grouped, own.norm, own.stem

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(F.group_norm(self.first(x), 3, self.scale.weight, self.scale.bias))
            out: Tensor = self.classify(F.relu(self.mix(x)).mean((2, 3)))
            return out

    a, b, renamed = Grouped(3, 0), Grouped(3, 1), Renamed(1)
    expected = fxmerge.merge(a, b, recipe=ZIPPED, example=IMAGES)
    found = fxmerge.merge(a, renamed, recipe=ZIPPED, example=IMAGES)
    assert list(found.state_dict()) == list(a.state_dict())
    same(found(IMAGES), expected(IMAGES), 1e-6)


def test_a_tied_weight_stays_tied_where_one_network_has_it_in_its_head() -> None:
    models = twin_of_tied()
    merged = fxmerge.merge(*models, recipe=ALIGNED, example=TOKENS)
    for number, model in enumerate(models):
        same(merged(TOKENS)[number], model(TOKENS))
    language = fxmerge.head(merged, 0)
    assert "heads.0.head.weight" not in merged.state_dict() and "heads.1.head.weight" in merged.state_dict()
    assert language.state_dict(keep_vars=True)["head.weight"] is language.state_dict(keep_vars=True)["embed.weight"]


def twin_of_tied() -> tuple[nn.Module, nn.Module]:
    first, second = Tied(None).double().eval(), Tied(4, seed=1).double().eval()
    own = first.state_dict()
    moved = fxmerge.find_symmetry(first, (TOKENS,)).sample_permutation(torch.Generator().manual_seed(3)).apply(own)
    order = (moved["embed.weight"][0, :, None] == own["embed.weight"][0]).int().argmax(1)
    assert not torch.equal(order, torch.arange(8))
    del moved["head.weight"]
    second.load_state_dict(moved | {"head.weight": second.head.weight[:, order]})  # type: ignore[index, union-attr]
    return first, second


def test_a_head_learns_from_its_own_network_and_on_its_own_data() -> None:
    """Noise in the data of one network changes nothing of what the other's head learns of it."""
    torch.manual_seed(0)
    a, b = Grouped(3, 0), Grouped(4, 1)
    first, second = IMAGES[:24], IMAGES[24:]
    trained = [fxmerge.merge(a, b, loaders=[[first], [data]], recipe=ONE_TRUNK) for data in (second, second * 3)]
    for name, tensor in trained[0].state_dict().items():
        equal = torch.allclose(tensor, trained[1].state_dict()[name], atol=1e-5)
        assert equal == (not name.startswith("heads.1")), name


ONE_TRUNK = Recipe(match=Align(), combine=Average(weights=(1, 0)), fit=Readout())
"""The trunk of the first network, with heads that are fitted."""


def test_the_heads_of_a_network_that_does_not_count_in_the_trunk_learn_too() -> None:
    a, b = Grouped(3, 0), Grouped(4, 1)
    merged = fxmerge.merge(a, b, [IMAGES], ONE_TRUNK)
    same(merged(IMAGES)[0], a(IMAGES), 1e-4)
    start = fxmerge.merge(a, b, [IMAGES], Recipe(match=Align(), combine=Average(weights=(1, 0)), fit=None))
    expected = b(IMAGES)
    missed = [float((m(IMAGES)[1] - expected).square().mean().detach()) for m in (merged, start)]
    assert missed[0] < 0.5 * missed[1]


@pytest.mark.parametrize("fit", but_slow([LeastSquares(), None, Readout(), Repair()]))
def test_every_fit_takes_heads_apart(fit: Any) -> None:
    a, b = Convolutional(3, 0).eval(), Convolutional(4, 1).eval()
    for given in ({"loader": [IMAGES]}, {"loaders": [[IMAGES[:24]], [IMAGES[24:]]]}):
        merged = fxmerge.merge(a, b, recipe=Recipe(fit=fit), **given)  # type: ignore[arg-type]
        assert [o.shape[1] for o in merged(IMAGES)] == [3, 4]
        assert all(torch.isfinite(o).all() for o in merged(IMAGES))
        report = fxmerge.report(merged)
        assert ("merged" in report.errors) == isinstance(fit, LeastSquares | Readout)
        assert "one trunk, with the heads '0', '1'" in str(report)


# ------------------------------------------------------------------------------------ what comes out


@pytest.fixture(scope="module")
def forked() -> tuple[Any, Sequence[nn.Module]]:
    models = [Convolutional(3, 0).eval(), Convolutional(4, 1).eval()]
    return fxmerge.merge(*models, loader=[IMAGES], recipe=Recipe(names=("a", "b"))), models


def test_the_graph_is_sound_and_takes_any_batch(forked: Any) -> None:
    merged, _ = forked
    merged.graph.lint()
    assert [len(o) for o in merged(IMAGES[:5])] == [5, 5]
    exported = torch.export.export(merged, (IMAGES,))
    same(exported.module()(IMAGES), merged(IMAGES), 1e-5)
    again = pickle.loads(pickle.dumps(merged))
    same(again(IMAGES), merged(IMAGES), 0)
    same(copy.deepcopy(merged)(IMAGES), merged(IMAGES), 0)


def test_the_symmetry_of_the_result_is_found_again(forked: Any) -> None:
    merged, _ = forked
    symmetry = fxmerge.find_symmetry(merged, (IMAGES,)).verify(merged, (IMAGES,))
    assert not symmetry.demoted and symmetry.log_order() > 20


def test_a_head_is_a_copy_that_is_trained_and_saved_like_its_network(forked: Any) -> None:
    merged, models = forked
    alone = fxmerge.head(merged, "b")
    buffer = io.BytesIO()
    torch.save(alone.state_dict(), buffer)
    buffer.seek(0)
    models[1].load_state_dict(torch.load(buffer))
    before = merged(IMAGES)[1].detach().clone()
    alone.train()
    assert not torch.equal(alone(IMAGES), alone(IMAGES))  # Dropout.
    alone(IMAGES).sum().backward()
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter.zero_()
    same(merged(IMAGES)[1], before, 0)
    assert not [n for n, _ in alone.named_parameters() if "heads" in n]


def test_a_merge_is_merged_again(forked: Any) -> None:
    merged, _ = forked
    other = fxmerge.merge(Convolutional(3, 2).eval(), Convolutional(4, 3).eval(), [IMAGES], Recipe(names=("a", "b")))
    both = fxmerge.merge(merged, other, [IMAGES])
    assert [o.shape[1] for o in both(IMAGES)] == [3, 4]
    assert list(both.state_dict()) == list(merged.state_dict())


def test_a_small_trunk_is_told(caplog: pytest.LogCaptureFixture) -> None:
    fxmerge.merge(Grouped(3, 0), Grouped(3, 1), recipe=Recipe(share="norm", fit=None), example=IMAGES)
    assert "The networks share at most 31% of their parameters (model A)" in caplog.text  # 252 of 811.
    caplog.clear()
    fxmerge.merge(Grouped(3, 0), Grouped(3, 1), recipe=Recipe(share="trunk", fit=None), example=IMAGES)
    assert "The networks share" not in caplog.text


def test_inputs_are_not_changed() -> None:
    models = [Convolutional(3, 0), Convolutional(4, 1)]
    before = [copy.deepcopy(m.state_dict()) for m in models]
    fxmerge.merge(*models, loader=[IMAGES])
    for model, own in zip(models, before, strict=True):
        assert model.training
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, own[name])


# ------------------------------------------------------------------------------------ fine-tuned from one


def tuned(classes: int, seed: int, batches: int) -> nn.Module:
    """A copy of one backbone that has seen some batches of its own, with a head of its own."""
    model = Convolutional(classes, 0)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for _ in range(batches):
            model(torch.randn(8, 2, 8, 8) * (1 + seed) + seed)
    return model.eval()


def test_without_matching_equal_units_are_averaged_and_statistics_count_by_batches() -> None:
    a, b = tuned(3, 1, 30), tuned(4, 2, 10)
    merged = fxmerge.merge(a, b, recipe=Recipe(match=None), example=IMAGES)
    found, (one, two) = merged.state_dict(), (m.state_dict() for m in (a, b))
    same(found["stem.0.weight"], (one["stem.0.weight"] + two["stem.0.weight"]) / 2, 1e-6)
    mean = 0.75 * one["stem.1.running_mean"] + 0.25 * two["stem.1.running_mean"]
    same(found["stem.1.running_mean"], mean, 1e-6)
    parts = [
        (w, s["stem.1.running_var"] + (s["stem.1.running_mean"] - mean) ** 2) for w, s in ((0.75, one), (0.25, two))
    ]
    same(found["stem.1.running_var"], sum(w * v for w, v in parts), 1e-5)
    for number, own in enumerate((one, two)):
        assert torch.equal(fxmerge.head(merged, number).state_dict()["head.weight"], own["head.weight"])


def test_without_matching_a_fit_is_as_with_it() -> None:
    a, b = tuned(3, 1, 30), tuned(3, 2, 10)
    merged = fxmerge.merge(a, b, [IMAGES], Recipe(match=None))
    assert set(fxmerge.report(merged).layers) == {"stem.0.weight", "block.0.weight", "down.0.weight", "head.weight"}
    plain = fxmerge.merge(a, b, [IMAGES], Recipe(match=None, fit=None))
    expected = (a(IMAGES) + b(IMAGES)) / 2
    errors = [float((m(IMAGES) - expected).square().mean().detach()) for m in (merged, plain)]
    assert errors[0] < 0.5 * errors[1]
    vectors = fxmerge.merge(a, b, base=tuned(3, 0, 1), recipe=Recipe(match=None), example=IMAGES)
    base = tuned(3, 0, 1).state_dict()["stem.0.weight"]
    both = sum(m.state_dict()["stem.0.weight"] - base for m in (a, b))
    same(vectors.state_dict()["stem.0.weight"], base + 0.4 * both, 1e-5)


# ------------------------------------------------------------------------------------ compared


def test_heads_are_compared_with_their_own_networks() -> None:
    torch.manual_seed(0)
    a, b = Grouped(3, 0), Grouped(4, 1)
    first, second = IMAGES[:32], IMAGES[32:]
    merged = fxmerge.merge(a, b, [first])
    names = fxmerge.merge(a, b, [first], Recipe(names=("a", "b"), outputs="dict", fit=None))
    scored: list[Any] = []

    def score(network: nn.Module) -> float:
        scored.append(pytree.tree_leaves(network(second)))
        return float(len(scored))

    table = fxmerge.compare({"merge": merged, "named": names}, [a, b], [second], calibration=[first], score=score)
    assert [row.name for row in table.rows] == [
        *("model A, new readout", "model B, new readout", "ensemble", "plain average", "merge", "named")
    ]
    expected = [a(second).detach(), b(second).detach()]
    same(scored[-1], expected, 1e-6)  # The ensemble comes last: both networks as they are.
    for name, network in (("merge", merged), ("named", names), ("plain average", table.networks["plain average"])):
        found = [o.detach() for o in pytree.tree_leaves(network(second))]
        shares = [(f - e).square().sum() / (e - e.mean(0)).square().sum() for f, e in zip(found, expected, strict=True)]
        assert table[name].distance == pytest.approx(float(sum(shares)) / 2, rel=1e-4)
    control = table.networks["model A, new readout"]
    same(control(second)[0], expected[0], 1e-2)
    trunk = {n: t for n, t in control.state_dict().items() if not n.startswith("heads")}
    assert all(torch.equal(t, a.state_dict()[n]) for n, t in trunk.items())


def test_networks_that_are_equal_in_shape_are_compared_by_their_heads_if_asked() -> None:
    a, b = Grouped(3, 0), Grouped(3, 1)
    merged = fxmerge.merge(a, b, [IMAGES], Recipe(share="trunk"))
    table = fxmerge.compare({"merge": merged}, [a, b], [IMAGES], share="trunk")
    assert [row.name for row in table.rows] == ["ensemble", "plain average", "merge"]
    with pytest.raises(fxmerge.ArchitectureMismatchError, match="gives outputs of shapes"):
        fxmerge.compare({"merge": merged}, [a, b], [IMAGES])


# ------------------------------------------------------------------------------------ kinds of networks


class Made(nn.Module):
    """A trunk of two layers, and what a test makes of their output."""

    def __init__(self, then: Any, seed: int = 0, between: Any = None, **own: nn.Module | nn.Parameter) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 5)
        self.then, self.between = then, between or (lambda y: y)
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.then(self, self.b(self.between(self.a(x).tanh())).tanh())


ROWS = torch.randn(8, 4, generator=GENERATOR).double()


@torch.no_grad()
def both_are_given_back(a: nn.Module, b: nn.Module, recipe: Recipe = ALIGNED, x: Tensor = ROWS) -> Any:
    """The trunks are equal: nothing is lost, by the whole and by each head alone."""
    a, b = a.double().eval(), b.double().eval()
    merged = fxmerge.merge(a, b, recipe=recipe, example=x)
    for number, model in enumerate((a, b)):
        same(merged(x)[number], model(x))
        alone = fxmerge.head(merged, number)
        same(alone(x), model(x))
        assert list(alone.state_dict()) == list(model.state_dict())
        again = copy.deepcopy(model)
        again.load_state_dict(alone.state_dict())
        same(again(x), model(x))
    return merged


def layer(classes: int, seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(5, classes)


@pytest.mark.parametrize("share", but_slow(["trunk", "auto"]))
def test_what_is_computed_of_a_heads_weights_alone_is_of_the_head(share: str) -> None:
    """It has the same ops and shapes in both networks, and no input reaches it."""

    def normalized(net: Any, f: Tensor) -> Tensor:
        return F.linear(F.normalize(f), F.normalize(net.w)) * net.temperature.exp()

    def own(classes: int) -> dict[str, Any]:
        torch.manual_seed(classes)
        return {"w": nn.Parameter(torch.randn(classes, 5)), "temperature": nn.Parameter(torch.randn(()))}

    def transposed(net: Any, f: Tensor) -> Any:
        return f @ net.w.t() * net.temperature

    for then in (normalized, transposed):
        one, other = Made(then, **own(3)), Made(then, **own(4 if share == "auto" else 3))
        with torch.no_grad():
            other.temperature += 1  # type: ignore[operator]
        merged = both_are_given_back(one, other, Recipe(match=Align(), share=share, fit=None))
        assert {"heads.0.w", "heads.1.temperature"} <= set(merged.state_dict())
    parametrized = torch.nn.utils.parametrizations.weight_norm
    heads = [Made(lambda net, f: net.h(f), h=parametrized(layer(3, seed))) for seed in (1, 2)]
    both_are_given_back(*heads, Recipe(match=Align(), share="trunk", fit=None))


def test_a_tied_weight_of_the_first_network_is_found_under_its_name_in_the_others() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.e, self.h = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.h.weight = self.e.weight

        def forward(self, t: Tensor) -> Tensor:
            out: Tensor = self.h(self.e(t).tanh())
            return out

    class Tagger(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.e, self.h = nn.Embedding(11, 8), nn.Linear(8, classes)

        def forward(self, t: Tensor) -> Tensor:
            out: Tensor = self.h(self.e(t).tanh())
            return out

    for classes in (3, 15):
        merged = both_are_given_back(Language(), Tagger(classes), x=TOKENS)
        assert not dict(merged.named_buffers())
        alone = fxmerge.head(merged, 1)
        alone(TOKENS).sum().backward()
        assert all(p.grad is not None for p in alone.parameters())
        both_are_given_back(Tagger(classes), Language(), x=TOKENS)


def written(y: Tensor) -> Tensor:
    y[:3] += 1.0
    return y


def through_a_view(y: Tensor) -> Tensor:
    v = y[:3]
    v.add_(1.0)
    return y


def through_views(y: Tensor) -> Tensor:
    y.view(-1, 2).mul_(2.0)
    y.chunk(2, 1)[0].mul_(3.0)
    return y


@pytest.mark.parametrize("write", but_slow([through_views, written, through_a_view]))
def test_writes_in_place_through_views_are_kept(write: Any) -> None:
    heads = [Made(lambda net, f: net.h(f), between=write, h=layer(n, n)) for n in (3, 4)]
    both_are_given_back(*heads)
    for share in ("b", "trunk"):
        equal = [Made(lambda net, f: net.h(f), between=write, h=layer(3, n)) for n in (3, 4)]
        both_are_given_back(*equal, Recipe(match=Align(), share=share, fit=None))
    both_are_given_back(*(Made(lambda net, f: net.h(write(f)), h=layer(n, n)) for n in (3, 4)))
    mixed = Made(lambda net, f: net.h(f), h=layer(3, 1)), Made(lambda net, f: net.h(write(f)), h=layer(4, 2))
    both_are_given_back(*mixed)


def test_numbers_in_buffers_that_differ_are_not_shared() -> None:
    class Ordered(Made):
        def __init__(self, order: list[int], classes: int) -> None:
            super().__init__(lambda net, f: net.h(f[:, net.order]), h=layer(classes, classes))
            self.register_buffer("order", torch.tensor(order))

    both_are_given_back(Ordered([0, 1, 2, 3, 4], 3), Ordered([4, 3, 2, 1, 0], 4))
    merged = both_are_given_back(Ordered([0, 2, 1, 3, 4], 3), Ordered([0, 2, 1, 3, 4], 4))
    assert "order" in merged.state_dict()


def test_networks_of_equal_shapes_and_other_functions_keep_heads_of_their_own() -> None:
    h = layer(3, 1)
    two = both_are_given_back(
        Made(lambda net, f: net.h(f), h=h), Made(lambda net, f: (net.h(f), net.h(f).exp()), h=copy.deepcopy(h))
    )
    assert len(two(ROWS)[1]) == 2
    both_are_given_back(Made(lambda net, f: net.h(f), h=h), Made(lambda net, f: net.h(f).sigmoid(), h=copy.deepcopy(h)))


def test_without_matching_layers_of_one_name_belong_together() -> None:
    class Branches(nn.Module):
        def __init__(self, first: int, second: int) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.l1, self.l2 = nn.Linear(4, 5), nn.Linear(4, 5)
            self.h1, self.h2 = nn.Linear(5, first), nn.Linear(5, second)

        def forward(self, x: Tensor) -> Any:
            return self.h1(self.l1(x).relu()), self.h2(self.l2(x).relu())

    both_are_given_back(Branches(3, 4), Branches(4, 5), Recipe(match=None))


def test_statistics_of_a_head_are_of_its_own_data() -> None:
    def head(classes: int) -> dict[str, nn.Module]:
        return {"n": nn.BatchNorm1d(5), "h": layer(classes, classes)}

    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(400, 4, generator=generator), torch.randn(400, 4, generator=generator) * 3 + 1]
    models = [Made(lambda net, f: net.h(net.n(f)), **head(3 + number)) for number in range(2)]
    with torch.no_grad():
        for model, own in zip(models, x, strict=True):
            model.n.momentum = None  # type: ignore[assignment, union-attr]
            model.train()(own)
            model.eval()
    for fit in (None, LeastSquares(), Readout()):
        merged = fxmerge.merge(*models, loaders=[[x[0]], [x[1]]], recipe=Recipe(match=Align(), fit=fit, share="b"))
        for number, (model, own) in enumerate(zip(models, x, strict=True)):
            same(merged(own)[number], model(own), 1e-2)


def test_the_report_outlives_pickling_and_what_does_not_is_told(forked: Any) -> None:
    merged, _ = forked
    again = pickle.loads(pickle.dumps(merged))
    assert fxmerge.report(again) == fxmerge.report(merged)
    with pytest.raises(fxmerge.OptionError, match="take its heads out before it is pickled"):
        fxmerge.head(again, "b")


# ------------------------------------------------------------------------------------ what is refused


def test_networks_that_have_nothing_in_common_are_refused() -> None:
    with pytest.raises(fxmerge.ArchitectureMismatchError, match="What they have in common cannot be merged either"):
        fxmerge.merge(nn.Linear(8, 3), nn.Linear(8, 4), [torch.randn(4, 8)])
    with pytest.raises(fxmerge.ArchitectureMismatchError, match="'linear' with 'weight' of shape"):
        fxmerge.merge(nn.Linear(8, 3), nn.Linear(8, 4), [torch.randn(4, 8)], Recipe(share="trunk"))


def test_what_does_not_go_with_heads_is_refused() -> None:
    a, b, c = Grouped(3, 0), Grouped(4, 1), Grouped(3, 2)
    with pytest.raises(fxmerge.OptionError, match="With a base, networks have no heads of their own"):
        fxmerge.merge(a, c, base=Grouped(3, 3), recipe=Recipe(share="trunk"), example=IMAGES)
    with pytest.raises(fxmerge.OptionError, match="targets is 'standardized'"):
        fxmerge.merge(a, b, [IMAGES], Recipe(targets="standardized"))
    with pytest.raises(fxmerge.OptionError, match="names has 3 names for 2 models"):
        fxmerge.merge(a, b, [IMAGES], Recipe(names=("a", "b", "c")))
    with pytest.raises(fxmerge.OptionError, match="names is given, but the networks are equal all through"):
        fxmerge.merge(a, c, [IMAGES], Recipe(names=("a", "b")))
    for names in (("train", "b"), ("a.b", "c"), ("a", "a"), ('"', "a"), ("forward", "a")):
        with pytest.raises(fxmerge.OptionError, match=r"Recipe\.names is .* one name for each network"):
            Recipe(names=names)
    with pytest.raises(fxmerge.OptionError, match="'nowhere', which is no module or node"):
        fxmerge.merge(a, b, [IMAGES], Recipe(share="nowhere"))


def test_a_head_that_is_none_is_told_with_those_that_are(forked: Any) -> None:
    with pytest.raises(fxmerge.OptionError, match="There is no head 'c'; there are 'a', 'b'"):
        fxmerge.head(forked[0], "c")
    whole = fxmerge.merge(Grouped(3, 0), Grouped(3, 1), recipe=ZIPPED, example=IMAGES)
    with pytest.raises(fxmerge.OptionError, match="has one head: the models were merged all through"):
        fxmerge.head(whole, 0)


@pytest.mark.slow
def test_runs_do_not_change_the_result() -> None:
    a, b = Grouped(3, 0), Grouped(4, 1)
    one, two = (fxmerge.merge(a, b, [IMAGES], run=Run(memory=m)) for m in (2.0, 1e-5))
    same([*one.state_dict().values()], [*two.state_dict().values()], 1e-6)


def test_data_of_any_strides() -> None:
    data = torch.randn(20, 1, 8, 8)

    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))

    merged = fxmerge.merge(network(), network(), [data[::2], data.transpose(2, 3)], Recipe(share="trunk"))
    torch.testing.assert_close(merged(data[::2])[0], merged(data[::2].contiguous())[0])
