"""Elements of the symmetry group, and how they act on parameters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from fxmerge.errors import PermutationError
from fxmerge.units.applied import applied
from fxmerge.units.layout import AxisLayout, Ids, move_axis


@dataclass(frozen=True)
class Permutation:
    """An element of a symmetry group: for every class, where each of its units goes.

    `images[c][i]` is the unit of class c to whose place unit i moves. `p @ q` applies q first.
    """

    layout: tuple[AxisLayout, ...]
    images: tuple[Ids, ...]

    def apply(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Permutes parameters.

        Arguments:
            state_dict: tensors by name, any dtype and device, in the shapes that the symmetry was found for.

        Returns:
            A new dict with the same keys in the same order, and with the `_metadata` (the versions of its modules) that
            the state dict of a module has; tensors that do not move are the same objects.

        Raises:
            PermutationError: if a parameter is missing or has another shape.

        Example:
            >>> import torch, fxmerge
            >>> mlp = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
            >>> symmetry = fxmerge.find_symmetry(mlp, (torch.zeros(1, 2),))
            >>> p = symmetry.sample_permutation(torch.Generator().manual_seed(0))
            >>> permuted = p.apply(mlp.state_dict())
            >>> torch.equal(p.inverse().apply(permuted)["0.weight"], mlp[0].weight)
            True
        """
        return applied(state_dict, self.layout, self.moved, PermutationError)

    def moved(self, name: str, tensor: Tensor) -> Tensor:
        """One parameter of `apply`, by the first of its names; as it is, if no class lies on it."""
        for axis in self._axes.get(name, ()):
            source = axis.source(self.images)
            if source is not None:
                tensor = move_axis(tensor, axis, source)
        return tensor

    @cached_property
    def _axes(self) -> dict[str, list[AxisLayout]]:
        """The axes of every parameter."""
        found: dict[str, list[AxisLayout]] = {}
        for axis in self.layout:
            found.setdefault(axis.parameter, []).append(axis)
        return found

    def inverse(self) -> Permutation:
        """The permutation that undoes this one."""
        return Permutation(self.layout, tuple(np.argsort(image) for image in self.images))

    def __matmul__(self, other: Permutation) -> Permutation:
        """First `other`, then this one."""
        if [len(i) for i in self.images] != [len(i) for i in other.images]:
            raise PermutationError("The permutations belong to different symmetries: their classes differ in size.")
        return Permutation(self.layout, tuple(a[b] for a, b in zip(self.images, other.images, strict=True)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Permutation) or len(self.images) != len(other.images):
            return NotImplemented if not isinstance(other, Permutation) else False
        return all(np.array_equal(a, b) for a, b in zip(self.images, other.images, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(image.tobytes() for image in self.images))

    def is_identity(self) -> bool:
        """Whether no unit moves."""
        return all(np.array_equal(image, np.arange(len(image))) for image in self.images)

    def save(self, path: str | Path) -> None:
        """Writes the permutation, and all that is needed to apply it, to an .npz file."""
        axes = [
            {k: getattr(a, k) for k in ("parameter", "aliases", "shape", "dim", "dims")}
            | {"roles": [n for n, _ in a.roles]}
            for a in self.layout
        ]
        arrays = {f"image{i}": image for i, image in enumerate(self.images)}
        for i, axis in enumerate(self.layout):
            arrays[f"slot{i}"] = axis.slot
            arrays |= {f"role{i}.{j}": slots for j, (_, slots) in enumerate(axis.roles)}
        arrays["axes"] = np.frombuffer(json.dumps({"version": 1, "axes": axes}).encode(), np.uint8)
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @staticmethod
    def load(path: str | Path) -> Permutation:
        """Reads a permutation that `save` wrote.

        Raises:
            PermutationError: if the file is not such a permutation.
        """
        try:
            with np.load(path) as file:
                axes = json.loads(bytes(file["axes"]))["axes"]
                layout = tuple(
                    AxisLayout(
                        a["parameter"],
                        tuple(a["aliases"]),
                        tuple(a["shape"]),
                        a["dim"],
                        tuple(a["dims"]),
                        file[f"slot{i}"],
                        tuple((number, file[f"role{i}.{j}"]) for j, number in enumerate(a["roles"])),
                    )
                    for i, a in enumerate(axes)
                )
                return Permutation(layout, tuple(file[f"image{i}"] for i in range(sum("image" in k for k in file))))
        except (KeyError, ValueError, EOFError) as error:
            raise PermutationError(f"{path} does not hold a permutation saved by fxmerge: {error}") from error


def build_image(size: int, key: Ids, moved_key: Callable[[Ids], Ids], choose: Callable[[Ids, Ids], Ids]) -> Ids:
    """Where the units of a class go, one combination of parents at a time.

    Arguments:
        size: the number of units.
        key: for every unit, a row of numbers that names its parents, shape (size, depth).
        moved_key: from rows of `key` to the rows where the parents go.
        choose: for two arrays of shape (combinations, units), of the units in each combination and
            of the places they may take, the place of each unit.
    """
    rows, row = np.unique(key, axis=0, return_inverse=True)
    members = np.argsort(row.reshape(-1), kind="stable").reshape(len(rows), -1)
    together = np.concatenate([rows, moved_key(rows)])
    number = np.unique(together, axis=0, return_inverse=True)[1].reshape(-1)
    if len(np.unique(number)) != len(rows):
        raise PermutationError("The parents of a nested class do not move along with each other.")
    places = members[number[len(rows) :]]
    image = np.empty(size, np.int64)
    image[members] = choose(members, places)
    return image
