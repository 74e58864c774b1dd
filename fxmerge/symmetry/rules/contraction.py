"""Sums of products: a join in the space of all indices, then a reduce over the contracted ones."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxmerge.symmetry import mixing, weighing
from fxmerge.symmetry.columns import Shape, axis_column, core, support
from fxmerge.symmetry.labels import Labels, move, reduce, rows_apart, sum_over
from fxmerge.symmetry.rules.movement import pad
from fxmerge.symmetry.rules.pooling import apart, facing, lies_in_space, two_ends
from fxmerge.symmetry.rules.registry import Site, is_zero, rule
from fxmerge.symmetry.units import distinct

Operand = Labels | Tensor


def contract(at: Site, operands: Sequence[Operand], terms: Sequence[str], out: str) -> Labels:
    """The labels of `einsum(",".join(terms) + "->" + out, *operands)`, one letter per dimension."""
    size: dict[str, int] = {}
    for operand, term in zip(operands, terms, strict=True):
        for letter, n in zip(term, operand.shape, strict=True):
            size[letter] = max(n, size.get(letter, 1))
    if at.is_zero(operands):
        return Labels(tuple(size[letter] for letter in out), is_zero=True)
    labels = [at.labels(x) for x in operands]
    at.mix(mixing.contracted, *labels, terms=terms, out=out)
    at.weigh(weighing.contracted, *labels, terms=terms, out=out)
    space = out + "".join(letter for letter in size if letter not in out)
    shape = tuple(size[letter] for letter in space)
    result, aligned = Labels(shape), [_align(at, x, term, space, shape) for x, term in zip(labels, terms, strict=True)]
    for i, (x, term) in enumerate(zip(labels, terms, strict=True)):
        others = [*terms[:i], *terms[i + 1 :]]
        if x.parameter is not None:
            # Not so where the other operand has nothing else in common: a bias.
            batch = {a for t in others if len(set(t) & set(term)) > 1 for a in t if a in out}
            use_apart(at, x, [d for d, letter in enumerate(term) if letter in batch])
            if i == len(labels) - 1 or any(y.parameter is None for y in labels):
                _consume(at, x, [d for d, letter in enumerate(term) if letter not in out])
        sum_over(at.units, x, {d for d, letter in enumerate(term) if letter not in out})
        for t in others:
            shared = {d for d, letter in enumerate(term) if letter in t}
            for column in x.columns:
                dims = support(column)
                if shared.issuperset(dims) and all(term[d] not in out for d in dims):
                    rows_apart(at.units, x, column, shared.difference(dims))
        result = at.join(result, aligned[i])
    result = reduce(at.units, result, range(len(out), len(space)), at.name)
    for x in aligned:
        at.mix(mixing.passed, x, result)
    ones = [1] * len(aligned)
    return at.product(result, *aligned, signs=ones, scales=ones)


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
            rows = [core(axis_column(x.shape, d), used) * int(np.prod(x.shape[d + 1 :])) for d in along]
            group = torch.stack(rows).sum(0)
            at.units.use_apart(core(column, used).reshape(-1).numpy(), group.reshape(-1).numpy())


def _consume(at: Site, x: Labels, dims: Sequence[int]) -> None:
    """Tells which axes of a parameter are contracted with an activation."""
    for column in x.columns:
        if not set(dims).isdisjoint(support(column)):
            at.units.contract(distinct(core(column, support(column)).numpy()))


@rule("einsum", contracts=True, lifts="contracts", mixes=True, weighs=True)
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


@rule("linear", contracts=True, adds="bias", lifts="contracts", mixes=True, weighs=True)
def linear(at: Site, x: Operand, weight: Operand, bias: Operand | None = None) -> Labels:
    batch = string.ascii_lowercase[: len(x.shape) - 1]
    if len(weight.shape) == 1:
        return _plus(at, contract(at, [x, weight], [batch + "I", "I"], batch), bias)
    return _plus(at, contract(at, [x, weight], [batch + "I", "OI"], batch + "O"), bias)


def _plus(at: Site, y: Labels, bias: Operand | None) -> Labels:
    """A sum of products and what is added to it."""
    if bias is not None and not is_zero(bias):
        shift = bias.expand(y.shape)
        at.mix(mixing.summed, y, shift)
        at.weigh(weighing.tied, y, shift)
    return at.join(y, bias)


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot", contracts=True, lifts="contracts", mixes=True, weighs=True)
def matmul(at: Site, a: Operand, b: Operand, *args: Any, **kwargs: Any) -> Labels:
    batch = string.ascii_lowercase[: max(len(a.shape), len(b.shape), 2) - 2]
    term_a = "K" if len(a.shape) == 1 else batch[len(batch) - len(a.shape) + 2 :] + "MK"
    term_b = "K" if len(b.shape) == 1 else batch[len(batch) - len(b.shape) + 2 :] + "KN"
    return contract(at, [a, b], [term_a, term_b], batch + "M" * (len(a.shape) > 1) + "N" * (len(b.shape) > 1))


@rule("addmm", "baddbmm", "addmv", "addbmm", contracts=True, adds="self", mixes=True, weighs=True)
def addmm(at: Site, bias: Operand, a: Operand, b: Operand, **kwargs: Any) -> Labels:
    if at.target._schema.name == "aten::addbmm":
        return _plus(at, contract(at, [a, b], ["bMK", "bKN"], "MN"), bias)
    return _plus(at, matmul(at, a, b), bias)


@rule("linalg_matrix_exp", "matrix_exp", "linalg_inv")
def matrix_function(at: Site, x: Labels) -> Labels:
    """Sums of powers, the identity among them. By the theorem of Cayley and Hamilton an inverse is one too, whose
    coefficients stay where rows and columns move alike."""
    batch = string.ascii_lowercase[: x.ndim - 2]
    powers = at.join(x, torch.eye(x.shape[-1]))
    for _ in range(2):
        powers = at.join(powers, contract(at, [powers, x], [batch + "MK", batch + "KN"], batch + "MN"))
    return powers


@rule("bilinear", contracts=True, adds="bias", mixes=True, weighs=True)
def bilinear(at: Site, x: Operand, y: Operand, weight: Operand, bias: Operand | None = None) -> Labels:
    batch = string.ascii_lowercase[: len(x.shape) - 1]
    return _plus(at, contract(at, [x, y, weight], [batch + "I", batch + "J", "OIJ"], batch + "O"), bias)


@rule("conv1d", "conv2d", "conv3d", contracts=True, adds="bias", mixes=True, weighs=True)
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

    Windows that do not overlap are contracted over their places, too.
    """
    rows, columns, *kernel = weight.shape
    if at.is_zero([x, weight]):
        return _biased(at, Labels(at.shape, is_zero=True), bias, len(kernel))
    w, x = at.labels(weight).reshape((groups, rows // groups, columns, *kernel)), at.labels(x)
    steps, gaps = (np.broadcast_to(v, len(kernel)).tolist() for v in (stride, dilation))
    if padding == "same" and any(k > 1 for k in kernel):
        windows, both = None, [(k - 1) * gap for k, gap in zip(kernel, gaps, strict=True)]
    else:
        pads = np.broadcast_to(0 if isinstance(padding, str) else padding, len(kernel)).tolist()
        places = [[-1] * p + [*range(n)] + [-1] * p for p, n in zip(pads, x.shape[-len(kernel) :], strict=True)]
        windows, both = _windows(at, x, places, kernel, stride, dilation), [2 * p for p in pads]
    wide = zip(x.shape[-len(kernel) :], at.shape[-len(kernel) :], kernel, steps, gaps, both, strict=True)
    even = [(out - 1) * step + (k - 1) * gap + 1 == n + pad and pad % 2 == 0 for n, out, k, step, gap, pad in wide]
    return _convolve(at, x, w, "goi", bias, windows, even)


def _windows(
    at: Site, x: Labels, places: Sequence[Sequence[int]], kernel: Sequence[int], stride: Any, dilation: Any
) -> Labels | None:
    """x as (..., *places, *kernel), None where windows overlap.

    Arguments:
        places: for every dimension of space, the places of x in the order in which windows see them, -1 for a zero.
    """
    spatial = len(kernel)
    if any(k > 1 for k in kernel) and not (_all_are(dilation, 1) and lies_in_space(x, spatial)):
        return None
    for dim, seen in enumerate(places, start=x.ndim - spatial):
        if list(seen) != list(range(x.shape[dim])):
            if -1 in seen and any(dim in support(c) and len(support(c)) > 1 for c in x.columns):
                return None  # Zeros would be units of every row.
            x = pad(at, x, [*[0, 0] * (x.ndim - 1 - dim), 0, 1]) if -1 in seen else x
            chosen = torch.tensor(seen) % x.shape[dim]
            shape = (*x.shape[:dim], len(seen), *x.shape[dim + 1 :])
            x = move(at.units, x, lambda c, d=dim, i=chosen: c.index_select(d, i), shape, at.name)  # type: ignore[misc]
    return apart(at, x, kernel, stride, at.shape[-spatial:])


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", contracts=True, adds="bias", mixes=True, weighs=True)
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
    """As a convolution, with the weight as (groups, in/groups, out/groups).

    Where windows of the output touch and do not overlap, every place of a window has a weight of its own.
    """
    rows, columns, *kernel = weight.shape
    if at.is_zero([x, weight]):
        return _biased(at, Labels(at.shape, is_zero=True), bias, len(kernel))
    w, x = at.labels(weight).reshape((groups, rows // groups, columns, *kernel)), at.labels(x)
    spatial = len(kernel)
    zero = _all_are(padding, 0) and _all_are(output_padding, 0)
    if zero and _all_are(dilation, 1) and _all_are(np.equal(stride, kernel) | np.equal(x.shape[-spatial:], 1), True):
        return _touching(at, x, w, bias)
    # A convolution of the stretched input with the kernel turned round.
    steps, pads = (np.broadcast_to(v, spatial).tolist() for v in (stride, padding))
    places = []
    for n, k, step, p, wide in zip(x.shape[-spatial:], kernel, steps, pads, at.shape[-spatial:], strict=True):
        first = [i + p - k + 1 for i in range(wide + k - 1)]
        places.append([i // step if i % step == 0 and 0 <= i < n * step else -1 for i in first])
    windows = _windows(at, x, places, kernel, 1, dilation)
    turned = w if windows is None else w.map(lambda c: c.flip(list(range(3, w.ndim))), w.shape)
    even = np.equal(np.broadcast_to(output_padding, spatial), 0).tolist()
    return _convolve(at, x, turned, "gio", bias, windows, even)


def _touching(at: Site, x: Labels, w: Labels, bias: Operand | None) -> Labels:
    """A transposed convolution whose windows of the output touch and do not overlap."""
    spatial, groups, rows = w.ndim - 3, w.shape[0], w.shape[1]
    x = x.reshape((*x.shape[: -spatial - 1], groups, rows, *x.shape[-spatial:]))
    n, space, taps = "n" * (x.ndim - spatial - 2), "XYZ"[:spatial], "PQR"[:spatial]
    out = n + "go" + "".join(place + tap for place, tap in zip(space, taps, strict=True))
    return _biased(at, contract(at, [x, w], [n + "gi" + space, "gio" + taps], out).reshape(at.shape), bias, spatial)


@rule("convolution", contracts=True, adds="bias", mixes=True, weighs=True)
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


def _all_are(value: Any, one: int) -> bool:
    return bool(np.all(np.equal(value, one)))


def _convolve(
    at: Site, x: Labels, w: Labels, order: str, bias: Operand | None, windows: Labels | None, even: Sequence[bool]
) -> Labels:
    """Contracts x with a weight of shape (groups, `order[1]`, `order[2]`, *kernel).

    Arguments:
        windows: x as (..., *places, *kernel), if its windows do not overlap.
        even: for each dimension of space, whether the windows lie alike as seen from both of its ends.
    """
    spatial, groups = w.ndim - 3, w.shape[0]
    lead, channels = x.shape[: -spatial - 1], x.shape[-spatial - 1]
    n, letters, taps = "n" * len(lead), "XYZ"[:spatial], "PQR"[:spatial]
    if windows is not None:
        x = windows.reshape((*lead, groups, channels // groups, *windows.shape[-2 * spatial :]))
        y = contract(at, [x, w], [n + "gi" + letters + taps, order + taps], n + "go" + letters).reshape(at.shape)
    else:
        at.mix(mixing.looked_up, x, dims=range(x.ndim - spatial, x.ndim))
        at.weigh(weighing.fixed, x, dims=range(x.ndim - spatial, x.ndim))
        # Every place of the output sees a window of its own, so of space it is only known that places differ: or, where
        # units lie along it, that places, kernel and output may be reversed together.
        ends = [end if alike else None for end, alike in zip(two_ends(at, x, spatial), even, strict=True)]
        # Not pinned: a group may move, and takes the positions in its kernels along.
        w = replace(at.join(w, facing(at, Labels(w.shape), range(3, w.ndim), ends)), parameter=w.parameter)
        space = range(x.ndim - spatial, x.ndim)
        x = reduce(at.units, facing(at, x, space, ends), space, at.name).reshape((*lead, groups, channels // groups))
        y = contract(at, [x, w], [n + "gi", order + taps], n + "go").reshape((*at.shape[:-spatial], *(1,) * spatial))
        y = at.join(y, facing(at, Labels(at.shape), range(len(at.shape) - spatial, len(at.shape)), ends), at.shape)
    return _biased(at, y, bias, spatial)


def _biased(at: Site, y: Labels, bias: Operand | None, spatial: int) -> Labels:
    return _plus(at, y, None if bias is None else bias.reshape((*bias.shape, *(1,) * spatial)))
