"""Activation space: streaming similarity of several models' units on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from fxmerge.errors import LoaderError, NonFiniteError
from fxmerge.evidence.moments import TINY, Moments
from fxmerge.evidence.running import RunningStatistics
from fxmerge.evidence.weights import real
from fxmerge.processes import ALONE, Processes
from fxmerge.program.captured import Program
from fxmerge.program.run import Data, Recorder
from fxmerge.recipe import Similarity
from fxmerge.symmetry import rules
from fxmerge.symmetry.columns import core, support
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagation import Propagation
from fxmerge.symmetry.shown import once, places_of

MAX_ROWS, MAX_ENTRIES = 4096, 2**20
"""Rows (samples times places) and entries (rows times units) taken of one activation in one batch; rows above
that are subsampled evenly, so that the statistics of a class of n units cost at most n * 2**20 multiplications."""


@dataclass(frozen=True)
class Tap:
    """An activation that a contraction consumes, and where it shows the units of one class.

    Attributes:
        node: the graph node that computes it.
        number: the class.
        dims: the dimensions along which the units lie.
        sizes: how many positions of each of these show the units once; along a dimension that is longer, they repeat.
        order: for every unit, its positions among these, flattened; shape (units, places per unit).
    """

    node: fx.Node
    number: int
    dims: tuple[int, ...]
    sizes: tuple[int, ...]
    order: Tensor


def find_taps(found: Propagation, symmetry: Symmetry) -> list[Tap]:
    """All activations that carry a class's units where a contraction consumes them."""
    number, place = places_of(found, symmetry)
    taps = []
    for node in _consumed(found.program):
        labels = found.labels.get(node.name)
        for column in labels.columns if labels is not None else ():
            dims = support(column)
            own = once(core(column, dims), [node.meta["val"].shape[d] for d in dims])
            if own is None:
                continue
            ids = own.reshape(-1).numpy()
            for n in np.unique(number[ids[number[ids] >= 0]]):
                at = np.flatnonzero(number[ids] == n)
                size = symmetry.units[n].size
                if len(at) % size or not np.array_equal(np.unique(place[ids[at]]), np.arange(size)):
                    continue
                order = at[np.argsort(place[ids[at]], kind="stable")].reshape(size, -1)
                for owner, views in symmetry.views.items():
                    for shown, units in views:
                        if shown == n:
                            where = torch.from_numpy(order[units].reshape(len(units), -1))
                            taps.append(Tap(node, owner, dims, tuple(own.shape), where))
    return taps


def _consumed(program: Program) -> list[fx.Node]:
    """The activations that contractions multiply, each once, in graph order."""
    nodes = program.graph.graph.nodes
    operands = {a for n in nodes for a in rules.multiplied(n) if a.op == "call_function"}
    return [n for n in nodes if n in operands and n not in program.sized]


Pair = tuple[int, int]


