"""Axes of parameters in other widths: where units go, against dense matrices of zeros and ones."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fxmerge.errors import UnitMapError
from fxmerge.units.layout import AxisLayout, add_axis, move_axis, value_layout


def axis(length: int, roles: list[tuple[int, list[int]]]) -> AxisLayout:
    """The second axis of a matrix of three rows."""
    numbered = tuple((number, np.array(slots)) for number, slots in roles)
    return AxisLayout("w", (), (3, length), 1, (1,), np.arange(length), numbered)


def one_hot(into: list[int], width: int) -> Tensor:
    return torch.eye(width)[into].T.contiguous()


def by_channels(one: Tensor, other: Tensor) -> Tensor:
    """(channels, pixels), flattened."""
    return torch.kron(one, torch.eye(3))


def by_pixels(one: Tensor, other: Tensor) -> Tensor:
    """(pixels, channels), flattened."""
    return torch.kron(torch.eye(3), one)


def beside(one: Tensor, other: Tensor) -> Tensor:
    """Units of two classes, with entries that stay between and after them."""
    return torch.block_diag(one, torch.eye(2), other, torch.eye(1))


def twice(one: Tensor, other: Tensor) -> Tensor:
    """Units of a class, those of another, and those of the first again."""
    return torch.block_diag(one, other, one)


CASES = {
    "channels, pixels": (axis(12, [(0, [0, 3, 6, 9]), (0, [1, 4, 7, 10]), (0, [2, 5, 8, 11])]), by_channels),
    "pixels, channels": (axis(12, [(0, [0, 1, 2, 3]), (0, [4, 5, 6, 7]), (0, [8, 9, 10, 11])]), by_pixels),
    "beside each other": (axis(9, [(0, [0, 1, 2, 3]), (1, [6, 7])]), beside),
    "in another order of roles": (axis(9, [(1, [6, 7]), (0, [0, 1, 2, 3])]), beside),
    "twice": (axis(10, [(0, [0, 1, 2, 3]), (0, [6, 7, 8, 9]), (1, [4, 5])]), twice),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("widths", [(4, 2), (3, 1), (1, 2), (5, 4), (9, 2), (2, 7)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_an_axis_in_another_width(name: str, widths: tuple[int, int], seed: int) -> None:
    layout, dense = CASES[name]
    rng = np.random.default_rng(seed)
    maps = [rng.integers(0, width, size) for width, size in zip(widths, (4, 2), strict=True)]
    matrix = dense(*(one_hot(own.tolist(), width) for own, width in zip(maps, widths, strict=True)))
    into = layout.resized(widths)
    assert into.shape == (3, len(matrix))
    tensor = torch.randn(layout.shape)
    target = layout.target(maps, into)
    torch.testing.assert_close(add_axis(tensor, layout, target, len(matrix)), tensor @ matrix.T)
    merged = torch.randn(into.shape)
    torch.testing.assert_close(move_axis(merged, layout, target), merged @ matrix)


@pytest.mark.parametrize("name", CASES)
def test_an_axis_in_its_own_width_is_the_same(name: str) -> None:
    layout, _ = CASES[name]
    assert layout.resized((4, 2)) is layout
    assert layout.target([np.arange(4), np.arange(2)]).tolist() == list(range(layout.shape[1]))


@pytest.mark.parametrize("name", CASES)
def test_the_source_of_a_permutation_is_the_way_back_of_its_target(name: str) -> None:
    layout, _ = CASES[name]
    images = np.array([2, 0, 3, 1]), np.array([1, 0])
    source = layout.source(images)
    assert source is not None
    assert layout.target(images)[source].tolist() == list(range(layout.shape[1]))
    assert layout.source((np.arange(4), np.arange(2))) is None


def test_units_of_every_row_are_fewer_in_every_row() -> None:
    """Two rows with three units each, and a pinned index in the middle."""
    slots = np.array([[0, 1, 6, 2], [3, 4, 7, 5]])
    layout = AxisLayout("w", (), (2, 4), 1, (0, 1), slots, ((0, np.arange(6)),))
    shorter = layout.resized((4,), [np.array([0, 2, 3, 5])])
    assert shorter.shape == (2, 3)
    target = layout.target([np.array([0, 0, 1, 2, 3, 3])], shorter)
    assert target.tolist() == [[0, 0, 1, 2], [0, 2, 1, 2]]
    tensor = torch.tensor([[1.0, 10.0, 100.0, 1000.0], [2.0, 20.0, 200.0, 2000.0]])
    assert add_axis(tensor, layout, target, 3).tolist() == [[11.0, 100.0, 1000.0], [2.0, 200.0, 2020.0]]
    assert shorter.even
    with pytest.raises(UnitMapError, match=r"Axis 1 of 'w' .* in every row.*cannot be more.*\[6\] units"):
        layout.resized((7,))


def test_rows_of_two_classes_are_shortened_one_after_the_other() -> None:
    """Until both are, nothing stands at the end of the shorter row; a pinned index stays in each."""
    slots = np.array([[0, 1, 6, 2], [3, 7, 4, 5]])
    layout = AxisLayout("w", (), (2, 4), 1, (0, 1), slots, ((0, np.arange(3)), (1, np.arange(3, 6))))
    maps = [np.array([0, 1, 0]), np.arange(3)]
    between = layout.resized((2, 3), [np.array([0, 1]), np.arange(3)])
    assert between.shape == (2, 4) and not between.even
    tensor = torch.tensor([[1.0, 10.0, 100.0, 1000.0], [2.0, 20.0, 200.0, 2000.0]])
    added = add_axis(tensor, layout, layout.target(maps, between), 4)
    assert added.tolist() == [[1001.0, 10.0, 100.0, 0.0], [2.0, 20.0, 200.0, 2000.0]]
    shorter = layout.resized((2, 2), [np.array([0, 1]), np.array([0, 2])])
    assert shorter.shape == (2, 3) and shorter.even
    maps = [np.array([0, 1, 0]), np.array([0, 0, 1])]
    added = add_axis(tensor, layout, layout.target(maps, shorter), 3)
    assert added.tolist() == [[1001.0, 10.0, 100.0], [202.0, 20.0, 2000.0]]


def test_units_of_every_row_move_by_rows() -> None:
    slots = np.arange(6).reshape(2, 3)
    layout = AxisLayout("w", (), (2, 3), 1, (0, 1), slots, ((0, np.arange(6)),))
    assert layout.resized((6,)) is layout
    moved = layout.target([np.array([1, 0, 2, 5, 4, 3])])
    assert moved.tolist() == [[1, 0, 2], [2, 1, 0]]
    tensor = torch.arange(6.0).reshape(2, 3)
    assert add_axis(tensor, layout, moved).tolist() == [[1.0, 0.0, 2.0], [5.0, 4.0, 3.0]]
    assert move_axis(tensor, layout, moved).tolist() == [[1.0, 0.0, 2.0], [5.0, 4.0, 3.0]]


# ------------------------------------------------------------------------------------ other widths


def test_an_index_has_a_place_on_a_resized_axis() -> None:
    """Two pinned indices, four channels of two places, and a pinned one."""
    slots = np.arange(2, 10).reshape(4, 2)
    axis = AxisLayout("w", (), (11,), 0, (0,), np.arange(11), ((0, slots[:, 0]), (0, slots[:, 1])))
    kept = [np.array([1, 3])]
    assert axis.resized([2], kept).shape == (7,)
    assert [axis.boundary(i, [2], kept) for i in range(12)] == [0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 7]
    assert [axis.boundary(i, [5]) for i in (0, 2, 9, 10, 11)] == [0, 2, 9, 12, 13]
    assert [axis.boundary(i, [4]) for i in (0, 5, 11)] == [0, 5, 11]
    into = axis.resized([2], kept)
    assert axis.target([np.array([0, 0, 1, 1])], into).tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6]


def test_units_along_a_value_have_a_layout() -> None:
    number, unit = np.array([-1, 0, 0, 1, 0, 0]), np.array([0, 1, 0, 0, 0, 1])
    layout = value_layout(number, unit, [2, 1])
    assert layout is not None
    assert [(n, slots.tolist()) for n, slots in layout.roles] == [(0, [2, 1]), (0, [4, 5]), (1, [3])]
    assert value_layout(number, unit, [3, 1]) is None  # One unit of three is not there.
    assert value_layout(number[:-1], unit[:-1], [2, 1]) is None  # One is there twice, and the other once.
