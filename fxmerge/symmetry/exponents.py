"""Which signs and positive scales the units of each class may have: what the rules recorded, solved by class.

Each axis of a parameter on which a class lies has an exponent, and so has each result that rules gave new names to. The
records are linear equations between these, modulo two for signs. Their solutions are the group: one number for every
unit and every independent solution. What no record determines does not change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm

import numpy as np

from fxmerge.symmetry.base import Group
from fxmerge.symmetry.mixing import Column
from fxmerge.symmetry.propagation import Propagation
from fxmerge.symmetry.units import Ids, distinct
from fxmerge.symmetry.weighing import Terms
from fxmerge.units.kind import Exponents

Number = int | Fraction
"""Whole numbers are kept as such: by far most are, and these are quick."""

Equation = tuple[tuple[int, Number], ...]
"""A sum of variables times coefficients that is zero."""

_SPAN = 1 << 12
"""More than the times that a class lies on one axis."""


@dataclass
class _Equations:
    """The equations of one class.

    Attributes:
        signs, stretches: the equations.
        seen: the variables in them.
        told: those that are told by others.
    """

    signs: set[Equation] = field(default_factory=set)
    stretches: set[Equation] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)
    told: set[int] = field(default_factory=set)


class ExponentFacts:
    """What was recorded of the exponents of the classes of a symmetry.

    Arguments:
        found: the labelled program.
        symmetry: its classes.
    """

    def __init__(self, found: Propagation, symmetry: Group) -> None:
        self._units, self._symmetry = found.units, symmetry
        self._starts = np.array(found.units.starts)
        self._axes = {int(found.units.origin(a.ids.reshape(-1)[:1])[0]): axis for axis, a in found.axes.items()}
        self._layout = {(a.parameter, a.dim): a for a in symmetry.layout}
        self._fixed: dict[int, list[tuple[Column, bool, bool]]] = defaultdict(list)
        self._weighed: dict[int, list[tuple[Column | None, Terms]]] = defaultdict(list)

    def fix(self, column: Column, *, signs: bool = True, scales: bool = True) -> None:
        """The exponents of a column are zero."""
        self._fixed[column.number].append((column, signs, scales))

    def weigh(self, result: Column | None, terms: Terms) -> None:
        """The exponents of a result are sums of those of others, times coefficients for signs and for scales."""
        self._weighed[terms[0][0].number].append((result, terms))

    def solve(self, number: int) -> tuple[tuple[Exponents, ...], tuple[Exponents, ...]]:
        """The independent signs and positive scales of the units of a class."""
        own = _Equations()
        variables = _Variables(self, number, own)
        for column, signs, scales in self._fixed[number]:
            zero = {((v, 1),) for (v,) in variables.rows([column])}
            own.signs |= zero if signs else set()
            own.stretches |= zero if scales else set()
        for result, terms in self._weighed[number]:
            columns = [*(c for c, _, _ in terms), *([] if result is None else [result])]
            last = [] if result is None else [-1]
            for row in variables.rows(columns):
                own.signs.add(_equation(row, [*(s for _, s, _ in terms), *last], modulo=2))
                own.stretches.add(_equation(row, [*(p for _, _, p in terms), *last]))
                own.told.update(row[len(terms) :])
        axes = self._free(number, own.seen)
        still = [((v, 1),) for v in own.seen if v not in axes and v not in own.told]
        signs_found = _solutions([*own.signs, *still], axes, modulo=2)
        return signs_found, _solutions([*own.stretches, *still], axes)

    def _free(self, number: int, seen: Collection[int]) -> dict[int, tuple[str, int, int]]:
        """The variables of the axes of a class, each with the axis and the slot of the first unit there. An axis that
        no record speaks of has none: nothing is known of it."""
        creation = {axis: c for c, axis in self._axes.items()}
        views = dict(self._symmetry.views[number])
        found: dict[int, tuple[str, int, int]] = {}
        for axis, layout in self._layout.items():
            for k, (shown, slots) in enumerate(layout.roles):
                variable = creation[axis] * _SPAN + k
                if shown in views and variable in seen:
                    found[variable] = (*axis, int(slots[0]))
        return found


class _Variables:
    """The variables of one class, which are numbers: that of a creation of units, with the role on an axis."""

    def __init__(self, facts: ExponentFacts, number: int, equations: _Equations) -> None:
        self._facts, self._equations = facts, equations
        self._views = dict(facts._symmetry.views[number])
        self._roles: dict[int, Ids] = {}
        self._known: dict[int, Ids] = {}

    def rows(self, columns: Sequence[Column]) -> list[list[int]]:
        """The variables at the places of columns that have the same units at the same places, each combination once."""
        told = [self._of(c) for c in columns]
        if all(len(own) == 1 for own in told):
            return [[int(own[0]) for own in told]]
        rows: list[list[int]] = np.unique(np.stack(np.broadcast_arrays(*told)), axis=1).T.tolist()
        return rows

    def _of(self, column: Column) -> Ids:
        """The variable at every place of a column, or the one of all. All units at one place have the same."""
        if id(column.raw) not in self._known:  # The records keep the arrays, so their ids stay their own.
            place, raw = column.raw
            variables = self._at(raw)
            if (variables == variables[0]).all():
                self._equations.seen.add(int(variables[0]))
                self._known[id(column.raw)] = variables[:1]
            else:
                self._equations.seen.update(distinct(variables).tolist())
                first = np.concatenate([[True], place[1:] != place[:-1]])
                firsts = variables[first]
                pairs = np.stack([variables, firsts[first.cumsum() - 1]])
                for pair in np.unique(pairs[:, pairs[0] != pairs[1]], axis=1).T.tolist():
                    self._equations.signs.add(_equation(pair, (1, -1), modulo=2))
                    self._equations.stretches.add(_equation(pair, (1, -1)))
                self._known[id(column.raw)] = firsts
        return self._known[id(column.raw)]

    def _at(self, raw: Ids) -> Ids:
        """The variables of units of the walk."""
        facts = self._facts
        creation = facts._units.creation(raw)
        variables = creation * _SPAN
        if creation[0] not in facts._axes and (creation == creation[0]).all():
            return variables
        for c in distinct(creation).tolist():
            if c in facts._axes:
                own = creation == c
                variables[own] += self._role(c)[raw[own] - facts._starts[c]]
        return variables

    def _role(self, creation: int) -> Ids:
        """For every slot of an axis, which of the roles of the axis shows the units of the class there."""
        if creation not in self._roles:
            facts = self._facts
            layout = facts._layout.get(facts._axes[creation])
            end = facts._starts[creation + 1] if creation + 1 < len(facts._starts) else facts._units.size
            roles = np.full(int(end - facts._starts[creation]), _SPAN - 1)
            for k, (shown, slots) in enumerate(layout.roles if layout is not None else ()):
                if shown in self._views:
                    roles[slots[self._views[shown]]] = k
            self._roles[creation] = roles
        return self._roles[creation]


def _equation(variables: Iterable[int], coefficients: Iterable[float], modulo: int = 0) -> Equation:
    total: dict[int, Number] = {}
    for v, c in zip(variables, coefficients, strict=True):
        total[v] = total.get(v, 0) + (c if isinstance(c, int) else _number(Fraction(c)))
    return _reduced(total, modulo)


def _number(c: Fraction) -> Number:
    return c.numerator if c.denominator == 1 else c


def _reduced(row: Mapping[int, Number], modulo: int) -> Equation:
    if modulo:
        return tuple(sorted((v, c % modulo) for v, c in row.items() if c % modulo))
    return tuple(sorted((v, c) for v, c in row.items() if c))


def _solutions(
    equations: Iterable[Equation], axes: Mapping[int, tuple[str, int, int]], modulo: int = 0
) -> tuple[Exponents, ...]:
    """The independent solutions of equations, by axis. Each is led by the first axis that others are told by.

    Numbers are fractions, or whole numbers modulo two.
    """
    told: dict[int, Equation] = {}  # A variable, and the sum of others that it is.

    def settled(row: Mapping[int, Number]) -> dict[int, Number]:
        left, done = dict(row), dict[int, Number]()
        while left:
            v, c = left.popitem()
            if v not in told:
                done[v] = done.get(v, 0) + c
                continue
            for w, d in told[v]:
                left[w] = left.get(w, 0) + c * d
        return dict(_reduced(done, modulo))

    for equation in sorted(equations, key=len):
        row = settled(dict(equation))
        if row:
            last = max(row, key=lambda v: (v not in axes, v))
            by = row.pop(last)
            told[last] = _reduced(
                {v: -c * by if by in (1, -1) else _number(Fraction(-c, by)) for v, c in row.items()}, modulo
            )
    led: dict[int, dict[int, Number]] = defaultdict(dict)
    for variable in axes:
        for leader, power in settled({variable: 1}).items():
            led[leader][variable] = power
    return tuple(_whole(axes, led[leader]) for leader in sorted(led) if leader in axes)


def _whole(axes: Mapping[int, tuple[str, int, int]], powers: Mapping[int, Number]) -> Exponents:
    """A solution times the least number that makes all exponents whole."""
    times = lcm(*(p.denominator for p in powers.values()))
    return tuple((*axes[v], int(p * times)) for v, p in sorted(powers.items()))
