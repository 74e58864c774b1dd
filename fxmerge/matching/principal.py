"""The directions of a class that count most, in one network or in several."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fxmerge.evidence import weights as parameters
from fxmerge.evidence.activations import Pair
from fxmerge.matching.balance import outer_products
from fxmerge.matching.mix import Mix
from fxmerge.matching.problem import Problem, floats
from fxmerge.program.double import in_double
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagation import Axis
from fxmerge.units.basis import Basis, Mixed, centred_frame
from fxmerge.units.kind import Kind

NOTHING = 1e-12
"""A direction is in no use if it has less than this share of the squared weights of the strongest one."""

AGREEMENT = 1e-3
"""What counts for directions of several models that lie at one place, as a share of their mean square: it decides where
activations do not."""

Used = Mapping[int, Sequence[int]]
"""For every class, how many of the first directions of each block are in use. A class that keeps the mean has one
direction fewer than units."""


def used_first(
    symmetry: Symmetry, states: Sequence[Mapping[str, Tensor]], numbers: Collection[int], consumed: Collection[Axis]
) -> tuple[Basis, Used]:
    """The change of basis after which the directions that are in use come first, and how many there are.

    Of an orthogonal class these are the directions that something writes. Of a general linear one they are those that
    something writes and something else reads.

    Arguments:
        symmetry: the group.
        states: parameters of the models, which are all in one basis.
        numbers: the classes.
        consumed: the parameter axes along which units are consumed.
    """
    matrices, used = {}, {}
    for n in numbers:
        kind = symmetry.kind(n)

        def reads(place: Mixed, linear: bool = kind == Kind.GENERAL_LINEAR) -> bool:
            return place.inverse if linear else (place.axis.parameter, place.axis.dim) in consumed

        names = {place.axis.parameter for place in symmetry.mixed[n]}
        wide = [{name: in_double(state[name].to("cpu")) for name in names} for state in states]
        sums = [outer_products(symmetry.mixed[n], state, reads) for state in wide]
        written, read = (_total(of_model.get(side) for of_model in sums) for side in (False, True))
        blocks, size = symmetry.by_block(n).shape
        turns = [(torch.eye(size, dtype=torch.float64), size)] * blocks
        if written is not None and kind != Kind.GENERAL_LINEAR:
            turns = [_written_first(block, kind) for block in written]
        elif written is not None and read is not None:
            turns = [_connected_first(*block) for block in zip(written, read, strict=True)]
        matrices[n], used[n] = torch.stack([turn for turn, _ in turns]), [count for _, count in turns]
    return Basis(symmetry.mixed, matrices), used


def _total(parts: Iterable[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return sum(known[1:], start=known[0]) if known else None


def _written_first(written: Tensor, kind: Kind) -> tuple[Tensor, int]:
    """The orthogonal matrix that brings directions that are written before others, and how many these are.

    Arguments:
        written: the outer products of what writes units, summed up: shape (units, units).
        kind: of the class. What keeps the mean acts on the directions of `centred_frame`.
    """
    if kind == Kind.CENTRED:
        frame = centred_frame(len(written))
        turn, count = _written_first(frame.T @ written @ frame, Kind.ORTHOGONAL)
        return _in_frame(turn, frame), count
    values, vectors = torch.linalg.eigh(written)
    count = int((values > NOTHING * values[-1]).sum())
    return (torch.eye(len(written), dtype=torch.float64) if count == len(written) else vectors.flip(1).T), count


def _connected_first(written: Tensor, read: Tensor) -> tuple[Tensor, int]:
    """The invertible matrix that brings directions that are both written and read before others, and how many these
    are; where there are others, the first are balanced (square-root method: Laub et al., 1987, doi
    10.1109/TAC.1987.1104549).

    Arguments:
        written, read: the outer products of what writes units and of what reads them, each summed up: shape
            (units, units).
    """
    writes, reads = _root(written), _root(read)
    u, values, vh = torch.linalg.svd(reads.T @ writes, full_matrices=False)
    count = int((values > NOTHING**0.5 * values.max()).sum()) if len(values) else 0
    if count == len(written):
        return torch.eye(len(written), dtype=torch.float64), count
    first = (reads @ u[:, :count] / values[:count].sqrt()).T
    back = writes @ vh[:count].T
    others = torch.linalg.qr(back, mode="complete")[0][:, count:]
    return torch.cat([first, others.T]), count


def _root(matrix: Tensor) -> Tensor:
    """A matrix of full column rank that is, times its transpose, a symmetric matrix without negative values."""
    values, vectors = torch.linalg.eigh(matrix)
    in_use = values > NOTHING * values[-1]
    root: Tensor = vectors[:, in_use] * values[in_use].sqrt()
    return root


def principal_basis(
    symmetry: Symmetry,
    states: Sequence[Mapping[str, Tensor]],
    correlations: Sequence[Mapping[int, Tensor]],
    used: Used,
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
        used: the classes, and how many directions of each block are in use. These come first already; they are sorted.
        alpha: weight of the weight-space similarity, in [0, 1]: one for all classes, or one for each by its number.
    """
    slices, still = parameters.slices(symmetry), symmetry.identity().images
    total: dict[int, Tensor] = {}
    for state, correlation in zip(states, correlations, strict=True):
        moved = floats(symmetry, state)
        scales = {name: parameters.scale(tensor, tensor) for name, tensor in moved.items()}
        problem = Problem(symmetry, moved, moved, correlation, Mix.of(alpha, correlation), still, scales, slices)
        for n in used:
            scores = torch.from_numpy(problem.scores(n, slices[n]))
            blocks = torch.stack([scores[units][:, units] for units in symmetry.by_block(n)])
            total[n] = total[n] + blocks if n in total else blocks
    matrices = {
        n: torch.stack([_sorted(*block, symmetry.kind(n)) for block in zip(scores, used[n], strict=True)])
        for n, scores in total.items()
    }
    return Basis(symmetry.mixed, matrices)


