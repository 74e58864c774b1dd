"""How near networks are to the ensemble of the models that they are made of."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxmerge import html, validate
from fxmerge.combine.average import average
from fxmerge.combine.batch_norm import batch_norm_statistics
from fxmerge.emit.bake import bake
from fxmerge.errors import ArchitectureMismatchError, LoaderError, OptionError
from fxmerge.evidence.moments import Moments
from fxmerge.job import Job, prepare, readable_again
from fxmerge.ordering import error_of, score_of
from fxmerge.program.capture import open_outputs
from fxmerge.program.models import copied, evaluating
from fxmerge.program.models import run as run_model
from fxmerge.program.run import Data, Inputs
from fxmerge.recipe import AUTO, Recipe, Run
from fxmerge.refitting.course import Lesson
from fxmerge.refitting.output_error import feature_rows
from fxmerge.refitting.refit import refit, with_statistics, written_out
from fxmerge.units.unit_map import UnitMap
from fxmerge.validate import Model

Score = Callable[[nn.Module], float | Tensor]
"""How good a network is: larger is better."""


@dataclass(frozen=True)
class Row:
    """One network of a comparison.

    Attributes:
        name: of the network.
        distance: the squared distance of its outputs to those of the ensemble, as a share of their variance; the
            mean over outputs.
        error: the standard error of the distance over batches; NaN for a single batch.
        score: what the score function gave; None without one.
    """

    name: str
    distance: float
    error: float
    score: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A table of networks beside the models that they are made of. `str(comparison)` shows it.

    Attributes:
        rows: the models, the models with a new readout if calibration data are given, their ensemble, their plain
            average, and the networks.
        networks: the networks by the names of their rows, all but the ensemble.

    Example:
        >>> table = Comparison((Row("merge", 0.1, 0.01, 0.9), Row("model A", 0.3, 0.02, 0.8)))
        >>> print(table)
        network  distance        score
        merge    0.1000 ± 0.010  0.900
        model A  0.3000 ± 0.020  0.800
        >>> table.best()
        'merge'
    """

    rows: tuple[Row, ...]
    networks: Mapping[str, nn.Module] = field(default_factory=dict, compare=False, repr=False)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise OptionError(f"There is no row {name!r}; there are {', '.join(repr(row.name) for row in self.rows)}.")

    def best(self) -> str:
        """The name of the network with the highest score, or without scores the one nearest to the ensemble."""
        rows = [row for row in self.rows if row.name != ENSEMBLE]
        if any(row.score is not None for row in rows):
            return max(rows, key=lambda row: score_of(math.nan if row.score is None else row.score)).name
        return min(rows, key=lambda row: error_of(row.distance)).name

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self._lines, strict=True)]
        table = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in self._lines]
        return "\n".join("  ".join(line).rstrip() for line in table)

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks."""
        head, *lines = self._lines
        return html.table("distance to the ensemble, as a share of its variance", head, lines)

    @property
    def _lines(self) -> list[tuple[str, ...]]:
        """The headings, and the cells of every row; without the scores if there are none."""
        scored = any(row.score is not None for row in self.rows)
        lines = [("network", "distance", "score")]
        for row in self.rows:
            within = "" if math.isnan(row.error) else f" ± {row.error:.3f}"
            lines.append((row.name, f"{row.distance:.4f}{within}", "-" if row.score is None else f"{row.score:.3f}"))
        return [line[: 3 if scored else 2] for line in lines]


ENSEMBLE = "ensemble"
PLAIN = "plain average"


def compare(
    networks: Mapping[str, nn.Module],
    models: Sequence[Model],
    loader: Iterable[Any],
    *,
    score: Score | None = None,
    calibration: Iterable[Any] | None = None,
    weights: Sequence[float] | None = None,
    share: str | float = AUTO,
    inputs: Inputs | None = None,
    run: Run | None = None,
) -> Comparison:
    """Compares networks with the models that they are made of.

    The distance of a network is that of its outputs to the mean of the models' outputs: the sum of squares, divided by
    that of the mean's distance to its own mean over all data, for every feature. It is 0 for the ensemble, and 1 for a
    network that gives the same outputs, the best ones, for all inputs. It needs no labels. It does not change if
    all models' outputs are shifted or scaled alike.

    Where models have heads of their own, the distance is that of every head's outputs to those of its own model, the
    mean over heads. There is no row for a model alone, since it has no head for the others' tasks; "model A, new
    readout" is then the trunk of model A with the last layers of all heads fitted, each to its own model's outputs.

    Arguments:
        networks: merged networks by name.
        models: the models that they are made of, or whose mean is of interest otherwise; one or more.
        loader: data that no network was fitted to, as for `merge`; labels are not used.
        score: how good a network is, larger for better, such as its accuracy on validation data. It is called with
            networks in eval mode, without gradients.
        calibration: the data that the networks were made with. On these, the models get a new readout: their last
            layers are fitted to the mean of all models' outputs, and nothing else. Without it, these rows are left out.
        weights: how much each model counts in the mean; None: all alike.
        share: what the models share, as in `Recipe.share`, where `networks` have heads of their own.
        inputs: turns a batch into (args, kwargs), where the default does not fit.
        run: device, memory, seed and progress.

    Returns:
        The table: `str(comparison)`, `comparison["name"].distance`, `comparison.best()`.

    Raises:
        ArchitectureMismatchError: if a network gives other outputs than the models.
        LoaderError: if the loader is empty or its batches do not fit.
        OptionError: if an argument is out of range, a name is taken, or the score is no number.

    Example:
        >>> import fxmerge
        >>> def mlp(seed):
        ...     torch.manual_seed(seed)
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> a, b = mlp(0), mlp(1)
        >>> x, new = torch.randn(64, 4), torch.randn(64, 4)
        >>> table = fxmerge.compare({"merge": fxmerge.merge(a, b, [x])}, [a, b], [new], calibration=[x])
        >>> [row.name for row in table.rows][:4]
        ['model A', 'model B', 'model A, new readout', 'model B, new readout']
        >>> table["merge"].distance < table["plain average"].distance
        True
    """
    _, run = validate.check_recipe(None, run)
    models = validate.check_models(models, "compare", 1)
    validate.check_loaders(loader, None, len(models))
    if calibration is not None:
        validate.check_loader(calibration)
        calibration = readable_again(calibration)
        if next(iter(calibration), None) is None:
            raise LoaderError("calibration is empty: it gave no batch. Pass the data that the networks were made with.")
    shares = validate.check_weights(weights, len(models))
    if score is not None and not callable(score):
        raise OptionError(f"score is {score!r}; it must be a function that takes a network and gives a number.")
    names = validate.names_of(len(models), None)
    readouts = [f"{name}, new readout" for name in names] if calibration is not None else []
    _check_networks(networks, [*names, *readouts, ENSEMBLE, PLAIN])
    job = prepare(models, loader, run, inputs=inputs, recipe=Recipe(share=share))
    assert job.data is not None
    parents = [bake(job.program, state) for state in job.states]
    rows: dict[str, nn.Module] = {} if job.heads else dict(zip(names, parents, strict=True))
    shown = len(rows)
    data = None if calibration is None else replace(job.data, loader=calibration)
    if data is not None:
        for j, name in enumerate(readouts):
            rows[name] = bake(job.program, _with_readout(job, data, j, shares, run))
    rows[PLAIN] = plain_average(job, shares, data)
    rows |= {name: _placed(network, run) for name, network in networks.items()}
    distances = Distances()
    with ExitStack() as stack:
        for network in [*parents, *rows.values()]:
            stack.enter_context(evaluating(network))
        for args, kwargs in job.data.batches("comparing"):
            if job.heads:
                means = [own for j, parent in enumerate(parents) for own in outputs_of(parent, args, kwargs, j)]
                given = [outputs_of(network, args, kwargs) for network in rows.values()]
            else:
                given = [outputs_of(network, args, kwargs) for network in rows.values()]
                each = zip(*given[:shown], strict=True)
                means = [reduce(torch.add, (s * v for s, v in zip(shares, own, strict=True))) for own in each]
            for name, own in zip(rows, given, strict=True):
                _check_shapes(name, own, means)
            distances.add(given, means)
        scored = [
            Row(name, *distances.of(i), None if score is None else checked_score(score, network, name))
            for i, (name, network) in enumerate(rows.items())
        ]
        ensemble = _Heads(parents) if job.heads else _Ensemble(parents, shares)
        together = None if score is None else checked_score(score, ensemble, ENSEMBLE)
    at = shown + len(readouts)
    return Comparison((*scored[:at], Row(ENSEMBLE, 0.0, 0.0, together), *scored[at:]), rows)


def _with_readout(job: Job, data: Data, number: int, shares: Sequence[float], run: Run) -> dict[str, Tensor]:
    """A model whose last layers are fitted to the mean of all models' outputs."""
    lessons = (Lesson(call, tuple(shares), 1.0) for call in data.batches("new readouts"))
    program = written_out(job.program)
    own = job.states[number]
    return refit(
        program,
        job.states,
        own,
        lessons,
        only_last=True,
        owner=job.owner,
        max_memory=run.memory,
        seed=run.seed,
        progress=run.progress,
    ).state


