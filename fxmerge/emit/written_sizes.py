"""What is written in a graph of sizes: for each op, the arguments that follow from the units along its operands."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from torch import fx

from fxmerge.emit.constants import ENTRY_BY_ENTRY, FILLED, parts
from fxmerge.emit.sizes import Sizes
from fxmerge.program.forms import bind
from fxmerge.symmetry.rules import find_rule

Changes = dict[str, Any]
"""New arguments of a call, by the names of its op's schema."""

Rule = Callable[[fx.Node, dict[str, Any], Sizes], Changes]
R = TypeVar("R", bound=Rule)
_RULES: dict[str, Rule] = {}

_FREE_NAMES = """
    alias clone contiguous detach detach_ flatten lift_fresh_copy movedim permute squeeze stack swapaxes t transpose
    unbind unsqueeze cat concat numpy_T mT sym_size sym_numel expand_as view_as reshape_as empty_like full_like
    randn_like broadcast_tensors bernoulli
    addmm baddbmm bilinear bmm dot einsum linear matmul mm mv embedding _grouped_mm
    lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
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

_FREE = frozenset(f"aten::{name}" for name in _FREE_NAMES.split()) | {"transformers::grouped_mm_fallback"}
"""The ops that say nothing of the sizes of what they read, beside those that go entry by entry."""


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
    if node.op != "call_function" or not (_counts(node) or any(map(sizes.changes, (node, *node.all_input_nodes)))):
        return {}
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # Items of lists, and Python's arithmetic of sizes.
        return {}
    if schema.name in _RULES:
        call = bind(node)
        return {name: new for name, new in _RULES[schema.name](node, call, sizes).items() if new != call[name]}
    if schema.name in _FREE or find_rule(node.target) in ENTRY_BY_ENTRY:
        return {}
    raise sizes.cannot(node, f"is a call of {schema.name}, which is not known to allow other sizes")


def _counts(node: fx.Node) -> bool:
    """Whether a call counts numbers up to a written one: that may follow from units that none of its operands has."""
    return getattr(getattr(node.target, "_schema", None), "name", "") == "aten::histc"


@rule("view", "_unsafe_view", "reshape", "expand", "view_copy", "expand_copy", "_reshape_copy")
def _written(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    size = list(call["size" if "size" in call else "shape"])
    return {
        "size" if "size" in call else "shape": [
            n if n == -1 or sizes.size(node, d) is None else sizes.size(node, d) for d, n in enumerate(size)
        ]
    }


@rule(*FILLED)
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


@rule("repeat_interleave")
def _repeat_interleave(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    x, dim = call["self"], call["dim"]
    if dim is None or not isinstance(call["repeats"], int):
        raise sizes.cannot(node, "repeats units by their places")
    if sizes.size(node, dim) is None and sizes.size(x, dim) is None:
        return {}
    each, rest = divmod(sizes.size(node, dim) or sizes.shape(node)[dim], sizes.size(x, dim) or sizes.shape(x)[dim])
    if rest:
        raise sizes.cannot(node, "repeats units, of which there would be other numbers")
    return {"repeats": each}


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _normalized(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    shape, ndim = call["normalized_shape"], len(sizes.shape(call["input"]))
    first = ndim - len(shape)
    return {"normalized_shape": [sizes.size(call["input"], first + i) or n for i, n in enumerate(shape)]}


@rule("group_norm")
def _group_norm(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    return {"num_groups": sizes.groups(call["input"], 1, call["num_groups"], alike=True)}


@rule("native_group_norm")
def _native_group_norm(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    channels = sizes.size(call["input"], 1) or call["C"]
    return {"C": channels, "group": sizes.groups(call["input"], 1, call["group"], alike=True)}


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    return {"groups": sizes.groups(call["input"], 1, call["groups"])}


@rule("channel_shuffle")
def _channel_shuffle(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    return {"groups": sizes.groups(call["self"], 1, call["groups"])}


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    """One tensor holds the states of all layers and directions."""
    each = len(call["params"]) // (call["num_layers"] * (1 + call["bidirectional"]))
    hidden = call["params"][1::each]
    found = {tuple(sizes.size(w, d) or sizes.shape(w)[d] for d in range(2)) for w in hidden}
    if len(found) > 1:
        why = "has layers or directions with other numbers of units, and all must have as many"
        raise sizes.cannot(node, why, hidden)
    return {}


@rule("slice")
def _slice(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    x, dim = call["self"], call["dim"]
    if sizes.size(x, dim) is None:
        return {}
    if not all(isinstance(call[k], int | None) for k in ("start", "end")):
        raise sizes.cannot(node, "takes units along a dimension from a place that is not known")
    if call["step"] != 1:
        return _every_few(node, call, sizes)
    start, end = (None if n is None else sizes.boundary(x, dim, n) for n in (call["start"], call["end"]))
    return {"start": start, "end": end}


def _every_few(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    """Places at equal distances, such as the gates that lie between the other half: so must be what is left of them."""
    x, dim = call["self"], call["dim"]
    size, step = sizes.shape(x)[dim], call["step"]
    before = [sizes.boundary(x, dim, i) for i in range(size)] + [sizes.boundary(x, dim, size)]
    taken = range(size)[slice(call["start"], call["end"], step)]
    left = [before[i] for i in taken if before[i] < before[i + 1]]
    added = any(b - a > 1 for a, b in itertools.pairwise(before))
    if added or not left or left != list(range(left[0], left[-1] + 1, step)):
        raise sizes.cannot(node, "takes every few of the units along a dimension")
    return {"start": left[0], "end": left[-1] + 1}


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
    size, old = sizes.shape(x)[dim], call[name]
    cuts = list(range(0, size, old)) if isinstance(old, int) else np.cumsum([0, *old[:-1]]).tolist()
    new = _lengths(node, x, dim, [*cuts, size], sizes)
    if not isinstance(old, int):
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
        if len(set(_lengths(node, x, dim, [*range(0, size, step), size], sizes))) > 1:
            raise sizes.cannot(node, "splits a dimension into equal parts, which would differ in size")
    return {}


def _lengths(node: fx.Node, x: fx.Node, dim: int, cuts: list[int], sizes: Sizes) -> list[int]:
    """How long the parts of a dimension are: as the units between the cuts, or, if there are none, as their readers
    need."""
    if not sizes.has_units(x, dim):
        return parts(node, sizes)
    return [b - a for a, b in itertools.pairwise(sizes.boundary(x, dim, cut) for cut in cuts)]


@rule("constant_pad_nd", "pad", "reflection_pad2d", "replication_pad2d")
def _pad(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    x, pad = call["self"], call["pad" if "pad" in call else "padding"]
    for i in range(len(pad) // 2):
        if any(pad[2 * i : 2 * i + 2]) and sizes.size(x, -1 - i) is not None:
            raise sizes.cannot(node, "adds to a dimension along which units lie")
    return {}


@rule("topk")
def _topk(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    """It finds the units that score highest wherever they are."""
    size = sizes.size(call["self"], call["dim"])
    if size is not None and isinstance(call["k"], int) and size < call["k"]:
        raise sizes.cannot(node, f"chooses {call['k']}, and there would be {size} to choose from")
    return {}


@rule("gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce")
def _gather(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    index = call["index" if "index" in call else "indices"]
    return {} if sizes.names(index) else _along(node, call, sizes)


@rule("histc")
def _histc(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    """How often each unit is named, by whole numbers."""
    size = sizes.named(call["self"])
    if size is None:
        return {}
    if not sizes.names(node) or call["max"] - call["min"] != call["bins"] - 1:
        raise sizes.cannot(node, "counts numbers of which it is not known what they name")
    return {"bins": size, "max": call["min"] + size - 1}


@rule("one_hot")
def _one_hot(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    size = sizes.size(node, -1)
    return {} if size is None or call["num_classes"] == -1 else {"num_classes": size}


@rule("roll", "flip", "index_select", "cumsum", "unfold")
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
        if index is None or sizes.names(index):
            continue
        if sizes.size(call["self"], d) is not None or sizes.changes(index):
            raise sizes.cannot(node, "looks at units by their places")
    return {}


@rule("_assert_tensor_metadata")
def _metadata(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    if call["size"] is not None or call["stride"] is not None:
        raise sizes.cannot(node, "compares a size with a constant")
    return {}


@rule("scaled_dot_product_attention")
def _attention(node: fx.Node, call: dict[str, Any], sizes: Sizes) -> Changes:
    if call["scale"] is not None or sizes.size(call["query"], -1) is None:
        return {}
    return {"scale": 1 / math.sqrt(sizes.shape(call["query"])[-1])}
