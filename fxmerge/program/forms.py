"""Ops that are linear in one of their operands, each as an einsum of two tensors plus a bias."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, fx
from torch.nn import functional

Arguments = Mapping[str, Any]
"""The arguments of a call by name, tensors among them as they are or as nodes."""


RESULT = "result"
"""The name of what a call gives."""


@dataclass(frozen=True)
class Form:
    """A call as `einsum(terms) + bias`, where every operand is first brought into shape.

    Attributes:
        operands: the names of the two operands.
        terms: the letters of the first operand, of the second, and of the result.
        bias: the name of what is added, if anything can be.
        bias_term: its letters.
        views: for some operands, and for the result under `RESULT`, how the tensor is brought into shape; it is given
            the tensor and all arguments.
    """

    operands: tuple[str, str]
    terms: tuple[str, str, str]
    bias: str | None = None
    bias_term: str = ""
    views: Mapping[str, Callable[[Tensor, Arguments], Tensor]] | None = None

    def view(self, name: str, value: Tensor, arguments: Arguments) -> Tensor:
        """An operand, bias or result with one dimension for each of its letters."""
        view = (self.views or {}).get(name)
        return value if view is None else view(value, arguments)


FormOf = Callable[[Arguments], Form | None]
F = TypeVar("F", bound=FormOf)
_FORMS: dict[str, FormOf] = {}
_GAINS: dict[str, FormOf] = {}


def form(*names: str) -> Callable[[F], F]:
    """Registers how the named ops are written: a function from the arguments of a call, by name, in which a tensor
    stands for its shape and dtype; it returns None for a call that is not linear."""
    return _registered(_FORMS, names)


def gain(*names: str) -> Callable[[F], F]:
    """Registers likewise how the named ops multiply every channel by a number of its own."""
    return _registered(_GAINS, names)


def _registered(where: dict[str, FormOf], names: tuple[str, ...]) -> Callable[[F], F]:
    def register(function: F) -> F:
        where.update(dict.fromkeys(names, function))
        return function

    return register


def op_name(node: fx.Node) -> str:
    """The name of the ATen op that a node calls, without its overload; nothing for other nodes."""
    return str(getattr(getattr(node.target, "_schema", None), "name", "")).removeprefix("aten::")


def bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node by the names of its op's schema, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    bound = {a.name: a.default_value for a in schema if a.has_default_value()}
    bound.update(zip((a.name for a in schema), node.args, strict=False))
    return bound | node.kwargs


def argument(arguments: Arguments, name: str) -> Any:
    """An argument by its name, or by its name and place as in `tensors.1`."""
    name, _, place = name.partition(".")
    return arguments[name][int(place)] if place else arguments[name]


def form_of(node: fx.Node) -> Form | None:
    """How a node's call is written, None if it is not linear in an operand or not known to be."""
    return _form(_FORMS, node)


def gain_of(node: fx.Node) -> Form | None:
    """How a node is written that multiplies every channel of what it normalizes, or reads, by a gain; None if it does
    not, or is not known to."""
    return _form(_GAINS, node)


def _form(where: Mapping[str, FormOf], node: fx.Node) -> Form | None:
    function = where.get(op_name(node))
    return None if function is None else function(fx.map_arg(bind(node), lambda n: n.meta.get("val")))


def _letters(count: int) -> str:
    return string.ascii_lowercase[:count]


# ---------------------------------------------------------------------- products


@form("linear")
def _linear(call: Arguments) -> Form | None:
    if call["weight"].ndim != 2:
        return None
    rows = _letters(call["input"].ndim - 1)
    return Form(("input", "weight"), (rows + "I", "OI", rows + "O"), "bias", "O")


def _product(names: tuple[str, str], a: Tensor, b: Tensor) -> Form | None:
    if min(a.ndim, b.ndim) < 2:
        return None
    batch = _letters(max(a.ndim, b.ndim) - 2)
    terms = (batch[len(batch) - a.ndim + 2 :] + "MK", batch[len(batch) - b.ndim + 2 :] + "KN", batch + "MN")
    return Form(names, terms)


@form("mm", "bmm")
def _mm(call: Arguments) -> Form | None:
    return _product(("self", "mat2"), call["self"], call["mat2"])


@form("matmul")
def _matmul(call: Arguments) -> Form | None:
    return _product(("self", "other"), call["self"], call["other"])


@form("addmm", "baddbmm")
def _addmm(call: Arguments) -> Form | None:
    names = ("mat1", "mat2") if "mat1" in call else ("batch1", "batch2")
    found = _product(names, call[names[0]], call[names[1]])
    if found is None or call["alpha"] != 1 or call["beta"] != 1:
        return None
    out = found.terms[2]
    return Form(names, found.terms, "self", out[len(out) - call["self"].ndim :])


