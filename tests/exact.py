"""The exact number of coordinate permutations that leave a tiny network unchanged, by brute force.

The network is exported to core ATen and its computation is written out as one graph of scalars: a vertex
for every entry of every tensor, equal expressions being one vertex. Sums, products, maxima and minima
do not order their arguments; everything else does. The entries of a parameter are anonymous: they are told
apart by nothing but what is computed with them. Inputs and outputs stay where they are, constants are
known by value. Then the automorphisms of this graph are just the permutations of parameter entries
that leave every output the same expression, and BLISS counts them.

What counts as the same expression: sums are unordered but not re-associated, and nothing is
distributed or cancelled. Only terms that are zero, factors that are zero or one, and infinities that
stem from masks are simplified away, because padding and masks make entries irrelevant in this way.
"""

from __future__ import annotations

import copy
import math
import operator
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import igraph
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

Grid = NDArray[np.int64]
"""A tensor written out: the vertex of every entry. (A `torch.Tensor` is a constant, known by value.)"""

Operand = Grid | Tensor | float
Dims = int | Sequence[int] | None


def exact_log_order(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> float:
    """The logarithm of the number of permutations of parameter entries that leave the function unchanged.

    Persistent floating-point buffers move like parameters, other buffers are constants, and so are inputs
    that are not floating-point numbers. Entries that no output depends on do not count. Tensors that share
    memory share their entries.

    Arguments:
        model: a network with some thousands of scalar operations; it is taken in eval mode and not modified.
        args: example inputs.
        kwargs: example inputs by keyword.

    Raises:
        NotImplementedError: for an op that cannot be written out, with its name.
    """
    with torch.no_grad():
        exported = torch.export.export(copy.deepcopy(model).eval(), args, dict(kwargs or {}), strict=False)
        program = exported.run_decompositions()
    unrolled = _Unroll(program, [*pytree.tree_leaves((args, dict(kwargs or {})))])
    return math.log(unrolled.scalars.count_automorphisms(unrolled.outputs()))


class Scalars:
    """The graph of scalars. A vertex has a kind and arguments, each with a role (None where order does not matter)."""

    def __init__(self) -> None:
        self.kinds: list[Hashable] = []
        self.arguments: list[list[tuple[Hashable, int]]] = []
        self.values: dict[int, float] = {}
        self._known: dict[Hashable, int] = {}

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
        roles = [None] if len(arguments) == 1 else range(len(arguments))
        return self._vertex((kind, *arguments), (kind, len(arguments)), list(zip(roles, arguments, strict=True)))

    def unordered(self, kind: Hashable, arguments: Iterable[int]) -> int:
        """A function of the multiset of its arguments."""
        times = sorted(Counter(arguments).items())
        shown = [(None if n == 1 else ("times", n), a) for a, n in times]
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


# ------------------------------------------------------------------------------------ ops

Op = Callable[..., Any]
_OPS: dict[str, Op] = {}


def _op(*names: str) -> Callable[[Op], Op]:
    """Registers what writes some ATen ops out; it is given the scalars and the op's own arguments."""

    def register(function: Op) -> Op:
        _OPS.update(dict.fromkeys(names, function))
        return function

    return register


_MOVEMENTS = frozenset(
    "view reshape _unsafe_view permute transpose t unsqueeze squeeze expand slice select split split_with_sizes "
    "unbind chunk repeat repeat_interleave flip roll diagonal as_strided unfold pixel_shuffle pixel_unshuffle "
    "channel_shuffle clone alias detach _to_copy index index_select gather embedding".split()
)
"""Ops that give out entries of their first argument."""

_ASSEMBLIES = frozenset("cat stack slice_scatter select_scatter constant_pad_nd copy where".split())
"""Ops that give out entries of any of their arguments."""


def _tensors(value: Any) -> Any:
    return pytree.tree_map(lambda v: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v, value)


def _grids(value: Any) -> Any:
    return pytree.tree_map(lambda v: v.numpy() if isinstance(v, Tensor) else v, value)


def _is_grid(value: Any) -> bool:
    return any(isinstance(v, np.ndarray) for v in pytree.tree_leaves(value))


def _move(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if target._schema.name == "aten::_to_copy":
        return args[0]
    if target._schema.name == "aten::embedding":
        args = args[:2]
    return _grids(target(*_tensors(args), **kwargs))


def _assemble(s: Scalars, name: str, target: Any, args: tuple[Any, ...]) -> Any:
    if name == "constant_pad_nd":
        fill = s.constant(float(args[2]) if len(args) > 2 else 0.0)
        return _grids(target(*_tensors(args[:2]), fill))
    whole = pytree.tree_map(lambda v: s.grid(v) if isinstance(v, Tensor) else v, args)
    if name == "where":
        whole = (args[0], *(s.grid(v) for v in args[1:]))
    return _grids(target(*_tensors(whole)))


_PAIRS: dict[str, Callable[[Scalars, int, int], int]] = {
    "add": lambda s, a, b: s.sum([a, b]),
    "mul": lambda s, a, b: s.product([a, b]),
    "maximum": lambda s, a, b: s.extreme("amax", [a, b]),
    "minimum": lambda s, a, b: s.extreme("amin", [a, b]),
    "sub": lambda s, a, b: s.sum([a, s.constant(-s.values[b])]) if b in s.values else s.ordered("sub", [a, b]),
    "div": lambda s, a, b: s.product([a, s.constant(1 / s.values[b])]) if s.values.get(b) else s.ratio(a, b),
}


def _pointwise(s: Scalars, name: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
    if name in _PAIRS and not kwargs.get("rounding_mode"):
        b = args[1] if kwargs.get("alpha", 1) == 1 else s.multiply(args[1], kwargs["alpha"])
        return s.map(lambda *pair: _PAIRS[name](s, *pair), args[0], b)
    is_operand = [isinstance(a, (np.ndarray, Tensor)) for a in args]
    detail = (name, tuple(None if o else a for a, o in zip(args, is_operand, strict=True)), tuple(sorted(kwargs.items())))

    def value(*at: int) -> int:
        if all(a in s.values for a in at):
            given = iter(at)
            whole = [torch.tensor(s.values[next(given)]) if o else a for a, o in zip(args, is_operand, strict=True)]
            return s.constant(float(target(*whole, **kwargs)))
        return s.ordered(detail, at)

    return s.map(value, *(a for a, o in zip(args, is_operand, strict=True) if o))


@_op("mm", "bmm", "mv", "dot")
def _matmul(s: Scalars, a: Operand, b: Operand) -> Grid:
    left, right = s.grid(a), s.grid(b)
    wide = right[..., None] if right.ndim == 1 else right
    product = s.reduce(s.sum, s.multiply(left[..., None], wide[..., None, :, :]), -2)
    return product[..., 0] if right.ndim == 1 else product


@_op("addmm", "baddbmm")
def _addmm(s: Scalars, bias: Operand, a: Operand, b: Operand) -> Grid:
    return s.add(_matmul(s, a, b), bias)


def _windows(x: Grid, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Grid:
    """All windows over the last dimensions of x: (..., *places, *kernel)."""
    lead = x.ndim - len(kernel)
    for dim, (k, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), start=lead):
        places = (x.shape[dim] - gap * (k - 1) - 1) // step + 1
        at = step * np.arange(places)[:, None] + gap * np.arange(k)
        x = np.moveaxis(np.take(x, at, axis=dim), dim + 1, -1)
    return x


def _border(s: Scalars, x: Grid, widths: Sequence[tuple[int, int]], fill: float) -> Grid:
    """x with its last dimensions padded; a negative width cuts."""
    for d, (before, after) in enumerate(widths, start=x.ndim - len(widths)):
        none = [(0, 0)] * x.ndim
        none[d] = (max(before, 0), max(after, 0))
        x = np.pad(x, none, constant_values=s.constant(fill))
        x = np.take(x, range(max(-before, 0), x.shape[d] - max(-after, 0)), axis=d)
    return x


@_op("convolution")
def _convolution(
    s: Scalars,
    x: Grid,
    weight: Grid,
    bias: Operand | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Grid:
    rank, kernel = len(stride), weight.shape[2:]
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    w = weight.reshape(groups, rows, columns, *kernel)
    widths = [(p, p) for p in padding]
    if transposed:  # A convolution of the stretched input with the kernel turned round.
        w = np.flip(w.swapaxes(1, 2), tuple(range(3, 3 + rank)))
        for d, step in enumerate(stride, start=2):
            at = np.arange(step * (x.shape[d] - 1) + 1)
            hole = (at % step != 0).reshape([-1 if i == d else 1 for i in range(x.ndim)])
            x = np.where(hole, s.constant(0.0), np.take(x, at // step, axis=d))
        full = [g * (k - 1) - p for g, k, p in zip(dilation, kernel, padding, strict=True)]
        widths = [(f, f + extra) for f, extra in zip(full, output_padding, strict=True)]
        stride = [1] * rank
    seen = _windows(_border(s, x, widths, 0.0), kernel, stride, dilation)
    places = seen.shape[2 : 2 + rank]
    seen = seen.reshape(len(x), groups, 1, -1, *places, *kernel)
    w = w.reshape(groups, w.shape[1], w.shape[2], *(1,) * rank, *kernel)
    out = s.reduce(s.sum, s.multiply(seen, w), (3, *range(-rank, 0)))
    return s.affine(out.reshape(len(x), -1, *places), None, bias, 1)


def _pool(f: Callable[[Scalars, list[int]], int], fill: float) -> Op:
    def pool(
        s: Scalars, x: Grid, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, *flags: Any
    ) -> Grid:
        # An average pooling has its ceil_mode where a maximum pooling has its dilation.
        gaps = [1] * len(kernel) if isinstance(dilation, (bool, int)) else dilation
        if dilation is True or flags[:1] == (True,) and isinstance(dilation, list):
            raise NotImplementedError("pooling with ceil_mode cannot be written out")
        pads = [padding] * len(kernel) if isinstance(padding, int) else padding
        seen = _windows(_border(s, x, [(p, p) for p in pads], fill), kernel, stride or kernel, gaps)
        return s.reduce(lambda row: f(s, row), seen, range(-len(kernel), 0))

    return pool


_average = _pool(lambda s, row: s.product([s.sum(row), s.constant(1 / len(row))]), 0.0)
_maximum = _pool(lambda s, row: s.extreme("amax", row), -math.inf)
_op("avg_pool1d", "avg_pool2d", "avg_pool3d")(_average)
_op("max_pool2d_with_indices", "max_pool3d_with_indices")(lambda *args: [_maximum(*args), None])


@_op("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d")
def _adaptive_average(s: Scalars, x: Grid, size: Sequence[int]) -> Grid:
    for d, n in enumerate(size, start=x.ndim - len(size)):
        full = x.shape[d]
        bins = [np.take(x, range(i * full // n, -(-(i + 1) * full // n)), axis=d) for i in range(n)]
        x = np.concatenate([s.mean(b, d, keepdim=True) for b in bins], axis=d)
    return x


@_op("native_layer_norm")
def _layer_norm(s: Scalars, x: Grid, shape: Sequence[int], scale: Any, shift: Any, eps: float) -> list[Any]:
    first = x.ndim - len(shape)
    return [s.affine(s.normalize(x, range(first, x.ndim), eps), scale, shift, first), None, None]


@_op("_fused_rms_norm")
def _rms_norm(s: Scalars, x: Grid, shape: Sequence[int], scale: Any, eps: float | None) -> list[Any]:
    return _layer_norm(s, x, shape, scale, None, eps or 0.0)[:2]


@_op("native_group_norm")
def _group_norm(
    s: Scalars, x: Grid, scale: Any, shift: Any, batch: int, channels: int, space: int, groups: int, eps: float
) -> list[Any]:
    y = s.normalize(x.reshape(batch, groups, -1), 2, eps).reshape(x.shape)
    return [s.affine(y, scale, shift, 1), None, None]


@_op("_native_batch_norm_legit_no_training")
def _batch_norm(
    s: Scalars, x: Grid, scale: Any, shift: Any, mean: Operand, variance: Operand, momentum: float, eps: float
) -> list[Any]:
    size = (-1, *(1,) * (x.ndim - 2))
    given = s.grid(mean).reshape(size), s.grid(variance).reshape(size)
    y = s.map(lambda *at: s.ordered(("standardize", eps), at), x, *given)
    return [s.affine(y, scale, shift, 1), None, None]


@_op("_native_batch_norm_legit")
def _batch_norm_of_batch(
    s: Scalars, x: Grid, scale: Any, shift: Any, training: bool, momentum: float, eps: float
) -> list[Any]:
    return [s.affine(s.normalize(x, (0, *range(2, x.ndim)), eps), scale, shift, 1), None, None]


@_op("_softmax", "_safe_softmax")
def _softmax(s: Scalars, x: Grid, dim: int, *rest: Any) -> Grid:
    # Not a plain `normalize`, so that masked entries drop out.
    def exponential(v: int) -> int:
        return s.constant(math.exp(s.values[v])) if v in s.values else s.ordered("exp", [v])

    e = s.map(exponential, x)
    return s.map(s.ratio, e, s.reduce(s.sum, e, dim, keepdim=True))


@_op("sum")
def _sum(s: Scalars, x: Grid, dims: Dims = None, keepdim: bool = False, **kwargs: Any) -> Grid:
    return s.reduce(s.sum, x, dims, keepdim)


@_op("mean")
def _mean(s: Scalars, x: Grid, dims: Dims = None, keepdim: bool = False, **kwargs: Any) -> Grid:
    return s.mean(x, dims, keepdim)


@_op("var")
def _variance(s: Scalars, x: Grid, dims: Dims = None, correction: float = 1, keepdim: bool = False) -> Grid:
    return s.reduce(lambda row: s.unordered(("var", correction), row), x, dims, keepdim)


@_op("amax")
def _amax(s: Scalars, x: Grid, dims: Dims = None, keepdim: bool = False) -> Grid:
    return s.reduce(lambda row: s.extreme("amax", row), x, dims, keepdim)


@_op("amin")
def _amin(s: Scalars, x: Grid, dims: Dims = None, keepdim: bool = False) -> Grid:
    return s.reduce(lambda row: s.extreme("amin", row), x, dims, keepdim)


@_op("full_like")
def _filled(s: Scalars, x: Grid, value: float, **kwargs: Any) -> Tensor:
    return torch.full(x.shape, value)


# ------------------------------------------------------------------------------------ the walk


class _Unroll(fx.Interpreter):
    """Runs an exported program on grids in place of its inputs and parameters."""

    def __init__(self, program: ExportedProgram, inputs: Sequence[Any]) -> None:
        super().__init__(program.graph_module)
        self.program, self.inputs, self.scalars = program, iter(inputs), Scalars()

    def outputs(self) -> list[int]:
        """The vertices of everything that the user sees."""
        values = self.run(*(self._given(spec) for spec in self.program.graph_signature.input_specs))
        specs = self.program.graph_signature.output_specs
        seen = [v for v, spec in zip(values, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]
        return [vertex for v in seen if v is not None for vertex in self.scalars.grid(v).reshape(-1).tolist()]

    def _given(self, spec: Any) -> Any:
        if spec.kind is InputKind.USER_INPUT:
            value = next(self.inputs)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            entries = [self.scalars.leaf(("input", spec.arg.name, i), 0) for i in range(value.numel())]
            return np.array(entries, np.int64).reshape(tuple(value.shape))
        tensor = self.program.state_dict.get(spec.target)
        if tensor is None:
            return self.program.constants[spec.target]
        return self._entries(tensor) if tensor.is_floating_point() else tensor

    def _entries(self, tensor: Tensor) -> Grid:
        """An entry is known by its place in memory, so that tied parameters are one."""
        storage = tensor.untyped_storage()
        places = torch.arange(storage.nbytes() // tensor.element_size())
        view = places.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        entries = [self.scalars.leaf(("parameter", storage.data_ptr()), at) for at in view.reshape(-1).tolist()]
        return np.array(entries, np.int64).reshape(tuple(tensor.shape))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is operator.getitem or not _is_grid((args, kwargs)):
            return target(*args, **kwargs)
        name = target._schema.name.removeprefix("aten::")
        if name.startswith(("_assert", "sym_constrain")):
            return None
        if name in _OPS:
            return _OPS[name](self.scalars, *args, **kwargs)
        if name in _MOVEMENTS and isinstance(args[0], np.ndarray) and not _is_grid(args[1:]):
            return _move(target, args, kwargs)
        if name in _ASSEMBLIES and not (name == "where" and _is_grid(args[0])):
            return _assemble(self.scalars, name, target, args)
        if torch.Tag.pointwise in target.tags:
            return _pointwise(self.scalars, name, target, args, kwargs)
        raise NotImplementedError(f"{target} cannot be written out")