def plain_average(job: Job, shares: Sequence[float], data: Data | None) -> fx.GraphModule:
    """The mean of all parameters, nothing matched; BatchNorm statistics are those of calibration data if given."""
    statistics = batch_norm_statistics(job.program)
    special = {name: [float(j == number) for j in range(len(shares))] for name, number in job.owner.items()}
    state = average(UnitMap.still(len(job.states)), job.states, shares, statistics, special)
    if data is not None:
        lessons = (Lesson(call, (), 1.0) for call in data.batches("BatchNorm statistics"))
        state = with_statistics(job.program, state, lessons)
    return bake(job.program, state)


def _check_networks(networks: Mapping[str, nn.Module], taken: Sequence[str]) -> None:
    if not isinstance(networks, Mapping) or not all(isinstance(n, nn.Module) for n in networks.values()):
        raise OptionError("networks is no dict of networks by name; pass such as {'merge': merged}.")
    for name in networks:
        if name in taken:
            raise OptionError(f"A network is called {name!r}, which is a row of every comparison; give another name.")


class _Ensemble(nn.Module):
    """The weighted mean of the outputs of several networks."""

    def __init__(self, networks: Sequence[nn.Module], shares: Sequence[float]) -> None:
        super().__init__()
        self.networks, self.shares = nn.ModuleList(networks), tuple(shares)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first, *others = (network(*args, **kwargs) for network in self.networks)
        return pytree.tree_map(self._mean, first, *others)

    def _mean(self, *values: Any) -> Any:
        first = values[0]
        if not isinstance(first, Tensor) or not (first.is_floating_point() or first.is_complex()):
            return first
        return reduce(torch.add, (share * value for share, value in zip(self.shares, values, strict=True)))