@form("einsum")
def _einsum(call: Arguments) -> Form | None:
    left, arrow, out = call["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2 or "." in call["equation"]:
        return None
    return Form(("tensors.0", "tensors.1"), (terms[0], terms[1], out))


# ---------------------------------------------------------------------- convolutions


@form("conv1d", "conv2d", "conv3d", "convolution")
def _conv(call: Arguments) -> Form | None:
    return _convolution(call, transposed=bool(call.get("transposed", False)))


@form("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(call: Arguments) -> Form | None:
    return _convolution(call, transposed=True)


def _convolution(call: Arguments, *, transposed: bool) -> Form | None:
    """A product over channels of a group and places under the kernel; rows are inputs and places of the output."""
    space = call["weight"].ndim - 2
    if call["input"].ndim != space + 2:
        return None
    places, kernel = _letters(space), string.ascii_uppercase[:space]
    own = "YX" if transposed else "XY"  # X: channels out, Y: channels in, of a group.

    def grouped(x: Tensor, call: Arguments) -> Tensor:
        return x.reshape(call["groups"], -1, *x.shape[1:])

    def weight(w: Tensor, call: Arguments) -> Tensor:
        return grouped(w.flip(tuple(range(2, w.ndim))) if transposed else w, call)

    def data(x: Tensor, call: Arguments) -> Tensor:
        x = patches(x, call, transposed=transposed)
        return x.view(len(x), call["groups"], -1, *x.shape[2:])

    def result(y: Tensor, call: Arguments) -> Tensor:
        return y.reshape(len(y), call["groups"], -1, *y.shape[2:])

    views = {"input": data, "weight": weight, "bias": grouped, RESULT: result}
    terms = (f"nGY{places}{kernel}", f"G{own}{kernel}", f"nGX{places}")
    return Form(("input", "weight"), terms, "bias", "GX", views)


def patches(x: Tensor, call: Arguments, *, transposed: bool) -> Tensor:
    """What lies under the kernel at every place of a convolution's output: (inputs, channels, *places, *kernel).

    A view of the padded input, in which places overlap. A transposed convolution is one with a flipped kernel and
    stride 1, of the input with zeros between its places.
    """
    kernel = call["weight"].shape[2:]
    stride, padding, dilation = (_each(call[name], len(kernel)) for name in ("stride", "padding", "dilation"))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if transposed:
        spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)))
        places = spread
        for d, s in enumerate(stride):
            places = places.unfold(2 + d, 1, s).squeeze(-1)
        places.copy_(x)
        extra = _each(call["output_padding"], len(kernel))
        sides = [(r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True)]
        x, stride = spread, [1] * len(kernel)
    elif call["padding"] == "same":
        sides = [(r // 2, r - r // 2) for r in reach]
    else:
        sides = [(p, p) for p in padding]
    x = functional.pad(x, [n for side in reversed(sides) for n in side])
    for d, (r, s, step) in enumerate(zip(reach, stride, dilation, strict=True)):
        x = x.unfold(2 + d, r + 1, s)[..., ::step]
    return x


def _each(value: Any, count: int) -> list[int]:
    if isinstance(value, str):  # "valid"; "same" is seen to by the caller
        return [0] * count
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


# ---------------------------------------------------------------------- gains


@gain("layer_norm")
def _layer_norm(call: Arguments) -> Form | None:
    def normalized(x: Tensor, call: Arguments) -> Tensor:
        return functional.layer_norm(x, call["normalized_shape"], eps=call["eps"])

    return _along_last(call, "bias", normalized)


@gain("rms_norm")
def _rms_norm(call: Arguments) -> Form | None:
    def normalized(x: Tensor, call: Arguments) -> Tensor:
        return functional.rms_norm(x, call["normalized_shape"], eps=call["eps"])

    return _along_last(call, None, normalized)


@gain("group_norm")
def _group_norm(call: Arguments) -> Form | None:
    def normalized(x: Tensor, call: Arguments) -> Tensor:
        return functional.group_norm(x, call["num_groups"], eps=call["eps"])

    return _along_second(call, normalized)


@gain("instance_norm")
def _instance_norm(call: Arguments) -> Form | None:
    def normalized(x: Tensor, call: Arguments) -> Tensor:
        return functional.instance_norm(x, eps=call["eps"])

    return _along_second(call, normalized) if call["use_input_stats"] else None


@gain("mul")
def _mul(call: Arguments) -> Form | None:
    a, b = call["self"], call["other"]
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return None
    out = _letters(max(a.ndim, b.ndim))
    return Form(("self", "other"), (out[len(out) - a.ndim :], out[len(out) - b.ndim :], out))


def _along_last(call: Arguments, bias: str | None, normalized: Callable[[Tensor, Arguments], Tensor]) -> Form | None:
    """One gain for each place along the dimensions that are normalized."""
    term = _letters(call["input"].ndim)
    own = term[len(term) - len(call["normalized_shape"]) :]
    return _normalization(call, term, own, bias, normalized)


def _along_second(call: Arguments, normalized: Callable[[Tensor, Arguments], Tensor]) -> Form | None:
    """One gain for each channel."""
    term = _letters(call["input"].ndim)
    return _normalization(call, term, term[1], "bias", normalized)


def _normalization(
    call: Arguments, term: str, own: str, bias: str | None, normalized: Callable[[Tensor, Arguments], Tensor]
) -> Form | None:
    if call["weight"] is None:
        return None
    return Form(("input", "weight"), (term, own, term), bias, own if bias else "", {"input": normalized})
