"""In which order a graph is computed, if the parameters of some nodes are only known once their inputs are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

Fits = Sequence[Collection[fx.Node]]
"""Sets of nodes; the nodes of a set get their parameters together, from the inputs that they have."""


@dataclass(frozen=True)
class Step:
    """What to compute on the way to the next stage.

    Attributes:
        run: the nodes to compute, in graph order.
        show: the nodes whose values this stage is to have.
        keep: the nodes whose values later stages need.
    """

    run: tuple[fx.Node, ...]
    show: frozenset[fx.Node]
    keep: frozenset[fx.Node]


def stages_of(graph: fx.Graph, fits: Fits, derived: Collection[fx.Node]) -> tuple[list[list[int]], dict[fx.Node, int]]:
    """When each set of nodes gets its parameters, and from which stage on each node's value is final.

    A set is due as soon as the inputs of its first node are final; the inputs of its other nodes may depend on its own
    result (a weight that a network uses again and again), and are then what they are before.

    Returns:
        For every stage the numbers of the sets that are due, and for every node the first stage in which its value
        is no longer going to change.
    """
    member = {node: number for number, nodes in enumerate(fits) for node in nodes}
    due: dict[int, int] = {}
    final: dict[fx.Node, int] = {}
    for node in graph.nodes:
        stage = max((final[n] for n in node.all_input_nodes if n not in derived), default=0)
        if node in member:
            stage = max(stage, due.setdefault(member[node], stage) + 1)
        final[node] = stage
    stages: list[list[int]] = [[] for _ in range(max(due.values(), default=-1) + 1)]
    for number, stage in due.items():
        stages[stage].append(number)
    return stages, final


def walk(
    graph: fx.Graph,
    targets: Sequence[Iterable[fx.Node]],
    derived: Collection[fx.Node],
    final: Mapping[fx.Node, int] | None = None,
) -> list[Step]:
    """What to compute and what to keep in every stage, so that each has the values of its targets.

    Arguments:
        graph: the graph.
        targets: the nodes whose values each stage needs.
        derived: nodes that are known throughout.
        final: from which stage on a node's value may be kept; None if always.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    done = {node for node in graph.nodes if node.op == "placeholder"}
    wanted = [_leading_to(t, set(derived)) for t in targets]
    ever = set().union(*wanted) if wanted else set()
    stages = []
    for number, own in enumerate(targets):
        run = _leading_to(own, done | set(derived))
        done |= {n for n in run if final is None or final[n] <= number}
        later = set().union(*(set(t) for t in targets[number + 1 :]))
        open_ = {n for n in done if n in later or any(u in ever and u not in done for u in n.users)}
        known = set(derived)
        stages.append(Step(tuple(sorted(run, key=order.__getitem__)), frozenset(own) - known, frozenset(open_ - known)))
    return stages


def jump(steps: Sequence[Step]) -> Step:
    """What to compute in place of some steps in a row, if only what the last of them keeps is needed."""
    keep, ran = steps[-1].keep, {node for step in steps for node in step.run}
    nodes = next(iter(keep)).graph.nodes if keep else ()
    found = _leading_to(keep, set(nodes) - ran)
    return Step(tuple(node for node in nodes if node in found), frozenset(), keep)


def _leading_to(targets: Iterable[fx.Node], known: Collection[fx.Node]) -> set[fx.Node]:
    """The targets and all that leads to them, but for what is known."""
    found: set[fx.Node] = set()
    todo = list(targets)
    while todo:
        node = todo.pop()
        if node not in found and node not in known:
            found.add(node)
            todo += node.all_input_nodes
    return found
