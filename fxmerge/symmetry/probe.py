"""Probing: what an op without a rule does to the dimensions of its operands, found by numeric trials in float64.

Permuting some operands' dimensions together may leave the outputs as they are (the dimensions are reduced) or
permute them along one dimension (these move together). What is found is written like an einsum, one letter for
every set of dimensions that move together, and labelled like one. Everything else is pinned.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxmerge.program.captured import Program
from fxmerge.program.models import same_draws
from fxmerge.program.run import Recorder
from fxmerge.symmetry import mixing
from fxmerge.symmetry.columns import support
from fxmerge.symmetry.labels import Labels, inert, pin, reduce
from fxmerge.symmetry.probe_kinds import mixed_by
from fxmerge.symmetry.rules.contraction import contract
from fxmerge.symmetry.rules.registry import Site
from fxmerge.symmetry.trials import Op, same

TRIALS = 2
MAX_TOGETHER = 3
"""How many operands' dimensions are tried together."""

Dim = tuple[int, int]
"""The number of an operand and one of its dimensions."""


@dataclass(frozen=True)
class Signature:
    """An op's dimensions as an einsum: one string of letters for each tensor operand and each output.

    Attributes:
        terms: for every operand, a letter per dimension, "." for one that has to be pinned.
        outs: likewise for every output, where "." marks a dimension along which it is only known to differ.
        nested: pairs of letters (outer, inner): the inner one may be permuted for each index of the outer by itself.
        free: pairs of letters whose positions may be permuted across both.
        kinds: by which matrices the positions of a letter may be mixed, as for `fxmerge.symmetry.mixing.probed`.
    """

    terms: tuple[str, ...]
    outs: tuple[str, ...]
    nested: frozenset[tuple[str, str]]
    free: frozenset[frozenset[str]]
    kinds: Mapping[str, mixing.Sides]


