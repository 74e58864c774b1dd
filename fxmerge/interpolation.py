"""How good the networks on the line between two networks are, before and after one is aligned to the other."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import nn

from fxmerge import html, validate
from fxmerge.api import align
from fxmerge.comparison import Distances, Score, checked_score, outputs_of, plain_average
from fxmerge.errors import OptionError
from fxmerge.job import Job, prepare, readable_again
from fxmerge.program.models import evaluating
from fxmerge.program.run import Inputs
from fxmerge.recipe import Align, Recipe, Run
from fxmerge.validate import Model

DISTANCE = "distance to the ensemble, as a share of its variance"
SCORE = "score"


@dataclass(frozen=True)
class Interpolation:
    """Networks on the line between two networks. `str(interpolation)` shows the table.

    Attributes:
        fractions: how far each network is on the way from the first one, 0, to the second one, 1.
        before: the figure of each network, with the units of both parents as they are.
        after: the same with the units of the second one aligned to those of the first.
        what: what the figures are.
        seconds: what it took, the alignment included.
    """

    fractions: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    what: str
    seconds: float

    def __str__(self) -> str:
        rows = [
            f"{t:8.3f}  {b:7.4f}  {a:7.4f}" for t, b, a in zip(self.fractions, self.before, self.after, strict=True)
        ]
        return "\n".join([self.what, "fraction   before    after", *rows])

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        rows = [
            (f"{t:.3f}", f"{b:.4f}", f"{a:.4f}")
            for t, b, a in zip(self.fractions, self.before, self.after, strict=True)
        ]
        return html.table(self.what, ("fraction", "before", "after"), rows)


def interpolate(
    a: Model,
    b: Model,
    loader: Iterable[Any],
    recipe: Recipe | None = None,
    *,
    points: int = 9,
    score: Score | None = None,
    inputs: Inputs | None = None,
    run: Run | None = None,
) -> Interpolation:
    """Measures networks on the line between two, before and after alignment (linear mode connectivity).

    A network on the line has the weighted mean of both parents' parameters. If its normalization layers keep running
    statistics, these are measured anew on the data, for the parents too. Nothing is fitted. Where the second parent is
    aligned to the first, the line between them is usually much flatter (Git Re-Basin, arXiv 2209.04836).

    It costs an alignment, as `align` does, and for every network on the lines four passes of a network over the
    loader: with 9 points there are 16 such networks. With a score there is one pass, and what the score takes.

    Arguments:
        a: the network at 0.
        b: the network at 1, of the same architecture.
        loader: data, as for `merge`; labels are not used.
        recipe: how to match, as for `align`; by permutations only.
        points: how many networks to measure on each line, both parents included.
        score: how good a network is, such as its accuracy on validation data, in place of the distance to the ensemble.
        inputs: as for `merge`.
        run: as for `merge`.

    Raises:
        ArchitectureMismatchError: if the networks are not equal all through.
        LoaderError: if the loader is empty or its batches do not fit.
        OptionError: if an argument is out of range, or the score is no number.

    Example:
        >>> import fxmerge
        >>> def mlp():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x, a, b = torch.randn(64, 4), mlp(), mlp()
        >>> shuffled = fxmerge.find_symmetry(a, (x,)).sample_permutation()
        >>> b.load_state_dict(shuffled.apply(a.state_dict()))  # the same function, in units of another order
        <All keys matched successfully>
        >>> line = fxmerge.interpolate(a, b, [x], points=3)
        >>> line.fractions, line.before[1] > 0.01, max(line.after) < 1e-6
        ((0.0, 0.5, 1.0), True, True)
    """
    if not isinstance(points, int) or points < 2:
        raise OptionError(
            f"points is {points!r}; it must be a whole number from 2 on, since both parents are measured."
        )
    if score is not None and not callable(score):
        raise OptionError(f"score is {score!r}; it must be a function that takes a network and gives a number.")
    if recipe is not None and isinstance(recipe.match, Align) and recipe.match.continuous:
        raise OptionError(
            "Align.continuous is set, and a change of basis leaves no line to the first network as it is: pass "
            "Align(continuous=False), which moves whole units."
        )
    _, run = validate.check_recipe(None, run)
    validate.check_loader(loader)
    began = time.perf_counter()
    loader = readable_again(loader)
    aligned = align(b, a, loader, recipe, inputs=inputs, run=run)
    job = prepare((a, b), loader, run, inputs=inputs)
    in_units_of_a = {name: tensor for name, tensor in aligned.state_dict().items() if name in job.states[1]}
    moved = replace(job, states=(job.states[0], job.states[1] | in_units_of_a))
    fractions = [i / (points - 1) for i in range(points)]
    ends = [_measured(job, t, score) for t in (0.0, 1.0)]
    lines = [[ends[0], *(_measured(own, t, score) for t in fractions[1:-1]), ends[1]] for own in (job, moved)]
    before, after = (tuple(line) for line in lines)
    what = DISTANCE if score is None else SCORE
    return Interpolation(tuple(fractions), before, after, what, time.perf_counter() - began)


def _measured(job: Job, fraction: float, score: Score | None) -> float:
    """The figure of the network at a fraction of the way from the first model to the second."""
    assert job.data is not None
    network = plain_average(job, (1 - fraction, fraction), job.data)
    if score is not None:
        with evaluating(network):
            return checked_score(score, network, f"the network at {fraction:.3g}")
    parents = [plain_average(job, shares, None) for shares in ((1.0, 0.0), (0.0, 1.0))]
    return _distance(job, network, parents)


def _distance(job: Job, network: nn.Module, parents: Sequence[nn.Module]) -> float:
    """The distance of a network to the mean of the parents' outputs, as `compare` has it."""
    assert job.data is not None
    distances = Distances()
    with ExitStack() as stack:
        for one in (network, *parents):
            stack.enter_context(evaluating(one))
        for args, kwargs in job.data.batches("measuring"):
            each = zip(*(outputs_of(parent, args, kwargs) for parent in parents), strict=True)
            means = [reduce(torch.add, own) / len(parents) for own in each]
            distances.add([outputs_of(network, args, kwargs)], means)
    return distances.of(0)[0]
