"""Tensors as linear functions of the entries of another one, place by place, computed by the ops themselves."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, fx

from fxmerge.symmetry.columns import axis_column, compact, core, joint_column, reshape, shrink, spread, support
from fxmerge.symmetry.labels import Labels
from fxmerge.symmetry.rules import elementwise, movement, reduction
from fxmerge.symmetry.rules.registry import Lookup

NO_ENTRY = -1

MOST_TERMS = 8
"""How many entries may be added up at one place, those that cancel included."""

TIMES, OVER = ("aten::mul", "aten::multiply"), ("aten::div", "aten::divide", "aten::true_divide")
PLUS, MINUS, PAIR = ("aten::add",), ("aten::sub", "aten::subtract"), ("aten::complex",)
NEGATIVE, CONJUGATE = ("aten::neg", "aten::negative"), ("aten::_conj", "aten::_conj_physical")
BY_MEMORY = ("aten::as_strided", "aten::_neg_view")
"""Ops that read the memory of a tensor, not its entries."""


@dataclass(frozen=True)
class Form:
    """A tensor as a linear function of the entries of another one.

    Attributes:
        place: which place, along the dimensions of the other tensor that have no units, is read.
        terms: what is added up: the numbers of entries along the dimensions with units, and their factors. All tensors
            have the shape of this one, and stride 0 along dimensions on which they do not depend.
    """

    place: Tensor
    terms: tuple[tuple[Tensor, Tensor], ...]

    @staticmethod
    def of(shape: tuple[int, ...], dims: Sequence[int]) -> Form:
        """A tensor itself, with units along some dimensions."""
        sizes = [shape[d] for d in dims]
        entry = spread(torch.arange(math.prod(sizes)).reshape(sizes), shape, dims)
        others = [axis_column(shape, d) for d in range(len(shape)) if d not in dims]
        place = joint_column([torch.zeros(1, dtype=torch.int64).expand(shape), *others])
        assert place is not None
        return Form(place, ((entry, torch.ones(1, dtype=torch.float64).expand(shape)),))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.place.shape)

    def map(self, op: Callable[[Tensor], Tensor]) -> Form:
        """The form of a rearrangement."""
        return Form(op(self.place), tuple((op(entry), op(factor)) for entry, factor in self.terms))

    def times(self, value: Tensor, shape: tuple[int, ...]) -> Form:
        """The form of a product with what is known, both broadcast to a shape."""
        value, wide = compact(value.expand(shape)), self.map(lambda t: t.expand(shape))
        return Form(wide.place, tuple((e, (compact(f) * value).expand(shape)) for e, f in wide.terms))


def is_linear(n: fx.Node, own: Sequence[fx.Node], find_rule: Lookup) -> bool:
    """Whether a node is linear in those of its operands that depend on parameters, `own`, and `step` knows how."""
    name, rule = name_of(n), find_rule(n.target)
    if n.target is operator.getitem:
        return True
    value = n.meta.get("val")
    if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
        return False
    if rule is elementwise.pointwise:
        if n.kwargs:
            return False
        if name in TIMES:
            return len(own) == 1 and n.args[0] is not n.args[1]
        if name in OVER:
            return own == [n.args[0]]
        return name in NEGATIVE or (name in (*PLUS, *MINUS, *PAIR) and all(a in own for a in n.args))
    if rule in (movement.cat, movement.stack):
        return all(t in own for t in n.args[0])  # type: ignore[union-attr]
    moves = (*movement.MOVEMENTS, movement.expand, elementwise.identity, reduction.complex_parts)
    return rule in moves and name not in BY_MEMORY and own == [n.args[0]]


def step(n: fx.Node, find_rule: Lookup, forms: Mapping[Any, Any], values: Mapping[fx.Node, Any]) -> Any:
    """The form of a node for which `is_linear` holds: a list for several results, None where it is not known.

    Arguments:
        n: the node.
        find_rule: the rules of ops.
        forms: of its operands.
        values: labels or values of what it is multiplied by.
    """
    name, rule, args = name_of(n), find_rule(n.target), [*n.args, *n.kwargs.values()]
    first: Any = args[0]
    if n.target is operator.getitem:
        return forms[first][args[1]]
    value = n.meta["val"]
    shape = tuple(map(known, value.shape)) if isinstance(value, Tensor) else ()
    if rule is elementwise.pointwise:
        return _pointwise(name, args, forms, values, shape)
    if rule in (movement.cat, movement.stack):
        dim: Any = (*args[1:], 0)[0]
        parts = [forms[t] for t in first]
        if rule is movement.stack:
            parts = [p.map(lambda t: t.unsqueeze(dim % len(shape))) for p in parts]
        return _cat(parts, dim % len(shape), shape)
    form: Form = forms[first]
    if rule is elementwise.identity:
        return _conjugate(form) if name in CONJUGATE else form.map(lambda t: t.expand(shape))
    if rule is reduction.complex_parts:
        return _as_real(form) if name == "aten::view_as_real" else _as_complex(form)
    if rule is movement.view:
        return form.map(lambda t: reshape(t, shape))
    if rule is movement.expand:
        return form.map(lambda t: t.expand(shape))
    more, kwargs = fx.map_arg((n.args[1:], n.kwargs), lambda m: known(m.meta["val"]))
    target: Any = n.target
    if rule is movement.split:
        return _pieces(form, lambda t: target(t, *more, **kwargs))
    return form.map(lambda t: target(t, *more, **kwargs))


def _pieces(form: Form, split: Callable[[Tensor], Sequence[Tensor]]) -> list[Form]:
    places, entries = split(form.place), [(split(entry), split(factor)) for entry, factor in form.terms]
    return [Form(p, tuple((e[i], f[i]) for e, f in entries)) for i, p in enumerate(places)]


def _pointwise(
    name: str,
    args: Sequence[Any],
    forms: Mapping[Any, Any],
    values: Mapping[fx.Node, Any],
    shape: tuple[int, ...],
) -> Form | None:
    if name in NEGATIVE:
        return forms[args[0]].times(torch.tensor(-1.0), shape)  # type: ignore[no-any-return]
    a, b = args
    if name in (*TIMES, *OVER):
        form, other = (a, b) if isinstance(a, fx.Node) and a in forms else (b, a)
        factor = _value(other, values)
        return None if factor is None else forms[form].times(factor if name in TIMES else 1 / factor, shape)
    sign = torch.tensor(1.0 if name in PLUS else -1.0 if name in MINUS else 1j)
    return _sum(forms[a].map(lambda t: t.expand(shape)), forms[b].times(sign, shape))


def name_of(n: fx.Node) -> str:
    name: str = getattr(getattr(n.target, "_schema", None), "name", "")
    return name


def known(size: Any) -> Any:
    """The number that a symbolic size stood for when the graph was captured."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _value(operand: Any, values: Mapping[fx.Node, Any]) -> Tensor | None:
    """The value of a factor. One that depends on inputs has any numbers: equal ones where its labels are equal."""
    if not isinstance(operand, fx.Node):
        return torch.tensor(operand, dtype=torch.complex128 if isinstance(operand, complex) else torch.float64)
    value, like = values.get(operand), operand.meta["val"]
    dtype = torch.complex128 if isinstance(like, Tensor) and like.is_complex() else torch.float64
    if isinstance(value, Labels):
        if value.columns:
            return None
        joint = joint_column(value.inert)
        joint = torch.zeros(1, dtype=torch.int64).expand(value.shape) if joint is None else joint
        numbers, code = compact(joint).unique(return_inverse=True)
        generator = torch.Generator().manual_seed(crc32(operand.name.encode()))  # Each factor has its own.
        return torch.randn(len(numbers), dtype=dtype, generator=generator)[code].expand(value.shape)
    if isinstance(value, Tensor):
        return None if value.is_meta else value.detach().cpu().resolve_conj().to(dtype)
    return None if value is None else torch.tensor(value, dtype=dtype)


