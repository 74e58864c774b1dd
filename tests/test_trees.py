"""Tensors inside of objects are inputs and outputs, on every capture route; what cannot be opened is refused."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxmerge
from fxmerge.program.capture import capture_program
from fxmerge.program.trees import input_names, open_classes
from tests.slow import crossed


class Kind(Enum):
    SUM = 1
    MEAN = 2


@dataclass
class Plain:
    y: Tensor
    note: str = "none"


@dataclass(frozen=True)
class Frozen:
    inner: Plain
    kind: Kind = Kind.SUM
    dtype: torch.dtype = torch.float32
    rest: list[Tensor] = field(default_factory=list)


@dataclass
class Derived:
    y: Tensor
    double: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.double = 2 * self.y

    @cached_property
    def total(self) -> Tensor:
        return self.y.sum()


@dataclass(slots=True)
class Slotted:
    y: Tensor
    count: int = 0


class Keyed(dict[str, Tensor]):
    """A dict with attributes for keys."""

    def __getattr__(self, name: str) -> Tensor:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class Pair(NamedTuple):
    y: Tensor
    other: Tensor


MAKE: dict[str, Callable[[Tensor], Any]] = {
    "plain": Plain,
    "frozen": lambda y: Frozen(Plain(y, "inside"), Kind.MEAN, rest=[y + 1]),
    "derived": Derived,
    "slotted": lambda y: Slotted(y, 3),
    "keyed": lambda y: Keyed(y=y, other=2 * y),
    "pair": lambda y: Pair(y, 2 * y),
    "nested in a dict": lambda y: {"found": [Plain(y)]},
}

ROUTES = {
    "symbolic_trace": lambda x: x,
    "torch.export": lambda x: x + 0 if x.shape[1] > 2 else x,
    "whole": lambda x: x + 0 if bool(x.sum() > -1e9) else x,
}


class Returns(nn.Module):
    def __init__(self, make: str, route: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 4)
        self.make, self.route = make, route

    def forward(self, x: Tensor) -> Any:
        return MAKE[self.make](self.b(torch.relu(self.a(ROUTES[self.route](x)))))


class Takes(nn.Module):
    def __init__(self, route: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 4)
        self.route = route

    def forward(self, batch: Any) -> Tensor:
        x = batch.inner.y + 3 * batch.rest[0]
        out: Tensor = self.b(torch.relu(self.a(ROUTES[self.route](x))))
        if self.route == "symbolic_trace":
            return out
        return out if batch.kind is Kind.SUM else -out


@pytest.mark.parametrize(("make", "route"), crossed(MAKE, ROUTES))
def test_outputs_inside_of_objects(make: str, route: str) -> None:
    torch.manual_seed(0)
    model, x = Returns(make, route), torch.randn(8, 3)
    program = capture_program(model, (x,))
    # Symbolic tracing writes objects as calls of their class: not of one that takes no value for a field, or is a dict.
    untraced = route == "symbolic_trace" and make in ("derived", "keyed")
    assert program.route == ("torch.export" if untraced else route)
    got, expected = program.module(x), model(x)
    assert type(got) is type(expected)
    assert pytree.tree_structure(got) == pytree.tree_structure(expected)
    assert len(pytree.tree_leaves(got)) == len(pytree.tree_leaves(expected)) >= 1
    symmetry = fxmerge.find_symmetry(model, (x,)).verify(model, (x,))
    assert symmetry.names and not symmetry.demoted
    permuted = Returns(make, route)
    permuted.load_state_dict(symmetry.sample_permutation(torch.Generator().manual_seed(0)).apply(model.state_dict()))
    for a, b in zip(pytree.tree_leaves(permuted(x)), pytree.tree_leaves(expected), strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b)


def test_a_wrong_group_shows_inside_of_an_object() -> None:
    """Verification compares what is inside: with a model whose units are tied, the group of the free one fails."""

    class Tied(Returns):
        def forward(self, x: Tensor) -> Any:
            return Plain(self.b(torch.relu(self.a(x)) * torch.arange(6)))

    x = torch.randn(8, 3)
    symmetry = fxmerge.find_symmetry(Returns("plain", "symbolic_trace"), (x,))
    assert symmetry.verify(Tied("plain", "symbolic_trace"), (x,)).demoted == tuple(symmetry.names)


@pytest.mark.parametrize("route", ROUTES)
def test_inputs_inside_of_objects(route: str) -> None:
    def batch() -> Frozen:
        return Frozen(Plain(torch.randn(16, 3)), rest=[torch.randn(16, 3)])

    torch.manual_seed(0)
    a, b, c, batches = Takes(route), Takes(route), Takes(route), [batch() for _ in range(4)]
    merged = fxmerge.merge(a, b, batches)
    assert fxmerge.report(merged).route == route
    c.load_state_dict(merged.state_dict())
    for one in (batches[1], batch()):
        torch.testing.assert_close(merged(one), c(one))


def test_what_an_object_derives_when_asked_is_no_part_of_it() -> None:
    class Net(nn.Linear):
        def forward(self, batch: Derived) -> Tensor:  # type: ignore[override]
            return super().forward(batch.y) + batch.total

    batches = [Derived(torch.randn(8, 3)) for _ in range(3)]
    assert batches[0].total.ndim == 0  # Only the first has been asked.
    merged = fxmerge.merge(Net(3, 2), Net(3, 2), batches)
    assert merged(batches[1]).shape == (8, 2)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Frozen(Plain(torch.randn(16, 3)), kind=Kind.MEAN, rest=[torch.randn(16, 3)]), "structured differently"),
        (Frozen(Plain(torch.randn(16, 3), "other"), rest=[torch.randn(16, 3)]), r"'batch\.inner\.note' .* is 'other'"),
        (Frozen(Plain(torch.randn(16, 5)), rest=[torch.randn(16, 3)]), r"'batch\.inner\.y' .* \(16, 5\)"),
    ],
)
def test_batches_that_differ_in_what_is_fixed(other: Frozen, message: str) -> None:
    first = Frozen(Plain(torch.randn(16, 3)), rest=[torch.randn(16, 3)])
    with pytest.raises(fxmerge.LoaderError, match=message):
        fxmerge.merge(Takes("torch.export"), Takes("torch.export"), [first, other])


class Closed:
    def __init__(self, y: Tensor) -> None:
        self.y = y


def _generated(y: Tensor) -> Any:
    yield y


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda y: torch.distributions.Normal(y, 1.0), "Normal"),
        (Closed, "Closed"),
        (lambda y: {y}, "set"),
        (_generated, "generator"),
        (lambda y: Plain(Closed(y)), "Closed"),  # type: ignore[arg-type]
    ],
)
def test_outputs_that_cannot_be_opened(make: Any, name: str) -> None:
    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return make(super().forward(x))

    model, x = Net(3, 2), torch.randn(4, 3)
    fine = nn.Linear(3, 2)
    for call in (
        lambda: fxmerge.find_symmetry(model, (x,)),
        lambda: fxmerge.explain(model, (x,)),
        lambda: fxmerge.capture(model, (x,)),
        lambda: fxmerge.merge(model, Net(3, 2), [x]),
        lambda: fxmerge.merge(fine, model, [x]),
        lambda: fxmerge.align(model, to=Net(3, 2), example=x),
        lambda: fxmerge.find_symmetry(fine, (x,)).verify(model, (x,)),
    ):
        with pytest.raises(fxmerge.CaptureError, match=rf"Net returns a {name}, .*Return a tensor"):
            call()


def test_inputs_that_cannot_be_opened() -> None:
    class Net(nn.Linear):
        def forward(self, batch: Any) -> Tensor:
            return super().forward(batch.y)

    model, batch = Net(3, 2), Closed(torch.randn(4, 3))
    with pytest.raises(fxmerge.CaptureError, match="Net is given a Closed"):
        fxmerge.find_symmetry(model, (batch,))
    with pytest.raises(fxmerge.LoaderError, match=r"A batch holds a Closed, .* Pass inputs="):
        fxmerge.merge(model, Net(3, 2), [batch], inputs=lambda batch: ((batch,), {}))
    with pytest.raises(fxmerge.LoaderError, match=r"A batch holds a ndarray, .*torch\.from_numpy"):
        fxmerge.merge(model, Net(3, 2), [{"batch": batch.y.numpy()}])


def test_attrs_classes() -> None:
    made = attrs.make_class("Made", ["y"])(torch.ones(2))
    open_classes(made, "It is", fxmerge.FxmergeError, "")
    assert torch.equal(pytree.tree_leaves(made)[0], torch.ones(2))


def test_names_of_inputs() -> None:
    def forward(x: Any, *rest: Any, graph: Any = None) -> None: ...

    given = (Pair(torch.ones(1), torch.ones(1)), torch.ones(1), [torch.ones(1)])
    by_name = {"graph": {"edges": Slotted(torch.ones(1))}}
    open_classes((given, by_name), "They are", fxmerge.FxmergeError, "")
    names = input_names(forward, given, by_name)
    assert names == ["x.y", "x.other", "rest_0", "rest_1[0]", "graph['edges'].y", "graph['edges'].count"]
