"""A symmetry in words: one line for every class, pinned axis, op without a rule and demoted class."""

from __future__ import annotations

from fxmerge.symmetry.base import ClassAxis, EquivalenceClass, Group
from fxmerge.symmetry.structure import combinations
from fxmerge.units.kind import Kind

SHOWN = 4
"""How many axes of a class are listed."""


def describe(symmetry: Group) -> str:
    """The report that `str(symmetry)` gives."""
    movable, pinned = symmetry.classes[: len(symmetry.units)], symmetry.classes[len(symmetry.units) :]
    shapes = {a.parameter: a.shape for a in symmetry.layout}
    letters = [_letters(n) for n in range(len(movable))]
    lines = []
    for n, (letter, c, unit) in enumerate(zip(letters, movable, symmetry.units, strict=True)):
        count, each = combinations(unit)
        inside = [letters[p] for p, _ in unit.parents] + ["fixed"] * bool(unit.fixed.any())
        moves = f"{each}!" + (f"^{count}" if count > 1 else "") if each > 1 else "moves with " + " and ".join(inside)
        moves += _group(c, *symmetry.by_block(n).shape)
        where = f" in {' x '.join(inside)}" if inside else ""
        pattern = letter if not inside else f"({' '.join([*inside, *([letter] if each > 1 else [])])})"
        axes = [_pattern(axis, shapes[axis.parameter], pattern) for axis in c.axes[:SHOWN]]
        more = [f"... ({len(c.axes)} axes)"] if len(c.axes) > SHOWN else []
        lines.append(f"{letter}: {c.size} units{where}, {moves} | {', '.join(axes + more) or 'blocks of other units'}")
    lines += [f"pinned: {c.name}, {c.size} indices: {c.why}" for c in pinned]
    lines += [f"no rule: {op} ({count}x)" for op, count in symmetry.unknown.items()]
    lines += [f"probed: {op} ({count}x)" for op, count in symmetry.probed.items()]
    lines += [f"demoted: {name} failed verification" for name in symmetry.demoted]
    return "\n".join(lines)


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


def _letters(n: int) -> str:
    """a to z, then aa, ab, and so on."""
    return (_letters(n // 26 - 1) if n >= 26 else "") + chr(ord("a") + n % 26)
