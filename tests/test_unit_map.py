"""Where units go, against dense matrices of zeros and ones that are written out here."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fxmerge
from fxmerge.program.capture import capture_program
from fxmerge.symmetry.flow import Flow, flows
from fxmerge.symmetry.group import Symmetry, analyse
from fxmerge.units.unit_map import UnitMap

Maps = Sequence[Sequence[np.ndarray[Any, Any]]]


class Concatenated(nn.Module):
    """Units of two classes on one axis, with inputs that do not move between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(torch.cat([self.a(x).relu(), x, self.b(x).tanh()], 1))
        return out


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def shallow() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def flattened() -> nn.Module:
    """The units of a convolution lie on the axis of the linear layer with all of their four pixels."""
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))


Along = tuple[int, bool, list[str | int]]
"""A dimension, whether it consumes, and what lies along it: units of a class by name, or so many entries that stay."""

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, dict[str, list[Along]]]] = {
    # What it is, the shape of its inputs, how many pixels of each unit lie on an axis that consumes, and its axes.
    "mlp": (
        mlp,
        (6, 3),
        1,
        {
            "0.weight": [(0, False, ["0.weight[0]"])],
            "0.bias": [(0, False, ["0.weight[0]"])],
            "2.weight": [(0, False, ["2.weight[0]"]), (1, True, ["0.weight[0]"])],
            "2.bias": [(0, False, ["2.weight[0]"])],
            "4.weight": [(1, True, ["2.weight[0]"])],
        },
    ),
    "flattened": (
        flattened,
        (6, 2, 3, 3),
        4,
        {
            "0.weight": [(0, False, ["0.weight[0]"])],
            "0.bias": [(0, False, ["0.weight[0]"])],
            "3.weight": [(1, True, ["0.weight[0]"])],
        },
    ),
    "concatenated": (
        Concatenated,
        (6, 3),
        1,
        {
            "a.weight": [(0, False, ["a.weight[0]"])],
            "a.bias": [(0, False, ["a.weight[0]"])],
            "b.weight": [(0, False, ["b.weight[0]"])],
            "b.bias": [(0, False, ["b.weight[0]"])],
            "c.weight": [(1, True, ["a.weight[0]", 3, "b.weight[0]"])],
        },
    ),
}
EACH = pytest.mark.parametrize("name", NETS)
WIDTHS = pytest.mark.parametrize("change", [0, -1, 2, 6], ids=["same", "narrower", "wider", "much wider"])
SHARES = [0.5, 0.3, 0.2]


def of(net: nn.Module, x: Tensor) -> tuple[Symmetry, frozenset[tuple[str, int]]]:
    """The symmetry of a network, and its consuming axes."""
    found, symmetry = analyse(capture_program(net, (x,)))
    return symmetry, frozenset(axis for axis, kind in flows(found).items() if kind is Flow.CONSUMES)


@cache
def known(name: str) -> tuple[Symmetry, frozenset[tuple[str, int]]]:
    build, shape, _, _ = NETS[name]
    return of(build(), torch.randn(shape))


PIXELS = {"3.weight[1]": "0.weight[0]"}
"""Classes whose units are the pixels of the units of another one, and go where these go."""


def with_pixels(names: Sequence[str], own: Sequence[Any], pixels: int) -> tuple[np.ndarray[Any, Any], ...]:
    """The map of one model in which pixels go along with their units."""
    by_name = dict(zip(names, own, strict=True))
    for name, parent in PIXELS.items():
        if name in by_name:
            by_name[name] = (pixels * by_name[parent][:, None] + np.arange(pixels)).reshape(-1)
    return tuple(by_name.values())


def widths_of(names: Sequence[str], sizes: Sequence[int], change: int, pixels: int) -> tuple[int, ...]:
    return tuple(size + change * (pixels if name in PIXELS else 1) for name, size in zip(names, sizes, strict=True))


