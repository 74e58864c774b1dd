"""Which layers write outputs that may be scores of classes, found by the graph alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.errors import OptionError
from fxmerge.program.captured import Program
from fxmerge.program.forms import argument, bind, form_of, op_name
from fxmerge.refitting.layers import Layer, Layers, Use

_SAME = frozenset(("clone", "contiguous", "alias", "detach", "_to_copy", "to", "log_softmax", "_log_softmax"))
"""Ops that keep every entry where it is. The softmax of a `log_softmax` is that of what it reads."""

_MOVING = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
        *("transpose", "permute", "t", "slice", "select"),
    )
)
"""Ops that only move entries."""

INSTEAD = "pass LeastSquares() for outputs that are no scores of classes."


@dataclass(frozen=True)
class ScoreLayers:
    """The layers that write scores of classes.

    Attributes:
        layers: these layers; all rows of their outputs are rows of outputs of the network.
        left: by parameter, why a layer that writes an output cannot be fitted to scores.
    """

    layers: tuple[Layer, ...]
    left: Mapping[str, str]


def score_layers(program: Program, layers: Layers, last: Sequence[Layer]) -> ScoreLayers:
    """Finds the layers whose outputs are outputs of the network, with one class to an entry of the last dimension.

    Arguments:
        program: the program.
        layers: its layers.
        last: those that no other layer comes after.

    Raises:
        OptionError: if no output can be scores of classes, or a last layer writes an output of one number to a row.
    """
    uses = {use.node: (layer, use) for layer in layers.all for use in layer.uses}
    reached: dict[Layer, set[Use]] = {}
    left: dict[str, str] = {}
    others: list[str] = []
    for answer in program.answers:
        chain, source = _way(answer)
        name = f"output {answer.name!r}"
        if source in uses and uses[source][0] in last:
            layer, use = uses[source]
            if layer.codes.numel() and layer.codes.shape[0] * layer.codes.shape[2] < 2:
                raise OptionError(
                    f"LeastSquares.outputs is 'logits', but {layer.name!r} writes {name} with one number to a row, "
                    f"which is no score of a class among others: {INSTEAD}"
                )
            why = _why_not(layer, use, chain)
            if why is None:
                reached.setdefault(layer, set()).add(use)
            else:
                left[layer.name] = why
        elif source not in uses and (names := _not_fitted(program, source, layers)):
            left |= names
        else:
            others.append(f"{name} is given by {source.target}, which is no last layer")
    if not reached and not left:
        why = others[0] if others else "no output is a floating-point number that depends on parameters"
        raise OptionError(f"LeastSquares.outputs is 'logits', but {why}: {INSTEAD}")
    for layer, found in reached.items():
        if len(found) < len(layer.uses):
            left.setdefault(layer.name, "only some of what it gives are outputs")
    return ScoreLayers(tuple(layer for layer in reached if layer.name not in left), left)


def _way(answer: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """The ops between an output and what gives its entries, first to last, and the node that gives them."""
    chain, node = list[fx.Node](), answer
    while (name := op_name(node)) in _SAME or name in _MOVING:
        if not node.args or not isinstance(node.args[0], fx.Node):
            break
        chain.append(node)
        node = node.args[0]
    return chain[::-1], node


def _not_fitted(program: Program, source: fx.Node, layers: Layers) -> dict[str, str]:
    """For a product with parameters that are in no layer, such as those of a tied embedding, why they are in none."""
    form = form_of(source)
    if form is None:
        return {}
    operands = [argument(bind(source), name) for name in form.operands]
    found = {node for node in operands if isinstance(node, fx.Node) and node in program.derived}
    todo, names = list(found), dict[str, str]()
    while todo:
        node = todo.pop()
        kind, name = program.sources.get(node, ("", ""))
        if kind == "parameter" and name in layers.left:
            names[name] = layers.left[name]
        todo += node.all_input_nodes
    return names


def _why_not(layer: Layer, use: Use, chain: Sequence[fx.Node]) -> str | None:
    """Why the entries of an output are not one class each, along its last dimension; None if they are."""
    groups, _, classes = layer.codes.shape
    if groups > 1:
        return "it has several groups, and scores of all groups are compared with each other"
    added = use.form.bias is not None and argument(bind(use.node), use.form.bias) is not None
    if added != use.biased:
        return "what is added to its scores is no parameter of it"
    dim = use.outputs_dim
    value = use.node.meta["val"]
    if dim is None or value.shape[dim] != classes:
        return "its classes lie along several dimensions"
    sizes = [_number(size) for size in value.shape]
    numbers = torch.arange(classes).reshape([-1 if d == dim else 1 for d in range(len(sizes))]).expand(sizes)
    for node in chain:
        if op_name(node) in _SAME:
            if "softmax" in op_name(node) and numbers.stride(bind(node)["dim"]) != 1:
                return f"{node.target} goes over another dimension than that of its classes"
            continue
        found = _moved(node, numbers)
        if found is None or found.numel() != numbers.numel():
            return f"{node.target} at graph node {node.name!r} leaves out some of its scores"
        numbers = found
    along = [d for d in range(numbers.ndim) if numbers.shape[d] > 1 and numbers.stride(d) > 0]
    if numbers.shape[-1:] != (classes,) or along != [numbers.ndim - 1]:
        return "its classes do not lie along the last dimension of the output"
    return None


def _moved(node: fx.Node, numbers: Tensor) -> Tensor | None:
    """What an op makes of the numbers of classes, in the sizes of the example; None if that cannot be told."""

    def shown(arg: fx.Node) -> Any:
        return numbers if arg is node.args[0] else _number(arg.meta["val"])

    args, kwargs = fx.map_arg((node.args, node.kwargs), shown)
    name = op_name(node)
    try:
        # Views of expanded numbers cost no memory; where classes are cut, a copy would not be as expected anyway.
        found = getattr(torch.ops.aten, "reshape" if name in ("view", "_unsafe_view") else name)(*args, **kwargs)
    except (RuntimeError, TypeError):
        return None
    return found if isinstance(found, Tensor) else None


def _number(size: Any) -> Any:
    """A size in the example, where it may vary."""
    return size.node.hint if isinstance(size, torch.SymInt) else size
