"""A symmetry in words: one line for every class, pinned axis, op without a rule and demoted class."""

from __future__ import annotations

from fxmerge import html
from fxmerge.symmetry.base import ClassAxis, EquivalenceClass, Group
from fxmerge.symmetry.structure import combinations
from fxmerge.units.kind import Kind

SHOWN = 4
"""How many axes of a class are listed."""


def describe(symmetry: Group) -> str:
    """The report that `str(symmetry)` gives."""
    movable, pinned = symmetry.classes[: len(symmetry.units)], symmetry.classes[len(symmetry.units) :]
    shapes = {a.parameter: a.shape for a in symmetry.layout}
    lines = []
    for n, c in enumerate(movable):
        inside = within(symmetry, n)
        where = f" in {' x '.join(inside)}" if inside else ""
        pattern = _unit(symmetry, n)
        axes = [_pattern(axis, shapes[axis.parameter], pattern) for axis in c.axes[:SHOWN]]
        more = [f"... ({len(c.axes)} axes)"] if len(c.axes) > SHOWN else []
        listed = ", ".join(axes + more) or "blocks of other units"
        lines.append(f"{letters(n)}: {c.size} units{where}, {moves(symmetry, n)} | {listed}")
    lines += [f"pinned: {c.name}, {c.size} indices: {c.why}" for c in pinned]
    return "\n".join(lines + notes(symmetry))


def notes(symmetry: Group) -> list[str]:
    """A line for every op without a rule, and for every demoted class."""
    return [
        *(f"no rule: {op} ({count}x)" for op, count in symmetry.unknown.items()),
        *(f"probed: {op} ({count}x)" for op, count in symmetry.probed.items()),
        *(f"demoted: {name} failed verification" for name in symmetry.demoted),
    ]


def tables(symmetry: Group) -> str:
    """The same in HTML, for notebooks: a table of the classes, and one of the pinned axes that a reader opens."""
    movable, pinned = symmetry.classes[: len(symmetry.units)], symmetry.classes[len(symmetry.units) :]
    rows = [
        (letters(n), c.name, c.size, " x ".join(within(symmetry, n)) or "-", moves(symmetry, n), len(c.axes))
        for n, c in enumerate(movable)
    ]
    text = html.table(f"{len(movable)} classes of units", ("", "class", "units", "inside of", "group", "axes"), rows)
    if pinned:
        stuck = [(c.name, c.size, c.why) for c in pinned]
        inner = html.table("pinned axes", ("axis", "indices", "why"), stuck)
        text += html.folded(f"{len(pinned)} pinned axes", inner)
    return text + "".join(map(html.lines, notes(symmetry)))


def within(symmetry: Group, number: int) -> list[str]:
    """The letters of the classes in which a class is nested, and "fixed" if it is held at fixed positions too."""
    unit = symmetry.units[number]
    return [letters(p) for p, _ in unit.parents] + ["fixed"] * bool(unit.fixed.any())


def moves(symmetry: Group, number: int) -> str:
    """How the units of a class may move: "3!^2" for all permutations of three units, in each of two blocks,
    and ", 2^6, R+^6" for a sign and a positive scale of each of these."""
    count, each = combinations(symmetry.units[number])
    own = f"{each}!" + (f"^{count}" if count > 1 else "")
    own = own if each > 1 else "moves with " + " and ".join(within(symmetry, number))
    own += _scales(symmetry.classes[number])
    return own + _group(symmetry.classes[number], *symmetry.by_block(number).shape)


def _unit(symmetry: Group, number: int) -> str:
    """A unit as in `weight(_ a)`, or `weight(_ (a b))` if it is nested in another."""
    inside, (_, each) = within(symmetry, number), combinations(symmetry.units[number])
    return letters(number) if not inside else f"({' '.join([*inside, *([letters(number)] if each > 1 else [])])})"


def _scales(c: EquivalenceClass) -> str:
    """The signs and positive scales of the units of a class, such as `, 2^12, R+^12`."""
    numbers = (("2", c.size * c.signs), ("R+", c.size * c.stretches))
    return "".join(f", {group}^{count}" for group, count in numbers if count)


def _group(c: EquivalenceClass, count: int, each: int) -> str:
    """The group of matrices of a class, such as `, GL(64)^12`, and what limits it; nothing for permutations."""
    if c.kind == Kind.PERMUTATION:
        return ""
    names = {Kind.GENERAL_LINEAR: f"GL({each})", Kind.ORTHOGONAL: f"O({each})", Kind.CENTRED: f"O({each - 1})"}
    name = (names | {Kind.COMPLEX: "GL(1, C)", Kind.UNITARY: "U(1)"})[c.kind]
    return f", {name}" + (f"^{count}" if count > 1 else "") + (f" ({c.kind}: {c.limited})" if c.limited else "")


def _pattern(axis: ClassAxis, shape: tuple[int, ...], pattern: str) -> str:
    """An axis as in `weight(_ a)`: the class's letter in its dimension."""
    dims = " ".join(pattern if d == axis.dim else "_" for d in range(len(shape)))
    span = f"[{axis.indices.min()}:{axis.indices.max() + 1}]" if len(axis.indices) < shape[axis.dim] else ""
    return f"{axis.parameter}({dims}){span}"


def letters(n: int) -> str:
    """a to z, then aa, ab, and so on."""
    return (letters(n // 26 - 1) if n >= 26 else "") + chr(ord("a") + n % 26)