class Prober:
    """Probes the ops of one program on the values that they meet in its example.

    Arguments:
        program: a captured model.
        ops: the ops to probe.
    """

    def __init__(self, program: Program, ops: set[Any]) -> None:
        self._values = _observe(program, ops)
        self._known: dict[Any, Signature | None] = {}

    def label(self, at: Site, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """The labels of a node's outputs, given those of its arguments; NotImplemented where nothing is found."""
        if node not in self._values:
            return NotImplemented
        operands = [at.labels(x) for x in pytree.tree_leaves((args, kwargs), is_leaf=_is_operand) if _is_operand(x)]
        seeds = [{d for c in x.columns for d in support(c)} for x in operands]
        leaves = pytree.tree_leaves(self._values[node])
        key = (node.target, at.used, tuple(map(_pattern, leaves)), tuple(map(frozenset, seeds)))
        if key not in self._known:
            op = Op.make(node.target, *self._values[node], at.used if isinstance(at.shape, list) else None)
            self._known[key] = None if op is None else _find(op, seeds)
        signature = self._known[key]
        return NotImplemented if signature is None else _apply(at, operands, signature)


def _is_operand(x: Any) -> bool:
    return isinstance(x, (Labels, Tensor))


def _pattern(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)


def _observe(program: Program, ops: set[Any]) -> dict[fx.Node, tuple[Any, Any]]:
    example = program.aten.example
    if example is None or any(t.device.type == "meta" for t in program.aten.state.values()):
        return {}
    inputs = iter(pytree.tree_leaves(example))
    values = [
        next(inputs) if kind == "input" else {**program.parameters, **program.constants}[name]
        for kind, name in program.sources.values()
    ]
    probed = [n for n in program.graph.graph.nodes if n.op == "call_function" and n.target in ops]
    recorder = Recorder(program, {operand for n in probed for operand in n.all_input_nodes})
    with torch.no_grad(), same_draws(*values):
        recorder.run(*values)
    return {n: fx.map_arg((n.args, n.kwargs), recorder.seen.__getitem__) for n in probed}


def _find(op: Op, seeds: Sequence[set[int]]) -> Signature:
    tensors, outputs = op.given[0], op.expected[0]
    terms = [["."] * t.ndim for t in tensors]
    outs = [["."] * y.ndim for y in outputs]
    letters = iter(string.ascii_letters)
    for seed in [(i, d) for i, dims in enumerate(seeds) for d in sorted(dims)]:
        if terms[seed[0]][seed[1]] == ".":
            for together in _candidates(seed, tensors, terms):
                found = _moves(op, together, outputs, outs)
                if found is not None:
                    letter = next(letters)
                    for i, d in together:
                        terms[i][d] = letter
                    for out, to in zip(outs, found, strict=True):
                        if to is not None:
                            out[to] = letter
                    break
    shapes = _Shapes(op, ["".join(t) for t in terms], ["".join(o) for o in outs])
    pairs = {(t[a], t[b]) for t, s in zip(terms, seeds, strict=True) for a, b in permutations(s, 2)}
    pairs = {p for p in pairs if "." not in p}
    nested = frozenset(p for p in pairs if shapes.is_nested(*p))
    free = frozenset(frozenset(p) for p in pairs if frozenset(p) and shapes.is_free(*p))
    single = [(letter, "") for letter in sorted({*"".join(shapes.terms)} - {"."})]
    inside = [(inner, outer) for outer, inner in sorted(nested)]
    kinds = {inner + outer: mixed_by(op, shapes.terms, shapes.outs, inner, outer) for inner, outer in single + inside}
    return Signature(tuple(shapes.terms), tuple(shapes.outs), nested, free, kinds)


def _candidates(seed: Dim, tensors: Sequence[Tensor], terms: Sequence[Sequence[str]]) -> Iterator[tuple[Dim, ...]]:
    """Sets of dimensions of one size, the seed among them, one of each operand, the small sets first."""
    size = tensors[seed[0]].shape[seed[1]]
    others = [
        (i, d)
        for i, t in enumerate(tensors)
        for d in range(t.ndim)
        if i != seed[0] and t.shape[d] == size and terms[i][d] == "."
    ]
    for count in range(MAX_TOGETHER):
        for more in combinations(others, count):
            if len({i for i, _ in more}) == count:
                yield (seed, *more)


def _moves(
    op: Op, together: Sequence[Dim], outputs: Sequence[Tensor], outs: Sequence[Sequence[str]]
) -> list[int | None] | None:
    """Where each output moves if these dimensions are permuted alike: a dimension, or None if it does not move.

    None in place of the list if some output does neither.
    """
    size = op.given[0][together[0][0]].shape[together[0][1]]
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(size, generator=generator) if size > 2 else torch.tensor([1, 0]) for _ in range(TRIALS)]
    choices: list[list[int | None]] = [
        [None, *(d for d in range(y.ndim) if y.shape[d] == size and out[d] == ".")]
        for y, out in zip(outputs, outs, strict=True)
    ]
    found: list[int | None] = []
    for number, options in enumerate(choices):
        fitting = [o for o in options if all(_moves_to(op, together, order, number, o) for order in orders)]
        if not fitting:
            return None
        found.append(fitting[0])
    return found


def _moves_to(op: Op, together: Sequence[Dim], order: Tensor, number: int, option: int | None) -> bool:
    def moved(tensors: list[Tensor]) -> list[Tensor]:
        tensors = list(tensors)
        for i, d in together:
            tensors[i] = tensors[i].index_select(d, order)
        return tensors

    try:
        return all(
            same([op.call(moved(g))[number]], [e[number] if option is None else e[number].index_select(option, order)])
            for g, e in zip(op.given, op.expected, strict=True)
        )
    except Exception:
        return False


