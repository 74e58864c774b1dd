"""A checkpoint: tensors by name, which are read when they are asked for, and how they were found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxmerge.errors import CheckpointError
from fxmerge.io.headers import Entry
from fxmerge.io.wrappers import prefix_to_remove

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

SHOWN = 3
"""So many names are given in a message."""

FLOATS = ("float", "bfloat", "complex")


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, "Tensor"]):
    """The weights in a file or a directory: a mapping of names to tensors, each read when it is asked for.

    Attributes:
        path: what was given.
        files: the files that hold the tensors.
        entries: for every name, the shape and dtype of its tensor, known without reading it.
        read: reads one tensor by its name in the files.
        prefix: what was taken from before every name; "" if nothing.
        notes: what was seen through or assumed, each in a sentence.
        metadata: texts that the files hold beside the tensors.
    """

    path: Path
    files: tuple[Path, ...]
    entries: Mapping[str, Entry]
    read: Callable[[str], Tensor]
    prefix: str = ""
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.entries:
            raise KeyError(name)
        return self.read(self.prefix + name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def bytes(self) -> int:
        """That all tensors take together."""
        return sum(entry.bytes for entry in self.entries.values())

    def noted(self, *notes: str) -> Checkpoint:
        """The same with further notes, which are logged."""
        for note in notes:
            logger.info("%s: %s", self.path, note)
        return replace(self, notes=(*self.notes, *notes))

    def without_prefix(self, wanted: Sequence[str]) -> Checkpoint:
        """The same without a prefix that all names have, such as `module.`, if it then fits better to these names."""
        prefix = prefix_to_remove(list(self.entries), wanted)
        if not prefix:
            return self
        entries = {name[len(prefix) :]: entry for name, entry in self.entries.items()}
        without = replace(self, entries=entries, prefix=self.prefix + prefix)
        return without.noted(f"{prefix!r} was taken from before every name.")

    def fitted(self, wanted: Mapping[str, Entry], tied: Mapping[str, str]) -> Checkpoint:
        """The same, checked to have exactly the tensors of a network.

        Arguments:
            wanted: the tensors of the network.
            tied: for the names that the network has for one and the same tensor, the first of them. One in the file is
                enough.

        Raises:
            CheckpointError: if a tensor is missing, is none of the network, or has another shape or kind of number.
        """
        own = self.without_prefix(list(wanted))
        there = {tied.get(name, name) for name in own.entries}
        missing = [name for name in wanted if tied.get(name, name) not in there and not _counts_batches(name)]
        left = [name for name in own.entries if name not in wanted]
        if missing or left:
            raise CheckpointError(f"{self.path} does not fit the network: {_told(missing, left)}")
        for name, need in wanted.items():
            entry = own.entries.get(name, need)
            if entry.shape != need.shape:
                raise CheckpointError(
                    f"{self.path} does not fit the network: {name!r} has shape {entry.shape}, and the network's has "
                    f"{need.shape}. Build the network for it with --set, or pass weights of this architecture."
                )
            if entry.dtype.startswith(FLOATS) != need.dtype.startswith(FLOATS):
                raise CheckpointError(
                    f"{self.path} does not fit the network: {name!r} holds {entry.dtype}, and the network's holds "
                    f"{need.dtype}. Save the weights as floating-point numbers; quantized ones cannot be merged."
                )
        return own


def _counts_batches(name: str) -> bool:
    """Whether a missing tensor only counts batches, as old checkpoints lack it."""
    return name.endswith("num_batches_tracked")


def _told(missing: Sequence[str], left: Sequence[str]) -> str:
    parts = []
    if missing:
        parts.append(f"{_listed(missing)} of the network {'is' if len(missing) == 1 else 'are'} not in the file")
    if left:
        parts.append(f"{_listed(left)} of the file {'is' if len(left) == 1 else 'are'} not in the network")
    near = get_close_matches(left[0], missing, n=1) if missing and left else []
    hint = f" {near[0]!r} is near to {left[0]!r}." if near else ""
    return f"{', and '.join(parts)}.{hint} Pass weights of this architecture, or another --arch or --set."


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


def entry_of(tensor: Any) -> Entry:
    """What is known of a tensor without its values."""
    return Entry(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.numel() * tensor.element_size())
