"""The search for the permutation of one model's units that best matches another's: coordinate descent over classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fxmerge.evidence import weights
from fxmerge.evidence.weights import Similarities, Slices
from fxmerge.matching import signs
from fxmerge.matching.assignment import Scores, descendants, propose
from fxmerge.matching.descent import descend, rises
from fxmerge.matching.mix import Mix
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.units import Ids
from fxmerge.units.basis import Basis, Mixed, centred_frame, plane
from fxmerge.units.kind import Kind
from fxmerge.units.layout import move_axis
from fxmerge.units.permutation import Permutation
from fxmerge.units.scaling import Scaled, Scaling


@dataclass(frozen=True)
class Match:
    """An element of the group that re-expresses a model in the units of another, and how it was found.

    Attributes:
        permutation: to be applied to the matched model.
        basis: to be applied after it: the change of basis of the classes whose units may be mixed.
        scaling: to be applied at last: the signs of the units of other classes.
        trace: the objective at the start and after every accepted step; it never falls.
        quality: per class, the mean similarity of matched units in weight space (cosine of their
            slices) and in activation space (correlation), where these are known.
    """

    permutation: Permutation
    basis: Basis
    scaling: Scaling
    trace: tuple[float, ...]
    quality: Mapping[str, Mapping[str, float]]


Position = tuple[
    dict[str, Tensor], tuple[Ids, ...], dict[int, Tensor], dict[int, Tensor], dict[str, float], dict[int, float]
]
"""The moved parameters of a problem, where units are, how they are mixed, their signs, and what parameters and
activations give to the objective."""


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
    similarities: Similarities = field(init=False)

    def __post_init__(self) -> None:
        self.similarities = Similarities(self.a, self.scales)
        self.matrices = dict(self.symmetry.identity_basis().matrices)
        self.flipped = {
            n: f for n, f in self.symmetry.identity_scaling().factors.items() if self.symmetry.kinds[n].signs
        }
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
        by_weights, shown = self.mix.weights_of(number), self.mix.activations.get(number, 0.0)
        size = self.symmetry.units[number].size
        if number in self.flipped:
            return signs.best(self._by_signs(number, usable, self.symmetry.units[number].size))
        total = np.zeros((size, size))
        if by_weights > 0 and usable:
            similarity = self.similarities.of(number, self.b, usable, self.images[number])
            total += by_weights * similarity.double().cpu().numpy()
        if shown > 0:
            total += shown * self.weight(number) * self.placed(number).double().cpu().numpy()
        return total

    def _by_signs(self, number: int, usable: list[Slices], size: int) -> dict[signs.Parities, Scores]:
        """The scores of a class, by the signs on which they depend."""
        by_weights, by_activations = self.mix.weights_of(number), self.mix.activations.get(number, 0.0)
        total: dict[signs.Parities, Scores] = {}
        for parities, where in signs.by_parities(self.symmetry, number, usable).items():
            similarity = weights.similarity(self.a, self.b, where, self.scales)
            total[parities] = by_weights * similarity.double().cpu().numpy()
        if by_activations > 0:
            parities = signs.of_activations(self.symmetry, number)
            placed = by_activations * self.weight(number) * self.placed(number).double().cpu().numpy()
            total[parities] = total.get(parities, np.zeros((size, size))) + placed
        return total or {(0,) * len(self.symmetry.kinds[number].signs): np.zeros((size, size))}

    def take(self, step: Sequence[Ids]) -> None:
        """Moves the units of b."""
        moved = {n for n, image in enumerate(step) if not np.array_equal(image, np.arange(len(image)))}
        b: dict[str, Tensor] = {}
        for axis in self.symmetry.layout:
            if any(n in moved for n, _ in axis.roles):
                source = axis.source(tuple(step))
                if source is not None:
                    b[axis.parameter] = move_axis(b.get(axis.parameter, self.b[axis.parameter]), axis, source)
        self.value = self.value | {name: self._match(name, b) for name in b}
        self.b = self.b | b
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
                scores_by_signs = self._by_signs(n, usable[n], self.symmetry.units[n].size)
                factors = torch.ones_like(self.flipped[n])
                factors[: len(self.symmetry.kinds[n].signs)] = signs.chosen(scores_by_signs)
                moved = Scaling(self.symmetry.scaled, {n: factors}).apply(before)
                self.flipped = self.flipped | {n: factors * self.flipped[n]}
            else:
                scores = torch.from_numpy(self.scores(n, usable[n]))
                steps = [nearest(scores[units][:, units], self.symmetry.kind(n)) for units in self.symmetry.by_block(n)]
                step = Basis(self.symmetry.mixed, {n: torch.stack(steps)})
                moved = step.apply(before)
                self.matrices = self.matrices | {n: step.matrices[n] @ self.matrices[n]}
            self.b = self.b | moved
            self.value = self.value | {name: self._match(name, self.b) for name in moved}
            if n in self.agreed:
                self.agreed = self.agreed | {n: float(self.agreement(n).sum())}

    def improve(self, step: Sequence[Ids], mixed: Iterable[int] = ()) -> float:
        """Moves the units of b, and mixes those of some classes, if the objective rises by it.

        Returns:
            The objective afterwards.
        """
        before, at = self.objective(), self.position
        self.take(step)
        self.rotate(mixed, self.slices)
        after = self.objective()
        if rises(before, after):
            return after
        self.position = at
        return before

    @property
    def position(self) -> Position:
        """Where the units of b are, to come back to."""
        return self.b, self.images, self.matrices, self.flipped, self.value, self.agreed

    @position.setter
    def position(self, at: Position) -> None:
        self.b, self.images, self.matrices, self.flipped, self.value, self.agreed = at


def match(
    symmetry: Symmetry,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    correlation: Mapping[int, Tensor],
    *,
    alpha: float | Mapping[int, float],
    continuous: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Match:
    """Finds the element of the group that makes b most similar to a.

    With alpha = 1 this is weight matching (Git Re-Basin, arXiv 2209.04836, algorithm 1), with
    alpha = 0 activation matching; between, the dual space of MuDSC (arXiv 2403.01753, equation 5).

    Arguments:
        symmetry: the group to search.
        a: parameters of the model whose units are taken as they are.
        b: parameters of the model to permute.
        correlation: for some classes, the correlations of the units' activations, (units of a, units of b).
        alpha: weight of the weight-space similarity, in [0, 1]: one for all classes, or one for each by its number.
        continuous: whether units are mixed by orthogonal matrices where their kind allows that, and others have signs;
            `correlation` then holds covariances of the former classes. Else units are only permuted.
        seed: seed of the random order.
        progress: whether to show a progress bar; None shows it on a terminal.
    """
    symmetry = symmetry if continuous else replace(symmetry, kinds=())
    a, b = floats(symmetry, a), floats(symmetry, b)
    scales = {name: weights.scale(a[name], b[name]) for name in a}
    start, slices = symmetry.identity().images, weights.slices(symmetry)
    problem = Problem(symmetry, a, b, correlation, Mix.of(alpha, correlation), start, scales, slices)
    trace = search(problem, seed=seed, progress=progress)
    basis = Basis(symmetry.mixed, problem.matrices)
    scaling = Scaling(symmetry.scaled, problem.flipped)
    return Match(Permutation(symmetry.layout, problem.images), basis, scaling, trace, quality(problem))


def search(problem: Problem, *, seed: int = 0, progress: bool | None = None) -> tuple[float, ...]:
    """Moves the units of a problem's model b to where it is most similar to a.

    The first sweep visits the classes in the order in which evidence reaches them: a class is matched
    by those of its slices whose other axes are pinned or matched already. From there, or from where b
    was where that is no worse, coordinate descent in random order goes on until no step
    helps by more than `TOLERANCE`.

    Returns:
        The objective at the start and after every accepted step; it never falls.
    """
    start, at_start = problem.position, problem.objective()
    roots = [n for n, c in enumerate(problem.symmetry.units) if not c.parents]
    with tqdm(total=None, desc="matching", disable=None if progress is None else not progress, leave=False) as bar:
        _first_sweep(problem, roots, bar)
        # Units that are alike in a, such as dead ones, may trade places at no gain; they stay where they are.
        if not rises(at_start, problem.objective()):
            problem.position = start
        return descend(
            roots,
            problem.objective(),
            lambda root: problem.improve(_best(problem, root, problem.slices), _mixed(problem, root)),
            _neighbours(problem, roots).__getitem__,
            np.random.default_rng(seed),
            bar,
        )


def floats(symmetry: Symmetry, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that the group moves, at least in single precision."""
    names = {axis.parameter for axis in symmetry.layout}
    return {n: state[n].detach().float() if state[n].element_size() < 4 else state[n].detach() for n in sorted(names)}


