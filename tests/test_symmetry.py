import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge


def test_one_line_for_every_class_and_pin() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    assert str(fxmerge.find_symmetry(net, (torch.zeros(1, 3, 2, 2),))).splitlines() == [
        "a: 3 units, 3! | blocks of other units",
        "b: 6 units in a, 2!^3, R+^6 | "
        "0.weight((a b) _ _ _), 0.bias((a b)), 1.weight((a b)), 1.bias((a b)), ... (5 axes)",
        "pinned: 0.weight[1], 3 indices: conv2d",
        "pinned: 3.weight[0], 2 indices: output",
        "pinned: 3.bias[0], 2 indices: output",
    ]


def test_classes_and_graph() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    symmetry = fxmerge.find_symmetry(net, (torch.zeros(1, 3, 2, 2),))
    blocks, channels = symmetry.classes[:2]
    assert (blocks.size, blocks.structure, blocks.axes) == (3, "free", ())
    assert (channels.size, channels.structure, channels.parents) == (6, "nested", (blocks.name,))
    assert [(a.parameter, a.dim) for a in channels.axes] == [
        ("0.weight", 0),
        ("0.bias", 0),
        ("1.weight", 0),
        ("1.bias", 0),
        ("3.weight", 1),
    ]
    assert list(symmetry.graph.edges) == [(channels.name, blocks.name)]
    assert symmetry.graph.nodes[channels.name]["size"] == 6
    assert {c.why for c in symmetry.classes[2:]} == {"conv2d", "output"}


@torch.library.custom_op("fxmerge_tests::single", mutates_args=())
def single(x: Tensor) -> Tensor:
    """Refuses double precision, so that it cannot be probed."""
    if x.dtype != torch.float32:
        raise ValueError("float32 only")
    return x.softmax(-1)


@torch.library.custom_op("fxmerge_tests::center", mutates_args=())
def center(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


for op in (single, center):
    op.register_fake(torch.empty_like)


class Applies(nn.Module):
    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op
        self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = getattr(torch.ops.fxmerge_tests, self.op)(self.a(x))
        out: Tensor = self.c(torch.relu(self.b(h)))
        return out


def test_an_op_that_cannot_be_probed_pins_what_it_touches_and_is_named() -> None:
    symmetry = fxmerge.find_symmetry(Applies("single"), (torch.randn(4, 3),))
    assert symmetry.unknown == {"fxmerge_tests.single.default": 1}
    assert [c.name for c in symmetry.classes if c.structure != "pinned"] == ["b.weight[0]"]
    assert "pinned: a.weight[0], 5 indices: single: no rule for fxmerge_tests.single.default" in str(symmetry)
    assert "no rule: fxmerge_tests.single.default (1x)" in str(symmetry)


def test_an_op_without_a_rule_is_probed_and_named() -> None:
    model, x = Applies("center"), torch.randn(4, 3)
    symmetry = fxmerge.find_symmetry(model, (x,))
    assert symmetry.unknown == {}
    assert symmetry.probed == {"fxmerge_tests.center.default": 1}
    assert sorted(c.size for c in symmetry.classes if c.structure != "pinned") == [4, 5]
    assert "probed: fxmerge_tests.center.default (1x)" in str(symmetry)
    assert symmetry.verify(model, (x,)).demoted == ()


def test_an_op_without_a_rule_is_written_out_where_torch_can() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Hardswish(), nn.Linear(5, 2))
    symmetry = fxmerge.find_symmetry(model, (torch.randn(4, 3),))
    assert symmetry.unknown == {}
    assert symmetry.classes[0].size == 5


def broken_rule() -> Any:
    """A rule that fails, as one of the package's own."""

    def broken(at: Any, *args: Any) -> Any:
        raise ZeroDivisionError("a mistake in a rule")

    broken.__module__ = fxmerge.symmetry.rules.__name__
    return broken


