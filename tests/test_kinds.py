"""Kinds of real architectures, how they are told, and that a wrong kind does not pass verification."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge import Symmetry, find_symmetry
from fxmerge.units.kind import Kind, UnitKind
from tests.networks import groups
from tests.oracle.continuous_networks import NETWORKS, SEQUENCES
from tests.oracle.nullity import generic
from tests.real import REAL, drawn
from tests.slow import but_slow

HEADS = ["GL(4)^2", "GL(4)^2"]
"""Two heads of width 4: queries with keys, and values with what reads them."""

EXPECTED: dict[str, list[str]] = {
    "ViT": [*HEADS, "O1(8)"],
    # The last gains lie before an embedding that other layers read, too, so they stay, and the stream is permuted.
    "GPT-2": HEADS,
    "T5": 3 * HEADS,
    # Two planes in each head are turned by rotary positions.
    "Llama": ["C^4", "GL(4)^2", "O(8)"],
    # Norms come after the sums, and their gains stay.
    "BERT": HEADS,
    # The norm behind the patches has gains; that of the second stage has none left.
    "Swin": [*HEADS, "GL(8)^2", "GL(8)^2", "O1(16)"],
    # Channels are read one by one by depthwise convolutions.
    "ConvNeXt": [],
    # A bottleneck without an activation; the other one is added to what a ReLU gives.
    "MobileNetV2": ["GL(8)"],
}


def test_every_network_has_an_expectation() -> None:
    assert EXPECTED.keys() == REAL.keys()


@pytest.mark.parametrize("name", but_slow(EXPECTED, ["ViT", "GPT-2", "Llama", "MobileNetV2"]))
def test_kinds_of_real_architectures(name: str) -> None:
    model, args = drawn(name)
    plain = fxmerge.canonicalize(model, args)
    symmetry = find_symmetry(plain, args)
    assert groups(symmetry) == sorted(EXPECTED[name]), symmetry
    proven = symmetry.verify(plain, args)
    assert proven.demoted == () and proven.kinds == symmetry.kinds, proven
    assert proven.error is not None and proven.error < 1e-9


def test_gains_that_are_not_moved_allow_no_rotations() -> None:
    model, args = drawn("ViT")
    assert groups(find_symmetry(model, args)) == HEADS


def raised(symmetry: Symmetry, kind: Kind) -> Symmetry:
    """A symmetry that claims too much of classes on parameters whose units are mixed by less."""
    kinds = tuple(
        replace(own, kind=kind) if own.kind < kind and c.roles else own
        for c, own in zip(symmetry.units, symmetry.kinds, strict=True)
    )
    return replace(symmetry, kinds=kinds)


@pytest.mark.parametrize("kind", [Kind.CENTRED, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR])
@pytest.mark.parametrize(
    "name", ["RMSNorm", "LayerNorm", "MLP, GELU", "tied linear autoencoder", "norms of queries and keys"]
)
def test_a_wrong_kind_is_lowered_to_the_right_one(name: str, kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    model, args = generic(NETWORKS[name].model(), NETWORKS[name].args)
    right = find_symmetry(model, args)
    wrong = raised(right, kind)
    proven = wrong.verify(model, args)
    assert [own.kind for own in proven.kinds] == [own.kind for own in right.kinds]
    assert proven.demoted == () and proven.error is not None and proven.error < 1e-9
    lowered = [n for n, (a, b) in enumerate(zip(wrong.kinds, right.kinds, strict=True)) if a.kind != b.kind]
    assert all(proven.kinds[n].why == "it failed verification" for n in lowered)
    assert len([r for r in caplog.records if "failed verification as" in r.message]) == len(lowered)


def test_a_wrong_side_is_lowered() -> None:
    """An axis on which the inverse is to act, but does not."""
    model = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 4)).double()
    args = (torch.randn(4, 5, dtype=torch.float64),)
    right = find_symmetry(model, args)
    wrong = replace(right, kinds=(replace(right.kinds[0], inverse=frozenset()),))
    assert wrong.verify(model, args).kind(0) == Kind.ORTHOGONAL


def test_a_symmetry_without_kinds_permutes() -> None:
    model, args = generic(NETWORKS["RMSNorm"].model(), NETWORKS["RMSNorm"].args)
    bare = replace(find_symmetry(model, args), kinds=())
    assert bare.dimension() == 0 and not bare.sample().basis.matrices and bare.kind(0) == Kind.PERMUTATION
    proven = bare.verify(model, args)
    assert proven.kinds == () and proven.error is not None and proven.error < 1e-9
    assert "O(" not in str(bare)


TOLD = {
    "RMSNorm": ["O(4) (orthogonal: rms_norm)", "GL(3)^2"],
    "LayerNorm": ["O(4) (orthogonal, keeps the mean: layer_norm)", "GL(3)^2"],
    "tied linear autoencoder": ["O(2) (orthogonal: the same units are summed over with each other)"],
    "linear bottleneck": ["GL(2)"],
    "rotary": ["GL(4)^2"],
}


@pytest.mark.parametrize("name", TOLD)
def test_the_report_tells_groups_and_what_limits_them(name: str) -> None:
    model, args = generic(NETWORKS[name].model(), NETWORKS[name].args)
    lines = str(find_symmetry(model, args)).splitlines()
    for words in TOLD[name]:
        assert any(f"!, {words} |" in line or f"!^2, {words} |" in line for line in lines), lines


@pytest.mark.parametrize(
    ("name", "words"),
    [("rotary", "GL(1, C)^4 (complex: cat)"), ("norms of queries and keys, rotary", "U(1)^4 (unitary: rms_norm_1)")],
)
def test_the_report_tells_planes(name: str, words: str) -> None:
    model, args = generic(NETWORKS[name].model(), NETWORKS[name].args)
    assert f"moves with d and fixed, {words} |" in str(find_symmetry(model, args))


def test_planes_that_scale_are_lowered_to_rotations() -> None:
    model, args = generic(NETWORKS["norms of queries and keys, rotary"].model(), SEQUENCES)
    right = find_symmetry(model, args)
    wrong = replace(
        right, kinds=tuple(replace(k, kind=Kind.COMPLEX) if k.kind == Kind.UNITARY else k for k in right.kinds)
    )
    assert [own.kind for own in wrong.verify(model, args).kinds] == [own.kind for own in right.kinds]


def test_planes_that_are_none_are_not_mixed() -> None:
    """The planes of heads that were turned otherwise: each has a unit of two planes."""
    model, args = generic(NETWORKS["rotary"].model(), SEQUENCES)
    right = find_symmetry(model, args)
    ((number, own),) = [(n, own) for n, own in enumerate(right.kinds) if own.kind == Kind.COMPLEX]
    (a, b), (c, d), *rest = own.planes
    kinds = list(right.kinds)
    kinds[number] = replace(own, planes=((a, d), (c, b), *rest))
    proven = replace(right, kinds=tuple(kinds)).verify(model, args)
    assert proven.kind(number) == Kind.PERMUTATION and proven.kinds[number].planes == ()


def test_classes_tell_their_kind() -> None:
    model = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    mixed, permuted, *_ = find_symmetry(model, (torch.zeros(1, 5),)).classes
    assert (mixed.kind, mixed.limited) == (Kind.GENERAL_LINEAR, "")
    assert (permuted.kind, permuted.limited) == (Kind.PERMUTATION, "relu")


@pytest.mark.parametrize(
    ("kind", "text", "dimensions"),
    [
        (Kind.PERMUTATION, "permutation", [0, 0, 0, 0]),
        (Kind.CENTRED, "orthogonal, keeps the mean", [0, 0, 1, 3]),
        (Kind.UNITARY, "unitary", [0, 1, 1, 2]),
        (Kind.ORTHOGONAL, "orthogonal", [0, 1, 3, 6]),
        (Kind.COMPLEX, "complex", [1, 2, 3, 4]),
        (Kind.GENERAL_LINEAR, "general linear", [1, 4, 9, 16]),
    ],
)
def test_words_and_dimensions(kind: Kind, text: str, dimensions: list[int]) -> None:
    assert str(kind) == text and [kind.dimension(n) for n in (1, 2, 3, 4)] == dimensions
    assert UnitKind(kind) == UnitKind(kind, "", frozenset(), frozenset())
