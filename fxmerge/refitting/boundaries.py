"""Activations between two stages: in memory up to a budget, beyond it in a temporary folder."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Key = tuple[int, int]
Values = Mapping[Any, Any]


class Boundaries:
    """Mappings to tensors and other values, by key. What was put under a key is taken once.

    Arguments:
        budget: how many bytes of tensors to keep in memory.
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.bytes = 0
        self._held: dict[Key, tuple[Values, int]] = {}
        self._spilled: dict[Key, list[Hashable]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Boundaries:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, key: Key, values: Values) -> None:
        """Keeps some values, and of the memory that they are views of no more than they show."""
        values = without_the_rest(values)
        leaves = pytree.tree_leaves(list(values.values()))
        storages = [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)]
        size = sum({storage._cdata: storage.nbytes() for storage in storages}.values())
        if self.bytes + size > self.budget:
            self._spilled[key] = list(values)
            torch.save(list(values.values()), self._path(key))
        else:
            self._held[key] = values, size
            self.bytes += size

    def take(self, key: Key) -> Values:
        """What was put, which is kept no longer."""
        if key in self._spilled:
            values = torch.load(self._path(key), weights_only=False)
            self._path(key).unlink()
            return dict(zip(self._spilled.pop(key), values, strict=True))
        held, size = self._held.pop(key)
        self.bytes -= size
        return held

    def _path(self, key: Key) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="fxmerge-")
        return Path(self._folder.name) / "-".join(map(str, key))


def without_the_rest(values: Values) -> Values:
    """Values with copies of those tensors that show only a part of their memory, such as slices of a data set.

    Views that show all of it together, such as the parts that a tensor was split into, stay as they are.

    Example:
        >>> data = torch.zeros(1000, 4)
        >>> without_the_rest({"x": data[:10]})["x"].untyped_storage().nbytes()
        160
    """
    shown: Counter[int] = Counter()
    for leaf in pytree.tree_leaves(list(values.values())):
        if isinstance(leaf, Tensor):
            shown[leaf.untyped_storage()._cdata] += leaf.nbytes

    def copied(leaf: Tensor) -> Tensor:
        storage = leaf.untyped_storage()
        return leaf.clone() if shown[storage._cdata] < storage.nbytes() else leaf

    return {key: pytree.tree_map_only(Tensor, copied, value) for key, value in values.items()}