def test_a_rule_that_fails_pins_what_its_op_touches_and_is_named_in_one_sentence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = broken_rule()
    with caplog.at_level(logging.DEBUG, logger="fxmerge.symmetry"):
        symmetry = fxmerge.find_symmetry(
            Applies("single"), (torch.randn(4, 3),), rules={"fxmerge_tests::single": broken}
        )
    assert symmetry.unknown == {"fxmerge_tests.single.default": 1}
    assert "pinned: a.weight[0], 5 indices: single: no labels for fxmerge_tests.single.default" in str(symmetry)
    (warned,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert (
        warned.getMessage() == "single (fxmerge_tests.single.default) cannot be labelled, so what it reads is pinned."
    )
    assert warned.exc_info is None
    assert any(r.exc_info and isinstance(r.exc_info[1], ZeroDivisionError) for r in caplog.records)


def test_an_op_whose_rule_fails_is_probed(caplog: pytest.LogCaptureFixture) -> None:
    broken = broken_rule()
    symmetry = fxmerge.find_symmetry(Applies("center"), (torch.randn(4, 3),), rules={"fxmerge_tests::center": broken})
    assert symmetry.probed == {"fxmerge_tests.center.default": 1}
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


class Scaled(nn.Module):
    """Multiplies its units by a constant that less than single precision makes ones."""

    def __init__(self, stored: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.stored = stored
        self.table: Tensor
        self.register_buffer("table", torch.tensor([0.0, 0.5, 1.0, 2.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        places = self.table if self.stored else torch.arange(4).to(x.dtype) / 2
        turned = (1 + 1e-4 * places).cos().to(x.dtype)
        return self.b(torch.relu(self.a(x) * turned))  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_constants_of_low_precision_are_labelled_as_in_single_precision(
    dtype: torch.dtype, stored: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Scaled(stored).to(dtype), torch.randn(5, 3, dtype=dtype)
    symmetry = fxmerge.find_symmetry(model, (x,))
    assert symmetry.log_order() == fxmerge.find_symmetry(Scaled(stored), (x.float(),)).log_order() == 0
    assert symmetry.verify(model, (x,), trials=3).demoted == ()
    assert [record for record in caplog.records if record.name.startswith("fxmerge")] == []


def test_parameters_that_the_example_does_not_use_do_not_count() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(9, 4), nn.Embedding(50, 4)
            self.unused, self.out = nn.Linear(4, 7), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.out(torch.relu(self.tokens(ids) + self.places(torch.arange(ids.shape[1]))))
            return out

    symmetry = fxmerge.find_symmetry(Positions(), (torch.randint(9, (2, 6)),))
    assert [c.size for c in symmetry.classes if c.structure != "pinned"] == [4]
    assert any("not used for the example inputs" in c.why for c in symmetry.classes)


@pytest.mark.parametrize("names", ["demoted", "error"])
def test_nothing_is_claimed_before_verification(names: str) -> None:
    symmetry = fxmerge.find_symmetry(nn.Linear(2, 2), (torch.zeros(1, 2),))
    assert not getattr(symmetry, names)


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.parametrize("pin", [[("2.weight", 0)], [("2.weight", -2)], ["2.weight[0]"], ["2.bias"], "2.bias"])
def test_a_pinned_axis_stays_with_all_that_is_tied_to_it(pin: list[str | tuple[str, int]]) -> None:
    symmetry = fxmerge.find_symmetry(stack(), (torch.zeros(1, 3),), pin=pin)
    assert symmetry.names == ("0.weight[0]",)
    assert {("2.weight", 0), ("2.bias", 0), ("4.weight", 1)} == {
        axis for axis, reasons in symmetry.stuck.items() if "on request" in reasons
    }


def test_a_pattern_pins_every_axis_of_what_it_names() -> None:
    assert fxmerge.find_symmetry(stack(), (torch.zeros(1, 3),), pin=["2.*"]).names == ()
    assert fxmerge.find_symmetry(stack(), (torch.zeros(1, 3),), pin=["?.bias"]).names == ()
    assert len(fxmerge.find_symmetry(stack(), (torch.zeros(1, 3),), pin=["4.bias"]).names) == 2


def test_a_tied_parameter_is_pinned_by_any_of_its_names() -> None:
    net = nn.Sequential(nn.Embedding(5, 3), nn.ReLU(), nn.Linear(3, 5, bias=False))
    net[2].weight = net[0].weight
    for name in ("0.weight", "2.weight"):
        symmetry = fxmerge.find_symmetry(net, (torch.zeros(2, 4, dtype=torch.int64),), pin=[(name, 1)])
        assert symmetry.stuck["0.weight", 1]["on request"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("pin", "sentence"),
    [
        (["2.wieght"], "pin names no parameter: '2.wieght'. Did you mean '2.weight'"),
        (["layer*"], "There are '0.weight', '0.bias', '2.weight', '2.bias', '4.weight' and 1 more"),
        ([("2.bias", 1)], r"pin names dimension 1 of '2.bias', which has 1 \(shape \(4,\)\)"),
        ([3], "pin holds 3; give a parameter's name"),
    ],
)
def test_a_wrong_pin_is_told_in_a_sentence(pin: list[str | tuple[str, int]], sentence: str) -> None:
    with pytest.raises(fxmerge.OptionError, match=sentence):
        fxmerge.find_symmetry(stack(), (torch.zeros(1, 3),), pin=pin)


@torch.library.custom_op("fxmerge_tests::normalize", mutates_args=())
def normalize(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@normalize.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Normalizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(normalize(self.a(x)))
        return out


@pytest.mark.parametrize(
    "op",
    ["fxmerge_tests::normalize", torch.ops.fxmerge_tests.normalize, torch.ops.fxmerge_tests.normalize.default],
    ids=["name", "packet", "overload"],
)
def test_a_rule_of_this_call_only(op: Any) -> None:
    model, x = Normalizes(), torch.randn(4, 3)

    def rule(at: Any, x: Any) -> Any:
        return at.join(x, at.reduce(x, [-1], keepdim=True))

    symmetry = fxmerge.find_symmetry(model, (x,), rules={op: rule})
    assert symmetry.names == ("a.weight[0]",)
    assert symmetry.unknown == symmetry.probed == {}
    assert symmetry.verify(model, (x,)).demoted == ()
    assert fxmerge.find_symmetry(model, (x,)).probed == {"fxmerge_tests.normalize.default": 1}


def test_a_rule_of_this_call_comes_before_the_registered_one() -> None:
    def pins(at: Any, x: Any, *args: Any) -> Any:
        return at.pin(x)

    symmetry = fxmerge.find_symmetry(stack(), (torch.zeros(1, 3),), rules={"relu": pins})
    assert symmetry.names == ()
    assert "relu" in symmetry.stuck["0.weight", 0]
    assert len(fxmerge.find_symmetry(stack(), (torch.zeros(1, 3),)).names) == 2


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ({"aten::rleu": print}, "there is no such op. Did you mean"),
        ({3: print}, "rules holds a rule for 3; give an op"),
        ({"relu": 3}, "rules holds 3 for 'relu'; give a function"),
    ],
)
def test_a_wrong_rule_is_told_in_a_sentence(rules: Any, sentence: str) -> None:
    with pytest.raises(fxmerge.OptionError, match=sentence):
        fxmerge.find_symmetry(stack(), (torch.zeros(1, 3),), rules=rules)


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (lambda at, x: 1 / 0, "raises ZeroDivisionError: division by zero"),
        (lambda at: None, "raises TypeError"),
        (lambda at, x: None, r"gives None, and the op's output has shape \(4, 5\)"),
        (lambda at, x: at.reduce(x, [-1]), r"gives labels of shape \(4,\), and the op's output has shape \(4, 5\)"),
    ],
)
def test_a_faulty_rule_is_an_error_that_names_it(faulty: Any, message: str) -> None:
    where = r"The rule for fxmerge_tests\.center\.default at graph node 'center' "
    with pytest.raises(fxmerge.OptionError, match=where + message):
        fxmerge.find_symmetry(Applies("center"), (torch.randn(4, 3),), rules={"fxmerge_tests::center": faulty})


def test_a_rule_may_leave_calls_to_others() -> None:
    rules = {"fxmerge_tests::center": lambda at, x: NotImplemented}
    assert fxmerge.find_symmetry(Applies("center"), (torch.randn(4, 3),), rules=rules).probed
