"""By which matrices an op lets positions be mixed, by numeric trials: is op(x R) = op(x) R for random R?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from fxmerge.symmetry.mixing import Sides
from fxmerge.symmetry.trials import Op
from fxmerge.units.basis import random_matrices
from fxmerge.units.kind import Kind

SIZES = (1.0, 1e3, 1e-3)
"""What the mixed operands are multiplied by in the trials: an op may be linear only for numbers that are not large."""


def mixed_by(op: Op, terms: Sequence[str], outs: Sequence[str], letter: str, outer: str = "") -> Sides:
    """The largest group of matrices by which the positions of one letter may be mixed, and where by which side.

    Arguments:
        op: the op, on values.
        terms, outs: a letter per dimension of its operands and outputs. Positions of one letter may be permuted alike.
        letter: the one whose positions are mixed.
        outer: another one, for each index of which they are mixed by a matrix of its own; by default by one for all.
    """
    where = [(term.find(letter), term.find(outer) if outer else -1) for term in (*terms, *outs)]
    tensors = [*op.given[0], *op.expected[0]]
    own = [i for i, (d, _) in enumerate(where) if d >= 0]
    size, blocks = tensors[own[0]].shape[where[own[0]][0]], tensors[own[0]].shape[where[own[0]][1]] if outer else 1
    if size < 2 or not all(tensors[i].is_floating_point() or tensors[i].is_complex() for i in own):
        return Kind.PERMUTATION, frozenset()
    trials = [op.times(factor, [i for i in own if i < len(terms)]) for factor in SIZES]
    for kind, inverse in _groups(own):
        matrices = random_matrices(kind, blocks, size, torch.Generator().manual_seed(0))
        sides = [torch.linalg.inv(matrices).mT if i in inverse else matrices for i in range(len(where))]

        def mixed(xs: list[Tensor], start: int, sides: Sequence[Tensor] = sides) -> list[Tensor]:
            return [
                x if dims[0] < 0 else _mixed(x, *dims, side)
                for x, dims, side in zip(xs, where[start:], sides[start:], strict=False)
            ]

        if all(t is not None and t.maps(lambda xs: mixed(xs, 0), lambda ys: mixed(ys, len(terms))) for t in trials):
            return kind, inverse
    return Kind.PERMUTATION, frozenset()


def _mixed(x: Tensor, inner: int, outer: int, matrices: Tensor) -> Tensor:
    """x with its positions along one dimension mixed, by one matrix or by one for each index of another dimension."""
    if outer < 0:
        alike: Tensor = torch.tensordot(matrices[0].to(x), x, ([1], [inner]))
        return alike.movedim(0, inner)
    apart = x.movedim((outer, inner), (0, 1))
    mixed: Tensor = matrices.to(x) @ apart.flatten(2)
    return mixed.reshape(apart.shape).movedim((0, 1), (outer, inner))


def _groups(own: Sequence[int]) -> Iterator[Sides]:
    """The groups that are tried, the largest first, each with the tensors on which the inverse's transpose acts."""
    for sides in product((False, True), repeat=len(own) - 1):
        yield Kind.GENERAL_LINEAR, frozenset(i for i, side in zip(own[1:], sides, strict=True) if side)
    yield Kind.ORTHOGONAL, frozenset()
    yield Kind.CENTRED, frozenset()
