"""What an op says of signs and positive scales of single units: what its result is multiplied by if its operands are.

A column of a tensor has an exponent: if a unit has the number t, the entries of the tensor at that unit are multiplied
by t to this exponent. Rules record calls of these functions as they do those of `fxmerge.symmetry.mixing`. What a rule
does not speak of keeps the exponent zero.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from fxmerge.symmetry.mixing import Column, Seen, counterpart, met

Coefficients = Sequence[int | float | None]
"""For every operand what its exponent counts in that of the result; None if the operand must not change."""

Terms = Sequence[tuple[Column, int, float]]
"""Columns with a coefficient for signs and one for scales."""


class Facts(Protocol):
    """What receives the facts of one op."""

    def fix(self, column: Column, *, signs: bool = True, scales: bool = True) -> None:
        """Units change neither their signs nor their scales, or not one of these."""

    def weigh(self, result: Column | None, terms: Terms) -> None:
        """The exponent of a result is a sum of those of others, each times a coefficient for signs and one for scales;
        None for zero. All columns have the same units at the same places."""


def still(facts: Facts, *operands: Seen) -> None:
    """No operand may change."""
    for x in operands:
        for column in x.columns:
            facts.fix(column)


def fixed(facts: Facts, x: Seen, dims: Collection[int]) -> None:
    """Units along some dimensions do not change."""
    along = {d % len(x.shape) for d in dims} if x.shape else set[int]()
    for column in x.columns:
        if not along.isdisjoint(column.dims):
            facts.fix(column)


def positive(facts: Facts, x: Seen) -> None:
    """The result is multiplied by what its operand is multiplied by, if that is positive."""
    for column in x.columns:
        facts.fix(column, scales=False)


def odd(facts: Facts, x: Seen) -> None:
    """The result changes its sign where its operand does."""
    for column in x.columns:
        facts.fix(column, signs=False)


def tied(facts: Facts, *terms: Seen, dims: Collection[int] = ()) -> None:
    """Tensors that are added, or put together along some dimensions: along others all change alike, or none does."""
    for i, x in enumerate(terms):
        for column in x.columns:
            if not set(dims).isdisjoint(column.dims):
                continue
            for y in (*terms[:i], *terms[i + 1 :]):
                other = counterpart(column, y)
                if other is None:
                    facts.fix(column)
                else:
                    facts.weigh(None, [(column, 1, 1), (other, -1, -1)])


def product(facts: Facts, result: Seen, *factors: Seen, signs: Coefficients, scales: Coefficients) -> None:
    """A product of powers of tensors of one shape, or what is alike in its signs or its scales.

    Of factors with more dimensions than the result, the units along the last ones are left out.
    """
    for i, x in enumerate(factors):
        for column in x.columns:
            if any(d >= len(result.shape) for d in column.dims):
                continue
            facts.fix(column, signs=signs[i] is None, scales=scales[i] is None)
            found = [counterpart(column, y) for y in factors]
            first = next(j for j, other in enumerate(found) if other is not None)
            if first < i:
                continue
            terms = [
                (other, int(s or 0), p or 0)
                for other, s, p in zip(found, signs, scales, strict=True)
                if other is not None
            ]
            after = counterpart(column, result)
            if after is None:
                for other, _, _ in terms:
                    facts.fix(other)
            else:
                facts.weigh(after, terms)


def contracted(facts: Facts, *factors: Seen, terms: Sequence[str], out: str) -> None:
    """A sum of products, with one letter for each dimension: each product that is summed keeps its sign and scale."""
    for i, (x, term) in enumerate(zip(factors, terms, strict=True)):
        for column in x.columns:
            letters = [term[d] for d in column.dims]
            if len(set(term)) < len(term):  # A diagonal.
                facts.fix(column)
            elif not all(letter in out for letter in letters):
                others = [(y, t) for j, (y, t) in enumerate(zip(factors, terms, strict=True)) if j != i]
                pairs = [met(column, letters, y, t) for y, t in others]
                facts.weigh(None, [(column, 1, 1), *((pair[1], 1, 1) for pair in pairs if pair is not None)])


WORDS = frozenset({still, fixed, positive, odd, tied, product, contracted})
"""The functions of this module that are recorded."""
