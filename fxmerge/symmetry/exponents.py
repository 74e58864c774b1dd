"""Which signs and positive scales the units of each class may have: what the rules recorded, solved by class.

Each axis of a parameter on which a class lies has an exponent, and so has each result that rules gave new names to. The
records are linear equations between these, modulo two for signs. Their solutions are the group: one number for every
unit and every independent solution. What no record determines does not change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm

import numpy as np

from fxmerge.symmetry.base import Group
from fxmerge.symmetry.mixing import Column
from fxmerge.symmetry.propagation import Propagation
from fxmerge.symmetry.units import Ids, distinct
from fxmerge.units.kind import Exponents

Equation = tuple[tuple[int, Fraction], ...]
"""A sum of variables times coefficients that is zero."""

_SPAN = 1 << 12
"""More than the times that a class lies on one axis."""


@dataclass
class Balance:
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
    """The equations of all classes of a symmetry.

    Arguments:
        found: the labelled program.
        symmetry: its classes.
    """

    def __init__(self, found: Propagation, symmetry: Group) -> None:
        self._units, self._symmetry = found.units, symmetry
        self._starts = np.array(found.units.starts)
        self._axes = {int(found.units.origin(a.ids.reshape(-1)[:1])[0]): axis for axis, a in found.axes.items()}
        self._layout = {(a.parameter, a.dim): a for a in symmetry.layout}
        self._balances: dict[int, Balance] = defaultdict(Balance)
        self._roles: dict[tuple[int, int], Ids] = {}
        self._known: dict[tuple[int, int], tuple[Ids, Ids]] = {}

    def fix(self, column: Column, *, signs: bool, scales: bool) -> None:
        """The exponents of a column are zero."""
        own = self._balances[column.number]
        for v in distinct(self._variables(column)).tolist():
            for equations, asked in ((own.signs, signs), (own.stretches, scales)):
                if asked:
                    equations.add(((v, Fraction(1)),))

    def weigh(self, result: Column | None, terms: Sequence[tuple[Column, int, float]]) -> None:
        """The exponents of a result are sums of those of others, times coefficients for signs and for scales."""
        columns = [*(c for c, _, _ in terms), *([] if result is None else [result])]
        own = self._balances[columns[0].number]
        told = [self._variables(c) for c in columns]
        rows = np.unique(np.stack(told), axis=1).T.tolist()
        if result is not None:
            own.told.update(distinct(told[-1]).tolist())
        last = [] if result is None else [-1]
        for row in rows:
            own.signs.add(_equation(row, [*(s for _, s, _ in terms), *last], modulo=2))
            own.stretches.add(_equation(row, [*(p for _, _, p in terms), *last]))

    def solve(self, number: int) -> tuple[tuple[Exponents, ...], tuple[Exponents, ...]]:
        """The independent signs and positive scales of the units of a class."""
        own = self._balances.get(number)
        if own is None:
            return (), ()
        axes = self._free(number)
        still = [((v, Fraction(1)),) for v in own.seen if v not in axes and v not in own.told]
        signs = _solutions([*own.signs, *still], axes, modulo=2)
        return signs, _solutions([*own.stretches, *still], axes)

    def _free(self, number: int) -> dict[int, tuple[str, int, int]]:
        """The variables of the axes of a class, each with the axis and the slot of the first unit there. An axis that
        no record speaks of is none: nothing is known of it."""
        creation = {axis: c for c, axis in self._axes.items()}
        views = dict(self._symmetry.views[number])
        found: dict[int, tuple[str, int, int]] = {}
        for axis, layout in self._layout.items():
            for k, (shown, slots) in enumerate(layout.roles):
                variable = creation[axis] * _SPAN + k
                if shown in views and variable in self._balances[number].seen:
                    found[variable] = (*axis, int(slots[0]))
        return found

    def _variables(self, column: Column) -> Ids:
        """The variable at every place of a column. All units at one place have the same."""
        key = (column.number, id(column.raw))
        if key not in self._known:
            place, raw = column.raw
            variables = self._of(column.number, raw)
            own = self._balances[column.number]
            own.seen.update(distinct(variables).tolist())
            first = np.concatenate([[True], place[1:] != place[:-1]])
            firsts = variables[first]
            pairs = np.stack([variables, firsts[first.cumsum() - 1]])
            for a, b in np.unique(pairs[:, pairs[0] != pairs[1]], axis=1).T.tolist():
                for equations in (own.signs, own.stretches):
                    equations.add(_equation((a, b), (1, -1), modulo=2 if equations is own.signs else 0))
            self._known[key] = firsts, column.raw  # The array is kept, so that its id stays its own.
        return self._known[key][0]

    def _of(self, number: int, raw: Ids) -> Ids:
        """The variables of units of the walk, as units of a class."""
        creation = self._units.origin(raw)
        variables = creation * _SPAN
        for c in distinct(creation).tolist():
            if c in self._axes:
                own = creation == c
                variables[own] += self._role(number, c)[raw[own] - self._starts[c]]
        return variables

    def _role(self, number: int, creation: int) -> Ids:
        """For every slot of an axis, which of the roles of the axis shows the units of a class there."""
        if (number, creation) not in self._roles:
            layout, views = self._layout.get(self._axes[creation]), dict(self._symmetry.views[number])
            end = self._starts[creation + 1] if creation + 1 < len(self._starts) else self._units.size
            roles = np.full(int(end - self._starts[creation]), _SPAN - 1)
            for k, (shown, slots) in enumerate(layout.roles if layout is not None else ()):
                if shown in views:
                    roles[slots[views[shown]]] = k
            self._roles[number, creation] = roles
        return self._roles[number, creation]


def _equation(variables: Iterable[int], coefficients: Iterable[float], modulo: int = 0) -> Equation:
    total: dict[int, Fraction] = defaultdict(Fraction)
    for v, c in zip(variables, coefficients, strict=True):
        total[v] += Fraction(c)
    return _reduced(total, modulo)


def _reduced(row: Mapping[int, Fraction], modulo: int) -> Equation:
    pairs = ((v, c % modulo if modulo else c) for v, c in row.items())
    return tuple(sorted((v, c) for v, c in pairs if c))


def _solutions(
    equations: Iterable[Equation], axes: Mapping[int, tuple[str, int, int]], modulo: int = 0
) -> tuple[Exponents, ...]:
    """The independent solutions of equations, by axis. Each is led by the first axis that others are told by.

    Numbers are fractions, or whole numbers modulo two.
    """
    told: dict[int, Equation] = {}  # A variable, and the sum of others that it is.

    def settled(row: Mapping[int, Fraction]) -> dict[int, Fraction]:
        left, done = dict(row), dict[int, Fraction]()
        while left:
            v, c = left.popitem()
            if v not in told:
                done[v] = done.get(v, Fraction()) + c
                continue
            for w, d in told[v]:
                left[w] = left.get(w, Fraction()) + c * d
        return dict(_reduced(done, modulo))

    for equation in sorted(equations, key=len):
        row = settled(dict(equation))
        if row:
            last = max(row, key=lambda v: (v not in axes, v))
            told[last] = _reduced({v: -c / row[last] for v, c in row.items() if v != last}, modulo)
    led: dict[int, dict[int, Fraction]] = defaultdict(dict)
    for variable in axes:
        for leader, power in settled({variable: Fraction(1)}).items():
            led[leader][variable] = power
    return tuple(_whole(axes, led[leader]) for leader in sorted(led) if leader in axes)


def _whole(axes: Mapping[int, tuple[str, int, int]], powers: Mapping[int, Fraction]) -> Exponents:
    """A solution times the least number that makes all exponents whole."""
    times = lcm(*(p.denominator for p in powers.values()))
    return tuple((*axes[v], int(p * times)) for v, p in sorted(powers.items()))
