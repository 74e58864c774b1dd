"""The label calculus on bare columns, without a network."""

import pytest
import torch
from torch import Tensor

from fxmerge.symmetry.columns import axis_column, reshape, shrink, spread, support, view_groups
from fxmerge.symmetry.labels import Labels, constant, inert, join, move, pin, reduce
from fxmerge.symmetry.relate import relate
from fxmerge.symmetry.units import NOTHING, UnitGraph


def column(units: UnitGraph, shape: tuple[int, ...], *dims: int) -> Tensor:
    """Fresh units, one for every position along `dims`."""
    sizes = [shape[d] for d in dims]
    ids = units.fresh(int(torch.tensor(sizes).prod()), ("axis", str(units.size), 0))
    return spread(torch.from_numpy(ids).reshape(sizes), shape, dims)


def test_a_column_takes_the_memory_of_its_support() -> None:
    c = axis_column((1000, 1000, 7), 2)
    assert c.untyped_storage().nbytes() == 7 * 8
    assert support(c) == (2,)


def test_equal_partitions_are_equated() -> None:
    units = UnitGraph()
    a, b = column(units, (4, 3), 1), column(units, (4, 3), 1)
    relate(units, a, b, "op")
    ((x, y),) = (pair for pair in units.equal if len(pair[0]))
    assert sorted(zip(x.tolist(), y.tolist(), strict=True)) == list(zip(a[0].tolist(), b[0].tolist(), strict=True))


def test_a_finer_partition_is_kept_and_its_units_are_members() -> None:
    units = UnitGraph()
    a = column(units, (6,), 0)
    b = column(units, (3,), 0).repeat_interleave(2)
    assert relate(units, a, b, "op") == "a"
    ((child, parent),) = (pair for pair in units.member if len(pair[0]))
    assert sorted(zip(child.tolist(), parent.tolist(), strict=True)) == list(zip(a.tolist(), b.tolist(), strict=True))


def test_columns_along_different_dims_say_nothing_of_each_other() -> None:
    units = UnitGraph()
    assert relate(units, column(units, (4, 3), 0), column(units, (4, 3), 1), "op") == ""
    assert not units.equal
    assert not units.member


def test_after_a_flatten_columns_are_compared_by_value() -> None:
    """The batch is inert, and shares a dimension with the heads once both are flattened."""
    units = UnitGraph()
    heads = reshape(column(units, (2, 3), 1), (6,))
    batch = reshape(axis_column((2, 3), 0), (6,))
    pins = len(units.pinned)
    join(units, Labels((6,), (heads,)), Labels((6,), (), (batch,)), "op")
    assert len(units.pinned) == pins


def test_an_irregular_meeting_is_pinned() -> None:
    units = UnitGraph()
    a, b = column(units, (3,), 0), column(units, (3,), 0)
    relate(units, a[torch.tensor([0, 0, 1, 2])], b[torch.tensor([0, 1, 1, 2])], "op")
    assert {int(i) for ids, why in units.pinned for i in ids if "irregular" in why} == {
        *a[:2].tolist(),
        *b[:2].tolist(),
    }


def test_reducing_members_away_leaves_their_blocks() -> None:
    units = UnitGraph()
    x = Labels((4, 3, 2), (column(units, (4, 3, 2), 1, 2),))
    y = reduce(units, x, [2], "sum")
    assert y.shape == (4, 3)
    assert support(y.columns[0]) == (1,)
    assert len(y.columns[0][0].unique()) == 3


def test_a_sliding_window_is_not_a_block_structure() -> None:
    units = UnitGraph()
    windows = Labels((5,), (column(units, (5,), 0),))
    windows = move(units, windows, lambda c: c.unfold(0, 2, 1), (4, 2), "unfold")
    reduce(units, windows, [1], "sum")
    assert any("overlapping" in why for _, why in units.pinned)


def test_units_left_behind_are_told_apart_from_those_taken() -> None:
    units = UnitGraph()
    x = Labels((5,), (column(units, (5,), 0),))
    move(units, x, lambda c: c[:3], (3,), "slice")
    ((child, parent),) = units.member
    assert child.tolist() == x.columns[0][:3].tolist()
    assert len(set(parent.tolist())) == 1


def test_pinning_makes_the_dimension_inert() -> None:
    units = UnitGraph()
    x = Labels((4, 3), (column(units, (4, 3), 1),))
    y = pin(units, x, "why", [1])
    assert y.columns == ()
    assert [support(f) for f in y.inert] == [(1,)]


