"""Graphs with another number of units: what they compute, where they are refused, and folds of planted duplicates."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxmerge
from fxmerge.matching.room import alike, halves
from fxmerge.program.capture import capture_program
from fxmerge.program.captured import Program
from fxmerge.sizing import failing
from fxmerge.symmetry.flow import Flow, flows
from fxmerge.symmetry.group import analyse
from tests.networks import Attentive, Convolutional, mlp, pictures, vectors
from tests.oracle.architectures import CASES
from tests.oracle.generator import build, random_recipe
from tests.slow import but_slow


def double(args: Any) -> Any:
    return pytree.tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, args)


def error(expected: Any, got: Any) -> float:
    """The largest difference of two lists of outputs, as a share of the largest value of each."""
    found = [0.0]
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True):
        if a.is_floating_point():
            a, b = a.detach(), b.detach()
            found.append(float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)))
    return max(found)


def check(model: nn.Module, args: Any, width: float | dict[str, float] = 0.5) -> dict[str, tuple[int, int]]:
    """A fold of a model in which units are equal computes what it does. Returns the widths of a fold, by half."""
    model, args = model.double().eval(), double(args)
    example: dict[str, Any] = {"example": args, "inputs": lambda given: (given, {})}
    widths = dict(fxmerge.report(fxmerge.fold(model, width=width, **example)).widths)
    program = capture_program(model, args)
    found, symmetry = analyse(program)
    consumed = frozenset(axis for axis, kind in flows(found).items() if kind is Flow.CONSUMES)
    changed = {n for n in symmetry.choices if symmetry.names[n] in widths}
    outer = [n for n in changed if symmetry.ancestors(n).isdisjoint(changed)]
    units = alike(symmetry, halves(symmetry, outer), consumed)
    state = units.spread(units.apply(positive(program)))
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.copy_(state[name])
    if widths:
        fewer = {
            symmetry.names[n]: units.widths[n] / symmetry.units[n].size
            for n in units.resized & set(symmetry.choices)
            if symmetry.ancestors(n).isdisjoint(changed)
        }
        folded = fxmerge.fold(model, width=fewer, **example)
        assert set(fxmerge.report(folded).widths) >= set(fewer)
        assert error(model(*args), folded(*args)) < 1e-9
    return widths


def positive(program: Program) -> dict[str, Tensor]:
    """Parameters none of which is negative, as variances must not be."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.rand(t.shape, generator=generator, dtype=t.dtype) / 2 + 0.5 if t.is_floating_point() else t
        for name, t in program.aten.state.items()
    }
    return state | {name: state[first] for name, first in program.aliases.items()}


