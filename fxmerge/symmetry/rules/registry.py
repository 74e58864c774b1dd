"""One registry of propagation rules: from an op's name to the function that labels its output."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from fxmerge.symmetry import weighing
from fxmerge.symmetry.columns import Shape, core, spread, support
from fxmerge.symmetry.deferred import Deferred
from fxmerge.symmetry.labels import Labels, constant, join, move, pin, reduce
from fxmerge.symmetry.mixing import Mix
from fxmerge.symmetry.units import UnitGraph
from fxmerge.symmetry.weighing import Coefficients

Value = Any
"""What a node holds during propagation: `Labels`, a constant (tensor or scalar), or a sequence of these."""


@dataclass(frozen=True)
class Site:
    """Where a rule is applied: the unit graph it writes to, the node's name and op, and the shape of its output.

    Where the op has several outputs, `shape` is a list of shapes, and `used` tells which of them are read. `node` is
    the node itself, if the op is one of a graph. `meets` tells of every parameter that the op multiplies whether it
    meets anything but zeros.
    """

    units: UnitGraph
    name: str
    target: Any
    shape: Any
    used: frozenset[int] = frozenset()
    node: fx.Node | None = None
    meets: dict[str, bool] = field(default_factory=dict)

    def is_zero(self, factors: Sequence[Labels | Deferred | Tensor | float]) -> bool:
        """Whether one of some factors is a constant of zeros, so that their product does not depend on the others."""
        zero = any(is_zero(x) for x in factors)
        for x in factors:
            if isinstance(x, Labels) and x.parameter is not None:
                self.meets[x.parameter] = self.meets.get(x.parameter, False) or not zero
        return zero

    def labels(self, value: Labels | Deferred | Tensor | float) -> Labels:
        """The labels of an operand, which may be a constant."""
        if isinstance(value, Labels):
            return value
        if isinstance(value, Deferred):
            return value.settle(self.units, self.name)
        return constant(value, self.units) if isinstance(value, Tensor) else Labels(())

    def mix(self, what: Mix, *operands: Labels | Tensor | float, **how: Any) -> None:
        """Records what the op says of changes of basis: see `fxmerge.symmetry.mixing`."""
        labels = (constant(x) if isinstance(x, Tensor) else x for x in operands)
        self.units.record(
            what, [x if isinstance(x, Labels) else Labels((), uniform=frozenset()) for x in labels], how, self.name
        )

    def weigh(self, what: Mix, *operands: Labels | Tensor | float, **how: Any) -> None:
        """Records what the op says of signs and positive scales: see `fxmerge.symmetry.weighing`."""
        if self.units.weighs and any(isinstance(x, Labels) and x.columns for x in operands):
            labels = [x if isinstance(x, Labels) else Labels(getattr(x, "shape", ())) for x in operands]
            self.units.record(what, labels, how, self.name)

    def product(
        self, result: Labels, *factors: Labels | Tensor | float, signs: Coefficients, scales: Coefficients
    ) -> Labels:
        """A result under new names where its signs and scales may be others than those of what it was computed from:
        see `fxmerge.symmetry.weighing.product`, which this records.

        Arguments:
            result: with the units of its factors.
            factors: of the shape of the result, or with further dimensions.
        """
        if not self.units.weighs:
            return result
        labels = [x if isinstance(x, Labels) else Labels(()) for x in factors]
        alone = {p for x, *both in zip(labels, signs, scales, strict=True) if x.columns for p in both} <= {1, None}
        changes = [s is not None or p is not None for s, p in zip(signs, scales, strict=True)]
        supports = [[(c, set(support(c))) for c in x.columns] for x in labels]

        def is_of_one(column: Tensor) -> bool:
            """Whether the units of a column are under the names of the only factor with units there that may change."""
            dims = set(support(column))
            along = [[c for c, own in columns if own <= dims] for columns in supports]
            if sum(map(bool, along)) < 2:
                return True
            changing = [columns for columns, may in zip(along, changes, strict=True) if may]
            if sum(any(map(self._on_axis, columns)) for columns in changing) > 1:
                return False
            return len(changing) == len(along) or any(_is_equal(c, column) for columns in changing for c in columns)

        after = result
        # A parameter keeps its names, so that it is known which of its entries are used.
        if result.parameter is None and not (alone and all(map(is_of_one, result.columns))):
            named = (c if alone and is_of_one(c) else self._renamed(c) for c in result.columns)
            after = replace(result, columns=tuple(named))
        self.weigh(weighing.product, after, *labels, signs=signs, scales=scales)
        return after

    def _on_axis(self, column: Tensor) -> bool:
        """Whether the units of a column are those of an axis, not blocks: what has no axis has no exponent."""
        first = core(column, support(column)).reshape(-1)[:1].numpy()
        return str(self.units.origins[int(self.units.origin(first)[0])][0]) == "axis"

    def _renamed(self, column: Tensor) -> Tensor:
        dims = support(column)
        ids = self.units.rename(core(column, dims).numpy())
        return spread(torch.from_numpy(ids), tuple(column.shape), dims)

    def join(self, x: Labels, y: Labels | Tensor | None, shape: Shape | None = None) -> Labels:
        """`fxmerge.symmetry.labels.join` after broadcasting both to `shape` (by default that of x)."""
        if y is None:
            return x
        shape = x.shape if shape is None else shape
        return join(self.units, x.expand(shape), self.labels(y).expand(shape), self.name)

    def reduce(self, x: Labels, dims: Iterable[int], *, keepdim: bool = False) -> Labels:
        """The labels after a symmetric reduction (sum, mean, max, norm) over `dims`."""
        return reduce(self.units, x, dims, self.name, keepdim=keepdim)

    def move(self, x: Labels, op: Callable[[Tensor], Tensor]) -> Labels:
        """The labels after a data movement, which is run on the columns themselves."""
        return move(self.units, x, op, self.shape, self.name)

    def pin(self, x: Labels, dims: Iterable[int] | None = None) -> Labels:
        """The labels after an op that depends on the order of positions along `dims` (by default all)."""
        return pin(self.units, x, self.name, dims)


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return support(a) == support(b) and torch.equal(core(a, support(a)), core(b, support(b)))


def is_zero(x: Labels | Deferred | Tensor | float) -> bool:
    """Whether an operand is a constant of zeros."""
    return not (x.is_meta or bool(x.any())) if isinstance(x, Tensor) else isinstance(x, (int, float)) and x == 0


Rule = Callable[..., Value]
Lookup = Callable[[Any], Rule | None]
"""From an op to its rule, None if there is none."""
R = TypeVar("R", bound=Rule)
_RULES: dict[str, Rule] = {}
_MIXES: set[str] = set()
"""The ops whose rules record what units a change of basis may mix."""
_WEIGHS: set[str] = set()
"""The ops whose rules record what signs and positive scales units may have."""
_CONTRACTIONS: dict[str, str] = {}
"""The ops that sum products, and the name in its schema of the operand that each only adds."""


LIFTS = "lifts"
"""The attribute of a rule that serves operands with one more dimension before all others. It says how: "copies" or
"views" its operand, "moves" positions, "aligns" dimensions at the right, "joins" point by point, or "contracts"."""
TAKES = "takes"
"""The attribute of a rule that is given `Deferred` operands as they are."""


def rule(
    *names: str,
    contracts: bool = False,
    adds: str = "",
    lifts: str = "",
    takes: bool = False,
    mixes: bool | Collection[str] = False,
    weighs: bool | Collection[str] = False,
) -> Callable[[R], R]:
    """Registers a rule for all overloads of the named ops (`"linear"` means `aten::linear`).

    A rule takes a `Site` and the op's own arguments, in which every tensor is either `Labels` or,
    if it is a constant, a `torch.Tensor`; it returns the `Labels` of the output. `contracts` says that
    the ops sum products of their operands, so that they consume the units of these, but for the one that is only
    added, which `adds` names as the ops' schemas do. For `lifts` and `takes` see `LIFTS` and `TAKES`. `mixes` says that
    the rule records, for all ops or those named, what units a change of basis may mix: see `fxmerge.symmetry.mixing`.
    The units that any other op touches are mixed with none. `weighs` says likewise that the rule records what signs and
    positive scales units may have: see `fxmerge.symmetry.weighing`.
    """

    def register(function: R) -> R:
        setattr(function, LIFTS, lifts)
        setattr(function, TAKES, takes)
        for name in names:
            full = name if "::" in name else f"aten::{name}"
            _RULES[full] = function
            if contracts:
                _CONTRACTIONS[full] = adds
        for told, all_told in ((mixes, _MIXES), (weighs, _WEIGHS)):
            telling = (names if told else ()) if isinstance(told, bool) else told
            all_told.update(name if "::" in name else f"aten::{name}" for name in telling)
        return function

    return register


def find_rule(target: Any) -> Rule | None:
    """The rule for an op, or None if there is none."""
    name = getattr(getattr(target, "_schema", None), "name", None)
    if name in _RULES:
        return _RULES[name]
    tags = getattr(target, "tags", ())
    if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
        return _RULES["aten::pointwise"]
    return None


def mixes(target: Any) -> bool:
    """Whether the rule for an op records what units a change of basis may mix."""
    return _name(target) in _MIXES


def weighs(target: Any) -> bool:
    """Whether the rule for an op records what signs and positive scales units may have."""
    name = _name(target)
    return name in _WEIGHS or (name not in _RULES and find_rule(target) is not None)  # One that is pointwise.


def contracts(target: Any) -> bool:
    """Whether an op sums products of its operands, as a linear layer does."""
    return _name(target) in _CONTRACTIONS


def _name(target: Any) -> str | None:
    return getattr(getattr(target, "_schema", None), "name", None)


def multiplied(node: fx.Node) -> list[fx.Node]:
    """The operands that a node multiplies with each other, as far as a graph computes them; none of an op that does not
    sum products."""
    if not contracts(node.target):
        return []
    schema = node.target._schema  # type: ignore[union-attr]
    operands = {**dict(zip((a.name for a in schema.arguments), node.args, strict=False)), **node.kwargs}
    operands.pop(_CONTRACTIONS[schema.name], None)
    found: list[fx.Node] = []
    fx.map_arg(operands, found.append)
    return found


def summed_over(node: Any) -> list[int] | None:
    """The dimensions over which a product of two tensors, or a square, is summed; None for all other nodes, and where
    the product is used otherwise, too."""
    if not isinstance(node, fx.Node) or _name(node.target) not in (*_TIMES, *_SQUARES):
        return None
    if not is_square(node) and not all(isinstance(a, fx.Node) for a in node.args):
        return None
    found: set[tuple[int, ...]] = set()
    for user in node.users:
        if _name(user.target) not in ("aten::sum", "aten::mean") or user.args[0] is not node:
            return None
        dims: Any = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim")
        found.add(tuple(normalize_dims(dims, node.meta["val"].ndim)))
    return list(found.pop()) if len(found) == 1 else None


_TIMES, _SQUARES = ("aten::mul", "aten::multiply"), ("aten::pow", "aten::square")


def is_square(node: fx.Node | None) -> bool:
    """Whether a node squares a tensor."""
    if node is not None and _name(node.target) in _TIMES:
        return node.args[0] is node.args[1]
    return node is not None and _name(node.target) in _SQUARES and node.args[1:] in ((), (2,))


def normalize_dims(dims: int | Sequence[int] | None, ndim: int) -> list[int]:
    """Dims of a reduction as non-negative numbers; None or an empty list means all of them."""
    if isinstance(dims, int):
        dims = [dims]
    if not dims:
        return list(range(ndim))
    return [d % ndim for d in dims] if ndim else []