def test_equal_constants_are_alike() -> None:
    (factor,) = constant(torch.tensor([[1.0, 2.0, 1.0]]).expand(4, 3)).inert
    assert support(factor) == (1,)
    assert factor[0, 0] == factor[0, 2] != factor[0, 1]
    assert constant(torch.ones(3, 4)).inert == ()


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64),
        *(torch.complex64, torch.int8, torch.uint16, torch.bool),
    ],
)
def test_constants_of_every_type_are_labelled(dtype: torch.dtype) -> None:
    (factor,) = constant(torch.tensor([1.0, 0.0, 1.0]).to(dtype)).inert
    assert factor[0] == factor[2] != factor[1]


def test_constants_of_a_type_without_numbers_are_told_apart_by_their_bits() -> None:
    (factor,) = constant(torch.tensor([3, 5, 3], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)).inert
    assert factor[0] == factor[2] != factor[1]


def test_padding_is_in_no_block() -> None:
    units = UnitGraph()
    ids = column(units, (5,), 0)
    pairs = torch.cat([ids, torch.tensor([NOTHING])]).reshape(3, 2)
    (blocks,) = reduce(units, Labels((3, 2), (pairs,)), [1], "sum").columns
    assert NOTHING not in blocks
    assert all((child != NOTHING).all() for child, _ in units.member)


def test_sets_of_one_block_with_more_and_less_padding_are_told_apart() -> None:
    units = UnitGraph()
    a, b = column(units, (2,), 0).tolist()
    rows = torch.tensor([[a, b, NOTHING, NOTHING], [a, b, a, b], [b, a, NOTHING, NOTHING]])
    y = reduce(units, Labels((3, 4), (rows,)), [1], "sum")
    assert y.columns == ()
    (told,) = y.inert
    assert told[0] == told[2] != told[1]


@pytest.mark.parametrize("padding", [0, 1])
def test_units_that_are_there_more_often_than_others_are_told_apart(padding: int) -> None:
    units = UnitGraph()
    a, b, c = column(units, (3,), 0).tolist()
    reduce(units, Labels((4 + padding,), (torch.tensor([a, a, b, c] + [NOTHING] * padding),)), [0], "sum")
    tags = {int(u): int(tag) for child, parent in units.member for u, tag in zip(child, parent, strict=True)}
    assert tags[a] != tags[b] == tags[c]
    assert {tags[a], tags[b]} <= {int(u) for ids, _ in units.pinned for u in ids}
    assert not any("uneven" in why for _, why in units.pinned)


def test_sets_of_the_same_units_that_hold_others_more_often_are_pinned() -> None:
    units = UnitGraph()
    a, b = column(units, (2,), 0).tolist()
    reduce(units, Labels((2, 3), (torch.tensor([[a, a, b], [a, b, b]]),)), [1], "sum")
    assert next(sorted(ids.tolist()) for ids, why in units.pinned if "uneven" in why) == [a, b]


def test_a_reduction_crosswise_is_pinned_and_its_results_are_told_apart() -> None:
    units = UnitGraph()
    rows, places = column(units, (2, 2), 0), axis_column((2, 2), 1)
    crosswise = torch.tensor([[0, 3], [1, 2]])
    x = Labels((2, 2), (rows.reshape(-1)[crosswise],), (places.reshape(-1)[crosswise],))
    y = reduce(units, x, [1], "sum")
    assert {int(i) for ids, why in units.pinned for i in ids if "irregular" in why} == {*rows[:, 0].tolist()}
    assert any(support(f) == (0,) and f[0] != f[1] for f in y.inert)


def test_shrink_finds_the_dimensions_that_do_not_matter() -> None:
    assert support(shrink(axis_column((4, 3), 1).contiguous())) == (1,)


def test_inert_labels_every_dimension() -> None:
    assert [support(f) for f in inert((2, 1, 3)).inert] == [(0,), (2,)]


@pytest.mark.parametrize(
    ("old", "new", "groups"),
    [
        ((2, 12), (2, 3, 4), [((0,), (0,)), ((1,), (1, 2))]),
        ((2, 3, 4), (2, 12), [((0,), (0,)), ((1, 2), (1,))]),
        ((2, 3, 1), (2, 3), [((0,), (0,)), ((1,), (1,)), ((2,), ())]),
        ((6, 4), (4, 6), [((0, 1), (0, 1))]),
        ((2, 3, 4, 5), (6, 20), [((0, 1), (0,)), ((2, 3), (1,))]),
    ],
)
def test_view_groups(
    old: tuple[int, ...], new: tuple[int, ...], groups: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    assert [(tuple(a), tuple(b)) for a, b in view_groups(old, new)] == groups


def test_a_view_must_keep_the_number_of_entries() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) cannot be viewed as \(5,\)"):
        view_groups((2, 3), (5,))