UNUSUAL = {"units written between constants", "a convolution padded more at one end"}
"""Architectures that cannot be brought to float64, or of which torch warns."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CASES) - UNUSUAL))
def test_equal_units_of_an_architecture_are_one(name: str) -> None:
    check(*CASES[name]())


@pytest.mark.parametrize("seed", but_slow(range(1000, 1016), 4))
def test_equal_units_of_a_random_architecture_are_one(seed: int) -> None:
    check(*build(random_recipe(Random(seed))))


HALVED = [
    *("conv, BatchNorm, flatten", "grouped queries", "DenseNet", "inverted residual, squeeze-excite", "ViT", "VGG"),
    *("residual CNN, projection shortcut", "U-Net", "ConvNeXt block", "SwiGLU, packed", "MLP-Mixer", "LSTM", "GRU"),
]


@pytest.mark.parametrize("name", but_slow(HALVED, 2))
def test_these_can_be_halved(name: str) -> None:
    """The tests above do not pass for want of anything to resize."""
    assert check(*CASES[name]())


@pytest.mark.parametrize(
    ("holds", "blamed"),
    [
        (lambda some: True, []),
        (lambda some: 2 not in some, [2]),
        (lambda some: not {0, 3} <= set(some), [0, 1, 2, 3]),  # Only together.
        (lambda some: 1 not in some and not {0, 3} <= set(some), [1, 0, 2, 3]),
    ],
)
def test_classes_that_fail_alone_or_together_are_found(holds: Any, blamed: list[int]) -> None:
    assert failing(None, [0, 1, 2, 3], holds) == blamed  # type: ignore[arg-type]


BLOCKS = {
    "ViT": ("blocks of *", (2, 1)),
    "GroupNorm": ("blocks of *", (3, 2)),
    "grouped queries": ("blocks of *", (4, 2)),
    "grouped queries, native": ("blocks of *", (4, 2)),
    "rotary attention": ("blocks of *", (2, 1)),
    "shifted windows": ("table*", (2, 1)),
    "cross-covariance attention": ("temperature*", (2, 1)),
    "maxout": ("2.*", (3, 2)),
}


@pytest.mark.parametrize("name", but_slow(BLOCKS))
def test_equal_blocks_are_one(name: str) -> None:
    """Heads with their queries, keys and values, and groups with their channels."""
    pattern, width = BLOCKS[name]
    widths = check(*CASES[name](), {pattern: 0.5})
    assert width in widths.values()


def test_blocks_keep_their_number_unless_they_are_named() -> None:
    model, args = CASES["ViT"]()
    recipe = fxmerge.Recipe(match=fxmerge.Zip(continuous=False))
    small = fxmerge.fold(model, None, 0.5, recipe, example=args, inputs=lambda given: (given, {}))
    assert set(fxmerge.report(small).widths) == {"token[2]", "mlp.1.weight[0]"}


def test_blocks_or_what_lies_in_them() -> None:
    """Groups, if they are named alone; else channels, of which there may be fewer in every group."""
    model, args = CASES["GroupNorm"]()
    example: dict[str, Any] = {"example": args, "inputs": lambda given: (given, {})}

    def widths(width: dict[str, float]) -> dict[str, tuple[int, int]]:
        return dict(fxmerge.report(fxmerge.fold(model, width=width, **example)).widths)

    first = "blocks of 0.weight[0]", "0.weight[0]"
    assert widths({first[0]: 0.5}) == {first[0]: (3, 2), first[1]: (6, 4)}
    assert widths({first[1]: 0.5}) == widths({"*0.weight[0]": 0.5}) == {first[1]: (6, 3)}
    with pytest.raises(fxmerge.OptionError, match=r"are blocks, and '0\.weight\[0\]', which lies in them"):
        widths({first[1]: 0.5, first[0]: 0.5})
    assert set(widths({first[0]: 0.5, "*": 0.5})) >= set(first)
    with pytest.raises(fxmerge.OptionError, match=r"cannot have more units\. Leave it out"):
        widths({first[0]: 1.5})


class Grouped(nn.Module):
    """Convolutions with GroupNorm, then attention with two heads."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers = (
            nn.Conv2d(3, 6, 3),
            nn.GroupNorm(3, 6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3),
            nn.GroupNorm(2, 4),
            nn.Flatten(2),
        )
        self.layers, self.qkv = nn.Sequential(*layers), nn.Linear(4, 12)
        self.out, self.head = nn.Linear(4, 5), nn.Linear(5, classes)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.layers(x).mT).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4).unbind()
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.out(y).relu().mean(1))  # type: ignore[no-any-return]


def test_more_blocks() -> None:
    """Of full width, no group and no head is merged with another, and nothing is lost."""
    a, b, x = Grouped(2), Grouped(3), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    wide = fxmerge.merge(a, b, recipe=fxmerge.Recipe(match=fxmerge.Zip(width=2.0)), example=x)
    widths = fxmerge.report(wide).widths
    assert widths["blocks of layers.0.weight[0]"] == (3, 6)
    assert widths["blocks of layers.3.weight[0]"] == widths["blocks of qkv.weight[0]"] == (2, 4)
    assert error((a(x), b(x)), wide(x)) < 1e-9
    match = fxmerge.Zip(width={"blocks of qkv*": 1.5})
    some = fxmerge.merge(a, b, [x], fxmerge.Recipe(match=match))
    assert fxmerge.report(some).widths["blocks of qkv.weight[0]"] == (2, 3)
    assert [y.shape[1] for y in some(x[:3])] == [2, 3]


FIXED = {
    "places of channels": "looks at units by their places",
    "residual CNN, padded shortcut": "adds to a dimension along which units lie",
}


