"""The objective of a search for the units of two models that agree, and the model as it is moved by the search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch
from torch import Tensor

from fxmerge.evidence import weights
from fxmerge.evidence.weights import Placing, Similarities, Slices, Stamps, most_kept
from fxmerge.matching import signs
from fxmerge.matching.assignment import Scores, descendants
from fxmerge.matching.descent import rises
from fxmerge.matching.mix import Mix
from fxmerge.progress import release_memory
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.units import Ids
from fxmerge.units.basis import Basis, Mixed, centred_frame, plane
from fxmerge.units.kind import Kind
from fxmerge.units.layout import AxisLayout, move_axis
from fxmerge.units.scaling import Scaled, Scaling

Position = tuple[
    dict[str, Tensor],
    tuple[Ids, ...],
    dict[int, Tensor],
    dict[int, Tensor],
    dict[str, float],
    dict[int, float],
    Stamps,
]
"""The moved parameters of a problem, where units are, how they are mixed, their signs, what parameters and activations
give to the objective, and the stamps of axes."""


@dataclass
class Problem:
    """The objective, and the model as it is permuted and mixed so far.

    The objective is  mix.weights * sum over parameters of scale * <a, permuted b>
    + sum over classes of mix.activations * entries per unit * sum over units of correlation(a, permuted b).
    A scale is the number of a parameter's entries over the norms of both tensors, so that a unit's
    activations weigh as much as all of its weights.

    Attributes:
        symmetry: the group to search.
        a: parameters of the model whose units are taken as they are.
        b: parameters of the model to permute, in the places that `images` gives them.
        correlation: for some classes, the correlations of the units' activations, (units of a, units of b as they
            were before any permutation).
        mix: how much weights and activations count.
        images: where the units of b are.
        matrices: for every class that may be mixed, how the units of b are, once they are in their places: shape
            (blocks, units, units), blocks and units in the order of these places.
        scales: for every parameter, how much an inner product counts.
        slices: the parameter slices of every class.
        flipped: for every class whose units may have signs, the factors of the units of b, once in their places.
        value: for every parameter, its part of the objective.
        agreed: for every class with activations, how much the matched units agree: the sum of their correlations.
        stamps: of every axis along which units were moved or mixed, a number that no other state has.
        similarities: of the units' weights, kept from one visit of a class to the next.
    """

    symmetry: Symmetry
    a: Mapping[str, Tensor]
    b: dict[str, Tensor]
    correlation: Mapping[int, Tensor]
    mix: Mix
    images: tuple[Ids, ...]
    scales: Mapping[str, float]
    slices: Mapping[int, list[Slices]]
    matrices: dict[int, Tensor] = field(init=False)
    flipped: dict[int, Tensor] = field(init=False)
    value: dict[str, float] = field(init=False)
    agreed: dict[int, float] = field(init=False)
    stamps: Stamps = field(init=False, default_factory=dict)
    similarities: Similarities = field(init=False)

    def __post_init__(self) -> None:
        self._count, self.matrices = count(1), dict(self.symmetry.identity_basis().matrices)
        self.similarities = Similarities(self.a, self.scales, most_kept(self.a, mixes=bool(self.matrices)))
        scaling, kinds = self.symmetry.identity_scaling(), self.symmetry.kinds
        self.flipped = {n: factors for n, factors in scaling.factors.items() if kinds[n].signs}
        self.value = {n: self._match(n, self.b) for n in self.scales}
        self.agreed = {n: float(self.agreement(n).sum()) for n in self.correlation}

    def _match(self, name: str, b: Mapping[str, Tensor]) -> float:
        return weights.inner(self.a[name], b[name]) * self.scales[name]

    def weight(self, number: int) -> float:
        """The number of parameter entries for each unit of a class."""
        return float(sum(s.entries for s in self.slices[number])) or 1.0

    def objective(self) -> float:
        total = sum(self.value.values()) * self.mix.weights
        for number, own in self.agreed.items():
            total += self.mix.activations[number] * self.weight(number) * own
        return float(total)

    def agreement(self, number: int) -> Tensor:
        """For every unit of a, its correlation with the unit of b that is in its place now."""
        if number in self.matrices:
            return self.placed(number).diagonal()
        correlation, units = self.correlation[number], torch.from_numpy(np.argsort(self.images[number]))
        agreed = correlation[torch.arange(len(units)), units]
        return agreed * self._shown(number).to(agreed) if number in self.flipped else agreed

    def _shown(self, number: int) -> Tensor:
        """The signs of the activations of a class, for the units of b in their places."""
        return signs.shown(self.symmetry, number, self.flipped[number])

    def placed(self, number: int) -> Tensor:
        """The correlations of a class, for the units of b as they are now."""
        placed = self.correlation[number][:, np.argsort(self.images[number])]
        if number in self.matrices:
            placed, matrix = placed.clone(), self.matrices[number].to(placed)
            for units, own in zip(self.symmetry.by_block(number), matrix, strict=True):
                placed[:, units] = placed[:, units] @ own.T
        return placed * self._shown(number).to(placed) if number in self.flipped else placed

    def scores(self, number: int, usable: list[Slices]) -> Scores:
        """For every (unit of a, unit of b as placed now), what the objective gains from matching them."""
        if number in self.flipped:
            return signs.best(self._by_signs(number, usable))
        by_weights, shown = self.mix.weights_of(number), self.mix.activations.get(number, 0.0)
        size = self.symmetry.units[number].size
        total: Tensor | None = None
        if by_weights > 0 and usable:  # In double precision at once: what is large takes long to fill with zeros.
            similarity = self.similarities.of(number, usable, self.placing(number)).cpu()
            total = torch.empty(size, size, dtype=torch.float64).copy_(similarity).mul_(by_weights)
        if shown > 0:
            placed = self.placed(number).double().cpu() * (shown * self.weight(number))
            total = placed if total is None else total.add_(placed)
        total = torch.zeros(size, size, dtype=torch.float64) if total is None else total
        return total.numpy()

    def _by_signs(self, number: int, usable: list[Slices]) -> dict[signs.Parities, Scores]:
        """The scores of a class, by the signs on which they depend."""
        by_weights, shown = self.mix.weights_of(number), self.mix.activations.get(number, 0.0)
        size = self.symmetry.units[number].size
        total: dict[signs.Parities, Scores] = {}
        for parities, where in signs.by_parities(self.symmetry, number, usable).items():
            similarity = weights.similarity(self.a, self.b, where, self.scales)
            total[parities] = by_weights * similarity.double().cpu().numpy()
        if shown > 0:
            parities = signs.of_activations(self.symmetry, number)
            placed = shown * self.weight(number) * self.placed(number).double().cpu().numpy()
            total[parities] = total.get(parities, np.zeros((size, size))) + placed
        return total or {(0,) * len(self.symmetry.kinds[number].signs): np.zeros((size, size))}

    def stay(self, root: int) -> bool:
        """Whether it is certain that the units of a class are where they match best; see `Similarities.stay`."""
        tree = [n for n in descendants(self.symmetry, root) if n in self.symmetry.choices]
        where = self.slices[root] if tree == [root] else []
        mixed = root in self.matrices or root in self.flipped
        if not where or mixed or root in self.mix.activations or self.mix.weights <= 0:
            return False
        return self.similarities.stay(root, where, self.placing(root))

    def placing(self, number: int) -> Placing:
        """The units of a class as they are now."""
        blocks = self.symmetry.by_block(number) if number in self.matrices else None
        return Placing(self.b, self.images[number], self.stamps, blocks, self.matrices.get(number))

    def follow(self, step: Sequence[Ids], mixed: Iterable[int]) -> None:
        """Brings what is kept of the classes that a step has moved or mixed to where their units are now."""
        moved = {n for n in self.symmetry.choices if not np.array_equal(step[n], np.arange(len(step[n])))}
        for n in sorted(moved.union(mixed)):
            self.similarities.follow(n, self.placing(n))

    def take(self, step: Sequence[Ids]) -> None:
        """Moves the units of b."""
        moved = {n for n, image in enumerate(step) if not np.array_equal(image, np.arange(len(image)))}
        sources: dict[str, list[tuple[AxisLayout, Ids]]] = {}
        for axis in self.symmetry.layout:
            source = None if moved.isdisjoint(axis.classes) else axis.source(tuple(step))
            if source is not None:
                sources.setdefault(axis.parameter, []).append((axis, source))
        self.similarities.make_room({n: t for n, t in self.b.items() if n not in sources})
        self._stamp((name, axis.dim) for name, own in sources.items() for axis, _ in own)
        for name, own in sources.items():  # One at a time, so that the whole model is not there twice.
            tensor = self.b[name]
            for axis, source in own:
                tensor = move_axis(tensor, axis, source)
            self.b = self.b | {name: tensor}
            self.value = self.value | {name: self._match(name, self.b)}
        self.images = tuple(s[i] for s, i in zip(step, self.images, strict=True))
        for n in moved & self.matrices.keys():
            blocks = self.symmetry.by_block(n)
            number = np.empty(blocks.size, np.int64)
            number[blocks] = np.arange(len(blocks))[:, None]
            came = np.argsort(number[step[n][blocks[:, 0]]])
            self.matrices = self.matrices | {n: self.matrices[n][torch.from_numpy(came)]}
        for n in moved & self.flipped.keys():
            self.flipped = self.flipped | {n: self.flipped[n][:, torch.from_numpy(np.argsort(step[n]))]}
        self.agreed = self.agreed | {n: float(self.agreement(n).sum()) for n in moved & self.agreed.keys()}
        release_memory()

    def _stamp(self, axes: Iterable[tuple[str, int]]) -> None:
        self.stamps = {**self.stamps, **dict.fromkeys(axes, next(self._count))}

    def rotate(self, numbers: Iterable[int], usable: Mapping[int, list[Slices]]) -> None:
        """Mixes the units of some classes of b by the orthogonal matrices that fit those of a best, or gives them the
        signs that do.

        For each block this is the orthogonal factor of its scores (Procrustes), on vectors whose entries sum to zero
        where the mean must be kept, and among rotations where a plane is turned.
        """
        for n in numbers:
            axes: Sequence[Mixed | Scaled] = self.symmetry.mixed[n] or self.symmetry.scaled[n]
            before = {own.axis.parameter: self.b[own.axis.parameter] for own in axes}
            if n in self.flipped:
                factors = torch.ones_like(self.flipped[n])
                factors[: len(self.symmetry.kinds[n].signs)] = signs.chosen(self._by_signs(n, usable[n]))
                moved = Scaling(self.symmetry.scaled, {n: factors}).apply(before)
                self.flipped = self.flipped | {n: factors * self.flipped[n]}
            else:
                scores = torch.from_numpy(self.scores(n, usable[n]))
                steps = [nearest(scores[units][:, units], self.symmetry.kind(n)) for units in self.symmetry.by_block(n)]
                step = Basis(self.symmetry.mixed, {n: torch.stack(steps)})
                moved = step.apply(before)
                self.matrices = self.matrices | {n: step.matrices[n] @ self.matrices[n]}
            self.b = self.b | moved
            self._stamp((own.axis.parameter, own.axis.dim) for own in axes)
            self.value = self.value | {name: self._match(name, self.b) for name in moved}
            if n in self.agreed:
                self.agreed = self.agreed | {n: float(self.agreement(n).sum())}

    def improve(self, step: Sequence[Ids], mixed: Sequence[int] = ()) -> float:
        """Moves the units of b, and mixes those of some classes, if the objective rises by it.

        Returns:
            The objective afterwards.
        """
        before, known = self.objective(), (self.value, self.agreed, self.stamps)
        at = self.position if mixed else None  # It holds on to the parameters before the step.
        self.take(step)
        self.rotate(mixed, self.slices)
        after = self.objective()
        if rises(before, after):
            self.follow(step, mixed)
            return after
        if at is None:
            self.take(tuple(map(np.argsort, step)))
            self.value, self.agreed, self.stamps = known
        else:
            self.position = at
        return before

    @property
    def position(self) -> Position:
        """Where the units of b are, to come back to."""
        return self.b, self.images, self.matrices, self.flipped, self.value, self.agreed, self.stamps

    @position.setter
    def position(self, at: Position) -> None:
        self.b, self.images, self.matrices, self.flipped, self.value, self.agreed, self.stamps = at


def floats(symmetry: Symmetry, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that the group moves, at least in single precision."""
    names = {axis.parameter for axis in symmetry.layout}
    return {n: state[n].detach().float() if state[n].element_size() < 4 else state[n].detach() for n in sorted(names)}


