"""The search for the permutation of one model's units that best matches another's: coordinate descent over classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from fxmerge.evidence import weights
from fxmerge.evidence.weights import Slices
from fxmerge.matching.assignment import descendants, propose
from fxmerge.matching.descent import descend, rises
from fxmerge.matching.mix import Mix
from fxmerge.matching.problem import Problem, movable, quality
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.units import Ids
from fxmerge.units.basis import Basis
from fxmerge.units.permutation import Permutation
from fxmerge.units.scaling import Scaling


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
    a, b = movable(symmetry, a), movable(symmetry, b)
    scales = {name: weights.scale(a[name], b[name]) for name in a}
    start, slices = symmetry.identity().images, weights.slices(symmetry)
    problem = Problem(symmetry, a, b, correlation, Mix.of(alpha, correlation), start, scales, slices)
    trace = search(problem, seed=seed, progress=progress)
    basis = Basis(symmetry.mixed, problem.matrices)
    scaling = Scaling(symmetry.scaled, problem.flipped)
    return Match(Permutation(symmetry.layout, problem.images), basis, scaling, trace, quality(problem))


def search(problem: Problem, *, afresh: bool = True, seed: int = 0, progress: bool | None = None) -> tuple[float, ...]:
    """Moves the units of a problem's model b to where it is most similar to a.

    The first sweep visits the classes in the order in which evidence reaches them: a class is matched
    by those of its slices whose other axes are pinned or matched already. From there, or from where b
    was where that is no worse, coordinate descent in random order goes on until no step
    helps by more than `TOLERANCE`.

    Arguments:
        problem: the problem.
        afresh: whether there is a first sweep. Without one, the search goes on from where b is.
        seed: seed of the random order.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        The objective at the start and after every accepted step; it never falls.
    """
    start, at_start = problem.position, problem.objective()
    roots = [n for n, c in enumerate(problem.symmetry.units) if not c.parents]
    with tqdm(total=None, desc="matching", disable=None if progress is None else not progress, leave=False) as bar:
        seen = _first_sweep(problem, roots, bar) if afresh else {}
        # Units that are alike in a, such as dead ones, may trade places at no gain; they stay where they are.
        if afresh and not rises(at_start, problem.objective()):
            problem.position = start
            seen.clear()

        def step(root: int) -> float:
            inputs = _inputs(problem, root)
            if seen.get(root) == inputs or problem.stay(root):
                return problem.objective()
            seen[root] = inputs
            return problem.improve(_best(problem, root, problem.slices), _mixed(problem, root))

        return descend(
            roots,
            problem.objective(),
            step,
            _neighbours(problem, roots).__getitem__,
            np.random.default_rng(seed),
            bar,
        )


def _best(problem: Problem, root: int, usable: Mapping[int, list[Slices]]) -> Sequence[Ids]:
    """The best move of a class and all that are nested in it, by the slices that are usable."""
    symmetry = problem.symmetry
    own = {n: problem.scores(n, usable[n]) for n in descendants(symmetry, root) if n in symmetry.choices}
    return propose(symmetry, root, own)


def _mixed(problem: Problem, root: int) -> list[int]:
    """The classes of a tree whose units may be mixed or have signs."""
    return [n for n in descendants(problem.symmetry, root) if n in problem.matrices or n in problem.flipped]


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


def _inputs(problem: Problem, root: int) -> list[int | None]:
    """What the best move of a class and of all that are nested in it depends on, but for where their units are: the
    stamps of the axes along which the entries of their slices lie."""
    return [problem.stamps.get(axis) for _, s in _tree_slices(problem, root) for axis in s.across]


def _first_sweep(problem: Problem, roots: list[int], bar: tqdm[None]) -> dict[int, list[int | None]]:
    """Matches every class by the slices that are comparable already.

    Returns:
        For the classes that were matched by all of their slices, what they were matched by: see `_inputs`.
    """
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
    seen: dict[int, list[int | None]] = {}
    while len(matched) < len(roots):
        evidence = {
            r: sum(s.entries for _, s, across in others[r] if across <= matched) for r in roots if r not in matched
        }
        root = max(evidence, key=lambda r: (evidence[r], -r))
        usable: dict[int, list[Slices]] = {n: [] for n in problem.symmetry.choices}
        for n, s, across in others[root]:
            if across <= matched or not evidence[root]:
                usable[n].append(s)
        if sum(map(len, usable.values())) == len(others[root]):
            seen[root] = _inputs(problem, root)
        # What is not usable yet does not count against the move.
        step, mixed = _best(problem, root, usable), _mixed(problem, root)
        problem.take(step)
        problem.rotate(mixed, usable)
        problem.follow(step, mixed)
        matched.add(root)
        bar.update()
    return seen