def _best(problem: Problem, root: int, usable: Mapping[int, list[Slices]]) -> Sequence[Ids]:
    """The best move of a class and all that are nested in it, by the slices that are usable."""
    symmetry = problem.symmetry
    own = {n: problem.scores(n, usable[n]) for n in descendants(symmetry, root) if n in symmetry.choices}
    return propose(symmetry, root, own)


def _mixed(problem: Problem, root: int) -> list[int]:
    """The classes of a tree whose units may be mixed or have signs."""
    return [n for n in descendants(problem.symmetry, root) if n in problem.matrices or n in problem.flipped]


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


def _tree_slices(problem: Problem, root: int) -> list[tuple[int, Slices]]:
    tree = descendants(problem.symmetry, root)
    return [(n, s) for n in tree if n in problem.symmetry.choices for s in problem.slices[n]]


def _shown(s: Slices) -> int:
    """The class that lies where some slices do: that of their units, or one that moves along with it."""
    return next(n for n, slots in s.axis.roles if s.slots.flat[0] in slots)


def _roots_on(problem: Problem, roots: list[int]) -> dict[tuple[str, int], set[int]]:
    """For every parameter axis, the roots of the classes on it."""
    found: dict[tuple[str, int], set[int]] = {}
    above = {n: ({n} | problem.symmetry.ancestors(n)) & set(roots) for n in range(len(problem.symmetry.units))}
    for axis in problem.symmetry.layout:
        found[axis.parameter, axis.dim] = set().union(*(above[n] for n, _ in axis.roles))
    return found


