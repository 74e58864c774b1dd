"""The basis of a class whose first directions count most."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fxmerge.evidence import weights
from fxmerge.matching.mix import Mix
from fxmerge.matching.search import Problem, floats
from fxmerge.symmetry.group import Symmetry
from fxmerge.units.basis import Basis, centred_frame
from fxmerge.units.kind import Kind


def principal_basis(
    symmetry: Symmetry,
    states: Sequence[Mapping[str, Tensor]],
    correlations: Sequence[Mapping[int, Tensor]],
    numbers: Collection[int],
    *,
    alpha: float | Mapping[int, float],
) -> Basis:
    """The change of basis by orthogonal matrices after which the directions of classes come in the order of how much
    they count.

    What counts is the similarity by which models are matched, here of every model with itself: the inner products of
    the weights that give and read units, and those of their activations. Its first eigenvectors are the directions in
    which most of it is left. With alpha = 0 these are the principal components of SliceGPT (arXiv 2401.15024).

    Arguments:
        symmetry: the group.
        states: parameters of the models, which are all in one basis.
        correlations: for every model and some classes, the mean products of the activations of all pairs of units.
        numbers: the classes.
        alpha: weight of the weight-space similarity, in [0, 1]: one for all classes, or one for each by its number.
    """
    slices, still = weights.slices(symmetry), symmetry.identity().images
    total: dict[int, Tensor] = {}
    for state, correlation in zip(states, correlations, strict=True):
        own = floats(symmetry, state)
        scales = {name: weights.scale(tensor, tensor) for name, tensor in own.items()}
        problem = Problem(symmetry, own, own, correlation, Mix.of(alpha, correlation), still, scales, slices)
        for n in numbers:
            scores = torch.from_numpy(problem.scores(n, slices[n]))
            blocks = torch.stack([scores[units][:, units] for units in symmetry.by_block(n)])
            total[n] = total[n] + blocks if n in total else blocks
    matrices = {n: torch.stack([_sorted(block, symmetry.kind(n)) for block in own]) for n, own in total.items()}
    return Basis(symmetry.mixed, matrices)


def _sorted(scores: Tensor, kind: Kind) -> Tensor:
    """The orthogonal matrix that brings the eigenvectors of symmetric scores to the first directions, in the order of
    their eigenvalues; of what keeps the mean, to those of `centred_frame`."""
    if kind == Kind.CENTRED:
        frame = centred_frame(len(scores))
        return frame @ _sorted(frame.T @ scores @ frame, Kind.ORTHOGONAL) @ frame.T + 1 / len(scores)
    vectors: Tensor = torch.linalg.eigh((scores + scores.T) / 2)[1]
    return vectors.flip(1).T
