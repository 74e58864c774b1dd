"""What all models share: it is neither moved, nor zipped, nor refitted."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxmerge
from fxmerge.program.capture import capture_program
from fxmerge.shared import EQUAL, equal_names, without_shared
from fxmerge.symmetry.flow import flows
from fxmerge.symmetry.group import analyse
from tests.slow import crossed

MATCH: dict[str, fxmerge.Align | fxmerge.Zip] = {"align": fxmerge.Align(), "zip": fxmerge.Zip()}


class Adapted(nn.Module):
    """A frozen convolutional base with BatchNorm and attention; each model trained adapters and a head of its own."""

    def __init__(self, seed: int, *, own: tuple[str, ...] = ("down", "up", "head")) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.down, self.up, self.head = nn.Linear(8, 3), nn.Linear(3, 8), nn.Linear(8, 2)
        for p in self.parameters():
            nn.init.normal_(p, std=0.4)
        self.norm.running_mean.normal_()  # type: ignore[union-attr]
        self.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        torch.manual_seed(seed)
        for name in own:
            for p in getattr(self, name).parameters():
                nn.init.normal_(p, std=0.4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.stem(x))).transpose(1, 2)
        h = h + self.mix(h, h, h, need_weights=False)[0]
        h = h + self.up(torch.relu(self.down(h)))
        out: Tensor = self.head(h.mean(1))
        return out


BASE = ("stem", "norm", "mix")


def batches() -> list[Tensor]:
    torch.manual_seed(5)
    return [torch.randn(32, 3, 5) for _ in range(2)]


@pytest.mark.parametrize(
    ("recipe", "count"),
    crossed(
        [
            fxmerge.Recipe(),
            fxmerge.Recipe(match=fxmerge.Align()),
            fxmerge.Recipe(fit=None),
            fxmerge.Recipe(fit=fxmerge.Repair()),
        ],
        [2, 3],
    ),
)
def test_a_frozen_base_under_adapters_stays_bit_for_bit(recipe: fxmerge.Recipe, count: int) -> None:
    models = [Adapted(seed) for seed in range(1, count + 1)]
    merged = fxmerge.merge_many(models, batches(), recipe)
    state, base = merged.state_dict(), models[0].state_dict()
    frozen = {name for name in base if name.split(".")[0] in BASE}
    for name in frozen:
        assert torch.equal(state[name], base[name]), name
    told = fxmerge.report(merged)
    assert set(told.shared) == frozen
    assert not torch.equal(state["down.weight"], base["down.weight"])
    if recipe.fit is not None:
        assert set(told.layers) <= {"down.weight", "up.weight", "head.weight"} and told.layers
        assert EQUAL in told.left["stem.weight"] and EQUAL in told.left["mix.in_proj_weight"]
    assert {"stem.weight[0]", "down.weight[0]"} <= set(told.images[1])


def test_statistics_behind_layers_that_differ_are_estimated_again() -> None:
    models = [Adapted(seed, own=("stem", "head")) for seed in (1, 2)]
    merged = fxmerge.merge(*models, batches(), recipe=fxmerge.Recipe(fit=None)).state_dict()
    assert not torch.equal(merged["norm.running_mean"], models[0].state_dict()["norm.running_mean"])


@pytest.mark.parametrize("loader", [batches(), None], ids=["data", "no data"])
def test_equal_models_are_merged_to_themselves_bit_for_bit(loader: list[Tensor] | None) -> None:
    merged = fxmerge.merge(
        Adapted(1), Adapted(1), loader, recipe=fxmerge.Recipe(combine=fxmerge.Average((0.3, 0.7))), example=batches()[0]
    )
    for name, value in Adapted(1).state_dict().items():
        assert torch.equal(merged.state_dict()[name], value), name


@pytest.mark.slow
def test_adapters_of_models_with_one_base_are_aligned() -> None:
    a, b = Adapted(1), Adapted(1)
    order = torch.tensor([2, 0, 1])
    b.down.weight.data, b.down.bias.data = a.down.weight.data[order], a.down.bias.data[order]
    b.up.weight.data = a.up.weight.data[:, order]
    aligned = fxmerge.align(b, to=a, loader=batches())
    for name, value in a.state_dict().items():
        assert torch.equal(aligned.state_dict()[name], value), name
    (images,) = fxmerge.report(aligned).images
    assert images["down.weight[0]"] == order.tolist()
    symmetry = fxmerge.find_symmetry(a, (batches()[0],))
    assert symmetry.element(images).apply(b.state_dict())["up.weight"].equal(a.up.weight)


class Tables(nn.Module):
    """A fixed table of positions is added to trained embeddings: it must move with their units."""

    def __init__(self, seed: int, positions: int = 40) -> None:
        super().__init__()
        torch.manual_seed(seed)
        angles = torch.arange(positions)[:, None] / 10 ** (torch.arange(4) / 2)
        self.register_buffer("table", torch.cat([angles.sin(), angles.cos()], 1))
        self.tokens, self.mlp = nn.Embedding(12, 8), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.out = nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.table[: ids.shape[1]]  # type: ignore[index]
        out: Tensor = self.out(functional.layer_norm(h + self.mlp(h), (8,)))
        return out


@pytest.mark.slow
def test_a_fixed_table_added_to_trained_embeddings_moves_with_their_units() -> None:
    ids = torch.arange(48).reshape(4, 12) % 12
    a, twin = Tables(0, positions=12), Tables(1, positions=12)
    symmetry = fxmerge.find_symmetry(a, (ids,))
    twin.load_state_dict(symmetry.sample_permutation(torch.Generator().manual_seed(0)).apply(a.state_dict()))
    aligned = fxmerge.align(twin, to=a, loader=[ids])
    for name, value in a.state_dict().items():
        assert torch.equal(aligned.state_dict()[name], value), name
    # Of models that were trained apart the table is the same, and has more entries than the embeddings.
    found, whole = analyse(capture_program(Tables(0), (ids,)))
    smaller, still = without_shared(whole, flows(found), [Tables(0).state_dict(), Tables(1).state_dict()])
    assert not still and len(smaller.units) == len(whole.units)


class Fourier(nn.Module):
    """Random features, the same in all models."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("frequencies", torch.randn(2, 8))
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(torch.cos(x @ self.frequencies))
        return out