class Case:
    """Three networks, random maps of their units, and the same as dense matrices."""

    def __init__(self, name: str, change: int, seed: int = 0) -> None:
        build, shape, self.pixels, self.axes = NETS[name]
        torch.manual_seed(seed)
        self.nets = [build().double() for _ in range(3)]
        self.states = [net.state_dict() for net in self.nets]
        self.x = torch.randn(shape, dtype=torch.float64)
        symmetry, consumed = known(name)
        rng = np.random.default_rng(seed)
        sizes = [c.size for c in symmetry.units]
        widths = widths_of(symmetry.names, sizes, change, self.pixels)
        drawn = [[rng.integers(0, w, size) for size, w in zip(sizes, widths, strict=True)] for _ in self.nets]
        maps = tuple(with_pixels(symmetry.names, own, self.pixels) for own in drawn)
        self.units = UnitMap(symmetry.names, symmetry.layout, consumed, maps, widths)

    def matrix(self, parts: list[str | int], consumes: bool, model: int) -> Tensor:
        """Of zeros and ones: from the units of a model along an axis to the merged ones."""
        blocks = []
        for part in parts:
            if isinstance(part, int):
                blocks.append(torch.eye(part, dtype=torch.float64))
                continue
            number = self.units.names.index(part)
            own = self.units.maps[model][number]
            one = torch.zeros(self.units.widths[number], len(own), dtype=torch.float64)
            for unit, merged in enumerate(own):
                one[merged, unit] = 1
            blocks.append(torch.kron(one, torch.eye(self.pixels if consumes else 1, dtype=torch.float64)))
        return torch.block_diag(*blocks)

    def sums(self, name: str, tensor: Tensor, model: int, produced_only: bool = False) -> tuple[Tensor, Tensor]:
        """A parameter times the matrices of its axes, and ones times those of axes that produce."""
        members = torch.ones_like(tensor)
        for dim, consumes, parts in self.axes.get(name, []):
            if produced_only and consumes:
                continue
            matrix = self.matrix(parts, consumes, model)
            tensor = torch.tensordot(matrix, tensor, ([1], [dim])).movedim(0, dim)
            if consumes:
                shape = [len(matrix) if d == dim else n for d, n in enumerate(members.shape)]
                members = members.select(dim, 0).unsqueeze(dim).expand(shape)
            else:
                members = torch.tensordot(matrix, members, ([1], [dim])).movedim(0, dim)
        return tensor, members


def ratio(total: Tensor, count: Tensor) -> Tensor:
    return torch.where(count > 0, total / count, 0.0)


# -------------------------------------------------------------------------- parameters


@EACH
@WIDTHS
@pytest.mark.parametrize("seed", range(3))
def test_one_model_in_merged_units(name: str, change: int, seed: int) -> None:
    case = Case(name, change, seed)
    for m, state in enumerate(case.states):
        applied = case.units.apply(state, m)
        assert list(applied) == list(state)
        for key, value in state.items():
            torch.testing.assert_close(applied[key], ratio(*case.sums(key, value, m)))


@EACH
@WIDTHS
@pytest.mark.parametrize("weights", [SHARES, None], ids=["weighted", "alike"])
def test_merged_models(name: str, change: int, weights: list[float] | None) -> None:
    case = Case(name, change)
    merged = case.units.merge(case.states, weights)
    assert list(merged) == list(case.states[0])
    for key in merged:
        total: Any = 0
        count: Any = 0
        for m, (state, weight) in enumerate(zip(case.states, weights or [1 / 3] * 3, strict=True)):
            sums, members = case.sums(key, state[key], m)
            total, count = total + weight * sums, count + weight * members
        torch.testing.assert_close(merged[key], ratio(total, count))


@EACH
@WIDTHS
@pytest.mark.parametrize("produced_only", [False, True])
def test_sums_and_members(name: str, change: int, produced_only: bool) -> None:
    case = Case(name, change)
    for m, state in enumerate(case.states):
        for key, value in state.items():
            sums, count = case.units.gather(key, value, m, only="produced" if produced_only else None)
            expected, members = case.sums(key, value, m, produced_only)
            torch.testing.assert_close(sums, expected)
            torch.testing.assert_close(count.expand(sums.shape), members)


@EACH
@WIDTHS
def test_a_model_that_produces_merged_units(name: str, change: int) -> None:
    case = Case(name, change)
    for m, state in enumerate(case.states):
        sums, counts = case.units.produce(state, m)
        assert counts.keys() == case.axes.keys()
        assert list(sums) == list(state)
        for key, value in state.items():
            expected, members = case.sums(key, value, m, produced_only=True)
            torch.testing.assert_close(sums[key], expected)
            if key in counts:
                torch.testing.assert_close(counts[key], members)


