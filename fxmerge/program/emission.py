"""From a traced graph to the GraphModule that is emitted: with the state dict of the model, and its training mode."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.operator_schemas import normalize_function

TREE = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
"""The attributes of a module that its state dict is made of."""

FLAGS = frozenset(("training", "train", "use_input_stats", "dropout_p", "dropout"))
"""The names of the arguments by which torch's functions are told whether the model is trained."""


class WithExtraState(fx.GraphModule):
    """A GraphModule of a model that has extra state at its root, such as a version: its state dict has it too.

    torch pickles it as a plain GraphModule.
    """

    extra_state: Any

    def get_extra_state(self) -> Any:
        return self.extra_state

    def set_extra_state(self, state: Any) -> None:
        self.extra_state = state

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        made = super().__deepcopy__(memo)
        made.extra_state = copy.deepcopy(self.extra_state, memo)
        return made


class Whole(fx.GraphModule):
    """A GraphModule that calls a model as one module, whose parameters, buffers and children are its own.

    For models that are no graph, since what they do depends on the values of their inputs.
    """

    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        holder = nn.Module()
        holder.model = model
        super().__init__(holder, _call_of(model), type(model).__name__)
        self.__dict__.update({name: model.__dict__[name] for name in TREE}, model=model)
        self._version = model._version
        super().train(model.training)

    def train(self, mode: bool = True) -> Whole:
        super().train(mode)
        self.model.training = mode
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Whole:
        return Whole(copy.deepcopy(self.model, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Whole, (self.model,)


def _call_of(model: nn.Module) -> fx.Graph:
    """A graph that passes all arguments on to a model, but for those that its signature leaves open (**kwargs).

    Raises:
        ValueError: if the model takes any number of positional arguments.
    """
    graph = fx.Graph()
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise ValueError(f"its forward takes any number of arguments (*{name})")
        if parameter.kind is not parameter.VAR_KEYWORD:
            default = parameter.default
            given = graph.placeholder(
                name, default_value=inspect.Signature.empty if default is parameter.empty else default
            )
            # By name where it may be left out: decorators that fill such arguments in look for them among the names.
            required = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and default is parameter.empty
            if required or parameter.kind is parameter.POSITIONAL_ONLY:
                args.append(given)
            else:
                kwargs[name] = given
    graph.output(graph.call_module("model", tuple(args), kwargs))
    return graph


def emitted(model: nn.Module, graph: fx.Graph, source: nn.Module) -> fx.GraphModule:
    """A GraphModule whose state dict is that of a model: the same keys in the same order, aliases, and versions.

    Modules that the graph calls are taken as they are. Others become plain ones that hold their parameters, so that the
    result can be pickled without their classes, unless a class has a say in its state dict. What else the graph
    reads, such as constants that a trace met, is kept beside, and is not in the state dict.

    Arguments:
        model: a copy of the model, whose tensors and modules are used.
        graph: a graph with the attribute names of the model.
        source: what holds the other attributes that the graph reads.
    """
    root = _mirrored(model, {node.target for node in graph.nodes if node.op == "call_module"})
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            _attach(root, source, node.target)
    graph._tracer_cls = fx.Tracer  # What is pickled names it.
    with_extra = type(model).get_extra_state is not nn.Module.get_extra_state
    module = (WithExtraState if with_extra else fx.GraphModule)(root, graph, type(model).__name__)
    if with_extra:
        module.extra_state = model.get_extra_state()
    module.__dict__.update({name: root.__dict__[name] for name in TREE})
    module._version = root._version
    module.train(root.training)
    return module


def duplicate(module: fx.GraphModule, memo: dict[int, Any] | None = None) -> fx.GraphModule:
    """A copy with all parameters, buffers and modules in order, under all their names, and with the version.

    The `copy.deepcopy` of a GraphModule loses second names and the version of the root.

    Arguments:
        module: what is to be copied.
        memo: copies of objects by their id, as for `copy.deepcopy`.
    """
    memo = {} if memo is None else memo
    if isinstance(module, Whole):
        return copy.deepcopy(module, memo)
    trees = copy.deepcopy({name: module.__dict__[name] for name in (*TREE, "training")}, memo)
    made = copy.deepcopy(module, memo)
    made.__dict__.update(trees)
    made._version = module._version
    return made


def _mirrored(model: nn.Module, called: set[Any]) -> nn.Module:
    """The model as a tree of plain modules, but for those that are called and those that save state of their own."""
    whole = {id(model.get_submodule(name)) for name in called if _has_module(model, name)}
    made: dict[int, nn.Module] = {}

    def mirror(module: nn.Module, root: bool = False) -> nn.Module:
        if not root and (id(module) in whole or _saves_by_itself(module)):
            return module
        if id(module) not in made:
            made[id(module)] = plain = nn.Module()
            plain.training, plain._version = module.training, module._version
            for name, parameter in module._parameters.items():
                plain.register_parameter(name, parameter)
            for name, buffer in module._buffers.items():
                plain.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
            for name, child in module._modules.items():
                plain._modules[name] = None if child is None else mirror(child)
        return made[id(module)]

    return mirror(model, root=True)


def _has_module(model: nn.Module, name: str) -> bool:
    return any(name == known for known, _ in model.named_modules(remove_duplicate=False))


def _saves_by_itself(module: nn.Module) -> bool:
    """Whether the state dict of a module is not just its parameters, buffers and children."""
    kind = type(module)
    own = (
        getattr(kind, name) is not getattr(nn.Module, name)
        for name in ("get_extra_state", "state_dict", "_save_to_state_dict")
    )
    return any(own) or bool(module._state_dict_hooks or module._state_dict_pre_hooks)


def _attach(root: nn.Module, source: nn.Module, target: str) -> None:
    """Gives the root what a graph reads and the model does not hold in its tree; tensors are not saved."""
    *path, leaf = target.split(".")
    for name in path:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    if not hasattr(root, leaf):
        value = attrgetter(target)(source)
        if isinstance(value, Tensor):
            root.register_buffer(leaf, value.detach(), persistent=False)
        else:
            setattr(root, leaf, value)


GUARDS = "_guards_fn"
"""The name of the module by which torch checks whether an exported graph holds for the sizes of its inputs."""


def write_out_guards(module: fx.GraphModule) -> fx.Graph:
    """The graph of an exported module, in which the checks of its inputs, which cannot be pickled, are nodes."""
    for node in module.graph.find_nodes(op="call_module", target=GUARDS):
        tracer = fx.proxy.GraphAppendingTracer(module.graph)
        with module.graph.inserting_before(node):
            module.get_submodule(GUARDS)(*(fx.Proxy(n, tracer) if isinstance(n, fx.Node) else n for n in node.args))
        module.graph.erase_node(node)
    if hasattr(module, GUARDS):
        delattr(module, GUARDS)
    return module.graph


# ------------------------------------------------------------------------------------ training


def follow_training(graph: fx.Graph, trained: fx.Graph) -> None:
    """Lets a graph that was traced in eval mode do in training mode what the model does there.

    Of the ops that are told whether to train (dropout, BatchNorm), those that a trace in training mode tells
    otherwise read the `training` of the module. Where the two traces have other such ops, nothing is changed.

    Arguments:
        graph: the graph in eval mode, which is changed.
        trained: a graph of the same model in training mode.
    """
    calm, active = list(_told(graph)), list(_told(trained))
    if [node.target for node, _ in calm] != [node.target for node, _ in active]:
        return
    changes = [
        (node, name, other[name])
        for (node, given), (_, other) in zip(calm, active, strict=True)
        for name, value in given.items()
        if not value and other[name]
    ]
    if changes:
        with graph.inserting_before(next(iter(graph.nodes))):
            training = graph.create_node("get_attr", "training")
        for node, name, value in changes:
            _follow(node, name, value, training)


def is_told(graph: fx.Graph) -> bool:
    """Whether some op of a graph is told whether to train."""
    return next(_told(graph), None) is not None


def _told(graph: fx.Graph) -> Iterator[tuple[fx.Node, dict[str, Any]]]:
    """The calls of functions that are told whether to train, with these arguments by name."""
    for node in graph.nodes:
        if node.op == "call_function":
            given = {n: value for n, value in _arguments(node).items() if n in FLAGS and type(value) in (bool, float)}
            if given:
                yield node, given


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, defaults included; none where it is not known which signature it has."""
    try:
        found = normalize_function(node.target, node.args, node.kwargs, normalize_to_only_use_kwargs=True)  # type: ignore[arg-type]
    except RuntimeError:
        return {}
    return {} if found is None else found.kwargs


def _follow(node: fx.Node, name: str, value: Any, training: fx.Node) -> None:
    """Makes an argument of a call `value` in training, and else what is false or zero."""
    following = training
    if value is not True:
        with node.graph.inserting_before(node):
            following = node.graph.call_function(operator.mul, (training, value))
    place = list(_arguments(node)).index(name)
    if place < len(node.args):
        node.update_arg(place, following)
    else:
        node.update_kwarg(name, following)