class _Correlations:
    """Sums over rows of one class's units in several models, in units of the deviations seen in the first batch; of a
    class whose units are mixed, in one unit for all of them."""

    def __init__(self, models: int, pairs: Sequence[Pair]) -> None:
        self.moments = [Moments()] * models
        self.products: dict[Pair, Tensor | float] = dict.fromkeys(pairs, 0.0)

    def add(self, rows: Sequence[Tensor]) -> None:
        self.moments = [own + Moments.of(x) for own, x in zip(self.moments, rows, strict=True)]
        for i, j in self.products:
            self.products[i, j] = (rows[i].T @ rows[j]).double().add_(self.products[i, j])

    def total(self, processes: Processes) -> None:
        """Makes these the sums over the rows of all processes."""
        self.moments, self.products = processes.total("activations", (self.moments, self.products))

    def covariances(self, kind: Similarity) -> dict[Pair, Tensor]:
        """The covariances of all pairs of units, or mean products for "cosine", in units of the mean variance of each
        model."""
        means, sizes = [], []
        for own in self.moments:
            centred = kind != "cosine"
            means.append(own.mean if centred else torch.zeros_like(own.mean))
            squares = own.variance if centred else torch.as_tensor(own.squares) / own.count
            sizes.append(max(float(squares.mean()), TINY) ** 0.5)
        found = {}
        for (i, j), products in self.products.items():
            covariance = torch.as_tensor(products) / self.moments[i].rows - torch.outer(means[i], means[j])
            found[i, j] = (covariance / (sizes[i] * sizes[j])).float()
        return found

    def similarities(self, kind: Similarity) -> dict[Pair, Tensor]:
        shift, scale = [], []
        for own in self.moments:
            centred = kind != "cosine"
            shift.append(own.mean if centred else torch.zeros_like(own.mean))
            size = own.deviation if centred else (torch.as_tensor(own.squares) / own.count).sqrt()
            # A unit that never varies is similar to nothing.
            scale.append(torch.where(size > 1e-6, 1 / size, torch.zeros_like(size)))
        found = {}
        for (i, j), products in self.products.items():
            centred_products = torch.as_tensor(products).div_(self.moments[i].rows).addr_(shift[i], shift[j], alpha=-1)
            found[i, j] = centred_products.mul_(scale[i][:, None]).mul_(scale[j]).float()
        return found


def _first_of_all(
    taps: Sequence[Tap],
    seen: Sequence[Mapping[fx.Node, Any]],
    names: Sequence[str],
    kind: Similarity,
    mixed: Collection[int],
) -> list[list[tuple[Tensor, Tensor]]]:
    """For every tap and model, by what it shows on the first batch: see `_first`."""
    return [[_first(x, kind, mixed=tap.number in mixed) for x in _all_rows(tap, seen, names)] for tap in taps]


def _first(x: Tensor, kind: Similarity, *, mixed: bool) -> tuple[Tensor, Tensor]:
    """What is subtracted from an activation's units, and what they are multiplied with, so that all activations of a
    class count alike; by the first batch."""
    if mixed:
        shift = torch.zeros_like(x[0]) if kind == "cosine" else x.mean(dim=0)
        return shift, 1 / (x - shift).square().mean().sqrt().clamp(min=1e-6)
    shift = torch.zeros_like(x[0]) if kind == "cosine" else x.mean(dim=0)
    size = (x - shift).square().mean(dim=0).sqrt()
    varies = size > 1e-6
    # Units that do not vary yet may do so later, on data of another kind.
    usual = size[varies].mean() if varies.any() else size.new_ones(())
    return shift, 1 / torch.where(varies, size, usual)