@pytest.mark.parametrize(("name", "reason"), FIXED.items())
def test_what_cannot_be_resized_is_named(name: str, reason: str) -> None:
    model, args = CASES[name]()
    example: dict[str, Any] = {"example": args, "inputs": lambda given: (given, {})}
    with pytest.raises(fxmerge.OptionError, match=reason):
        fxmerge.fold(model, width={"*": 0.5}, **example)


@pytest.mark.parametrize("name", but_slow(FIXED))
def test_what_cannot_be_resized_keeps_its_width_under_one_number_for_all(name: str) -> None:
    model, args = CASES[name]()
    example: dict[str, Any] = {"example": args, "inputs": lambda given: (given, {})}
    assert len(fxmerge.report(fxmerge.fold(model, width=0.5, **example)).widths) < len(find_classes(model, args))


def test_streams_that_one_parameter_reads_by_rows_get_smaller_together() -> None:
    """Queries, keys and values of one packed weight may read one stream each; all of its rows are of one length."""
    model, args = CASES["attention, three streams of one width"]()
    example: dict[str, Any] = {"example": args, "inputs": lambda given: (given, {})}
    streams = dict.fromkeys(("query.weight[0]", "key.weight[0]", "value.weight[0]"), 0.5)
    for continuous in (True, False):
        recipe = fxmerge.Recipe(match=fxmerge.Zip(continuous=continuous))
        widths = fxmerge.report(fxmerge.fold(model, None, streams, recipe, **example)).widths
        assert widths == dict.fromkeys(streams, (6, 3))
    del streams["key.weight[0]"]
    with pytest.raises(fxmerge.OptionError, match=r"rows of several lengths along axis 1: all must lose as many units"):
        fxmerge.fold(model, width=streams, **example)


class Recurrence(nn.Module):
    """A recurrent layer, read at all steps or as it ends."""

    def __init__(self, layer: nn.RNNBase, ends: bool) -> None:
        super().__init__()
        self.embed, self.layer, self.ends = nn.Linear(3, 6), layer, ends
        size, directions = layer.proj_size or layer.hidden_size, 1 + layer.bidirectional
        self.head = nn.Linear(size * directions, 2)

    def forward(self, x: Tensor) -> Tensor:
        steps, state = self.layer(self.embed(x))
        if not self.ends:
            return self.head(steps)  # type: ignore[no-any-return]
        final = state[0] if isinstance(state, tuple) else state
        return self.head(torch.cat(list(final[-(1 + self.layer.bidirectional) :]), -1))  # type: ignore[no-any-return]


