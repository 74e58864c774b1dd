"""Where the trunk of networks ends: after what they have in common, at a module, or at a share of the parameters."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Sequence
from operator import attrgetter
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from fxmerge.errors import ArchitectureMismatchError, OptionError
from fxmerge.program.memory import needed
from fxmerge.recipe import NOTHING, Budget
from fxmerge.symmetry import rules

CALLS = ("call_function", "call_method")


def trunk_of(
    module: fx.GraphModule, common: Collection[fx.Node], share: str | float | fx.Node, called: Sequence[str]
) -> set[fx.Node]:
    """The nodes to share, of those that all networks have.

    Arguments:
        module: the first network.
        common: the nodes of it that all networks have.
        share: see `Recipe.share`; or the node with which the trunk ends.
        called: what to call the networks in errors.

    Raises:
        ArchitectureMismatchError: if the networks differ in what they are to share.
        OptionError: if `share` names nothing, or is less than the first layers have.
    """
    graph = module.graph
    if isinstance(share, fx.Node):
        return _closed(graph, {share}, common)
    if share in ("auto", "trunk"):
        rest = set(common) - (after(graph, _last_layers(graph)) if share == "trunk" else set())
        return _closed(graph, rest & after(graph, graph.find_nodes(op="placeholder")), common)
    if share == NOTHING:
        return needed(n for n in common if n.op == "placeholder")
    if isinstance(share, str):
        wanted = {n for n in graph.nodes if n.name == share or _within(n, share)}
        if not wanted:
            known = ["auto", "trunk", NOTHING, *(n.name for n in graph.nodes if n.op in CALLS), *_modules(graph)]
            near = difflib.get_close_matches(share, known, n=3, cutoff=0.0)
            raise OptionError(
                f"Recipe.share is {share!r}, which is no module or node of {called[0]}, nor 'auto', 'trunk' or "
                f"'nothing'. Near it are {', '.join(map(repr, near))}."
            )
        if not wanted <= set(common):
            other = next(n for n in graph.nodes if n in wanted and n not in common)
            raise ArchitectureMismatchError(
                f"Recipe.share is {share!r}, but the networks differ in it, or before: node {other.name!r} of "
                f"{called[0]} has no counterpart. Share less, or pass share='auto', which shares all that they have in "
                "common."
            )
        return _closed(graph, wanted, common)
    cuts = [trunk for _, trunk in _trunks(graph, common)]
    total = max(_count(module, graph.nodes), 1)
    shares = [_count(module, cut) / total for cut in cuts]
    fitting = [cut for cut, own in zip(cuts, shares, strict=True) if own <= share]
    if not cuts:
        raise OptionError(
            f"Recipe.share is {share}, but {called[0]} has no node that every path goes through: name a module."
        )
    if not fitting:
        raise OptionError(
            f"Recipe.share is {share}, but the first node that every path goes through has "
            f"{math.ceil(1000 * min(shares)) / 1000} of the parameters of {called[0]} before it. Share as much, or "
            "name a module."
        )
    return fitting[-1]


def within(
    modules: Sequence[fx.GraphModule], common: Collection[fx.Node], budget: Budget, example: tuple[Any, Any]
) -> list[fx.Node]:
    """The nodes with which a trunk within a budget may end; the shortest trunk comes first. Last layers are of none.

    Arguments:
        modules: the networks.
        common: the nodes of the first that all have.
        budget: for the parameters and the floating-point operations.
        example: (args, kwargs), on which operations are counted.

    Raises:
        OptionError: if there is no such trunk.
    """
    first, *others = modules
    last = _last_layers(first.graph)
    trunks = [(node, own) for node, own in _trunks(first.graph, common) if last.isdisjoint(own)]
    # Each network but one is spared the trunk.
    sizes = [_count(m, m.graph.nodes) for m in modules]
    costs = {"parameters": [(sum(sizes) - len(others) * _count(first, own)) / sizes[0] for _, own in trunks]}
    if budget.flops is not None:
        work = [flops(m, *example) for m in modules]
        whole = [sum(own.values()) for own in work]
        spared = [len(others) * sum(work[0].get(n, 0) for n in own) for _, own in trunks]
        costs["flops"] = [(sum(whole) - own) / max(whole[0], 1) for own in spared]
    good = set(range(len(trunks)))
    for name, values in costs.items():
        limit = getattr(budget, name)
        if limit is not None:
            good = {i for i in good if values[i] <= limit}
            if not good:
                least = min(values, default=float(len(modules)))
                raise OptionError(
                    f"Recipe.share is {budget}, but with the longest trunk the result has {least:.3g} times the {name} "
                    f"of the first network. Allow as much, or pass share='trunk'."
                )
    return [node for i, (node, _) in enumerate(trunks) if i in good]


def flops(module: fx.GraphModule, args: Any, kwargs: Any) -> dict[fx.Node, int]:
    """How many floating-point operations each node takes on an example, as torch counts them."""
    counter = _Flops(module)
    with torch.no_grad():
        counter.run(*pytree.tree_leaves((tuple(args), dict(kwargs))), enable_io_processing=False)
    return counter.found


class _Flops(fx.Interpreter):
    """Runs a graph and counts the operations of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counted:
            value = super().run_node(n)
        self.found[n] = counted.get_total_flops()
        return value


