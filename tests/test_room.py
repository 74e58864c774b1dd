"""How many merged units there may be, and in whose places they stand."""

import numpy as np
import pytest
import torch
from torch import nn

import fxmerge
from fxmerge import OptionError, Zip
from fxmerge.matching.mergeable import mergeable, zipped_classes
from fxmerge.matching.nested import is_block
from fxmerge.matching.room import Room, alike, halves, may_change, wanted
from fxmerge.program.capture import capture_program
from fxmerge.symmetry.flow import Flow, flows
from fxmerge.symmetry.group import Symmetry, analyse


def analysed(model: nn.Module, *shape: int) -> tuple[Symmetry, dict[tuple[str, int], Flow]]:
    found, symmetry = analyse(capture_program(model.eval(), (torch.randn(2, *shape),)))
    return symmetry, flows(found)


@pytest.fixture(scope="module")
def flat() -> tuple[Symmetry, dict[tuple[str, int], Flow]]:
    """Channels that are flattened, so that each shows at four places of the next layer; then hidden units."""
    layers = (nn.Conv2d(1, 6, 3), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 2))
    return analysed(nn.Sequential(*layers), 1, 4, 4)


def test_units_that_move_along_are_kept_along(flat: tuple[Symmetry, dict[tuple[str, int], Flow]]) -> None:
    symmetry, _ = flat
    channels, places = symmetry.names.index("0.weight[0]"), symmetry.names.index("2.weight[1]")
    wider = Room.of(symmetry, {channels: 9}).widths
    assert (wider[channels], wider[places]) == (9, 36)
    room = Room.of(symmetry, {channels: 4})
    assert room.changed == {channels, places}
    assert room.widths[channels] == 4 and room.widths[places] == 16
    assert room.kept[channels].tolist() == [0, 1, 2, 3]
    assert room.kept[places].tolist() == list(range(16))
    assert Room.of(symmetry).changed == frozenset()


def test_which_classes_may_change(flat: tuple[Symmetry, dict[tuple[str, int], Flow]]) -> None:
    symmetry, flow = flat
    fewer, more = may_change(symmetry, flow, zipped_classes(symmetry, flow))
    assert {symmetry.names[n] for n in fewer} == {"0.weight[0]", "2.weight[0]"}
    assert fewer == more


def test_what_a_recipe_asks_for(flat: tuple[Symmetry, dict[tuple[str, int], Flow]]) -> None:
    symmetry, flow = flat
    fewer, more = may_change(symmetry, flow, zipped_classes(symmetry, flow))

    def asked(part: Zip, models: int = 2) -> dict[str, int]:
        return {symmetry.names[n]: width for n, width in wanted(part, symmetry, models, fewer, more).items()}

    assert asked(Zip(width=0.5)) == {"0.weight[0]": 3, "2.weight[0]": 4}
    assert asked(Zip(width=1.0)) == {}
    assert asked(Zip(width=1.5)) == {"0.weight[0]": 9, "2.weight[0]": 12}
    assert asked(Zip(width=5.0)) == {"0.weight[0]": 12, "2.weight[0]": 16}
    assert asked(Zip(width=0.01)) == {"0.weight[0]": 1, "2.weight[0]": 1}
    assert asked(Zip(width=0.6, multiple_of=4)) == {"0.weight[0]": 4, "2.weight[0]": 4}
    assert asked(Zip(width=2)) == asked(Zip(width=2.0)) == {"0.weight[0]": 12, "2.weight[0]": 16}
    assert asked(Zip(width=0.5, multiple_of=16)) == {}
    assert asked(Zip(width=1.5, multiple_of=16)) == {"0.weight[0]": 12, "2.weight[0]": 16}
    assert asked(Zip(width={"2.*": 3})) == {"2.weight[0]": 3}
    assert asked(Zip(width={"2.weight[0]": 0.25, "*": 0.5})) == {"0.weight[0]": 3, "2.weight[0]": 2}
    with pytest.raises(OptionError, match=r"names '7\.\*', which is no class; there are '0.weight"):
        asked(Zip(width={"7.*": 0.5}))
    with pytest.raises(OptionError, match=r"no class that it fits can have another width\. These can: '0.weight"):
        asked(Zip(width={"2.weight[1]": 0.5}))


def test_equal_units_are_spread_and_put_together_again(flat: tuple[Symmetry, dict[tuple[str, int], Flow]]) -> None:
    symmetry, flow = flat
    consumed = frozenset(axis for axis, kind in flow.items() if kind is Flow.CONSUMES)
    units = alike(symmetry, halves(symmetry, symmetry.choices), consumed)
    assert all(2 * units.widths[n] == symmetry.units[n].size for n in symmetry.choices)
    assert all(np.bincount(own).tolist() == [2] * width for own, width in zip(units.maps[0], units.widths, strict=True))
    state = {a.parameter: torch.rand(a.shape, dtype=torch.float64) for a in symmetry.layout}
    small = units.apply(state)
    assert {name: tuple(t.shape) for name, t in small.items()} == {n: units.shape(n, t.shape) for n, t in state.items()}
    again = units.apply(units.spread(small))
    for name, tensor in small.items():
        torch.testing.assert_close(again[name], tensor)


def test_units_in_blocks_are_kept_in_every_block() -> None:
    model = nn.Sequential(nn.Conv2d(2, 12, 1), nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 2, 1))
    symmetry, flow = analysed(model, 2, 3, 3)
    fewer, more = may_change(symmetry, flow, zipped_classes(symmetry, flow))
    (number,) = fewer
    (groups,) = (n for n in symmetry.choices if is_block(symmetry, n))
    assert not more
    assert may_change(symmetry, flow, mergeable(symmetry, flow)) == ({number, groups}, {groups})
    assert Room.of(symmetry, {groups: 2}).kept[number].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert Room.of(symmetry, {groups: 5}).widths == (5, 20)
    assert Room.of(symmetry, {number: 6}).kept[number].tolist() == [0, 1, 4, 5, 8, 9]
    x = torch.randn(2, 2, 3, 3)
    folded = fxmerge.fold(model, width=0.5, example=x)
    assert fxmerge.report(folded).widths[symmetry.names[number]] == (12, 6)
    assert folded(x).shape == (2, 2, 3, 3)