class Written(nn.Module):
    """Cells, called step by step on zeros of a written size, at last scaled by what nothing is known of."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTMCell(3, 6), nn.GRUCell(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 6), torch.zeros(1, 6, dtype=x.dtype).expand(len(x), 6)
        seen = x.new_zeros(len(x), 6).neg() + 1
        for step in x.unbind(1):
            state = self.lstm(step, state)
            seen = self.gru(state[0], seen)
        return self.head(seen)  # type: ignore[no-any-return]


RECURRENCES: dict[str, Callable[[], nn.Module]] = {
    "cells": Written,
    "LSTM": lambda: Recurrence(nn.LSTM(6, 4, batch_first=True), False),
    "LSTM, stacked, both ways, projected": lambda: Recurrence(
        nn.LSTM(6, 8, num_layers=2, bidirectional=True, proj_size=4), True
    ),
    "LSTM, stacked, without biases": lambda: Recurrence(nn.LSTM(6, 4, num_layers=2, bias=False), True),
    "GRU, stacked, both ways": lambda: Recurrence(nn.GRU(6, 4, num_layers=2, bidirectional=True), True),
    "GRU without biases": lambda: Recurrence(nn.GRU(6, 4, batch_first=True, bias=False), False),
    "RNN, both ways, without biases": lambda: Recurrence(nn.RNN(6, 4, bidirectional=True, bias=False), True),
}


@pytest.mark.parametrize("name", but_slow(RECURRENCES, 1))
def test_units_of_recurrent_layers(name: str) -> None:
    """They are halved, and doubled in a merge of two networks, of which nothing is lost then."""
    torch.manual_seed(0)
    a, b = (RECURRENCES[name]().double().eval() for _ in range(2))
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    widths = check(copy.deepcopy(a), (x,))
    assert all(2 * after == before for before, after in widths.values())
    assert any("weight_ih" in axis for axis in widths)
    recipe = fxmerge.Recipe(match=fxmerge.Zip(width=2.0))
    for data in (None, [x]):
        both = fxmerge.merge(a, b, data, recipe, example=x)
        assert error((a(x) + b(x)) / 2, both(x)) < 1e-9
        assert {after // before for before, after in fxmerge.report(both).widths.values()} == {2}
    assert error(both(x), pickle.loads(pickle.dumps(both))(x)) == 0.0


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_layers_of_one_recurrence_have_one_size(kind: type[nn.RNNBase]) -> None:
    """torch takes an LSTM whose layers differ in size, and computes something else."""
    model, x = Recurrence(kind(6, 8, num_layers=3, batch_first=True), False), torch.randn(5, 4, 3)
    widths = {name: 0.75 if "l1" in name else 0.5 for name in find_classes(model, (x,)) if "ih_l" in name}
    assert len(widths) == 3
    for own in (widths, dict(list(widths.items())[:1])):
        with pytest.raises(fxmerge.OptionError, match="all must have as many"):
            fxmerge.fold(model, width=own, example=x)


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True])
def test_a_budget_leaves_layers_that_need_one_size(both: bool) -> None:
    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Recurrence(nn.LSTM(6, 8, num_layers=1 if both else 2, batch_first=True, bidirectional=both), False)

    data, budget = [torch.randn(16, 4, 3)], fxmerge.Budget(parameters=0.95)
    for made in (
        fxmerge.fold(network(0), data, budget),
        fxmerge.merge(network(0), network(1), data, fxmerge.Recipe(match=fxmerge.Zip(width=budget))),
    ):
        widths = fxmerge.report(made).widths
        assert widths and not any("layer." in name for name in widths)


@pytest.mark.slow
def test_long_ways_to_a_constant_have_a_size() -> None:
    class Filtered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            seen = x.new_zeros(len(x), 8)
            for _ in range(400):
                x, seen = x * 0.99 + 0.01, seen * 0.99 + 0.01
            out: Tensor = self.last(self.first(x).relu() + seen)
            return out

    folded = fxmerge.fold(Filtered(), width=0.5, example=torch.randn(5, 4))
    assert list(fxmerge.report(folded).widths.values()) == [(8, 4)]


class Constants(nn.Module):
    """Units beside a value of a written size, which something else reads too."""

    def __init__(self, read: Callable[[nn.Linear, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last, self.read = nn.Linear(4, 6), nn.Linear(6, 2), read

    def forward(self, x: Tensor) -> Any:
        ones = x.new_ones(len(x), 6)
        return self.read(self.last, (self.first(x) + ones).relu(), ones)


@pytest.mark.parametrize(
    "read",
    [
        lambda last, units, ones: (last(units), ones),
        lambda last, units, ones: last(units) * ones.sum(-1, keepdim=True),
        lambda last, units, ones: last(nn.functional.batch_norm(units, ones[0] * 0, ones[0])),
    ],
    ids=["given out", "summed", "statistics"],
)
@pytest.mark.parametrize("verify", [True, False])
def test_what_reads_a_constant_as_it_is_keeps_its_size(read: Any, verify: bool) -> None:
    x, run = torch.randn(5, 4), fxmerge.Run(verify=verify)
    model = Constants(read).eval()
    folded = fxmerge.fold(model, width=0.5, example=x, run=run)
    assert fxmerge.report(folded).widths == {}
    assert error(model(x), folded(x)) < 1e-6


def find_classes(model: nn.Module, args: Any) -> tuple[str, ...]:
    return fxmerge.find_symmetry(model, args).names


# ------------------------------------------------------------------------------------ fold


class Weighed(nn.Module):
    """Units weighed against each other: how much each counts depends on how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).softmax(-1))
        return out


def test_units_that_an_op_counts_stay() -> None:
    torch.manual_seed(0)
    model, x = Weighed(), torch.randn(5, 4)
    assert not fxmerge.report(fxmerge.fold(model, width=0.5, example=x)).widths
    with pytest.raises(fxmerge.OptionError, match="as if an op counted them"):
        fxmerge.fold(model, width={"*": 0.5}, example=x)


