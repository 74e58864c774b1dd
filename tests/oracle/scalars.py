"""A computation written out as a graph of scalars, and the count of its automorphisms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import islice, permutations

import igraph
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Grid = NDArray[np.int64]
"""A tensor written out: the vertex of every entry. (A `torch.Tensor` is a constant, known by value.)"""

Operand = Grid | Tensor | float
Dims = int | Sequence[int] | None


class Scalars:
    """The graph of scalars. A vertex has a kind and arguments, each with a role (None where order does not matter)."""

    def __init__(self) -> None:
        self.kinds: list[Hashable] = []
        self.arguments: list[list[tuple[Hashable, int]]] = []
        self.values: dict[int, float] = {}
        self._known: dict[Hashable, int] = {}
        self.begin(())

    def begin(self, script: Sequence[int]) -> None:
        """Starts to write out what is computed where the first choices among values come out as in the script, and all
        further ones as the first thing that they can be."""
        self.script, self.taken, self.options = script, list[int](), list[int]()
        self.conditions: list[int] = []

    def choose(self, kind: Hashable, values: Sequence[int], count: int) -> tuple[int, ...]:
        """Which values come first, by size: their places, in order."""
        number, options = len(self.taken), math.perm(len(values), count)
        self.options.append(options)
        self.taken.append(self.script[number] if number < len(self.script) else 0)
        places = next(islice(permutations(range(len(values)), count), self.taken[-1], None))
        others = [v for i, v in enumerate(values) if i not in places]
        first = [values[i] for i in places]
        self.conditions.append(self.ordered(kind, [*first, self.unordered("others", others)]))
        return places

    def cases(self, found: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[int]:
        """The outputs, given the conditions and the outputs of every way in which choices come out."""
        if len(found) == 1:
            return list(found[0][1])
        told = [self.unordered("all of", conditions) for conditions, _ in found]
        every = zip(*(outputs for _, outputs in found), strict=True)
        return [
            self.unordered("cases", [self.ordered("case", pair) for pair in zip(told, each, strict=True)])
            for each in every
        ]

    def _vertex(self, key: Hashable, kind: Hashable, arguments: list[tuple[Hashable, int]]) -> int:
        if key not in self._known:
            self._known[key] = len(self.kinds)
            self.kinds.append(kind)
            self.arguments.append(arguments)
        return self._known[key]

    def leaf(self, kind: Hashable, entry: int) -> int:
        """One of several vertices that are told apart by their use only."""
        return self._vertex(("leaf", kind, entry), kind, [])

    def constant(self, value: float) -> int:
        # Rounding makes one constant of what float32 arithmetic computes in two ways.
        value = float(f"{value:.6g}") + 0.0
        vertex = self._vertex(("constant", value), ("constant", value), [])
        self.values[vertex] = value
        return vertex

    def ordered(self, kind: Hashable, arguments: Sequence[int]) -> int:
        roles: Iterable[Hashable] = [None] if len(arguments) == 1 else range(len(arguments))
        return self._vertex((kind, *arguments), (kind, len(arguments)), list(zip(roles, arguments, strict=True)))

    def unordered(self, kind: Hashable, arguments: Iterable[int]) -> int:
        """A function of the multiset of its arguments."""
        times = sorted(Counter(arguments).items())
        shown: list[tuple[Hashable, int]] = [(None if n == 1 else ("times", n), a) for a, n in times]
        return self._vertex((kind, "unordered", *times), (kind, "unordered"), shown)

    def _split(self, arguments: Iterable[int]) -> tuple[list[float], list[int]]:
        """The values of the constant arguments, and the others."""
        known, open_ = [], []
        for a in arguments:
            if a in self.values:
                known.append(self.values[a])
            else:
                open_.append(a)
        return known, open_

    def sum(self, terms: Sequence[int]) -> int:
        known, open_ = self._split(terms)
        rest = math.fsum(known)
        if not open_ or math.isinf(rest):
            return self.constant(rest)
        if rest != 0.0:
            open_.append(self.constant(rest))
        return open_[0] if len(open_) == 1 else self.unordered("sum", open_)

    def product(self, factors: Sequence[int]) -> int:
        known, open_ = self._split(factors)
        rest = math.prod(known)
        if not open_ or rest == 0.0:
            return self.constant(rest)
        if rest != 1.0:
            open_.append(self.constant(rest))
        return open_[0] if len(open_) == 1 else self.unordered("product", open_)

    def extreme(self, kind: str, values: Sequence[int]) -> int:
        """The maximum ("amax") or minimum ("amin")."""
        known, open_ = self._split(set(values))
        bound = max(known, default=-math.inf) if kind == "amax" else min(known, default=math.inf)
        if not open_ or not math.isinf(bound):
            open_.append(self.constant(bound))
        return open_[0] if len(open_) == 1 else self.unordered(kind, open_)

    def ratio(self, a: int, b: int) -> int:
        return a if self.values.get(a) == 0.0 else self.ordered("ratio", [a, b])

    def equal(self, a: int, b: int) -> int:
        known, open_ = self._split([a, b])
        if len(known) == 2 or (known and math.isinf(known[0])):  # What is computed is finite.
            return self.constant(float(not open_ and known[0] == known[1]))
        return self.unordered("equal", [a, b])

    def choice(self, condition: int, a: int, b: int) -> int:
        if condition in self.values:
            return a if self.values[condition] else b
        return self.ordered("choice", [condition, a, b])

    def count_automorphisms(self, outputs: Sequence[int]) -> int:
        """The number of automorphisms of what the outputs depend on, with the outputs in their places."""
        depth = self._depths(outputs)
        places: dict[int, list[int]] = {}
        for place, vertex in enumerate(outputs):
            places.setdefault(vertex, []).append(place)
        number = {vertex: i for i, vertex in enumerate(depth)}
        # Depths as colours give every edge of the undirected graph its direction back.
        colours: list[Hashable] = [(self.kinds[v], depth[v], tuple(places.get(v, ()))) for v in number]
        edges = []
        for v, i in number.items():
            for role, a in self.arguments[v]:
                if role is None:
                    edges.append((i, number[a]))
                else:
                    edges += [(i, len(colours)), (len(colours), number[a])]
                    colours.append(("role", role))
        palette: dict[Hashable, int] = {}
        graph = igraph.Graph(n=len(colours), edges=edges)
        return int(graph.count_automorphisms(color=[palette.setdefault(c, len(palette)) for c in colours], sh="fs"))

    def _depths(self, outputs: Sequence[int]) -> dict[int, int]:
        """The height above the leaves of every vertex that an output depends on."""
        reached, stack = set(outputs), list(outputs)
        while stack:
            for _, a in self.arguments[stack.pop()]:
                if a not in reached:
                    reached.add(a)
                    stack.append(a)
        depth: dict[int, int] = {}
        for v in sorted(reached):  # Arguments come before what is made of them.
            depth[v] = 1 + max((depth[a] for _, a in self.arguments[v]), default=0)
        return depth

    # ------------------------------------------------------------------ whole tensors

    def grid(self, x: Operand) -> Grid:
        """A tensor, a constant written out if need be."""
        if isinstance(x, np.ndarray):
            return x
        value = torch.as_tensor(x).double()
        vertices = [self.constant(v) for v in value.reshape(-1).tolist()]
        return np.array(vertices, np.int64).reshape(tuple(value.shape))

    def map(self, f: Callable[..., int], *operands: Operand) -> Grid:
        """f at every position, with broadcasting."""
        grids = np.broadcast_arrays(*map(self.grid, operands))
        vertices = [f(*at) for at in zip(*(g.reshape(-1).tolist() for g in grids), strict=True)]
        return np.array(vertices, np.int64).reshape(grids[0].shape)

    def reduce(self, f: Callable[[list[int]], int], x: Grid, dims: Dims = None, keepdim: bool = False) -> Grid:
        """f of all entries along some dimensions (None or no dimensions: along all)."""
        chosen = [dims] if isinstance(dims, int) else list(dims or range(x.ndim))
        gone = sorted(d % x.ndim for d in chosen)
        kept = [n for d, n in enumerate(x.shape) if d not in gone]
        rows = np.moveaxis(x, gone, range(x.ndim - len(gone), x.ndim)).reshape(math.prod(kept), -1)
        result = np.array([f(row) for row in rows.tolist()], np.int64).reshape(kept)
        return np.expand_dims(result, tuple(gone)) if keepdim else result

    def add(self, *operands: Operand) -> Grid:
        return self.map(lambda *terms: self.sum(terms), *operands)

    def multiply(self, *operands: Operand) -> Grid:
        return self.map(lambda *factors: self.product(factors), *operands)

    def mean(self, x: Grid, dims: Dims = None, keepdim: bool = False) -> Grid:
        return self.reduce(lambda row: self.product([self.sum(row), self.constant(1 / len(row))]), x, dims, keepdim)

    def normalize(self, x: Grid, dims: Dims, detail: Hashable) -> Grid:
        """Every entry as a function of itself and of all entries along some dimensions, in no order."""
        everything = self.reduce(lambda row: self.unordered("statistics", row), x, dims, keepdim=True)
        return self.map(lambda *at: self.ordered(("normalize", detail), at), x, everything)

    def affine(self, x: Grid, scale: Operand | None, shift: Operand | None, dim: int) -> Grid:
        """scale * x + shift, for vectors along `dim` and the dimensions after it."""
        for vector, combine in ((scale, self.multiply), (shift, self.add)):
            if vector is not None:
                grid = self.grid(vector)
                x = combine(x, grid.reshape(grid.shape + (1,) * (x.ndim - dim - grid.ndim)))
        return x