@dataclass
class _Shapes:
    """An op with its letters, to test permutations of the positions of two letters together."""

    op: Op
    terms: list[str]
    outs: list[str]

    def is_nested(self, outer: str, inner: str) -> bool:
        """Whether the inner letter may be permuted for each index of the outer by itself."""
        if any(inner in term and outer not in term for term in self.terms):
            return False
        return self._holds(
            outer, inner, lambda n, m, g: torch.rand(n, m, generator=g).argsort(1) + m * torch.arange(n)[:, None]
        )

    def is_free(self, outer: str, inner: str) -> bool:
        """Whether the positions of both letters may be permuted at will."""
        if any((inner in term) != (outer in term) for term in (*self.terms, *self.outs)):
            return False
        return self._holds(outer, inner, lambda n, m, g: torch.randperm(n * m, generator=g).reshape(n, m))

    def _holds(self, outer: str, inner: str, choose: Callable[[int, int, torch.Generator], Tensor]) -> bool:
        term, t = next((t, x) for t, x in zip(self.terms, self.op.given[0], strict=True) if outer in t and inner in t)
        n, m = t.shape[term.index(outer)], t.shape[term.index(inner)]
        order = choose(n, m, torch.Generator().manual_seed(0)).reshape(-1)

        def mover(terms: Sequence[str]) -> Callable[[list[Tensor]], list[Tensor]]:
            def move(tensors: list[Tensor]) -> list[Tensor]:
                return [
                    _permute(x, (t.index(outer), t.index(inner)), order) if outer in t and inner in t else x
                    for x, t in zip(tensors, terms, strict=True)
                ]

            return move

        return self.op.maps(mover(self.terms), mover(self.outs))


def _permute(x: Tensor, dims: tuple[int, int], order: Tensor) -> Tensor:
    """x with the positions along two dimensions, taken as one, in another order."""
    last = x.movedim(dims, (-2, -1))
    return last.flatten(-2).index_select(-1, order).reshape(last.shape).movedim((-2, -1), dims)


def _apply(at: Site, operands: Sequence[Labels], signature: Signature) -> Any:
    """The labels that an einsum with this signature would give, once what has to stay is pinned."""
    reason = f"{at.name}: probed"
    spare = (c for c in string.ascii_letters if not any(c in t for t in (*signature.terms, *signature.outs)))
    ready, terms = [], []
    for x, term in zip(operands, signature.terms, strict=True):
        x = pin(at.units, x, reason, [d for d, letter in enumerate(term) if letter == "."])
        for column in x.columns:
            dims = support(column)
            if len(dims) > 2:
                x = pin(at.units, x, reason, dims)
            elif len(dims) == 2:
                x = _pair(at, x, term, dims, signature, reason)
        ready.append(x)
        terms.append("".join(next(spare) if letter == "." else letter for letter in term))
    shapes = at.shape if isinstance(at.shape, list) else [at.shape]
    results, quiet = [inert(shape) for shape in shapes], _Quiet(**vars(at))
    numbers = sorted(at.used) if isinstance(at.shape, list) else [0]
    for number, out in zip(numbers, signature.outs, strict=True):
        shape = shapes[number]
        kept = "".join(letter for letter in out if letter != ".")
        y = contract(quiet, ready, terms, kept)
        y = y.reshape(tuple(1 if letter == "." else n for letter, n in zip(out, shape, strict=True)))
        results[number] = at.join(y, inert(shape, [d for d, letter in enumerate(out) if letter == "."]), shape)
    told = [*operands, *(results[number] for number in numbers)]
    at.mix(mixing.probed, *told, terms=(*signature.terms, *signature.outs), kinds=signature.kinds)
    return results if isinstance(at.shape, list) else results[0]


class _Quiet(Site):
    """A site at which a contraction says nothing of changes of basis, signs and scales: trials do."""

    def mix(self, what: mixing.Mix, *operands: Labels | Tensor | float, **how: Any) -> None:
        """Records nothing."""

    def weigh(self, what: mixing.Mix, *operands: Labels | Tensor | float, **how: Any) -> None:
        """Records nothing."""

    def product(self, result: Labels, *factors: Labels | Tensor | float, **how: Any) -> Labels:
        """The result under the names that it has."""
        return result


def _pair(at: Site, x: Labels, term: str, dims: tuple[int, ...], signature: Signature, reason: str) -> Labels:
    """Holds back a column along two dimensions as far as the op does not let it move."""
    a, b = term[dims[0]], term[dims[1]]
    if frozenset((a, b)) in signature.free:
        return x
    for outer, inner in ((a, b), (b, a)):
        if (outer, inner) in signature.nested:
            return at.join(x, reduce(at.units, x, [term.index(inner)], reason, keepdim=True), x.shape)
    return pin(at.units, x, reason, dims)
