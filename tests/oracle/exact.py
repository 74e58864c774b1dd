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

Where numbers tell places, such as those of the largest values, the network is written out once for every way
in which these may come out, as a case with its condition. Equal values do not occur.
"""

from __future__ import annotations

import copy
import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram, default_decompositions
from torch.export.graph_signature import InputKind, InputSpec, OutputKind
from torch.utils import _pytree as pytree

from tests.oracle.scalars import Dims, Grid, Operand, Scalars


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
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of torch.export, about torch's own recurrent modules.
        exported = torch.export.export(copy.deepcopy(model).eval(), args, dict(kwargs or {}), strict=False)
        table = default_decompositions()
        table.pop(torch.ops.aten.linalg_inv.default, None)  # Torch writes it with a check of its result.
        program = exported.run_decompositions(table)
    scalars, inputs = Scalars(), pytree.tree_leaves((args, dict(kwargs or {})))
    found, scripts = [], [()]
    while scripts:
        script: tuple[int, ...] = scripts.pop()
        scalars.begin(script)
        outputs = _Unroll(program, inputs, scalars).outputs()
        found.append((scalars.conditions, outputs))
        for i in range(len(script), len(scalars.taken)):
            scripts += [(*scalars.taken[:i], other) for other in range(1, scalars.options[i])]
    return math.log(scalars.count_automorphisms(scalars.cases(found)))


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
    (
        *("view", "reshape", "_unsafe_view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "diagonal"),
        *("slice", "select", "split", "split_with_sizes", "unbind", "chunk", "flip", "roll", "unfold", "as_strided"),
        *("repeat", "repeat_interleave", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
        *("clone", "alias", "detach", "_to_copy", "index", "index_select", "gather", "embedding"),
    )
)
"""Ops that give out entries of their first argument."""

_ASSEMBLIES = frozenset(("cat", "stack", "slice_scatter", "select_scatter", "constant_pad_nd", "copy"))
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
    return _grids(target(*_tensors(whole)))


_PAIRS: dict[str, Callable[[Scalars, int, int], int]] = {
    "add": lambda s, a, b: s.sum([a, b]),
    "mul": lambda s, a, b: s.product([a, b]),
    "maximum": lambda s, a, b: s.extreme("amax", [a, b]),
    "minimum": lambda s, a, b: s.extreme("amin", [a, b]),
    "sub": lambda s, a, b: s.sum([a, s.constant(-s.values[b])]) if b in s.values else s.ordered("sub", [a, b]),
    "eq": lambda s, a, b: s.equal(a, b),
    "div": lambda s, a, b: s.product([a, s.constant(1 / s.values[b])]) if s.values.get(b) else s.ratio(a, b),
}


def _resample(s: Scalars, target: Any, x: Grid, args: tuple[Any, ...]) -> Grid:
    """A linear map over space, whose matrix is found by running it on every unit image."""
    space = math.prod(x.shape[2:])
    matrix = target(torch.eye(space).reshape(space, 1, *x.shape[2:]), *args)
    terms = s.multiply(x.reshape(*x.shape[:2], space, 1), matrix.reshape(space, -1))
    return s.reduce(s.sum, terms, 2).reshape(*x.shape[:2], *matrix.shape[2:])


def _pointwise(s: Scalars, name: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
    if name in _PAIRS and not kwargs.get("rounding_mode"):
        b = args[1] if kwargs.get("alpha", 1) == 1 else s.multiply(args[1], kwargs["alpha"])
        return s.map(lambda *pair: _PAIRS[name](s, *pair), args[0], b)
    is_operand = [isinstance(a, (np.ndarray, Tensor)) for a in args]
    detail = (
        name,
        tuple(None if o else a for a, o in zip(args, is_operand, strict=True)),
        tuple(sorted(kwargs.items())),
    )

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


@_op("linalg_matrix_exp")
def _matrix_exponential(s: Scalars, x: Grid) -> Grid:
    """The first terms of the series: what leaves these unchanged leaves all of it unchanged."""
    square = _matmul(s, x, x)
    return s.add(torch.eye(x.shape[-1]), x, s.multiply(square, 1 / 2), s.multiply(_matmul(s, square, x), 1 / 6))


@_op("linalg_inv")
def _inverse(s: Scalars, x: Grid) -> Grid:
    """Cramer's rule: cofactors over the determinant."""
    size = len(x)
    terms: dict[tuple[int, int], list[int]] = {at: [] for at in np.ndindex(size, size)}
    whole = []
    for order in permutations(range(size)):
        sign = s.constant((-1.0) ** sum(a > b for i, b in enumerate(order) for a in order[:i]))
        entries = [int(x[row, column]) for row, column in enumerate(order)]
        whole.append(s.product([sign, *entries]))
        for row, column in enumerate(order):
            terms[row, column].append(s.product([sign, *entries[:row], *entries[row + 1 :]]))
    determinant = s.sum(whole)
    found = [s.ratio(s.sum(terms[row, column]), determinant) for column in range(size) for row in range(size)]
    return np.array(found).reshape(size, size)


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
        if dilation is True or (flags[:1] == (True,) and isinstance(dilation, list)):
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
    first = x.ndim - len(shape)
    return [s.affine(s.normalize(x, range(first, x.ndim), eps), scale, None, first), None]


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