def _neighbours(problem: Problem, roots: list[int]) -> dict[int, set[int]]:
    """For every root, the roots (itself included) whose scores change when it moves."""
    by_parameter: dict[str, set[int]] = {}
    for (name, _), on in _roots_on(problem, roots).items():
        by_parameter.setdefault(name, set()).update(on)
    return {r: set().union({r}, *(on for on in by_parameter.values() if r in on)) for r in roots}


def _first_sweep(problem: Problem, roots: list[int], bar: tqdm[None]) -> None:
    on_axis = _roots_on(problem, roots)
    others: dict[int, list[tuple[int, Slices, set[int]]]] = {}
    for root in roots:
        others[root] = []
        for n, s in _tree_slices(problem, root):
            name, dim = s.axis.parameter, s.axis.dim
            across: set[int] = set().union(*(on for (m, d), on in on_axis.items() if m == name and d != dim))
            beside = ({_shown(s)} | problem.symmetry.ancestors(_shown(s))) & set(roots)
            if any(_mixed(problem, r) for r in beside):  # In another basis the same units are not alike.
                across |= beside - {root}
            others[root].append((n, s, across))
    matched: set[int] = set()
    while len(matched) < len(roots):
        evidence = {
            r: sum(s.entries for _, s, across in others[r] if across <= matched) for r in roots if r not in matched
        }
        root = max(evidence, key=lambda r: (evidence[r], -r))
        usable: dict[int, list[Slices]] = {n: [] for n in problem.symmetry.choices}
        for n, s, across in others[root]:
            if across <= matched or not evidence[root]:
                usable[n].append(s)
        # What is not usable yet does not count against the move.
        problem.take(_best(problem, root, usable))
        problem.rotate(_mixed(problem, root), usable)
        matched.add(root)
        bar.update()


def quality(problem: Problem) -> dict[str, dict[str, float]]:
    """Per class, the mean similarity of matched units in weight space and in activation space."""
    found: dict[str, dict[str, float]] = {}
    for n in problem.symmetry.choices:
        entry: dict[str, float] = {}
        if problem.slices[n]:
            dot = 0.0
            for s in problem.slices[n]:
                name = s.axis.parameter
                dot += float((s.of(problem.a[name]) * s.of(problem.b[name])).sum()) * problem.scales[name]
            entry["weights"] = dot / (problem.weight(n) * problem.symmetry.units[n].size)
        if n in problem.correlation:
            entry["activations"] = float(problem.agreement(n).mean())
        found[problem.symmetry.names[n]] = entry
    return found
