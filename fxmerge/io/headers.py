"""What a .safetensors file says of its tensors before any of them is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxmerge.errors import CheckpointError

DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
"""The dtypes of the format that torch has too: their names in torch, and their bytes."""

LARGEST = 100_000_000
"""No header may be longer, by the format."""

AGAIN = "The file is damaged or was not written to its end; copy or save it again."


@dataclass(frozen=True)
class Entry:
    """What is known of a tensor without reading it.

    Attributes:
        shape: of the tensor.
        dtype: its name in torch, such as "float32".
        bytes: that its values take.
    """

    shape: tuple[int, ...]
    dtype: str
    bytes: int

    @property
    def numbers(self) -> int:
        """How many entries the tensor has."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"


@dataclass(frozen=True)
class Header:
    """What a .safetensors file holds: its tensors by name, and texts about the whole."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Reads and checks the header of a .safetensors file; no tensor is read.

    Raises:
        CheckpointError: if the file cannot be read, or is not whole.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > min(LARGEST, size - 8):
                raise CheckpointError(f"{path} is not a whole .safetensors file: it ends within its header. {AGAIN}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
        if not isinstance(found, dict):
            raise ValueError("it is no mapping of names to tensors")
        metadata = found.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("its metadata are not texts")
        entries, ends = {}, {}
        for name, entry in found.items():
            entries[name], ends[name] = _entry(name, entry)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that cannot be read: {error}. {AGAIN}") from error
    _check_places(path, ends, size - 8 - length)
    return Header(entries, metadata)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it names one tensor twice")
    return found


def _entry(name: str, given: Any) -> tuple[Entry, tuple[int, int]]:
    """A tensor, and between which bytes of the data it lies."""
    if not isinstance(given, dict) or set(given) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} has no dtype, shape and data_offsets")
    shape, between = given["shape"], given["data_offsets"]
    for numbers in (shape, between):
        whole = isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
        if not whole:
            raise ValueError(f"{name!r} has a shape or data_offsets that are not whole numbers")
    if given["dtype"] not in DTYPES:
        raise ValueError(f"{name!r} has the dtype {given['dtype']!r}, which is none that torch has")
    dtype, width = DTYPES[given["dtype"]]
    entry = Entry(tuple(shape), dtype, math.prod(shape) * width)
    if len(between) != 2 or between[1] - between[0] != entry.bytes:
        raise ValueError(f"{name!r} is {entry}, which takes {entry.bytes} bytes, but its data_offsets are {between}")
    return entry, (between[0], between[1])


def _check_places(path: Path, ends: Mapping[str, tuple[int, int]], size: int) -> None:
    """The tensors must lie one after the other and fill the file."""
    at = 0
    for name, (start, end) in sorted(ends.items(), key=lambda item: item[1]):
        if start != at:
            raise CheckpointError(f"{path} has a header by which {name!r} begins at byte {start}, not {at}. {AGAIN}")
        at = end
    if at != size:
        what = "ends before its last tensor" if size < at else "has more bytes than its tensors"
        raise CheckpointError(f"{path} {what}: {size:,} bytes of tensors in place of {at:,}. {AGAIN}")
