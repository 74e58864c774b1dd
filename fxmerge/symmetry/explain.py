"""Why an axis does not move: the chain of ops from it to where its units were pinned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order
from torch import nn
from torch.export import ExportedProgram

from fxmerge.program.capture import Args, Kwargs, capture_program
from fxmerge.symmetry.group import Symmetry, analyse
from fxmerge.symmetry.overrides import Pin, Rules
from fxmerge.symmetry.propagation import Propagation
from fxmerge.symmetry.reasons import concatenate, first_reasons
from fxmerge.symmetry.units import CONCLUDED, Ids


@dataclass(frozen=True)
class Step:
    """One link of a chain: what was tied to what, and by which op.

    Attributes:
        node: the graph node that tied them; "conclusion" where it follows from what the classes say of each other.
        op: the op of that node.
        to: what the units before are tied to: an axis such as "layer.weight[1]", or blocks of units.
    """

    node: str
    op: str
    to: str


@dataclass(frozen=True)
class Chain:
    """Why some indices of an axis do not move.

    Attributes:
        start: the axis, such as "layer.weight[0]"; in `because`, the blocks.
        count: how many of its indices, or how many of the blocks.
        steps: the fewest ties that lead from there to units that were pinned; none where its own were.
        node: the graph node that pinned them, or "conclusion"; empty if they were on request, or not used.
        op: the op of that node.
        reason: the reason that the symmetry gives.
        because: where the reason is a conclusion, the chain of the blocks that hold these units in place.
    """

    start: str
    count: int
    steps: tuple[Step, ...]
    node: str
    op: str
    reason: str
    because: Chain | None = None

    def __str__(self) -> str:
        """In one line, as in `2.weight[1] (8 indices) <- linear_1: 0.weight[0] <- pinned: linear`."""
        what = "indices" if self.start.endswith("]") else "units"
        links = [f"{self.start} ({self.count} {what})", *(f"{step.node}: {step.to}" for step in self.steps)]
        word = "concluded" if self.node == CONCLUDED else "pinned"
        told = self.node in ("", CONCLUDED) or self.node in self.reason
        links.append(f"{word}: {self.reason}" if told else f"pinned at {self.node}: {self.reason}")
        return " <- ".join(links) + (f", held by {self.because}" if self.because else "")


def explain(
    model: nn.Module | ExportedProgram,
    args: Args = (),
    kwargs: Kwargs | None = None,
    *,
    pin: Iterable[Pin] = (),
    rules: Rules | None = None,
    free: str | Iterable[str] = (),
) -> tuple[Chain, ...]:
    """Tells why the axes of a model that do not move do not.

    Arguments and errors are those of `find_symmetry`.

    Returns:
        For every pinned axis and reason the shortest chain of ops from the axis to the pin.

    Example:
        >>> import torch, fxmerge
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> for chain in fxmerge.explain(mlp, (torch.zeros(1, 2),), pin=["0.bias"]):
        ...     print(chain)
        0.weight[0] (3 indices) <- linear: 0.bias[0] <- pinned: on request
        0.weight[1] (2 indices) <- pinned: linear
        0.bias[0] (3 indices) <- pinned: on request
        2.weight[1] (3 indices) <- linear_1: 0.weight[0] <- linear: 0.bias[0] <- pinned: on request
    """
    return chains(*analyse(capture_program(model, args, kwargs), pin, rules, free))


def chains(found: Propagation, symmetry: Symmetry) -> tuple[Chain, ...]:
    """The chains of a symmetry, from the facts that it was inferred from.

    Arguments:
        found: the labelled program, as `analyse` returns it.
        symmetry: the symmetry, also after verification.
    """
    paths = _Paths(found)
    return tuple(
        paths.chain(f"{name}[{dim}]", len(indices), paths.find(found.axes[name, dim].ids, reason), reason)
        for (name, dim), reasons in symmetry.stuck.items()
        for reason, indices in reasons.items()
    )


class _Paths:
    """Shortest paths from the pins, over groups of units: those of one creation that were pinned for one reason."""

    def __init__(self, found: Propagation) -> None:
        self.units = units = found.units
        self.ops = {n.name: str(n.target) for n in found.program.graph.graph.nodes}
        self.reasons, why = first_reasons(units)
        code = units.origin(np.arange(units.size)) * len(self.reasons) + why
        self.codes, self.group = np.unique(code, return_inverse=True)
        self.sources = self._sources()
        self.edges = self._edges(why)
        self.before = self._search()
        self.holders = self._holders(why)

    def _sources(self) -> dict[int, str]:
        """The groups that were pinned themselves, each with the node that did it first."""
        sources: dict[int, str] = {}
        number = {reason: i for i, reason in enumerate(self.reasons)}
        for (ids, reason), node in zip(self.units.pinned, self.units.pinned_at, strict=True):
            groups = np.unique(self.group[ids])
            for g in groups[self.codes[groups] % len(self.reasons) == number[reason]].tolist():
                sources.setdefault(g, node)
        return sources

    def _edges(self, why: Ids) -> dict[tuple[int, int], str]:
        """Where a pin goes on: from group to group, each with the node that tied them first."""
        a, b = concatenate(self.units.equal)
        child, parent = concatenate(self.units.member)
        # Equal units are pinned together, and a block is pinned with its members.
        begin, end = np.concatenate([a, b, child]), np.concatenate([b, a, parent])
        equal_at = np.repeat(np.arange(len(self.units.equal)), [len(x) for x, _ in self.units.equal])
        member_at = np.repeat(np.arange(len(self.units.member)), [len(x) for x, _ in self.units.member])
        fact = np.concatenate([equal_at, equal_at, member_at + len(self.units.equal)])
        same = (why[begin] == why[end]) & (self.group[begin] != self.group[end])
        code = self.group[begin[same]] * len(self.codes) + self.group[end[same]]
        pairs, first = np.unique(code, return_index=True)
        nodes = [*self.units.equal_at, *self.units.member_at]
        return {
            (int(pair // len(self.codes)), int(pair % len(self.codes))): nodes[int(fact[same][i])]
            for pair, i in zip(pairs, first, strict=True)
        }

    def _search(self) -> Ids:
        """For every group, the one before it on the way from a pin; negative for the pins and what has none."""
        root = len(self.codes)
        begin = [a for a, _ in self.edges] + [root] * len(self.sources)
        end = [b for _, b in self.edges] + list(self.sources)
        graph = coo_matrix((np.ones(len(begin), np.int8), (begin, end)), shape=(root + 1,) * 2).tocsr()
        before: Ids = breadth_first_order(graph, root)[1].astype(np.int64)
        before[before == root] = -1
        return before

    def _holders(self, why: Ids) -> dict[int, int]:
        """For a group, blocks that do not move for another reason and hold its units."""
        child, parent = concatenate(self.units.member)
        held = (why[child] != why[parent]) & (why[parent] < len(self.reasons) - 1)
        pairs = np.unique(self.group[child[held]] * len(self.codes) + self.group[parent[held]])
        return {int(pair // len(self.codes)): int(pair % len(self.codes)) for pair in pairs[::-1]}

    def find(self, ids: Ids, reason: str) -> int | None:
        """The group of those of some units of one creation that were pinned for a reason, None if none were."""
        if reason not in self.reasons:
            return None
        code = int(self.units.origin(ids.reshape(-1)[:1])[0]) * len(self.reasons) + self.reasons.index(reason)
        at = int(np.searchsorted(self.codes, code))
        return at if at < len(self.codes) and self.codes[at] == code else None

    def chain(self, start: str, count: int, group: int | None, reason: str, seen: tuple[int, ...] = ()) -> Chain:
        """The chain from a group to its pin."""
        at, steps = group, []
        while at is not None and self.before[at] >= 0:
            previous = int(self.before[at])
            node = self.edges[previous, at]
            steps.append(Step(node, self.ops.get(node, ""), self._name(previous)))
            at = previous
        node = self.sources.get(-1 if at is None else at, "")
        holder = self.holders.get(-1 if at is None else at)
        because = None
        if node == CONCLUDED and holder is not None and holder not in seen:
            why = self.reasons[int(self.codes[holder]) % len(self.reasons)]
            members = int((self.group == holder).sum())
            because = self.chain(self._name(holder), members, holder, why, (*seen, holder))
        return Chain(start, count, tuple(steps), node, self.ops.get(node, ""), reason, because)

    def _name(self, group: int) -> str:
        origin = self.units.origins[int(self.codes[group]) // len(self.reasons)]
        kinds = {"axis": f"{origin[1]}[{origin[-1]}]", "block": f"blocks of {origin[-1]}"}
        return kinds.get(origin[0], f"fixed positions of {origin[-1]}")