def _trunks(graph: fx.Graph, common: Collection[fx.Node]) -> list[tuple[fx.Node, set[fx.Node]]]:
    """The nodes through which all goes, and the trunk that ends with each; the shortest first."""
    return [(cut, _closed(graph, {cut}, common)) for cut in _cuts(graph) if cut in common]


def _closed(graph: fx.Graph, nodes: Iterable[fx.Node], common: Collection[fx.Node]) -> set[fx.Node]:
    """Nodes with all that they depend on, and all that no parameter has a part in, such as masks.

    What no input has a part in, such as a weight that is normalized, belongs to what reads it.
    """
    by_parameters = learnt(graph)
    free = {n for n in common if n.op != "get_attr" and n not in by_parameters}
    found = needed(free | set(nodes))
    # What one network writes in place where another does not, is not shared.
    return found if found <= set(common) else needed(n for n in found if needed([n]) <= set(common))


def after(graph: fx.Graph, nodes: Collection[fx.Node]) -> set[fx.Node]:
    """Nodes and all that depends on them."""
    found: set[fx.Node] = set(nodes)
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def learnt(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on parameters."""
    return after(graph, graph.find_nodes(op="get_attr"))


def _last_layers(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that multiply data with what they read of parameters, and after which there is no other such node."""
    data = after(graph, graph.find_nodes(op="placeholder"))
    layers = {
        n
        for n in graph.nodes
        if n.op == "call_function"
        and n in data
        and rules.contracts(n.target)
        and any(a not in data for a in n.all_input_nodes)
    }
    earlier: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if any(user in earlier or user in layers for user in node.users):
            earlier.add(node)
    return layers - earlier


def _cuts(graph: fx.Graph) -> list[fx.Node]:
    """The nodes through which all goes that depends on parameters and inputs, in graph order."""
    flow = learnt(graph) & after(graph, graph.find_nodes(op="placeholder"))
    flow = {n for n in flow if n.op in CALLS}
    (output,) = graph.find_nodes(op="output")
    edges: nx.DiGraph[Any] = nx.DiGraph()
    for node in flow:
        edges.add_edges_from((user, node) for user in node.users if user in flow)
        if output in node.users:
            edges.add_edge(output, node)
        if flow.isdisjoint(node.all_input_nodes):
            edges.add_edge(node, "inputs")
    if output not in edges:
        return []
    above = nx.immediate_dominators(edges, output)
    found, node = [], above.get("inputs")
    while node is not None and node is not output:
        found.append(node)
        node = above[node]
    return found


def _count(module: fx.GraphModule, nodes: Iterable[fx.Node]) -> int:
    """How many entries the parameters that some nodes are have."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    found = {id(parameters[n.target]): parameters[n.target].numel() for n in nodes if n.target in parameters}
    return sum(found.values())


def _within(node: fx.Node, module: str) -> bool:
    return any(path == module or path.startswith(f"{module}.") for path in _path(node))


def _path(node: fx.Node) -> list[str]:
    """The names of the modules in whose forward a node lies."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]


def _modules(graph: fx.Graph) -> list[str]:
    return list(dict.fromkeys(path for n in graph.nodes for path in _path(n)))


def first_layer(module: fx.GraphModule) -> str:
    for node in module.graph.nodes:
        own = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        if node.op in CALLS and own:
            shape = tuple(attrgetter(own[0])(module).shape)
            return f"{node.name!r} with {own[0]!r} of shape {shape}"
    return "none"