@pytest.mark.parametrize(("match", "exported"), crossed(MATCH.values(), [False, True]))
def test_constant_buffers_stay(match: fxmerge.Align | fxmerge.Zip, exported: bool) -> None:
    x = torch.randn(64, 2)
    models: list[Any] = [Fourier(1), Fourier(2)]
    given = [torch.export.export(m, (x,)) for m in models] if exported else models
    merged = fxmerge.merge(*given, [x], fxmerge.Recipe(match=match))
    assert torch.equal(merged.state_dict()["frequencies"], models[0].frequencies)
    assert fxmerge.report(merged).shared == ("frequencies",)


def test_what_is_uniform_says_nothing() -> None:
    """Fresh networks share gains of one and biases of zero; their units are their own."""

    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        m = nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 1))
        nn.init.zeros_(m[0].bias)  # type: ignore[arg-type]
        return m

    x = torch.randn(4, 2)
    found, whole = analyse(capture_program(net(0), (x,)))
    states = [net(0).state_dict(), net(1).state_dict()]
    assert {"0.bias", "1.weight", "1.bias"} == equal_names(states)
    assert without_shared(whole, flows(found), states) == (whole, frozenset())


def test_classes_that_are_nested_in_each_other_stay_together() -> None:
    x = batches()[0]
    found, whole = analyse(capture_program(Adapted(0), (x,)))
    states = [Adapted(1).state_dict(), Adapted(2).state_dict()]
    smaller, still = without_shared(whole, flows(found), states)
    assert smaller.names == ("down.weight[0]",) and {"down.weight[0]", *still} == set(whole.names)
    assert smaller.verify(Adapted(0), (x,)).demoted == ()


@pytest.mark.parametrize("rule", [fxmerge.TaskArithmetic(), fxmerge.Ties()], ids=str)
def test_task_vectors_leave_what_was_not_fine_tuned(rule: Any) -> None:
    models = [Adapted(seed) for seed in (1, 2)]
    merged = fxmerge.merge(*models, batches(), base=Adapted(3), recipe=fxmerge.Recipe(combine=rule))
    for name, value in models[0].state_dict().items():
        if name.split(".")[0] in BASE:
            assert torch.equal(merged.state_dict()[name], value), name


def test_an_alpha_may_name_a_class_that_stays(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fxmerge.merge(
            Adapted(1),
            Adapted(2),
            batches(),
            recipe=fxmerge.Recipe(match=fxmerge.Zip(alpha={"stem.weight[0]": 0.2}), fit=None),
        )
    assert not caplog.records
