"""Networks that share a trunk and have heads of their own, as one graph; and one of them taken out of it again."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxmerge.emit.trunk import CALLS, first_layer, learnt, trunk_of
from fxmerge.errors import ArchitectureMismatchError, OptionError
from fxmerge.program.common import Pairs, common_part
from fxmerge.program.emission import TREE
from fxmerge.program.memory import needed, writes
from fxmerge.program.models import tensors as tensors_of
from fxmerge.recipe import NOTHING

HEADS = "heads"
"""The module of a forked network that holds the heads, by name; with an underscore after it where a network has one of
that name."""

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Head:
    """One of the networks inside of a forked one.

    Attributes:
        name: of the head.
        number: of the network.
        prefix: with which the names of its own tensors begin in the forked network.
        keys: for every name in the state dict of the network, in its order, the name in that of the forked one.
        versions: for every module of the network that has one, its version, which loading a state dict may ask for.
    """

    name: str
    number: int
    prefix: str
    keys: Mapping[str, str]
    versions: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Fork:
    """Several networks as one graph: what they share once, and what each has of its own.

    Attributes:
        module: the graph. It holds the trunk of the first network, and every network's own head.
        heads: the networks, in their order.
    """

    module: fx.GraphModule
    heads: tuple[Head, ...]

    def states(self, states: Sequence[State]) -> tuple[dict[str, Tensor], ...]:
        """For every network a state dict of the forked one: its own trunk, and all heads as they are."""
        each = [
            {key: state[name] for name, key in head.keys.items()}
            for head, state in zip(self.heads, states, strict=True)
        ]
        heads = {key: tensor for tensors in each for key, tensor in tensors.items()}
        order = [name for name in self.module.state_dict() if name in heads]
        return tuple({name: tensors.get(name, heads[name]) for name in order} for tensors in each)


def owner_of(heads: Sequence[Head]) -> dict[str, int]:
    """The number of the network, for every tensor of a forked one that is not of the trunk."""
    return {key: head.number for head in heads for key in head.keys.values() if key.startswith(head.prefix)}


def fork(
    modules: Sequence[fx.GraphModule],
    share: str | float | fx.Node,
    names: Sequence[str] | None,
    called: Sequence[str],
    *,
    as_dict: bool = False,
    by_name: bool = False,
) -> Fork | None:
    """Makes several networks one graph.

    Arguments:
        modules: the networks as graphs of ops.
        share: what they are to share: see `Recipe.share`; or the node of the first network with which that ends.
        names: of the heads; by default their numbers.
        called: what to call the networks in errors.
        as_dict: whether the output is a dict by the names of the heads, and not a tuple.
        by_name: as for `common_part`.

    Returns:
        The graph; None if the networks are equal all through and are to share everything.

    Raises:
        ArchitectureMismatchError: if they have nothing with parameters in common, or not all that is to be shared.
        OptionError: if `share` names nothing.
    """
    first = modules[0]
    pairs, common = in_common(modules, by_name=by_name)
    if share == "auto" and _equal(modules, pairs):
        return None
    trunk = trunk_of(first, common, share, called)
    if share != NOTHING and not any(n.op == "get_attr" for n in trunk):
        if any(n.op == "get_attr" for n in common):
            raise ArchitectureMismatchError(
                f"Recipe.share is {share!r}, and no layer of {called[0]} comes before the trunk would end. Share more."
            )
        raise ArchitectureMismatchError(
            f"{' and '.join(called)} have no layer in common, from the inputs on. The first one of {called[0]} is "
            f"{first_layer(first)}. Merge networks that begin with the same layers."
        )
    names = [str(i) for i in range(len(modules))] if names is None else names
    return _Forking(modules, pairs, trunk, names).made(as_dict=as_dict)


def in_common(modules: Sequence[fx.GraphModule], *, by_name: bool = False) -> tuple[list[Pairs], set[fx.Node]]:
    """For each network but the first, which of its nodes are nodes of the first; and the nodes that all have."""
    pairs = [common_part(modules[0], other, by_name=by_name) for other in modules[1:]]
    return pairs, {n for n in modules[0].graph.nodes if n.op != "output" and all(n in own for own in pairs)}


def names_in(modules: Sequence[fx.GraphModule]) -> list[dict[str, str]] | None:
    """Where networks are equal all through but for the names of their tensors: for every network the names of its
    tensors by those of the first one. Else None."""
    pairs = [common_part(modules[0], other) for other in modules[1:]]
    if not _equal(modules, pairs):
        return None
    first = _tensors(modules[0])
    one_name = {id(tensor): name for name, tensor in reversed(first.items())}
    names = [{name: name for name in first}]
    for same, other in zip(pairs, modules[1:], strict=True):
        renamed = _renamed(modules[0], other, same)
        back = {there: name for name, there in reversed(renamed.items())}
        if len(renamed) < len(_tensors(other)) or any(one_name[id(t)] not in back for t in first.values()):
            return None
        names.append({name: back[one_name[id(tensor)]] for name, tensor in first.items()})
    return names


def _equal(modules: Sequence[fx.GraphModule], pairs: Sequence[Pairs]) -> bool:
    """Whether networks are the same graph, down to their outputs."""
    (first,) = modules[0].graph.find_nodes(op="output")
    for other, own in zip(modules[1:], pairs, strict=True):
        (theirs,) = other.graph.find_nodes(op="output")
        same = [own.get(n) for n in first.all_input_nodes] == theirs.all_input_nodes
        specs = [_nesting(m.graph).out_spec for m in (modules[0], other)]
        if not same or specs[0] != specs[1]:
            return False
    return True


# ------------------------------------------------------------------------------------ one graph of several


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return tensors_of(module, keep_vars=True)


def _renamed(
    first: fx.GraphModule, other: fx.GraphModule, pairs: Pairs, trunk: Collection[fx.Node] | None = None
) -> dict[str, str]:
    """For the tensors of a network that are those of the trunk, their names in the first network.

    Of what no op reads, such as a counter of batches, that is of the trunk whose module has other tensors there.

    Arguments:
        first: the first network.
        other: the network.
        pairs: for nodes of the first network those of the other.
        trunk: the nodes of the first network that are shared; None for all that are in `pairs`.
    """
    tensors, of_first = _tensors(other), _tensors(first)
    name_of = {id(tensor): name for name, tensor in reversed(of_first.items())}
    same = {
        id(attrgetter(str(theirs.target))(other)): id(attrgetter(str(node.target))(first))
        for node, theirs in pairs.items()
        if node.op == "get_attr" and (trunk is None or node in trunk)
    }
    shared = {name: name_of[same[id(t)]] for name, t in tensors.items() if same.get(id(t)) in name_of}
    modules = {_module(name): _module(there) for name, there in shared.items() if _leaf(name) == _leaf(there)}
    unread, unread_of_first = set(tensors) - _read(other), set(of_first) - _read(first)
    for name in unread - set(shared):
        if _module(name) in modules:
            beside = modules[_module(name)] + _leaf(name)
            if beside in unread_of_first and of_first[beside].shape == tensors[name].shape:
                shared[name] = beside
    return {name: shared[name] for name in tensors if name in shared}


def _read(module: fx.GraphModule) -> set[str]:
    """The names of the tensors that some op reads."""
    read = {id(attrgetter(str(n.target))(module)) for n in module.graph.find_nodes(op="get_attr") if n.users}
    return {name for name, tensor in _tensors(module).items() if id(tensor) in read}


def _module(name: str) -> str:
    """The module of a tensor, with the dot after it."""
    return name[: len(name) - len(_leaf(name))]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


class _Forking:
    """Several networks on the way to one graph."""

    def __init__(
        self,
        modules: Sequence[fx.GraphModule],
        pairs: Sequence[Pairs],
        trunk: Collection[fx.Node],
        names: Sequence[str],
    ) -> None:
        self.modules, self.trunk, self.names = modules, trunk, names
        first = {n: n for n in modules[0].graph.nodes if n in trunk}
        self.pairs: list[Pairs] = [first, *({n: own[n] for n in first} for own in pairs)]
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.made_of: dict[fx.Node, fx.Node] = {}  # By nodes of the first network.
        self.attributes: dict[str, fx.Node] = {}

    def made(self, *, as_dict: bool) -> Fork:
        """The networks as one graph."""
        first = self.modules[0]
        numbered = enumerate(zip(self.modules, self.pairs, strict=True))
        heads = [self._place(number, module, own) for number, (module, own) in numbered]
        self._hold(heads)
        for node in first.graph.nodes:
            if node in self.trunk:
                self._copy(node, first, self.made_of, lambda target: heads[0].keys.get(target, target))
        outputs = [self._head(*each) for each in zip(self.modules, self.pairs, heads, strict=True)]
        self.graph.output(tuple(value for own in outputs for value in own))
        self.graph.set_codegen(self._codegen(as_dict))
        return Fork(_graph_module(self.root, self.graph, "Fork").eval(), tuple(heads))

    def _place(self, number: int, module: fx.GraphModule, own: Pairs) -> Head:
        """Where every tensor of a network is in the forked one."""
        shared = _renamed(self.modules[0], module, own, self.trunk)
        taken = hasattr(self.modules[0], HEADS)
        prefix = f"{HEADS}{'_' * taken}.{self.names[number]}."
        first: dict[int, str] = {}
        own_names = {name: first.setdefault(id(tensor), name) for name, tensor in _tensors(module).items()}
        keys = {name: shared.get(name, prefix + one) for name, one in own_names.items()}
        return Head(self.names[number], number, prefix, keys, _versions(module))

    def _hold(self, heads: Sequence[Head]) -> None:
        """Gives the root all tensors of the trunk and of the heads, in the order of the networks."""
        for head, module in zip(heads, self.modules, strict=True):
            kinds = dict(module.named_parameters(remove_duplicate=False))
            for name, key in head.keys.items():
                tensor = attrgetter(name)(module)
                if not _has(self.root, key):
                    _put(self.root, key, tensor, parameter=name in kinds, persistent=True)

    def _head(self, module: fx.GraphModule, own: Pairs, head: Head) -> tuple[Any, ...]:
        """Copies what is of one network alone; gives its outputs."""
        copies = {theirs: self.made_of[node] for node, theirs in own.items() if node in self.made_of}
        written = any(writes(n) for n in module.graph.nodes if n not in copies)
        beside: dict[fx.Node, fx.Node] = {}
        shared = set(copies)
        for node in module.graph.nodes:
            if node.op == "output":
                outputs: tuple[Any, ...] = fx.map_arg(tuple(node.args[0]), copies.__getitem__)
                return outputs
            if node in copies:
                continue
            if written and node.op in CALLS:  # An op in place must not change what other heads read.
                for n in node.all_input_nodes:
                    if n in shared and n.op in CALLS and n not in beside and isinstance(n.meta.get("val"), Tensor):
                        beside[n] = copies[n] = self.graph.call_method("clone", (copies[n],))
            self._copy(node, module, copies, lambda target: head.keys.get(target, head.prefix + target))
        raise AssertionError("a graph without an output")

    def _copy(self, node: fx.Node, module: fx.GraphModule, copies: dict[fx.Node, fx.Node], named: Any) -> None:
        """Copies a node of a network."""
        if node.op == "get_attr":
            copies[node] = self._attribute(node, module, named)
        else:
            copies[node] = self.graph.node_copy(node, copies.__getitem__)

    def _attribute(self, node: fx.Node, module: fx.GraphModule, named: Any) -> fx.Node:
        value = attrgetter(str(node.target))(module)
        target = str(node.target) if isinstance(value, bool) else named(str(node.target))
        if target not in self.attributes:
            if not _has(self.root, target):
                parameter = isinstance(value, nn.Parameter)
                _put(self.root, target, value, parameter=parameter, persistent=False)
            self.attributes[target] = self.graph.get_attr(target)
        return self.attributes[target]

    def _codegen(self, as_dict: bool) -> Any:
        """How arguments and outputs are nested: the outputs of all networks, one after the other."""
        numbers = count()
        specs = [_nesting(m.graph).out_spec for m in self.modules]
        values = [pytree.tree_unflatten([next(numbers) for _ in range(s.num_leaves)], s) for s in specs]
        nested = dict(zip(self.names, values, strict=True)) if as_dict else tuple(values)
        return _nested(self.modules[0].graph, pytree.tree_structure(nested))


def _nesting(graph: fx.Graph) -> Any:
    """How the arguments and outputs of an exported graph are nested."""
    codegen: Any = graph._codegen
    return codegen.pytree_info


def _nested(graph: fx.Graph, outputs: pytree.TreeSpec) -> Any:
    """The code generator of an exported graph, for outputs that are nested in another way."""
    codegen: Any = copy.copy(graph._codegen)
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=outputs)
    return codegen


def _has(root: nn.Module, target: str) -> bool:
    try:
        attrgetter(target)(root)
    except AttributeError:
        return False
    return True


def _put(root: nn.Module, target: str, value: Any, *, parameter: bool, persistent: bool) -> None:
    """Gives a module an attribute at a path, with the modules on the way there."""
    *path, leaf = target.split(".")
    for name in path:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    if parameter:
        root.register_parameter(leaf, value)
    elif isinstance(value, Tensor):
        root.register_buffer(leaf, value, persistent=persistent)
    else:
        setattr(root, leaf, value)


def _versions(module: nn.Module) -> dict[str, int]:
    named = module.named_modules(remove_duplicate=False)
    return {name: own._version for name, own in named if getattr(own, "_version", 1) not in (None, 1)}


# ------------------------------------------------------------------------------------ one network of a forked one


def take_out(module: fx.GraphModule, head: Head) -> fx.GraphModule:
    """The trunk and one head of a forked network, with the state dict of the network that it stands for.

    Raises:
        OptionError: if the network was pickled.
    """
    if not hasattr(module.graph._codegen, "pytree_info"):
        raise OptionError(
            "torch has traced the network anew when it was unpickled, and its graph no longer tells the heads apart: "
            "take its heads out before it is pickled, or keep its state dict."
        )
    specs = _nesting(module.graph).out_spec.children()
    start, own = sum(s.num_leaves for s in specs[: head.number]), specs[head.number]
    (output,) = module.graph.find_nodes(op="output")
    (flat,) = output.args
    leaves = tuple(flat[start : start + own.num_leaves])
    wanted = _needed(module.graph, [n for n in leaves if isinstance(n, fx.Node)])
    root, state = nn.Module(), _tensors(module)
    tensors: dict[str, Tensor] = {}
    named: dict[str, str] = {}
    for name, key in head.keys.items():
        value = tensors.setdefault(key, copy.deepcopy(state[key]))
        named.setdefault(key, name)
        _put(root, name, value, parameter=isinstance(value, nn.Parameter), persistent=True)
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.nodes:
        if node.op == "get_attr" and node in wanted:
            target = named.get(str(node.target), str(node.target).removeprefix(head.prefix))
            if not _has(root, target):
                value = copy.deepcopy(attrgetter(str(node.target))(module))
                _put(root, target, value, parameter=False, persistent=False)
            copies[node] = graph.get_attr(target)
        elif node.op == "placeholder" or node in wanted:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.map_arg(leaves, copies.__getitem__))
    graph.set_codegen(_nested(module.graph, own))
    made = _graph_module(root, graph, "Head")
    modules = dict(made.named_modules(remove_duplicate=False))
    for name, version in head.versions.items():
        if name in modules:
            modules[name]._version = version
    return made.train(module.training)


def _needed(graph: fx.Graph, outputs: Iterable[fx.Node]) -> set[fx.Node]:
    """What some outputs depend on, and the checks of the inputs."""
    own = learnt(graph)
    checks = {n for n in graph.nodes if n.op in CALLS and not n.users and n.is_impure() and n not in own}
    return needed(checks) | needed(outputs, at_the_end=True)


def _graph_module(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A graph with all tensors of a module, also those that it does not read, in their order."""
    made = fx.GraphModule(root, graph, name)
    made.__dict__.update({part: root.__dict__[part] for part in TREE})
    return made