def _sorted(scores: Tensor, used: int, kind: Kind) -> Tensor:
    """The orthogonal matrix that brings the eigenvectors of symmetric scores, among the first directions, into the
    order of their eigenvalues; of what keeps the mean, among those of `centred_frame`."""
    if kind == Kind.CENTRED:
        frame = centred_frame(len(scores))
        return _in_frame(_sorted(frame.T @ scores @ frame, used, Kind.ORTHOGONAL), frame)
    among = scores[:used, :used]
    turn = torch.eye(len(scores), dtype=torch.float64)
    turn[:used, :used] = torch.linalg.eigh((among + among.T) / 2)[1].flip(1).T
    return turn


def _in_frame(turn: Tensor, frame: Tensor) -> Tensor:
    """A matrix that acts on vectors whose entries sum to zero, and leaves the mean."""
    whole: Tensor = frame @ turn @ frame.T + 1 / len(frame)
    return whole


def joint_directions(products: Mapping[Pair, Tensor], weights: Sequence[float], kind: Kind) -> list[Tensor]:
    """For every model, the matrix that takes its units into those directions of the units of all models side by side in
    which most of their activations is left.

    Let V_i be the rows of model i in the first eigenvectors V of all products, and w_i its weight. Then the matrix is
    V_iᵀ / √w_i, and the weighted mean of all models, each after its matrix, is the projection onto V of all units, each
    times √w_i. So a direction that two models share becomes one direction of the merged network, and a direction that
    one model has alone may keep one for itself. Directions in which activations are small are left out.
    Where all models agree, these are orthogonal matrices. This is the zip of ZipIt! (arXiv 2305.03053) with directions
    in place of units.

    Arguments:
        products: for all pairs of models, the first of which has no larger number, the mean products of the
            activations of all pairs of units.
        weights: of the models, all above zero.
        kind: of the class. What keeps the mean acts on the directions of `centred_frame`, and the mean is kept.

    Returns:
        Shape (units, units), float64, for every model. Their basis is that in which models change least on average.

    Example:
        >>> one, two = torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([4.0, 0.0]))
        >>> for matrix in joint_directions({(0, 0): one, (0, 1): two, (1, 1): two}, (0.5, 0.5), Kind.ORTHOGONAL):
        ...     print([[round(float(x), 2) + 0 for x in row] for row in matrix])
        [[1.0, 0.0], [0.0, 1.41]]
        [[1.0, 0.0], [0.0, 0.0]]
    """
    count, size = len(weights), len(products[0, 0])
    frame = centred_frame(size) if kind == Kind.CENTRED else torch.eye(size, dtype=torch.float64)
    width = frame.shape[1]
    roots = torch.tensor(weights, dtype=torch.float64).sqrt()
    shares = torch.outer(roots, roots)
    blocks = torch.zeros(count, width, count, width, dtype=torch.float64)
    whole = blocks.view(count * width, count * width)
    for (i, j), product in products.items():  # `eigh` reads the lower half only.
        blocks[j, :, i] = (frame.T @ product.to(frame) @ frame * shares[i, j]).T
    blocks.diagonal(dim1=1, dim2=3).add_(AGREEMENT * whole.trace() / width * shares[:, :, None])
    rows = torch.linalg.eigh(whole)[1][:, -width:].flip(1).view(count, width, width)
    u, _, vh = torch.linalg.svd((roots[:, None, None] * rows).sum(0))
    matrices = [frame @ (u @ vh @ own.T / root) @ frame.T for own, root in zip(rows, roots, strict=True)]
    return [matrix + 1 / size for matrix in matrices] if kind == Kind.CENTRED else matrices