@pytest.fixture(scope="module")
def folded() -> tuple[nn.Module, fxmerge.Report, nn.Module]:
    torch.manual_seed(0)
    model = Convolutional(0).eval()
    made = fxmerge.fold(model, pictures(), 0.5)
    return model, fxmerge.report(made), made


def test_a_fold_is_smaller_and_runs_on_other_batches(folded: tuple[nn.Module, fxmerge.Report, nn.Module]) -> None:
    model, report, made = folded
    assert report.widths and all(after * 2 == before for before, after in report.widths.values())
    assert sum(p.numel() for p in made.parameters()) < sum(p.numel() for p in model.parameters())
    x = pictures()[0]
    assert made(x[:3]).shape == model(x[:3]).shape
    assert str(report).startswith("1 model, folded")
    assert report.held_out and 0 < report.errors["merged"] < 1


def test_a_fold_goes_on_its_way(folded: tuple[nn.Module, fxmerge.Report, nn.Module]) -> None:
    """It is checked, pickled, copied, exported, its symmetry inferred and verified, folded again and merged."""
    _, _, made = folded
    x = pictures()[0]
    made.graph.lint()  # type: ignore[operator, union-attr]
    assert torch.equal(pickle.loads(pickle.dumps(made))(x), made(x))
    assert torch.equal(copy.deepcopy(made)(x), made(x))
    exported = torch.export.export(made, (x,)).module()
    torch.testing.assert_close(exported(x), made(x))
    symmetry = fxmerge.find_symmetry(made, (x,)).verify(made, (x,))
    assert symmetry.units and not symmetry.demoted
    again = fxmerge.fold(made, pictures(), 0.5)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in made.parameters())
    other = fxmerge.fold(made, pictures(), 1.0)
    assert fxmerge.merge(made, other, pictures())(x).shape == made(x).shape


def test_a_fit_makes_a_fold_nearer() -> None:
    torch.manual_seed(0)
    model = mlp(0)
    x = torch.cat(vectors())
    with torch.no_grad():
        distance = {
            fit: float((fxmerge.fold(model, vectors(), 0.5, fxmerge.Recipe(fit=fit))(x) - model(x)).square().sum())
            for fit in (None, fxmerge.LeastSquares())
        }
    assert distance[fxmerge.LeastSquares()] < 0.6 * distance[None]


def test_width_one_changes_nothing() -> None:
    model, x = mlp(0), vectors()[0]
    assert torch.equal(fxmerge.fold(model, width=1.0, example=x)(x), model(x))


def test_widths_by_name_and_multiple() -> None:
    model, x = mlp(0), vectors()[0]
    made = fxmerge.fold(model, width={"1.*": 9, "3.*": 0.75}, example=x)
    widths = fxmerge.report(made).widths
    assert widths == {"1.weight[0]": (20, 9), "3.weight[0]": (20, 15)}
    match = fxmerge.Zip(multiple_of=8)
    made = fxmerge.fold(model, None, 0.5, fxmerge.Recipe(match=match), example=x)
    assert {after for _, after in fxmerge.report(made).widths.values()} == {8}
    with pytest.raises(fxmerge.OptionError, match="names 'nothing', which is no class"):
        fxmerge.fold(model, width={"nothing": 0.5}, example=x)


def test_a_recipe_that_does_not_fold_is_refused() -> None:
    model, x = mlp(0), vectors()[0]
    with pytest.raises(fxmerge.OptionError, match="fold merges units"):
        fxmerge.fold(model, recipe=fxmerge.Recipe(match=fxmerge.Align()), example=x)
    with pytest.raises(fxmerge.OptionError, match="of several networks"):
        fxmerge.fold(model, recipe=fxmerge.Recipe(share="trunk"), example=x)
    with pytest.raises(fxmerge.OptionError, match="width is 3, and fold makes a network smaller"):
        fxmerge.fold(model, width=3, example=x)
    with pytest.raises(fxmerge.OptionError, match="Repair, which compares units one by one"):
        fxmerge.fold(model, [x], recipe=fxmerge.Recipe(fit=fxmerge.Repair()))
    with pytest.raises(fxmerge.OptionError, match="width is -1"):
        fxmerge.fold(model, width=-1, example=x)


