"""Outputs by the names that users see, and those along which units may move."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxmerge.errors import OptionError
from fxmerge.symmetry.classes import UnitClass
from fxmerge.symmetry.columns import core, support
from fxmerge.symmetry.propagation import Propagation
from fxmerge.symmetry.units import Ids

ROOT = "output"

Path = tuple[str, ...]
"""The keys that lead to an output, as texts."""


@dataclass(frozen=True)
class FreeOutput:
    """Where the units of classes lie along one dimension of an output that is free.

    Attributes:
        leaf: the number of the output among all of them.
        dim: the dimension.
        classes: for every position along it the number of the class; -1 where no unit is that moves.
        units: for every position the unit of that class.
    """

    leaf: int
    dim: int
    classes: Ids
    units: Ids

    def source(self, images: Sequence[Ids]) -> Ids:
        """For every position, where what was there is after a permutation."""
        before = np.where(self.classes < 0, np.arange(len(self.classes)), self.units)
        after = before.copy()
        for number in np.unique(self.classes[self.classes >= 0]).tolist():
            own = self.classes == number
            after[own] = images[number][before[own]]
        source = np.empty_like(before)
        # A unit that lies there several times goes to as many places, in their order.
        source[np.lexsort((after, self.classes))] = np.lexsort((before, self.classes))
        return source

    def put_back(self, value: Tensor, images: Sequence[Ids]) -> Tensor:
        """The output of a permuted network in the units of the network before."""
        return value.index_select(self.dim, torch.from_numpy(self.source(images)).to(value.device))


def free_outputs(
    found: Propagation, classes: Sequence[UnitClass], leaves: Collection[int]
) -> tuple[list[FreeOutput], set[int]]:
    """Where the units of classes lie along some outputs.

    Arguments:
        found: the labelled program.
        classes: the classes, with the units of the walk.
        leaves: the numbers of the outputs.

    Returns:
        What is known of each output, and the numbers of those of which it is not known what moves with what.
    """
    number, place = np.full(found.units.size, -1), np.zeros(found.units.size, np.int64)
    for n, c in enumerate(classes):
        for role in c.roles:
            number[role.raw], place[role.raw] = n, np.arange(c.size)
    (output,) = found.program.graph.graph.find_nodes(op="output")
    known, unknown = [], set()
    for leaf, node in found.program.numbered_outputs(output):
        labels = found.labels.get(node.name)
        for column in labels.columns if labels is not None and leaf in leaves else ():
            dims = support(column)
            ids = found.units.first_names(core(column, dims).numpy())
            own, units = number[ids], place[ids]
            if (own < 0).all():
                continue
            if len(dims) > 1 or not all(_evenly(units[own == n], classes[n].size) for n in np.unique(own[own >= 0])):
                unknown.add(leaf)
            known.append(FreeOutput(leaf, dims[0], own, units))
    return known, unknown


def _evenly(units: Ids, size: int) -> bool:
    """Whether every unit of a class is there equally often."""
    return len(np.unique(np.bincount(units, minlength=size))) == 1


def paths_of(spec: pytree.TreeSpec | None, count: int) -> list[Path]:
    """The keys that lead to each of the outputs; by their numbers where the structure does not tell."""
    try:
        assert spec is not None
        tree = pytree.tree_unflatten([0] * spec.num_leaves, spec)
        found = [tuple(_key(k) for k in path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    except Exception:  # Whatever a user's class raises that is made of other values.
        found = []
    by_number: list[Path] = [()] if count == 1 else [(str(i),) for i in range(count)]
    return found if len(found) == count else by_number


def _key(entry: object) -> str:
    for name in ("key", "idx", "name"):
        if hasattr(entry, name):
            return str(getattr(entry, name))
    return str(entry)


def free_leaves(free: str | Iterable[str], paths: Sequence[Path]) -> frozenset[int]:
    """The numbers of the outputs that some names stand for.

    Arguments:
        free: names such as "output" for all outputs, "output[0]", "output['logits']" or "output.logits".
        paths: the keys that lead to each output.

    Raises:
        OptionError: if a name is of no output.

    Example:
        >>> sorted(free_leaves("output.a", [("a", "0"), ("a", "1"), ("b",)]))
        [0, 1]
    """
    if not isinstance(free, Iterable):
        raise OptionError(f"free is {free!r}; give names of outputs, such as {ROOT!r} for all of them.")
    found: set[int] = set()
    for name in [free] if isinstance(free, str) else free:
        keys = _parse(name)
        own = {i for i, path in enumerate(paths) if keys is not None and path[: len(keys)] == keys}
        if not own:
            listed = ", ".join(repr(name_of(path)) for path in paths[:8])
            raise OptionError(f"free names no output: {name!r}. The outputs are {listed}; {ROOT!r} stands for all.")
        found |= own
    return frozenset(found)


_STEP = re.compile(r"\.([^.\[\]]+)|\[(-?\d+)\]|\[(['\"])(.*?)\3\]")


def _parse(name: object) -> Path | None:
    if not isinstance(name, str) or not name.startswith(ROOT):
        return None
    rest, keys = name[len(ROOT) :], []
    while rest:
        step = _STEP.match(rest)
        if step is None:
            return None
        keys.append(next(group for group in (step[1], step[2], step[4]) if group is not None))
        rest = rest[step.end() :]
    return tuple(keys)


def name_of(path: Path) -> str:
    """An output's name.

    Example:
        >>> name_of(()), name_of(("0", "logits"))
        ('output', "output[0]['logits']")
    """
    return ROOT + "".join(f"[{key}]" if key.isdecimal() else f"[{key!r}]" for key in path)