@EACH
@WIDTHS
def test_merged_units_back_in_those_of_a_model(name: str, change: int) -> None:
    case = Case(name, change)
    for m in range(3):
        for number, (label, width) in enumerate(zip(case.units.names, case.units.widths, strict=True)):
            value = torch.randn(2, width, 3, dtype=torch.float64)
            back = torch.einsum("bwx,wu->bux", value, case.matrix([label], False, m))
            torch.testing.assert_close(case.units.unmerge(value, 1, number, m), back)
        for key, axes in case.axes.items():
            if len(axes) == 1 and not axes[0][1]:
                merged = case.units.merge(case.states)[key]
                back = torch.tensordot(case.matrix(axes[0][2], False, m).T, merged, ([1], [0]))
                torch.testing.assert_close(case.units.unmerge_tensor(key, merged, m), back)


# -------------------------------------------------------------------------- functions


@pytest.mark.parametrize("name", ["flattened", "concatenated", "shallow"])
@torch.no_grad()
def test_models_that_are_kept_apart_give_the_mean_of_their_outputs(name: str) -> None:
    """One hidden layer with the units of all models: merging is then exact."""
    build, shape = (shallow, (6, 3)) if name == "shallow" else NETS[name][:2]
    torch.manual_seed(0)
    nets, x = [build().double() for _ in range(3)], torch.randn(shape, dtype=torch.float64)
    symmetry, consumed = of(nets[0], x)
    units = UnitMap.of([symmetry.identity()] * 3, symmetry.names, consumed).apart()
    assert units.widths == tuple(3 * c.size for c in symmetry.units)
    for own in zip(*units.maps, strict=True):
        assert sorted(np.concatenate(own).tolist()) == list(range(sum(map(len, own))))
    merged = units.merge([net.state_dict() for net in nets], SHARES)
    expected = sum(w * net(x) for w, net in zip(SHARES, nets, strict=True))
    torch.testing.assert_close(functional_call(nets[0], merged, (x,)), expected, rtol=1e-12, atol=1e-12)
    for m, net in enumerate(nets):  # The units of each are the model, beside units that are 0.
        one = units.apply(net.state_dict(), m)
        torch.testing.assert_close(functional_call(nets[0], one, (x,)), net(x), rtol=1e-12, atol=1e-12)


@EACH
@torch.no_grad()
def test_two_units_of_a_model_that_are_alike_are_merged_without_loss(name: str) -> None:
    case = Case(name, 0)
    net, units = case.nets[0], case.units
    _, _, _, axes = NETS[name]
    for key, along in axes.items():
        for dim, consumes, (label, *_) in along:
            if not consumes:
                assert isinstance(label, str)
                net.state_dict()[key].select(dim, 0).copy_(net.state_dict()[key].select(dim, 1))
    into = with_pixels(units.names, [np.maximum(np.arange(w) - 1, 0) for w in units.widths], case.pixels)
    narrower = widths_of(units.names, units.widths, -1, case.pixels)
    narrow = UnitMap(units.names, units.layout, units.consumed, (into,), narrower)
    merged = narrow.merge([net.state_dict()])
    torch.testing.assert_close(functional_call(net, merged, (case.x,)), net(case.x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("build", [mlp, flattened, Concatenated, "attention"])
@torch.no_grad()
def test_permuted_twins_are_merged_to_the_model(build: Any) -> None:
    torch.manual_seed(0)
    if build == "attention":
        net: nn.Module = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0).eval().double()
        x = torch.randn(3, 4, 8, dtype=torch.float64)
    else:
        net, x = build().double(), torch.randn(6, 2, 3, 3) if build is flattened else torch.randn(6, 3)
        x = x.double()
    symmetry, consumed = of(net, x)
    planted = [symmetry.sample_permutation(torch.Generator().manual_seed(seed)) for seed in range(3)]
    twins = [p.apply(net.state_dict()) for p in planted]
    units = UnitMap.of([p.inverse() for p in planted], symmetry.names, consumed)
    assert units.one_to_one
    for key, value in units.merge(twins, SHARES).items():
        torch.testing.assert_close(value, net.state_dict()[key])
    for m, twin in enumerate(twins):
        assert units.permutation(m) == planted[m].inverse()
        moved = units.apply(twin, m)
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in moved.items())


