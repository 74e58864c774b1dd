"""Another number of units in a graph: the sizes that are written in it follow from the units along its values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fxmerge.errors import FxmergeError
from fxmerge.program.captured import AtenGraph, Program, quiet
from fxmerge.refitting.forms import bind
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.labels import Labels
from fxmerge.symmetry.propagate import Propagation
from fxmerge.symmetry.rules import elementwise, find_rule
from fxmerge.symmetry.shown import Shown, places_of, shown_by
from fxmerge.units.layout import AxisLayout, value_layout
from fxmerge.units.unit_map import UnitMap

Shape = tuple[int, ...]
Changes = dict[str, Any]
"""New arguments of a call, by the names of its op's schema."""


class CannotResizeError(FxmergeError):
    """A node cannot have another size.

    Attributes:
        node: its name.
        classes: the numbers of the classes to blame.
        why: the reason, as the end of a sentence.
    """

    def __init__(self, node: str, classes: frozenset[int], why: str) -> None:
        super().__init__(f"Graph node {node!r} {why}.")
        self.node, self.classes, self.why = node, classes, why


class Sizes:
    """The sizes of a graph's values with merged units.

    Arguments:
        found: the labelled program.
        symmetry: its classes.
        units: where units go, and how many merged ones there are.
        twins: for nodes of another graph of the model, the node of the labelled one with the same value.
    """

    def __init__(
        self,
        found: Propagation,
        symmetry: Symmetry,
        units: UnitMap,
        twins: Mapping[fx.Node, fx.Node] | None = None,
    ) -> None:
        self.found, self.units, self.twins = found, units, twins or {}
        self.counts = [c.size for c in symmetry.units]
        self.number, self.place = places_of(found, symmetry)
        self.dims: dict[str, dict[int, tuple[AxisLayout, AxisLayout] | int]] = {}

    def of(self, node: fx.Node) -> dict[int, tuple[AxisLayout, AxisLayout] | int]:
        """For every dimension of a node's value of which the size changes, where what lies before and after; or just
        the new size, where that depends on other dimensions too.

        Raises:
            CannotResizeError: if units lie so that they are no tensor of another size.
        """
        node = self.twins.get(node, node)
        if node.name not in self.dims:
            labels = self._labels(node)
            changed: dict[int, tuple[AxisLayout, AxisLayout] | int] = {}
            for column in labels.columns if labels is not None else ():
                shown = shown_by(column, self.number, self.place)
                if not self.units.resized.isdisjoint(np.unique(shown.number).tolist()):
                    for dim, size in self._resized(node, shown).items():
                        if dim in changed and _size(changed[dim]) != _size(size):
                            raise self.cannot(node, "has units of several sizes along one dimension")
                        changed[dim] = size
            self.dims[node.name] = changed
        return self.dims[node.name]

    def _labels(self, node: fx.Node) -> Labels | None:
        """What is known of a node of the labelled graph."""
        return self.found.labels.get(node.name) if node.graph is self.found.program.graph.graph else None

    def shape(self, node: fx.Node) -> Sequence[int]:
        """The shape of a node's value before."""
        shape: Sequence[int] = self.twins.get(node, node).meta["val"].shape
        return shape

    def _resized(self, node: fx.Node, shown: Shown) -> dict[int, tuple[AxisLayout, AxisLayout] | int]:
        if any(not isinstance(node.meta["val"].shape[d], int) for d in shown.dims):
            raise self.cannot(node, "has units along a dimension of any size")
        if len(shown.dims) == 1:
            before = value_layout(shown.number, shown.place, self.counts)
            if before is None:
                raise self.cannot(node, "has some units of a class, and not all, along a dimension")
            return {shown.dims[0]: (before, self.units.into(before))}
        alive = np.ones(shown.number.shape, bool)
        for n in self.units.resized & set(np.unique(shown.number).tolist()):
            if self.units.widths[n] > self.counts[n]:
                raise self.cannot(node, "has units along several dimensions, so that there cannot be more of them")
            alive[shown.number == n] = np.isin(shown.place[shown.number == n], self.units.kept[n])
        left = [alive.any(axis=tuple(a for a in range(alive.ndim) if a != at)) for at in range(alive.ndim)]
        if alive.sum() != math.prod(int(own.sum()) for own in left):
            raise self.cannot(node, "has units along several dimensions, of which other numbers would be left")
        return {dim: int(own.sum()) for dim, own in zip(shown.dims, left, strict=True) if not own.all()}

    def size(self, node: fx.Node, dim: int) -> int | None:
        """The new size of a dimension; None if it stays."""
        sizes = self.of(node)
        found = sizes.get(dim % len(self.shape(node))) if sizes else None
        return None if found is None else _size(found)

    def boundary(self, node: fx.Node, dim: int, index: int) -> int:
        """The new place of what comes before an index along a dimension of a node's value."""
        size = self.shape(node)[dim]
        found = self.of(node).get(dim % len(self.shape(node)))
        if found is None or not isinstance(size, int):
            return index
        index = min(index + size if index < 0 else index, size)
        if isinstance(found, tuple):
            return found[0].boundary(index, self.units.widths, self.units.kept or None)
        if index not in (0, size):
            raise self.cannot(node, "is cut inside of units that lie along several dimensions")
        return found if index else 0

    def groups(self, node: fx.Node, dim: int, groups: int) -> int:
        """The new number of groups into which a dimension of a node's value is cut."""
        new = self.size(node, dim)
        if new is None or groups == 1:
            return groups
        size = self.shape(node)[dim]
        if groups == size:
            return new
        ends = [self.boundary(node, dim, i * size // groups) for i in range(groups + 1)]
        sizes = {b - a for a, b in itertools.pairwise(ends)} - {0}
        if len(sizes) > 1:
            raise self.cannot(node, f"is cut into {groups} groups, which would differ in size")
        return new // sizes.pop()

    def changes(self, node: fx.Node) -> bool:
        """Whether the size of a node's value changes."""
        return isinstance(self.twins.get(node, node).meta.get("val"), Tensor) and bool(self.of(node))

    def cannot(self, node: fx.Node, why: str) -> CannotResizeError:
        """The error for a node: to blame are the classes of other widths along it and what it reads."""
        found: set[int] = set()
        for one in (node, *node.all_input_nodes):
            labels = self._labels(self.twins.get(one, one))
            for column in labels.columns if labels is not None else ():
                found |= set(np.unique(shown_by(column, self.number, self.place).number).tolist())
        return CannotResizeError(node.name, self.units.resized & found or self.units.resized, why)


def _size(found: tuple[AxisLayout, AxisLayout] | int) -> int:
    return found if isinstance(found, int) else len(found[1].index)


def resize(found: Propagation, symmetry: Symmetry, units: UnitMap, state: Mapping[str, Tensor], call: Any) -> AtenGraph:
    """Gives a graph the sizes of merged units.

    Its ops stay what they are. What changes is numbers that are written in it: sizes, places of cuts, numbers of
    groups; and a scale of attention that follows from a size is written out as it was. Then the graph is run without
    values, and every value must have the size that its units tell.

    Arguments:
        found: the labelled program.
        symmetry: its classes.
        units: where units go.
        state: the merged parameters, or others of their shapes.
        call: (args, kwargs) of the model, for the run.

    Returns:
        The graph, with nodes of the same names.

    Raises:
        CannotResizeError: if an op with resized operands is not known to allow this, or gives another size.
    """
    program, sizes = found.program, Sizes(found, symmetry, units)
    inputs = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in pytree.tree_leaves(call)]
    before = _shapes(program.graph, _values(program, program.aten.state, inputs))
    graph = fx.Graph()
    copied: dict[fx.Node, Any] = {}
    graph.output(graph.graph_copy(program.graph.graph, copied))
    for old, node in copied.items():
        node.name, node.meta = old.name, dict(old.meta)  # A copy may be given another name.
        write(node, changes_of(old, sizes))
    resized = replace(
        program.aten, module=fx.GraphModule(program.graph, graph), state=state, exported=None, example=call
    )
    twins = {node.name: node for node in program.graph.graph.nodes}
    try:
        after = _shapes(resized.module, _values(replace(program, aten=resized), state, inputs))
    except CannotResizeError as error:
        raise sizes.cannot(twins[error.node], error.why) from error
    for node in resized.module.graph.nodes:
        old, value = twins[node.name], after[node.name]
        if not isinstance(value, Tensor):
            continue
        size = list(before[old.name].shape)
        expected = [sizes.size(old, d) or n for d, n in enumerate(size)] if old.name in found.labels else value.shape
        if list(value.shape) != list(expected):
            raise sizes.cannot(old, f"would have the shape {tuple(value.shape)}, and not {tuple(expected)}")
        if list(value.shape) != size:
            open_ = old.meta["val"].shape  # Of any size along some dimensions.
            if any(n != m and not isinstance(o, int) for n, m, o in zip(value.shape, size, open_, strict=True)):
                raise sizes.cannot(old, "has units along a dimension of any size")
            shape = [n if n != m else o for n, m, o in zip(value.shape, size, open_, strict=True)]
            node.meta["val"] = old.meta["val"].new_empty(shape)
    return resized


def rewritten(
    module: fx.GraphModule, program: Program, found: Propagation, symmetry: Symmetry, units: UnitMap
) -> dict[fx.Node, Changes]:
    """What changes likewise in the graph that a captured program was made of, as `capture_ops` gives it.

    Arguments:
        module: the graph.
        program: the captured program.
        found: the labelled program, which is it or has some of its ops written out.
        symmetry, units: as for `resize`.

    Raises:
        CannotResizeError: as for `resize`.
    """
    twins = _twins(module, program)
    if found.program is not program:
        further = _made_of(found.program.graph)
        twins = {node: further.get(twin.name, twin) for node, twin in twins.items()}
    sizes = Sizes(found, symmetry, units, twins)
    return {node: changes_of(node, sizes) for node in module.graph.nodes}


def _twins(module: fx.GraphModule, program: Program) -> dict[fx.Node, fx.Node]:
    """For the nodes of a graph, those of the captured program with the same value; of some there is none."""
    tensors = {name: node for node, (kind, name) in program.sources.items() if kind == "parameter"}
    made = _made_of(program.graph)
    found: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            twin = tensors.get(program.aliases.get(node.target, node.target))
        elif node.op == "call_function":
            # What does nothing in eval mode, such as dropout, is left out of the program.
            twin = made.get(node.name) or next((found[n] for n in node.all_input_nodes if n in found), None)
        else:
            twin = None
        if twin is not None:
            found[node] = twin
    return found


def _made_of(module: fx.GraphModule) -> dict[str, fx.Node]:
    """The last node that each node was written out as, by the name of that."""
    found = {}
    for node in module.graph.nodes:
        if node.op == "call_function":
            names = [source.name for source in node.meta.get("from_node", ())]
            found.update(dict.fromkeys(names or [node.name], node))
    return found


def write(node: fx.Node, changes: Changes) -> None:
    """Gives a call new arguments. Of sizes, those that the graph computes stay as this call has them."""
    if not changes:
        return
    names, now = [a.name for a in node.target._schema.arguments], bind(node)  # type: ignore[union-attr]
    for name, value in changes.items():
        if isinstance(value, list):
            value = [now[name][i] if isinstance(n, fx.Node) else n for i, n in enumerate(value)]
        if names.index(name) < len(node.args):
            node.update_arg(names.index(name), value)
        else:
            node.update_kwarg(name, value)


def _values(program: Program, state: Mapping[str, Tensor], inputs: list[Any]) -> list[Any]:
    """The values of all placeholders of a program."""
    left = iter(inputs)
    return [
        next(left) if kind == "input" else state.get(name, program.aten.state.get(name, program.constants.get(name)))
        for kind, name in program.sources.values()
    ]


class _ShapeRun(fx.Interpreter):
    """Runs a graph on tensors without values, and keeps all."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            self.seen[n.name] = super().run_node(n)
        except Exception as error:
            why = f"fails: {next(iter(str(error).splitlines()), type(error).__name__)}"
            raise CannotResizeError(n.name, frozenset(), why) from error
        return self.seen[n.name]


def _shapes(module: fx.GraphModule, values: list[Any]) -> dict[str, Any]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, quiet(), torch.no_grad():
        fake = [mode.from_tensor(v.detach()) if isinstance(v, Tensor) else v for v in values]
        run = _ShapeRun(module)
        run.run(*fake)
    return run.seen


# --------------------------------------------------------------------------------- rules

Rule = Callable[[fx.Node, dict[str, Any], Sizes], Changes]
R = TypeVar("R", bound=Rule)
_RULES: dict[str, Rule] = {}

_FREE_NAMES = """
    alias clone contiguous detach detach_ flatten lift_fresh_copy movedim permute squeeze stack swapaxes t transpose
    unbind unsqueeze cat concat numpy_T mT sym_size sym_numel expand_as view_as reshape_as empty_like full_like
    randn_like broadcast_tensors bernoulli
    addmm baddbmm bilinear bmm dot einsum linear matmul mm mv embedding
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d
    max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices upsample_bilinear2d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bicubic2d upsample_linear1d upsample_trilinear3d
    grid_sampler grid_sampler_2d pixel_shuffle pixel_unshuffle
    softmax _softmax log_softmax _log_softmax _safe_softmax dropout feature_dropout native_dropout glu batch_norm
    _native_batch_norm_legit_no_training _native_batch_norm_legit native_batch_norm cudnn_batch_norm instance_norm
    _weight_norm _weight_norm_interface
    mean sum amax amin max min any all var var_mean std std_mean norm linalg_vector_norm logsumexp prod nansum nanmean
"""

_FREE = frozenset(f"aten::{name}" for name in _FREE_NAMES.split())
"""The ops that say nothing of the sizes of what they read, beside those that go entry by entry."""

_POINTWISE = (elementwise.pointwise, elementwise.identity, elementwise.prelu, elementwise.copy, elementwise.filled)


def rule(*names: str) -> Callable[[R], R]:
    """Registers what changes in calls of the named ops."""

    def register(function: R) -> R:
        _RULES.update({f"aten::{name}": function for name in names})
        return function

    return register


def changes_of(node: fx.Node, sizes: Sizes) -> Changes:
    """What changes in a call.

    Raises:
        CannotResizeError: if what it reads or gives is of another size, and it is not known to allow this.
    """
    if node.op != "call_function" or not any(map(sizes.changes, (node, *node.all_input_nodes))):
        return {}
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # Items of lists, and Python's arithmetic of sizes.
        return {}
    if schema.name in _RULES:
        call = bind(node)
        return {name: new for name, new in _RULES[schema.name](node, call, sizes).items() if new != call[name]}
    if schema.name in _FREE or find_rule(node.target) in _POINTWISE:
        return {}
    raise sizes.cannot(node, f"is a call of {schema.name}, which is not known to allow other sizes")


@rule("view", "_unsafe_view", "reshape", "expand", "view_copy", "expand_copy", "_reshape_copy")
def _written(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    size = list(call["size" if "size" in call else "shape"])
    return {
        "size" if "size" in call else "shape": [
            n if n == -1 or sizes.size(node, d) is None else sizes.size(node, d) for d, n in enumerate(size)
        ]
    }


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def _filled(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    return _written(node, call, sizes)


@rule("unflatten")
def _unflatten(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    first = call["dim"] % len(sizes.shape(call["self"]))
    return {
        "sizes": [
            n if n == -1 or sizes.size(node, first + i) is None else sizes.size(node, first + i)
            for i, n in enumerate(call["sizes"])
        ]
    }


@rule("repeat", "tile")
def _repeat(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    x, times = call["self"], list(call["repeats" if "repeats" in call else "dims"])
    added = len(times) - len(sizes.shape(x))
    for d, n in enumerate(times):
        new = sizes.size(node, d)
        old = 1 if d < added else sizes.size(x, d - added) or sizes.shape(x)[d - added]
        if new is not None and n != 1:
            times[d] = new // old
    return {"repeats" if "repeats" in call else "dims": times}


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _normalized(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    shape, ndim = call["normalized_shape"], len(sizes.shape(call["input"]))
    first = ndim - len(shape)
    return {"normalized_shape": [sizes.size(call["input"], first + i) or n for i, n in enumerate(shape)]}


@rule("group_norm")
def _group_norm(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    return {"num_groups": sizes.groups(call["input"], 1, call["num_groups"])}


@rule("native_group_norm")
def _native_group_norm(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    channels = sizes.size(call["input"], 1) or call["C"]
    return {"C": channels, "group": sizes.groups(call["input"], 1, call["group"])}


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    return {"groups": sizes.groups(call["input"], 1, call["groups"])}


@rule("channel_shuffle")
def _channel_shuffle(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    return {"groups": sizes.groups(call["self"], 1, call["groups"])}


@rule("slice")
def _slice(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    x, dim = call["self"], call["dim"]
    if sizes.size(x, dim) is None:
        return {}
    if call["step"] != 1 or not all(isinstance(call[k], int | None) for k in ("start", "end")):
        raise sizes.cannot(node, "takes every few of the units along a dimension")
    start, end = (None if n is None else sizes.boundary(x, dim, n) for n in (call["start"], call["end"]))
    return {"start": start, "end": end}


@rule("narrow")
def _narrow(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    x, dim = call["self"], call["dim"]
    if sizes.size(x, dim) is None:
        return {}
    start = sizes.boundary(x, dim, call["start"])
    return {"start": start, "length": sizes.boundary(x, dim, call["start"] + call["length"]) - start}


@rule("select")
def _select(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    x, dim = call["self"], call["dim"]
    return {} if sizes.size(x, dim) is None else {"index": sizes.boundary(x, dim, call["index"])}


@rule("split_with_sizes", "split", "unsafe_split", "unsafe_split_with_sizes")
def _split(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    name, x, dim = "split_size" if "split_size" in call else "split_sizes", call["self"], call["dim"]
    if sizes.size(x, dim) is None:
        return {}
    size, parts = sizes.shape(x)[dim], call[name]
    cuts = list(range(0, size, parts)) if isinstance(parts, int) else np.cumsum([0, *parts[:-1]]).tolist()
    ends = [sizes.boundary(x, dim, cut) for cut in (*cuts, size)]
    new = [b - a for a, b in itertools.pairwise(ends)]
    if not isinstance(parts, int):
        return {name: new}
    if len(set(new[:-1])) > 1 or new[-1] > new[0]:
        raise sizes.cannot(node, "splits a dimension into equal parts, which would differ in size")
    return {name: new[0]}


@rule("chunk", "unsafe_chunk")
def _chunk(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    x, dim = call["self"], call["dim"]
    if sizes.size(x, dim) is not None:
        size = sizes.shape(x)[dim]
        step = -(-size // call["chunks"])
        ends = [sizes.boundary(x, dim, cut) for cut in (*range(0, size, step), size)]
        if len({b - a for a, b in itertools.pairwise(ends)}) > 1:
            raise sizes.cannot(node, "splits a dimension into equal parts, which would differ in size")
    return {}


@rule("constant_pad_nd", "pad", "reflection_pad2d", "replication_pad2d")
def _pad(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    x, pad = call["self"], call["pad" if "pad" in call else "padding"]
    for i in range(len(pad) // 2):
        if any(pad[2 * i : 2 * i + 2]) and sizes.size(x, -1 - i) is not None:
            raise sizes.cannot(node, "adds to a dimension along which units lie")
    return {}


@rule(
    "roll", "flip", "gather", "index_select", "take_along_dim", "sort", "topk", "argmax", "argmin", "cumsum", "unfold"
)
def _along(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    """What looks at a dimension by position: it must not be one of those that change."""
    x = call["self"]
    dims = next((call[name] for name in ("dims", "dim", "dimension") if name in call), None)
    dims = [dims] if isinstance(dims, int) else dims
    for d in dims or range(len(sizes.shape(x))):
        if sizes.size(x, d) is not None:
            raise sizes.cannot(node, "looks at units by their places")
    return {}


@rule("index", "_unsafe_index", "index_put", "_unsafe_index_put")
def _index(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    for d, index in enumerate(call["indices"]):
        if index is not None and (sizes.size(call["self"], d) is not None or sizes.changes(index)):
            raise sizes.cannot(node, "looks at units by their places")
    return {}


@rule("scaled_dot_product_attention")
def _attention(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    if call["scale"] is not None or sizes.size(call["query"], -1) is None:
        return {}
    return {"scale": 1 / math.sqrt(sizes.shape(call["query"])[-1])}