def similarities(
    found: Propagation,
    symmetry: Symmetry,
    models: Sequence[Mapping[str, Tensor]],
    data: Data,
    names: Sequence[str],
    pairs: Sequence[Pair],
    kind: Similarity = "pearson",
    own: Collection[str] = (),
    mixed: Collection[int] = (),
    running: RunningStatistics | None = None,
    processes: Processes = ALONE,
) -> dict[int, dict[Pair, Tensor]]:
    """Similarity of all pairs of units of some pairs of models, for every class that an activation shows.

    Every activation is standardised by its units' means and deviations on the first batch and then
    counts alike. Memory does not depend on the number of batches: the product sums of each class and pair.

    Arguments:
        found: the labelled program.
        symmetry: its classes.
        models: state dicts.
        data: calibration batches.
        names: what to call the models in errors.
        pairs: the numbers of the models to compare; a model may be compared with itself.
        kind: "pearson" correlation, or "cosine", without subtracting the means.
        own: names of parameters that are of one model alone. What depends on these is not compared.
        mixed: classes whose units may be mixed. These are compared by covariances, with one unit of measurement for all
            units of a model, since a change of basis keeps neither the mean nor the deviation of a single unit.
        running: gathers what the models normalize by running statistics meanwhile.
        processes: those that share the data.

    Returns:
        For each class number and pair a tensor of shape (units, units), rows for the first model; in [-1, 1], but for
        the covariances of mixed classes.

    Raises:
        LoaderError: if the loader is empty.
        NonFiniteError: if an activation is NaN or infinite.
    """
    apart = found.program.depending_on(own)
    taps = [tap for tap in find_taps(found, symmetry) if tap.node not in apart]
    tapped = {tap.node for tap in taps}
    at: tuple[int, int | None] = (0, None)

    def kept(node: fx.Node, value: Any) -> Any:
        if running is not None:
            running.take(*at, node, value)
        return value if node in tapped else None

    runner = Recorder(found.program, tapped if running is None else tapped.union(running.names), kept)
    first: list[list[tuple[Tensor, Tensor]]] | None = None
    sums = {tap.number: _Correlations(len(models), pairs) for tap in taps}
    batches = 0
    for number, (owner, (args, kwargs)) in enumerate(data.owned("activations")):
        batches += 1
        if not processes.owns(number):
            continue
        seen = []
        for m, state in enumerate(models):
            runner.seen, at = {}, (m, owner)
            runner.call(state, args, kwargs)
            seen.append(runner.seen)
        if first is None:
            first = processes.once("the first batch", partial(_first_of_all, taps, seen, names, kind, mixed))
        for tap, measured in zip(taps, first, strict=True):
            rows = _all_rows(tap, seen, names)
            sums[tap.number].add([(x - shift) * scale for x, (shift, scale) in zip(rows, measured, strict=True)])
    if not batches:
        raise LoaderError("The loader is empty: it gave no batch. Pass an iterable that can be iterated several times.")
    if first is None:  # The share of this process is empty.
        processes.once("the first batch", list)
    for one in (*sums.values(), *(() if running is None else [running])):
        one.total(processes)
    return {n: m.covariances(kind) if n in mixed else m.similarities(kind) for n, m in sums.items()}


def whole(blocks: Mapping[Pair, Tensor], models: int) -> NDArray[np.float32]:
    """One matrix over the units of all models, model after model, from its blocks on and above the diagonal."""
    rows = [
        torch.cat([blocks[i, j] if i <= j else blocks[j, i].T for j in range(models)], dim=1) for i in range(models)
    ]
    matrix: NDArray[np.float32] = torch.cat(rows).float().cpu().numpy()
    return matrix


def _all_rows(tap: Tap, seen: Sequence[Mapping[fx.Node, Any]], names: Sequence[str]) -> list[Tensor]:
    """What a tap shows of the activations of every model on a batch."""
    rows = [_rows(shown[tap.node], tap) for shown in seen]
    for x, name in zip(rows, names, strict=True):
        if not torch.isfinite(x).all():
            raise NonFiniteError(f"An activation of {name} is NaN or infinite at graph node {tap.node.name!r}.")
    return rows


def _rows(value: Tensor, tap: Tap) -> Tensor:
    """What a tap shows of an activation: shape (rows, units). Both parts of complex numbers are rows."""
    value = real(value)
    for d, size in reversed(list(zip(tap.dims, tap.sizes, strict=True))):
        value = value.unflatten(d, (-1, size))
    dims = [d + i + 1 for i, d in enumerate(tap.dims)]
    others = [d for d in range(value.ndim) if d not in dims]
    flat = value.permute(*others, *dims).reshape(math.prod(value.shape[d] for d in others), -1)
    limit = max(min(MAX_ROWS // tap.order.shape[1], MAX_ENTRIES // tap.order.numel()), 2)
    if len(flat) > limit:
        flat = flat[torch.linspace(0, len(flat) - 1, limit, device=flat.device).long()]
    shown = flat[:, tap.order.to(flat.device)]
    return shown.permute(0, 2, 1).reshape(-1, tap.order.shape[0]).float()