# -------------------------------------------------------------------------- maps


@EACH
@WIDTHS
def test_one_map_after_another_is_the_product_of_their_matrices(name: str, change: int) -> None:
    first = Case(name, change)
    rng = np.random.default_rng(5)
    widths = tuple(max(width - 1, 1) for width in first.units.widths)
    for models in (1, 3):
        maps = tuple(
            tuple(rng.integers(0, w, own) for own, w in zip(first.units.widths, widths, strict=True))
            for _ in range(models)
        )
        second = UnitMap(first.units.names, first.units.layout, first.units.consumed, maps, widths)
        both = Case(name, change)
        both.units = first.units.then(second)
        assert both.units.widths == widths
        for m in range(3):
            for number, label in enumerate(first.units.names):
                one = torch.zeros(widths[number], first.units.widths[number], dtype=torch.float64)
                one[torch.from_numpy(maps[m % models][number]), torch.arange(one.shape[1])] = 1
                expected = one @ first.matrix([label], False, m)
                assert torch.equal(both.matrix([label], False, m), expected)


def test_a_map_and_its_inverse() -> None:
    net, x = flattened(), torch.randn(6, 2, 3, 3)
    symmetry, consumed = of(net, x)
    planted = [symmetry.sample_permutation(torch.Generator().manual_seed(seed)) for seed in range(2)]
    units = UnitMap.of(planted, symmetry.names, consumed)
    assert units.moving
    still = UnitMap.of([symmetry.identity()] * 2, symmetry.names, consumed)
    assert units.then(units.inverse()) == units.inverse().then(units) == still
    assert not still.moving
    for m, p in enumerate(planted):
        assert units.inverse().permutation(m) == p.inverse()


def test_what_moves() -> None:
    units = Case("concatenated", 0).units
    still = tuple(np.arange(width) for width in units.widths)
    swapped = (still[0], still[1][::-1].copy())
    assert UnitMap(units.names, units.layout, units.consumed, (still, still), units.widths).moving == frozenset()
    assert UnitMap(units.names, units.layout, units.consumed, (still, swapped), units.widths).moving == {1}
    wider = UnitMap(units.names, units.layout, units.consumed, (still,), (units.widths[0] + 1, units.widths[1]))
    assert (wider.moving, wider.one_to_one) == ({0}, False)
    assert Case("mlp", 0).units.one_to_one is False


def test_models_without_classes_keep_their_units() -> None:
    states = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}]
    units = UnitMap.still(2)
    assert units.merge(states, [0.75, 0.25])["w"].tolist() == [1.75]
    assert units.apply(states[1], 1)["w"] is states[1]["w"]
    assert (units.moving, units.one_to_one, str(units)) == (frozenset(), True, "")


def test_it_is_printed_by_classes() -> None:
    rows = (np.array([0, 0, 1]), np.array([0, 1, 1])), (np.array([0, 1, 2]), np.array([0, 1, 1]))
    units = UnitMap(("a", "b"), (), frozenset(), rows, (3, 2))
    assert str(units).splitlines() == [
        "a: 3 + 3 units of 2 models -> 3 merged units, 1 with several units of one model",
        "b: 3 + 3 units of 2 models -> 2 merged units, 1 with several units of one model",
    ]
    assert str(UnitMap(("a",), (), frozenset(), ((np.array([0]),),), (1,))) == "a: 1 unit -> 1 merged unit"


# -------------------------------------------------------------------------- tensors of all kinds


def test_dtypes_names_and_tensors_that_do_not_move() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval().bfloat16()
    symmetry, consumed = of(net, torch.randn(2, 3, dtype=torch.bfloat16))
    maps = ((np.array([0, 0, 1, 3]),), (np.array([3, 1, 2, 2]),))
    units = UnitMap(symmetry.names, symmetry.layout, consumed, maps, (4,))
    state, other = net.state_dict(), {k: v + 1 for k, v in net.state_dict().items()}
    merged = units.merge([state, other])
    assert {k: v.dtype for k, v in merged.items()} == {k: v.dtype for k, v in state.items()}
    assert merged._metadata == state._metadata  # type: ignore[attr-defined]
    assert merged["1.num_batches_tracked"] == 0
    assert merged["1.num_batches_tracked"] is not state["1.num_batches_tracked"]
    expected = torch.stack([state["0.bias"][:2].float().mean(), other["0.bias"][1].float()])
    torch.testing.assert_close(merged["0.bias"][1], (state["0.bias"][2].float() + expected[1]).div(2).bfloat16())
    torch.testing.assert_close(merged["0.bias"][0], expected[0].bfloat16())
    nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).load_state_dict(merged)