class _Heads(nn.Module):
    """The outputs that each of several networks has for its own head."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(network(*args, **kwargs)[number] for number, network in enumerate(self.networks))


def _check_shapes(name: str, own: Sequence[Tensor], means: Sequence[Tensor]) -> None:
    if [v.shape for v in own] != [v.shape for v in means]:
        raise ArchitectureMismatchError(
            f"Network {name!r} gives outputs of shapes {[tuple(v.shape) for v in own]}, and the models of shapes "
            f"{[tuple(v.shape) for v in means]}. Compare networks with the models that they are made of; "
            "where equal heads were kept apart, pass share='trunk' here too."
        )


def _placed(network: nn.Module, run: Run) -> nn.Module:
    return network if run.device is None else copied(network).to(run.device)


def outputs_of(network: nn.Module, args: Any, kwargs: Mapping[str, Any], head: int | None = None) -> list[Tensor]:
    """The floating-point outputs of a network, or of one of its heads."""
    outputs = run_model(network, args, kwargs)
    open_outputs(network, outputs)
    outputs = outputs if head is None else outputs[head]
    return [
        v.detach()
        for v in pytree.tree_leaves(outputs)
        if isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex())
    ]


def checked_score(score: Score, network: nn.Module, name: str) -> float:
    """The score of a network, without gradients.

    Raises:
        OptionError: if it is no number.
    """
    with torch.no_grad():
        value = score(network)
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise OptionError(
            f"score gave {value!r} for {name!r}; it must give a number, larger for a better network."
        ) from error


class Distances:
    """Sums over batches from which follow the distances of several networks, and their standard errors."""

    def __init__(self) -> None:
        self.missed: list[list[list[float]]] = []  # By batch, output and network.
        self.sums: list[list[Moments]] = []  # By batch and output.

    def add(self, given: Sequence[Sequence[Tensor]], means: Sequence[Tensor]) -> None:
        """Takes in the outputs of all networks on a batch, and the mean of the models'."""
        missed, sums = [], []
        for i, mean in enumerate(means):
            finite = mean.isfinite()  # Scores of what is ruled out are infinite in all networks.
            sums.append(Moments.of(feature_rows(mean.where(finite, 0.0))))
            missed.append([float(feature_rows((own[i] - mean).where(finite, 0.0)).square().sum()) for own in given])
        self.missed.append(missed)
        self.sums.append(sums)

    def of(self, network: int) -> tuple[float, float]:
        """The distance of a network, and its standard error (that of a ratio of sums over batches)."""
        by_output = [self._ratio(i, network) for i in range(len(self.sums[0]))]
        varying = [(ratio, error) for ratio, error in by_output if not math.isnan(ratio)]
        if not varying:
            return math.nan, math.nan
        mean = sum(ratio for ratio, _ in varying) / len(varying)
        return mean, math.sqrt(sum(error**2 for _, error in varying)) / len(varying)

    def _ratio(self, output: int, network: int) -> tuple[float, float]:
        own = [batch[output] for batch in self.sums]
        centre = reduce(operator.add, own).mean
        variances = [m.square - float((2 * m.sums - m.count * centre) @ centre) for m in own]
        missed = [batch[output][network] for batch in self.missed]
        total = sum(variances)
        if not total > 0:
            return math.nan, math.nan
        ratio, count = sum(missed) / total, len(missed)
        if count < 2:
            return ratio, math.nan
        off = sum((m - ratio * v) ** 2 for m, v in zip(missed, variances, strict=True))
        return ratio, math.sqrt(off * count / (count - 1)) / total
