"""Sums of products: a join in the space of all indices, then a reduce over the contracted ones."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from fxmerge.symmetry.columns import Shape, axis_column, core, support
from fxmerge.symmetry.labels import Labels, inert, move, pin, reduce, rows_apart
from fxmerge.symmetry.rules.registry import Site, rule
from fxmerge.symmetry.units import distinct

Operand = Labels | Tensor


def contract(at: Site, operands: Sequence[Operand], terms: Sequence[str], out: str) -> Labels:
    """The labels of `einsum(",".join(terms) + "->" + out, *operands)`, one letter per dimension."""
    labels = [at.labels(x) for x in operands]
    size: dict[str, int] = {}
    for x, term in zip(labels, terms, strict=True):
        for letter, n in zip(term, x.shape, strict=True):
            size[letter] = max(n, size.get(letter, 1))
    space = out + "".join(letter for letter in size if letter not in out)
    shape = tuple(size[letter] for letter in space)
    result = Labels(shape)
    for i, (x, term) in enumerate(zip(labels, terms, strict=True)):
        others = [*terms[:i], *terms[i + 1 :]]
        if x.parameter is not None:
            # Not so where the other operand has nothing else in common: a bias.
            batch = {a for t in others if len(set(t) & set(term)) > 1 for a in t if a in out}
            use_apart(at, x, [d for d, letter in enumerate(term) if letter in batch])
            if i == len(labels) - 1 or any(y.parameter is None for y in labels):
                _consume(at, x, [d for d, letter in enumerate(term) if letter not in out])
        for t in others:
            shared = {d for d, letter in enumerate(term) if letter in t}
            for column in x.columns:
                dims = support(column)
                if shared.issuperset(dims) and all(term[d] not in out for d in dims):
                    rows_apart(at.units, x, column, shared.difference(dims))
        result = at.join(result, _align(at, x, term, space, shape))
    return reduce(at.units, result, range(len(out), len(space)), at.name)


def _align(at: Site, x: Labels, term: str, space: str, shape: Shape) -> Labels:
    """x with its dimensions put where their letters are in `space`; a repeated letter is a diagonal."""
    while len(set(term)) < len(term):
        letter = next(c for c in term if term.count(c) > 1)
        i, j = term.index(letter), term.rindex(letter)
        kept = tuple(n for d, n in enumerate(x.shape) if d not in (i, j))
        x = x.map(lambda c, i=i, j=j: c.diagonal(0, i, j), (*kept, x.shape[i]))  # type: ignore[misc]
        x = at.join(x, x)
        term = term[:i] + term[i + 1 : j] + term[j + 1 :] + letter
    order = sorted(range(len(term)), key=lambda d: space.index(term[d]))
    unit = tuple(x.shape[term.index(letter)] if letter in term else 1 for letter in space)
    return x.map(lambda c: c.permute(order).reshape(unit).expand(shape), shape)


def use_apart(at: Site, x: Labels, dims: Sequence[int]) -> None:
    """Tells which rows of a parameter a batched contraction keeps apart."""
    for column in x.columns:
        along = [d for d in dims if d in support(column)]
        if along:
            used = support(column)
            groups = sum(axis_column(x.shape, d) * int(np.prod(x.shape[d + 1 :])) for d in along)
            assert isinstance(groups, Tensor)
            at.units.use_apart(
                core(column, used).reshape(-1).numpy(), core(groups.expand(x.shape), used).reshape(-1).numpy()
            )


def _consume(at: Site, x: Labels, dims: Sequence[int]) -> None:
    """Tells which axes of a parameter are contracted with an activation."""
    for column in x.columns:
        if not set(dims).isdisjoint(support(column)):
            at.units.contract(distinct(core(column, support(column)).numpy()))


@rule("einsum", contracts=True, lifts="contracts")
def einsum(at: Site, equation: str, operands: Sequence[Operand], **kwargs: Any) -> Labels:
    left, _, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    free = [c for c in string.ascii_letters if c not in equation]
    spare = max(len(x.shape) - len(t.replace("...", "")) for x, t in zip(operands, terms, strict=True))
    dots = "".join(free[:spare])
    if "->" not in equation:
        letters = "".join(terms).replace(".", "")
        out = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    full = []
    for x, t in zip(operands, terms, strict=True):
        count = len(x.shape) - len(t.replace("...", ""))
        full.append(t.replace("...", dots[len(dots) - count :]))
    return contract(at, operands, full, out.replace("...", dots))


@rule("linear", contracts=True, adds="bias", lifts="contracts")
def linear(at: Site, x: Operand, weight: Operand, bias: Operand | None = None) -> Labels:
    batch = string.ascii_lowercase[: len(x.shape) - 1]
    if len(weight.shape) == 1:
        return at.join(contract(at, [x, weight], [batch + "I", "I"], batch), bias)
    return at.join(contract(at, [x, weight], [batch + "I", "OI"], batch + "O"), bias)


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot", contracts=True, lifts="contracts")
def matmul(at: Site, a: Operand, b: Operand, *args: Any, **kwargs: Any) -> Labels:
    batch = string.ascii_lowercase[: max(len(a.shape), len(b.shape), 2) - 2]
    term_a = "K" if len(a.shape) == 1 else batch[len(batch) - len(a.shape) + 2 :] + "MK"
    term_b = "K" if len(b.shape) == 1 else batch[len(batch) - len(b.shape) + 2 :] + "KN"
    return contract(at, [a, b], [term_a, term_b], batch + "M" * (len(a.shape) > 1) + "N" * (len(b.shape) > 1))


@rule("addmm", "baddbmm", "addmv", "addbmm", contracts=True, adds="self")
def addmm(at: Site, bias: Operand, a: Operand, b: Operand, **kwargs: Any) -> Labels:
    if at.target._schema.name == "aten::addbmm":
        return at.join(contract(at, [a, b], ["bMK", "bKN"], "MN"), bias)
    return at.join(matmul(at, a, b), bias)


@rule("bilinear", contracts=True, adds="bias")
def bilinear(at: Site, x: Operand, y: Operand, weight: Operand, bias: Operand | None = None) -> Labels:
    batch = string.ascii_lowercase[: len(x.shape) - 1]
    return at.join(contract(at, [x, y, weight], [batch + "I", batch + "J", "OIJ"], batch + "O"), bias)


@rule("conv1d", "conv2d", "conv3d", contracts=True, adds="bias")
def conv(
    at: Site,
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Labels:
    """(groups, out/groups, in/groups) is contracted over its last index; space is inert.

    A kernel of one tap reads every place, or with a stride some places, alone.
    """
    rows, columns, *kernel = weight.shape
    w = at.labels(weight).reshape((groups, rows // groups, columns, *kernel))
    labels, still = at.labels(x), _is_point(kernel, padding)
    if still and not _all_are(stride, 1):
        places = (slice(None),) * (labels.ndim - len(kernel))
        places += tuple(slice(None, None, int(s)) for s in np.broadcast_to(stride, len(kernel)))
        read = (*labels.shape[: -len(kernel)], *at.shape[-len(kernel) :])
        labels = move(at.units, labels, lambda column: column[places], read, at.name)
    return _convolve(at, labels, w, "goi", bias, still=still)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", contracts=True, adds="bias")
def conv_transpose(
    at: Site,
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Labels:
    """As a convolution, with the weight as (groups, in/groups, out/groups)."""
    rows, columns, *kernel = weight.shape
    w = at.labels(weight).reshape((groups, rows // groups, columns, *kernel))
    still = _is_point(kernel, padding) and _all_are(stride, 1) and _all_are(output_padding, 0)
    return _convolve(at, at.labels(x), w, "gio", bias, still=still)


@rule("convolution", contracts=True, adds="bias")
def convolution(
    at: Site,
    x: Operand,
    weight: Operand,
    bias: Operand | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Labels:
    if transposed:
        return conv_transpose(at, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(at, x, weight, bias, stride, padding, dilation, groups)


def _is_point(kernel: Sequence[int], padding: Any) -> bool:
    """Whether every window is one place of the input."""
    return all(k == 1 for k in kernel) and (padding in ("valid", "same") or _all_are(padding, 0))


def _all_are(value: Any, one: int) -> bool:
    return all(v == one for v in value) if isinstance(value, (list, tuple)) else bool(value == one)


def _convolve(at: Site, x: Labels, w: Labels, order: str, bias: Operand | None, *, still: bool) -> Labels:
    """Contracts x with a weight of shape (groups, `order[1]`, `order[2]`, *kernel)."""
    spatial, groups = w.ndim - 3, w.shape[0]
    # Not pinned: a group may move, and takes the positions in its kernels along.
    w = replace(at.join(w, inert(w.shape, range(3, w.ndim))), parameter=w.parameter)
    lead, channels = x.shape[: -spatial - 1], x.shape[-spatial - 1]
    n, letters, taps = "n" * len(lead), "XYZ"[:spatial], "PQR"[:spatial]
    if still:
        x = x.reshape((*lead, groups, channels // groups, *x.shape[-spatial:]))
        y = contract(at, [x, w], [n + "gi" + letters, order + taps], n + "go" + letters).reshape(at.shape)
    else:
        # Every place of the output sees a window of its own, so of space it is only known that places differ.
        space = range(x.ndim - spatial, x.ndim)
        x = reduce(at.units, pin(at.units, x, f"{at.name}: space", space), space, at.name)
        x = x.reshape((*lead, groups, channels // groups))
        y = contract(at, [x, w], [n + "gi", order + taps], n + "go").reshape((*at.shape[:-spatial], *(1,) * spatial))
        y = at.join(y, inert(at.shape, range(len(at.shape) - spatial, len(at.shape))), at.shape)
    return at.join(y, None if bias is None else bias.reshape((*bias.shape, *(1,) * spatial)))