@_op("amax", "any")
def _maxima(s: Scalars, x: Grid, dims: Dims = None, keepdim: bool = False) -> Grid:
    return s.reduce(lambda row: s.extreme("amax", row), x, dims, keepdim)


@_op("amin")
def _minima(s: Scalars, x: Grid, dims: Dims = None, keepdim: bool = False) -> Grid:
    return s.reduce(lambda row: s.extreme("amin", row), x, dims, keepdim)


@_op("argmax", "argmin")
def _extreme_place(s: Scalars, x: Grid, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Which is the largest, as a number, in the case that is written out."""
    rows = x.reshape(-1) if dim is None else np.moveaxis(x, dim, -1)
    first = [s.choose("extreme", row, 1)[0] for row in rows.reshape(-1, rows.shape[-1]).tolist()]
    places = torch.tensor(first).reshape(rows.shape[:-1])
    return places.unsqueeze(dim) if keepdim and dim is not None else places


@_op("topk")
def _top(s: Scalars, x: Grid, k: int, dim: int = -1, largest: bool = True, *rest: Any) -> list[Any]:
    rows = np.moveaxis(x, dim, -1)
    first = [s.choose(("top", largest), row, k) for row in rows.reshape(-1, rows.shape[-1]).tolist()]
    places = np.array(first).reshape(*rows.shape[:-1], k)
    values = np.take_along_axis(rows, places, -1)
    return [np.moveaxis(values, -1, dim), torch.from_numpy(np.moveaxis(places, -1, dim))]


@_op("sort")
def _sorted(s: Scalars, x: Grid, dim: int = -1, descending: bool = False) -> list[Any]:
    return _top(s, x, x.shape[dim], dim, descending)


@_op("max.dim", "min.dim", "median.dim")
def _extreme_and_place(s: Scalars, x: Grid, dim: int, keepdim: bool = False) -> list[Any]:
    places = _extreme_place(s, x, dim, True)
    values = np.take_along_axis(x, places.numpy(), dim)
    return [values, places] if keepdim else [values.squeeze(dim), places.squeeze(dim)]


@_op("_grouped_mm")
def _grouped_product(s: Scalars, rows: Grid, stack: Grid, ends: Tensor, *args: Any) -> Grid:
    edges = pairwise([0, *ends.tolist()])
    parts = [_matmul(s, rows[i:j], stack[e]) for e, (i, j) in enumerate(edges) if i < j]
    return np.concatenate(parts)


@_op("where")
def _where(s: Scalars, condition: Operand, a: Operand, b: Operand) -> Grid:
    return s.map(s.choice, condition, a, b)


@_op("_trilinear")
def _trilinear(s: Scalars, *args: Any) -> Grid:
    factors = [np.expand_dims(x, tuple(gaps)) for x, gaps in zip(args[:3], args[3:6], strict=True)]
    return s.reduce(s.sum, s.multiply(*factors), args[6])


@_op("index_put", "_unsafe_index_put")
def _index_put(s: Scalars, x: Operand, indices: Sequence[Any], values: Operand, accumulate: bool = False) -> Grid:
    grid = s.grid(x)
    if _is_grid(indices):  # A mask of data over the first dimensions.
        (mask,) = indices
        mask = mask.reshape(*mask.shape, *(1,) * (grid.ndim - mask.ndim))
        written = s.add(grid, values) if accumulate else s.grid(values)
        return s.map(s.choice, mask, written, grid)
    places = torch.arange(grid.size).reshape(grid.shape)[tuple(slice(None) if i is None else i for i in indices)]
    return _written(s, grid, places.numpy(), s.grid(values), s.sum if accumulate else None)


@_op("scatter")
def _scatter(s: Scalars, x: Operand, dim: int, index: Tensor, source: Any) -> Grid:
    return _scattered(s, x, dim, index, source, None)


@_op("scatter_add")
def _scatter_add(s: Scalars, x: Operand, dim: int, index: Tensor, source: Operand) -> Grid:
    return _scattered(s, x, dim, index, source, s.sum)


@_op("scatter_reduce")
def _scatter_reduce(s: Scalars, x: Operand, dim: int, index: Tensor, source: Operand, way: str) -> Grid:
    return _scattered(s, x, dim, index, source, s.sum if way == "sum" else lambda row: s.extreme(way, row))


def _scattered(
    s: Scalars, x: Operand, dim: int, index: Tensor, source: Any, combine: Callable[[list[int]], int] | None
) -> Grid:
    grid, values = s.grid(x), s.grid(source if isinstance(source, (np.ndarray, Tensor)) else torch.tensor(source))
    places = torch.arange(grid.size).reshape(grid.shape).gather(dim, index).numpy()
    return _written(s, grid, places, values[tuple(map(slice, places.shape))] if values.ndim else values, combine)


def _written(s: Scalars, x: Grid, places: Any, values: Grid, combine: Callable[[list[int]], int] | None) -> Grid:
    """x with values written at numbered places; what there is at a place is combined, or lost."""
    out = x.reshape(-1).copy()
    lists: dict[int, list[int]] = {}
    for place, value in zip(places.reshape(-1), np.broadcast_to(values, places.shape).reshape(-1), strict=True):
        lists.setdefault(int(place), []).append(int(value))
    for place, entries in lists.items():
        out[place] = entries[-1] if combine is None else combine([int(out[place]), *entries])
    return out.reshape(x.shape)


@_op("index_add")
def _index_add(s: Scalars, x: Operand, dim: int, index: Tensor, source: Operand) -> Grid:
    grid = s.grid(x)
    places = torch.arange(grid.size).reshape(grid.shape).index_select(dim, index).numpy()
    return _written(s, grid, places, s.grid(source), s.sum)


@_op("full_like")
def _filled(s: Scalars, x: Grid, value: float, **kwargs: Any) -> Tensor:
    return torch.full(x.shape, value)


# ------------------------------------------------------------------------------------ the walk


class _Unroll(fx.Interpreter):
    """Runs an exported program on grids in place of its inputs and parameters."""

    def __init__(self, program: ExportedProgram, inputs: Sequence[Any], scalars: Scalars) -> None:
        super().__init__(program.graph_module)
        self.program, self.inputs, self.scalars = program, iter(inputs), scalars

    def outputs(self) -> list[int]:
        """The vertices of everything that the user sees."""
        values = self.run(*(self._given(spec) for spec in self.program.graph_signature.input_specs))
        specs = self.program.graph_signature.output_specs
        seen = [v for v, spec in zip(values, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]
        return [vertex for v in seen if v is not None for vertex in self.scalars.grid(v).reshape(-1).tolist()]

    def _given(self, spec: InputSpec) -> Any:
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
        name = f"{name}.{target._overloadname}" if f"{name}.{target._overloadname}" in _OPS else name
        if name in _OPS:
            return _OPS[name](self.scalars, *args, **kwargs)
        if name in _MOVEMENTS and isinstance(args[0], np.ndarray) and not _is_grid(args[1:]):
            return _move(target, args, kwargs)
        if name in _ASSEMBLIES:
            return _assemble(self.scalars, name, target, args)
        if name.startswith("upsample"):
            return _resample(self.scalars, target, args[0], args[1:])
        if torch.Tag.pointwise in target.tags:
            return _pointwise(self.scalars, name, target, args, kwargs)
        raise NotImplementedError(f"{target} cannot be written out")