def test_what_all_models_share_is_left_bit_for_bit() -> None:
    case = Case("mlp", 0)
    still = UnitMap(
        case.units.names,
        case.units.layout,
        case.units.consumed,
        (tuple(np.arange(width) for width in case.units.widths),) * 3,
        case.units.widths,
    )
    states = [{k: v.float() for k, v in case.states[0].items()} for _ in range(3)]
    merged = still.merge(states, SHARES)
    assert all(torch.equal(value, states[0][key]) and value is not states[0][key] for key, value in merged.items())


def test_names_of_one_parameter_have_one_tensor() -> None:
    layers = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)]
    net = nn.Sequential(*layers)
    net[4].weight = net[2].weight
    symmetry, consumed = of(net, torch.randn(2, 3))
    planted = [symmetry.sample_permutation(torch.Generator().manual_seed(seed)) for seed in range(2)]
    merged = UnitMap.of(planted, symmetry.names, consumed).merge([net.state_dict()] * 2)
    assert merged["2.weight"] is merged["4.weight"]
    assert not torch.equal(merged["2.weight"], net[2].weight)


class Lazy(Mapping[str, Tensor]):
    """Notes what is read."""

    def __init__(self, state: Mapping[str, Tensor], log: list[str]) -> None:
        self.state, self.log = state, log

    def __getitem__(self, name: str) -> Tensor:
        self.log.append(name)
        return self.state[name]

    def __contains__(self, name: object) -> bool:
        return name in self.state

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


@WIDTHS
def test_tensors_are_read_one_name_at_a_time(change: int) -> None:
    case, log = Case("mlp", change), list[str]()
    case.units.apply(Lazy(case.states[1], log), 1)
    assert log == list(case.states[1])
    log.clear()
    case.units.merge([Lazy(state, log) for state in case.states])
    assert log == [name for name in case.states[0] for _ in range(3)]


# -------------------------------------------------------------------------- written and read


@EACH
@WIDTHS
def test_what_is_written_is_read(name: str, change: int, tmp_path: Path) -> None:
    case = Case(name, change)
    read = UnitMap.from_json(case.units.to_json())
    assert read == case.units and hash(read) == hash(case.units)
    text = case.units.to_json(tmp_path / "units.json")
    assert (tmp_path / "units.json").read_text() == text
    for path in (tmp_path / "units.json", str(tmp_path / "units.json")):
        again = UnitMap.from_json(path)
        assert again == case.units
        for key, value in again.merge(case.states).items():
            assert torch.equal(value, case.units.merge(case.states)[key])
    assert Case(name, change, seed=1).units != case.units
    assert case.units != "units"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no map of units that fxmerge wrote"),
        ("{}", r"no map of units that fxmerge wrote: KeyError\('version'\)"),
        ("no/such/file", "No such file"),
        ('{"version": 7}', "has version 7; this fxmerge reads version 1"),
        ('{"version": 1, "names": 3}', "no map of units"),
        (UnitMap.still(2).to_json().replace('"names": []', '"names": ["a"]'), "There are 1 names for 0 classes"),
    ],
)
def test_what_is_no_map_is_refused(text: str, message: str) -> None:
    with pytest.raises(fxmerge.UnitMapError, match=message):
        UnitMap.from_json(text)


# -------------------------------------------------------------------------- errors