def movable(symmetry: Symmetry, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that the group moves: in at least single precision where units are mixed or scaled, and else as
    they are, since they only change places."""
    changed: list[Sequence[Mixed | Scaled]] = [*symmetry.mixed, *symmetry.scaled]
    mixed = {own.axis.parameter for each in changed for own in each}
    names = sorted({axis.parameter for axis in symmetry.layout})
    return {n: weights.single(state[n].detach()) if n in mixed else state[n].detach() for n in names}


def nearest(scores: Tensor, kind: Kind) -> Tensor:
    """The orthogonal matrix R with the largest trace of `scores` times the transpose of R.

    Arguments:
        scores: shape (units, units), float64.
        kind: `Kind.CENTRED` for a matrix that keeps the vector of ones, `Kind.UNITARY` or `Kind.COMPLEX` for a rotation
            of a plane, which has two units.

    Example:
        >>> turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
        >>> torch.allclose(nearest(3 * turn, Kind.ORTHOGONAL), turn)
        True
    """
    if kind == Kind.CENTRED:
        frame = centred_frame(len(scores))
        return frame @ nearest(frame.T @ scores @ frame, Kind.ORTHOGONAL) @ frame.T + 1 / len(scores)
    if kind.turns:
        number = torch.complex(scores[0, 0] + scores[1, 1], scores[1, 0] - scores[0, 1])
        return plane(number / number.abs() if number != 0 else torch.ones_like(number))
    u, _, vh = torch.linalg.svd(scores)
    factor: Tensor = u @ vh
    return factor


def quality(problem: Problem) -> dict[str, dict[str, float]]:
    """Per class, the mean similarity of matched units in weight space and in activation space."""
    found: dict[str, dict[str, float]] = {}
    for n in problem.symmetry.choices:
        entry: dict[str, float] = {}
        if problem.slices[n]:
            dot = 0.0
            for s in problem.slices[n]:
                name = s.axis.parameter
                pieces = s.pieces(problem.a[name], problem.b[name])
                dot += sum(float((one * other).sum()) for one, other in pieces) * problem.scales[name]
            entry["weights"] = dot / (problem.weight(n) * problem.symmetry.units[n].size)
        if n in problem.correlation:
            entry["activations"] = float(problem.agreement(n).mean())
        found[problem.symmetry.names[n]] = entry
    return found