# ------------------------------------------------------------------------------------ merges of other widths


def cnn(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    return nn.Sequential(*layers, *head).double().eval()


def test_with_all_units_apart_nothing_is_lost() -> None:
    a, b = cnn(0), cnn(1)
    data = [x.double() for x in pictures()]
    recipe = fxmerge.Recipe(match=fxmerge.Zip(width=2.0), share="trunk")
    merged = fxmerge.merge(a, b, data, recipe)
    for own, model in zip(merged(data[0]), (a, b), strict=True):
        assert error(model(data[0]), own) < 1e-9
    report = fxmerge.report(merged)
    assert {after // before for before, after in report.widths.values()} == {2}


class Counted(nn.Module):
    """A LayerNorm over a stream, and units with two zeros after them, which cannot be more."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.padded, self.head = nn.Linear(6, 5), nn.Linear(7, classes)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = nn.functional.pad(self.padded(x + self.norm(x)).tanh(), (0, 2))
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("data", but_slow([True, False]))
def test_where_a_norm_goes_over_all_units_networks_stand_side_by_side(data: bool) -> None:
    a, b, x = Counted(2), Counted(3), torch.randn(6, 7, 4, dtype=torch.float64)
    recipe = fxmerge.Recipe(match=fxmerge.Zip(width=2.0))
    merged = fxmerge.merge(a, b, [x] if data else None, recipe, example=x)
    assert error((a(x), b(x)), merged(x)) < 1e-9
    assert "nothing shared, side by side '0', '1'" in str(fxmerge.report(merged))
    for number, model in enumerate((a, b)):
        model.load_state_dict(fxmerge.head(merged, number).state_dict())
    again = fxmerge.merge(a, b, recipe=fxmerge.Recipe(share="nothing", names=("x", "y"), outputs="dict"), example=x)
    assert set(again(x)) == {"x", "y"}


def test_a_wider_merge_is_nearer() -> None:
    a, b = cnn(0), cnn(1)
    data = [x.double() for x in pictures()]
    errors = []
    for width in (1.0, 1.5):
        match = fxmerge.Zip(width=width)
        merged = fxmerge.merge(a, b, data, fxmerge.Recipe(match=match, share="trunk"))
        errors.append(fxmerge.report(merged).errors["merged"])
    assert errors[1] < errors[0]


def test_networks_with_attention_become_wider() -> None:
    a, b = (Attentive(seed).eval() for seed in (0, 1))
    merged = fxmerge.merge(a, b, pictures(), fxmerge.Recipe(match=fxmerge.Zip(width=1.5)))
    report = fxmerge.report(merged)
    assert report.widths and all(after == before * 3 // 2 for before, after in report.widths.values())
    x = pictures()[0][:3]
    assert merged(x).shape == a(x).shape


class Streamed(nn.Module):
    """A LayerNorm over all units, so that units of another network beside them change what it gives."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.first(x)).relu())
        return out


def test_layers_are_fitted_where_a_norm_sees_the_units_of_all_models() -> None:
    a, b, x = Streamed(0).eval(), Streamed(1).eval(), torch.randn(256, 4)
    recipe = fxmerge.Recipe(match=fxmerge.Zip(width=1.5), share="trunk")
    report = fxmerge.report(fxmerge.merge(a, b, [x], recipe))
    assert report.widths == {"first.weight[0]": (8, 12)}
    assert report.layers


class CastInside(nn.Module):
    """Computes in single precision, whatever its inputs are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(4, 8, 1), nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x.float()).softmax(1).to(torch.float32))
        return out


def test_units_are_counted_in_a_model_that_casts() -> None:
    x = torch.randn(3, 4, 5)
    assert not fxmerge.report(fxmerge.fold(CastInside().eval(), width=0.5, example=x)).widths


def test_a_network_of_which_nothing_can_change_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    folded = fxmerge.fold(Weighed(), width=0.5, example=torch.randn(5, 4))
    assert not fxmerge.report(folded).widths
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning.startswith(
        "No class of units has another width, so that the network keeps its size: 'first.weight[0]'"
    )