def test_maps_that_do_not_fit_are_refused() -> None:
    def units(maps: Any, widths: tuple[int, ...] = (2,), names: tuple[str, ...] = ("a",)) -> UnitMap:
        return UnitMap(names, (), frozenset(), maps, widths)

    one = np.array([0, 1])
    with pytest.raises(fxmerge.UnitMapError, match="one map for each of the 1 classes"):
        units(((one, one),))
    with pytest.raises(fxmerge.UnitMapError, match="one map for each of the 1 classes"):
        units(())
    with pytest.raises(fxmerge.UnitMapError, match="There are 2 names for 1 classes"):
        units(((one,),), names=("a", "b"))
    for wrong, said in ((np.array([0, 2]), "0 to 2"), (np.array([-1, 0]), "-1 to 0")):
        with pytest.raises(fxmerge.UnitMapError, match=f"Class 'a' of model 1 goes into units {said}; there are 2"):
            units(((one,), (wrong,)))


def test_maps_that_do_not_follow_each_other_are_refused() -> None:
    mlp_units, other = Case("mlp", 0).units, Case("mlp", 2).units
    with pytest.raises(fxmerge.UnitMapError, match=r"\(7, 6\) merged units cannot be .* 3 models with \(5, 4\)"):
        other.then(mlp_units)
    two = UnitMap(other.names, other.layout, other.consumed, other.maps[:2], other.widths)
    with pytest.raises(fxmerge.UnitMapError, match="cannot be followed by one of 2 models"):
        mlp_units.then(two)


def test_what_merges_units_has_no_inverse() -> None:
    for change in (0, 2):
        units = Case("mlp", change).units
        with pytest.raises(fxmerge.UnitMapError, match="has no inverse"):
            units.inverse()
        with pytest.raises(fxmerge.UnitMapError, match="is no permutation"):
            units.permutation(0)


def test_states_that_do_not_fit_are_refused() -> None:
    case = Case("mlp", 0)
    with pytest.raises(fxmerge.UnitMapError, match="of 3 models; 2 states and 2 weights were given"):
        case.units.merge(case.states[:2])
    with pytest.raises(fxmerge.UnitMapError, match="of 3 models; 3 states and 2 weights were given"):
        case.units.merge(case.states, [0.5, 0.5])
    without = OrderedDict((k, v) for k, v in case.states[0].items() if k != "2.weight")
    for call in (lambda: case.units.apply(without), lambda: case.units.merge([without, *case.states[1:]])):
        with pytest.raises(fxmerge.UnitMapError, match=r"no parameter '2\.weight', which has units of the map"):
            call()
    with pytest.raises(fxmerge.UnitMapError, match=r"no tensor '2\.weight'; give the state dicts of models of one"):
        case.units.merge([*case.states[1:], without])
    other = case.states[0] | {"2.bias": torch.zeros(7)}
    with pytest.raises(fxmerge.UnitMapError, match=r"'2\.bias' has shape \(7,\), but the map is of shape \(4,\)"):
        case.units.apply(other)


def test_there_are_no_more_units_of_every_row() -> None:
    """The input channels of a grouped convolution are units of its rows."""
    net = nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 1))
    symmetry, consumed = of(net, torch.randn(2, 2, 3, 3))
    (rows,) = (axis for axis in symmetry.layout if len(axis.dims) > 1 and axis.dim == 1)
    number = rows.roles[0][0]
    planted = symmetry.sample_permutation(torch.Generator().manual_seed(0))
    units = UnitMap.of([planted, symmetry.identity()], symmetry.names, consumed)
    merged = units.merge([net.state_dict()] * 2)
    for key, value in planted.apply(net.state_dict()).items():
        torch.testing.assert_close(merged[key], (value + net.state_dict()[key]) / 2)
    wider = tuple(width + (n == number) for n, width in enumerate(units.widths))
    message = r"Axis 1 of '2\.weight' has units of its own in every row, of which there cannot be more"
    with pytest.raises(fxmerge.UnitMapError, match=message):
        UnitMap(units.names, units.layout, consumed, units.maps, wider).merge([net.state_dict()] * 2)
    above = {n for axis in symmetry.layout if axis.parameter == "2.weight" and axis.dim == 0 for n, _ in axis.roles}
    wider = tuple(width + (n in above) for n, width in enumerate(units.widths))
    message = r"Rows of '2\.weight' have units of their own along dimension 1: their number cannot change"
    with pytest.raises(fxmerge.UnitMapError, match=message):
        UnitMap(units.names, units.layout, consumed, units.maps, wider).merge([net.state_dict()] * 2)
