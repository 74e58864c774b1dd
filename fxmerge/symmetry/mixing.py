"""What an op says of changes of basis: which units it lets be mixed, and by which matrices.

While rules label a graph they record calls of these functions (`Site.mix`). The calls are made once the classes are
known, with `Seen` in place of labels. What a rule does not speak of is kept apart: its units are permuted only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from fxmerge.units.kind import Kind
from fxmerge.units.layout import Ids


@dataclass(frozen=True)
class Column:
    """Units of one class on a tensor.

    Attributes:
        number: the class.
        dims: the dimensions along which its units differ.
        ids: the unit at every place along these, -1 for others than those of the class.
        raw: shape (2, pairs): places, numbered along all of `dims` and in order, and the units of the walk there.
    """

    number: int
    dims: tuple[int, ...]
    ids: Ids
    raw: Ids


@dataclass(frozen=True)
class Seen:
    """A tensor with units of known classes.

    Attributes:
        shape: of the tensor.
        columns: the units of classes that may be mixed.
        depends: the dimensions along which the tensor is not known to be the same.
        uniform: the parameters from which it is computed, if they are vectors of one number each; else None.
    """

    shape: tuple[int, ...]
    columns: tuple[Column, ...]
    depends: frozenset[int]
    uniform: frozenset[str] | None


class Facts(Protocol):
    """What receives the facts of one op."""

    def apart(self, column: Column, dims: Iterable[int] | None = None) -> None:
        """Units at different places along some dimensions, by default all, are not mixed."""

    def limit(self, column: Column, kind: Kind) -> None:
        """Units are mixed by matrices of this kind at most."""

    def tie(self, a: Column, b: Column, *, inverse: bool) -> None:
        """Units at one place are mixed alike, or by matrices of which one is the transpose of the other's inverse."""

    def scale(self, column: Column, parameters: Collection[str]) -> None:
        """Parameters that hold one number for all units scale them, and are not mixed."""

    def mixed(self, column: Column, parameters: Collection[str]) -> None:
        """Parameters that hold one number for all units are mixed, as where they are added to others."""

    def count(self, number: int, ids: Ids) -> None:
        """Units that show more often than others are not mixed with these."""


Sides = tuple[Kind, frozenset[int]]
"""Matrices by which the same units are mixed on several tensors, and the tensors on which it is by the transpose of the
inverse."""

Mix = Callable[..., None]
"""A function of `Facts`, of operands, and of what else it is recorded with."""


def separate(facts: Facts, *operands: Seen) -> None:
    """No unit is mixed with any other."""
    for x in operands:
        for column in x.columns:
            facts.apart(column)


def summed(facts: Facts, *terms: Seen) -> None:
    """The sum of tensors of one shape: each carries the units that another one does, or is the same for all of them."""
    alike = all(x.uniform is not None for x in terms)
    for i, x in enumerate(terms):
        for column in x.columns:
            if alike:  # Their sum is a number for all units, too, which may scale others.
                facts.scale(column, x.uniform or ())
                continue
            facts.mixed(column, x.uniform or ())
            for y in (*terms[:i], *terms[i + 1 :]):
                same = counterpart(column, y)
                if same is not None:
                    facts.tie(column, same, inverse=False)
                else:
                    facts.limit(column, Kind.CENTRED)
                    facts.apart(column, y.depends)


def multiplied(facts: Facts, *factors: Seen) -> None:
    """The product of tensors of one shape, place by place: units are mixed where all other factors are the same.

    A vector of one number scales the units of other factors along it. Where there are none, it still has its own.
    """
    for i, x in enumerate(factors):
        others = [y for j, y in enumerate(factors) if j != i]
        for column in x.columns:
            if x.uniform is None:
                facts.apart(column, {d for y in others if y.uniform is None for d in y.depends})
            elif any(not y.depends.isdisjoint(column.dims) for y in others):
                facts.scale(column, x.uniform)


def divides(facts: Facts, x: Seen, numerator: Seen) -> None:
    """The divisor of a quotient of tensors of one shape: only a vector of one number may scale units."""
    for column in x.columns:
        if x.uniform is not None and (numerator.uniform is not None or numerator.depends.intersection(column.dims)):
            facts.scale(column, x.uniform)
        else:
            facts.apart(column)


def contracted(facts: Facts, *factors: Seen, terms: Sequence[str], out: str) -> None:
    """A sum of products, with one letter for each dimension: what it sums over carries a matrix in one factor and its
    inverse in another."""
    along = [{term[d] for d in x.depends} for x, term in zip(factors, terms, strict=True)]
    for i, (x, term) in enumerate(zip(factors, terms, strict=True)):
        others = [j for j in range(len(factors)) if j != i]
        for column in x.columns:
            facts.mixed(column, x.uniform or ())
            letters = [term[d] for d in column.dims]
            shared = {letter for letter in letters if letter in out and any(letter in along[j] for j in others)}
            facts.apart(column, [d for d in column.dims if term[d] in shared])
            if len(set(term)) < len(term):  # A diagonal.
                facts.apart(column)
            gone = {letter for letter in letters if letter not in out}
            meeting = [j for j in others if gone & along[j]]
            partner = met(column, letters, factors[meeting[0]], terms[meeting[0]]) if len(meeting) == 1 else None
            if partner is not None:
                facts.tie(*partner, inverse=True)
            elif meeting:
                facts.apart(column)
            elif gone:
                facts.limit(column, Kind.CENTRED)
                facts.apart(column, [d for d in column.dims if term[d] not in gone])