def _equal(a: Tensor, b: Tensor) -> bool:
    dims = sorted({*support(a), *support(b)})
    return torch.equal(core(a, dims), core(b, dims))


def _sum(a: Form, b: Form) -> Form | None:
    terms = (*a.terms, *b.terms)
    return Form(a.place, terms) if _equal(a.place, b.place) and len(terms) <= MOST_TERMS else None


def _cat(parts: Sequence[Form], dim: int, shape: tuple[int, ...]) -> Form:
    def together(pieces: Sequence[Tensor]) -> Tensor:
        used = {dim, *(d for p in pieces for d in support(p))}
        thin = [p[tuple(slice(None) if d in used else slice(0, 1) for d in range(p.ndim))] for p in pieces]
        dtype = torch.complex128 if any(p.is_complex() for p in pieces) else pieces[0].dtype
        return shrink(torch.cat([p.to(dtype) for p in thin], dim).expand(shape))

    terms = []
    for i in range(max(len(p.terms) for p in parts)):
        own = [p.terms[i] if i < len(p.terms) else _nothing(p.shape) for p in parts]
        terms.append((together([e for e, _ in own]), together([f for _, f in own])))
    return Form(together([p.place for p in parts]), tuple(terms))


def _nothing(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    one = (1,) * len(shape)
    return torch.full(one, NO_ENTRY).expand(shape), torch.zeros(one, dtype=torch.float64).expand(shape)


def _conjugate(form: Form) -> Form:
    return Form(form.place, tuple((e, f.conj().resolve_conj()) for e, f in form.terms))


def _as_complex(form: Form) -> Form | None:
    real, imaginary = form.map(lambda t: t[..., 0]), form.map(lambda t: t[..., 1])
    return _sum(real, imaginary.times(torch.tensor(1j), imaginary.shape))


def _as_real(form: Form) -> Form:
    def both(t: Tensor) -> Tensor:
        return t.unsqueeze(-1).expand(*t.shape, 2)

    factors = [torch.view_as_real(compact(f).to(torch.complex128)).expand(*f.shape, 2) for _, f in form.terms]
    return Form(both(form.place), tuple((both(e), f) for (e, _), f in zip(form.terms, factors, strict=True)))