def passed(facts: Facts, x: Seen, result: Seen) -> None:
    """What a sum leaves: the units along the dimensions that it keeps are those of its operand, under other names where
    they are blocks of what is summed."""
    for column in x.columns:
        if all(d < len(result.shape) and result.shape[d] == x.shape[d] for d in column.dims):
            same = counterpart(column, result)
            if same is not None:
                facts.tie(column, same, inverse=False)
            else:
                facts.apart(column)


def averaged(facts: Facts, x: Seen, dims: Collection[int]) -> None:
    """A sum or a mean over some dimensions."""
    _reduced(facts, x, dims, Kind.CENTRED)


def measured(facts: Facts, x: Seen, dims: Collection[int], kind: Kind) -> None:
    """The length of a vector along some dimensions, or around its mean: a function of squares."""
    _reduced(facts, x, dims, kind)
    for column in x.columns:
        if set(dims).isdisjoint(column.dims):
            facts.apart(column)


def assembled(facts: Facts, *parts: Seen, dims: Collection[int]) -> None:
    """Tensors put together along some dimensions: along the others, each carries the units that another one does."""
    for i, x in enumerate(parts):
        for column in x.columns:
            facts.mixed(column, x.uniform or ())
            if set(dims).isdisjoint(column.dims):
                for y in (*parts[:i], *parts[i + 1 :]):
                    same = counterpart(column, y)
                    if same is None:
                        facts.apart(column)
                    else:
                        facts.tie(column, same, inverse=False)


def moved(facts: Facts, before: Seen, after: Seen) -> None:
    """Positions that are rearranged, left out or repeated."""
    for number in {c.number for c in before.columns}:
        shown = [c.ids.reshape(-1) for c in after.columns if c.number == number]
        facts.count(number, np.concatenate([*shown, np.zeros(0, np.int64)]))


def looked_up(facts: Facts, x: Seen, dims: Collection[int]) -> None:
    """Places along some dimensions are named by data, or seen through windows."""
    for column in x.columns:
        if not set(dims).isdisjoint(column.dims):
            facts.apart(column)


def probed(facts: Facts, *tensors: Seen, terms: Sequence[str], kinds: Mapping[str, Sides]) -> None:
    """What trials found of an op.

    Arguments:
        tensors: its operands and its results.
        terms: for each of these a letter per dimension.
        kinds: by which matrices the positions of a letter are mixed, wherever they are. The key is the letter, or the
            letter and another one for each index of which there is a matrix of its own.
    """
    for i, (x, term) in enumerate(zip(tensors, terms, strict=True)):
        for column in x.columns:
            facts.mixed(column, x.uniform or ())
            letters = [term[d] for d in column.dims]
            found = next((key for key in kinds if sorted(key) == sorted(letters)), None)
            if found is None:
                facts.apart(column)
                continue
            kind, inverse = kinds[found]
            facts.limit(column, kind)
            facts.apart(column, [d for d in column.dims if term[d] != found[0]])
            for j, (y, other) in enumerate(zip(tensors, terms, strict=True)):
                if j == i or found[0] not in other:
                    continue
                pair = met(column, letters, y, other)
                if pair is None:
                    facts.apart(column)
                else:
                    facts.tie(*pair, inverse=(i in inverse) != (j in inverse))


def _reduced(facts: Facts, x: Seen, dims: Collection[int], kind: Kind) -> None:
    gone = {d % len(x.shape) for d in dims} if x.shape else set()
    for column in x.columns:
        if not gone.isdisjoint(column.dims):
            facts.limit(column, kind)
            facts.apart(column, set(column.dims) - gone)


def counterpart(column: Column, y: Seen) -> Column | None:
    """The column of another tensor that has the same units at the same places."""
    return next((c for c in y.columns if c.dims == column.dims and _same_units(c, column, c.ids)), None)


def _same_units(a: Column, b: Column, ids: Ids) -> bool:
    return a.number == b.number and np.array_equal(ids, b.ids)


def met(column: Column, letters: Sequence[str], y: Seen, term: str) -> tuple[Column, Column] | None:
    """A column and the one of another factor that has the same units, as columns of a tensor with one dimension for
    each letter."""
    for other in y.columns:
        theirs = [term[d] for d in other.dims]
        if sorted(theirs) == sorted(letters):
            order = [theirs.index(letter) for letter in letters]
            place = np.transpose(np.arange(other.ids.size).reshape(other.ids.shape), order)
            if _same_units(other, column, np.transpose(other.ids, order)):
                raw = np.stack([np.argsort(place.reshape(-1))[other.raw[0]], other.raw[1]])
                return column, replace(other, raw=raw[:, raw[0].argsort(kind="stable")])
    return None
