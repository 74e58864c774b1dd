"""The methods that make one network of two.

A method that permutes says how: it gives the second parent in the units of the first, and the mean of the two is
its result. A method that does more gives its network itself. BatchNorm statistics are re-estimated by the
benchmark, for all methods alike. To add a method, add a line to `METHODS`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import Align, Readout, Recipe, Repair, Run, Zip
from fxmerge.combine.average import average as pooled
from fxmerge.combine.batch_norm import batch_norm_statistics
from fxmerge.demo import recalibrated
from fxmerge.program.capture import capture_program
from fxmerge.program.run import Data, batch_inputs
from fxmerge.recipe import OWN
from fxmerge.refitting.course import Lesson
from fxmerge.refitting.outputs import standardized
from fxmerge.refitting.refit import refit
from fxmerge.units.unit_map import UnitMap


@dataclass(frozen=True)
class Pair:
    """Two parents, batches of unlabelled inputs of both tasks, the same inputs by task, and a seed. No method changes
    it."""

    a: nn.Module
    b: nn.Module
    batches: list[Tensor]
    apart: tuple[list[Tensor], list[Tensor]]
    seed: int


@dataclass(frozen=True)
class Method:
    """What is made of a pair.

    Attributes:
        networks: the result; the scores of several are averaged. None if it is the mean of the first parent
            and of `aligned`.
        aligned: the second parent in the units of the first; None for a method that does not permute.
        merges: whether the result is one new network, whose statistics are re-estimated.
        published: whether it is a method of others, to be compared with fxmerge's defaults.
    """

    networks: Callable[[Pair], tuple[nn.Module, ...]] | None = None
    aligned: Callable[[Pair], nn.Module] | None = None
    merges: bool = True
    published: bool = False


def average(a: nn.Module, b: nn.Module) -> nn.Module:
    """The network whose every parameter is the mean of the two."""
    twin, other = copy.deepcopy(a), b.state_dict()
    twin.load_state_dict(
        {name: (own + other[name]) / 2 if own.is_floating_point() else own for name, own in a.state_dict().items()}
    )
    return twin


def permuting(aligned: Callable[[Pair], nn.Module], *, published: bool = True) -> Method:
    """The mean of the first parent and of the second in the units of the first."""
    return Method(aligned=aligned, published=published)


def merging(recipe: Recipe, *, published: bool = True) -> Method:
    """What `fxmerge.merge` gives by a recipe."""
    return Method(lambda pair: (merged(pair, recipe),), published=published)


def aligning(part: Align, *, published: bool = True) -> Method:
    """What `fxmerge.align` gives by a recipe, averaged."""
    return permuting(lambda pair: _align(pair, part), published=published)


def merged(pair: Pair, recipe: Recipe, *, apart: bool = False) -> nn.Module:
    """What `fxmerge.merge` gives by a recipe, on one loader or on one for each parent."""
    how = Run(seed=pair.seed, progress=False)
    if apart:
        found = fxmerge.merge(pair.a, pair.b, recipe=recipe, loaders=pair.apart, run=how)
    else:
        found = fxmerge.merge(pair.a, pair.b, pair.batches, recipe, run=how)
    return with_state_of(pair.a, found)


def refitting(
    start: Callable[[Pair], nn.Module], *, apart: bool = False, standard: bool = False, only_last: bool = True
) -> Method:
    """A control: a network whose layers are fitted to both parents without any alignment."""

    def networks(pair: Pair) -> tuple[nn.Module, ...]:
        program = capture_program(pair.a, (pair.batches[0],), {})
        lessons = [Lesson(((x,), {}), (0.5, 0.5), 1.0) for x in pair.batches]
        if apart:
            shares = ((OWN + (1 - OWN) / 2, (1 - OWN) / 2), ((1 - OWN) / 2, OWN + (1 - OWN) / 2))
            lessons = [
                Lesson(((x,), {}), share, 0.5) for share, own in zip(shares, pair.apart, strict=True) for x in own
            ]
        parents: Sequence[dict[str, Tensor]] = [pair.a.state_dict(), pair.b.state_dict()]
        if standard:
            parents = standardized(program, parents, Data(pair.batches, batch_inputs(pair.a), progress=False))
        own = start(pair).state_dict()
        refitted = refit(program, parents, own, lessons, only_last=only_last, seed=pair.seed, progress=False)
        network = copy.deepcopy(pair.a)
        network.load_state_dict(refitted.state)
        return (network,)

    return Method(networks)


def _random(pair: Pair) -> nn.Module:
    """A network of the same architecture that has learnt nothing."""
    network = copy.deepcopy(pair.a)
    torch.manual_seed(pair.seed)
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return recalibrated(network, pair.batches)


def _align(pair: Pair, part: Align) -> nn.Module:
    aligned = fxmerge.align(pair.b, pair.a, pair.batches, Recipe(match=part), run=Run(seed=pair.seed, progress=False))
    return with_state_of(pair.a, aligned)


def with_state_of(model: nn.Module, other: nn.Module) -> nn.Module:
    """A copy of a model with the parameters and buffers of another."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(other.state_dict())
    return twin


def without_data(part: Align | Zip) -> Method:
    """What `fxmerge.merge` gives without data; nothing is estimated anew."""

    def networks(pair: Pair) -> tuple[nn.Module, ...]:
        how = Run(seed=pair.seed, progress=False)
        merged = fxmerge.merge(pair.a, pair.b, recipe=Recipe(match=part), example=pair.batches[0], run=how)
        return (with_state_of(pair.a, merged),)

    return Method(networks, merges=False)


def _pooled(pair: Pair) -> nn.Module:
    """The average after an alignment by weights, with BatchNorm statistics that are pooled."""
    aligned = fxmerge.align(pair.b, pair.a, example=pair.batches[0], run=Run(seed=pair.seed, progress=False))
    program = capture_program(pair.a, (pair.batches[0],), {})
    states = (pair.a.state_dict(), aligned.state_dict())
    network = copy.deepcopy(pair.a)
    network.load_state_dict(pooled(UnitMap.still(2), states, (0.5, 0.5), batch_norm_statistics(program)))
    return network


def _rebasin(pair: Pair) -> nn.Module:
    """The second parent as rebasin permutes it."""
    from rebasin import PermutationCoordinateDescent

    permuted = copy.deepcopy(pair.b)
    PermutationCoordinateDescent(copy.deepcopy(pair.a), permuted, pair.batches[0]).rebasin()
    return permuted


def result(method: Method, pair: Pair) -> tuple[tuple[nn.Module, ...], nn.Module | None]:
    """The networks that a method gives, and the aligned second parent if that is how they were made."""
    if method.networks is not None:
        return method.networks(pair), None
    if method.aligned is None:
        raise ValueError("A method has to give networks or to align.")
    aligned = method.aligned(pair)
    return (average(pair.a, aligned),), aligned


DEFAULTS = "fxmerge"
OWN_DATA = "fxmerge, own data"
STANDARDIZED = "fxmerge, standardized"
PLAIN = "plain average"
BY_ALPHA = {
    0.0: "activation align",
    0.25: "MuDSC align 0.25",
    0.5: "MuDSC align 0.5",
    0.75: "MuDSC align 0.75",
    1.0: "Git Re-Basin",
}
"""The methods that differ only in the weight of the weight-space similarity."""

METHODS: dict[str, Method] = {
    "parent A": Method(lambda pair: (pair.a,), merges=False),
    "parent B": Method(lambda pair: (pair.b,), merges=False),
    "ensemble": Method(lambda pair: (pair.a, pair.b), merges=False),
    PLAIN: permuting(lambda pair: pair.b, published=False),
    **{name: aligning(Align(alpha), published=alpha in (0, 0.5, 1)) for alpha, name in BY_ALPHA.items()},
    "ZipIt": merging(Recipe(match=Zip(alpha=0.0, budget=0.125, damping=0.3), fit=None)),
    "weight zip": merging(Recipe(match=Zip(alpha=1.0), fit=None)),
    "MuDSC zip": merging(Recipe(match=Zip(alpha=0.5, budget=1.0, damping=0.5), fit=None)),
    "rebasin": permuting(_rebasin),
    "align, cosine": aligning(Align(similarity="cosine"), published=False),
    "zip, cosine": merging(Recipe(match=Zip(similarity="cosine"), fit=None), published=False),
    "align, repaired": merging(Recipe(match=Align(), fit=Repair())),
    "zip, repaired": merging(Recipe(fit=Repair()), published=False),
    "align, no data": without_data(Align()),
    "align, no data, pooled": Method(lambda pair: (_pooled(pair),), merges=False),
    "zip, no data": without_data(Zip()),
    "parent, readout": refitting(lambda pair: pair.a),
    "random, readout": refitting(_random),
    "average, readout": merging(Recipe(fit=Readout()), published=False),
    "refit, not aligned": refitting(lambda pair: average(pair.a, pair.b), only_last=False),
    "refit, aligned": merging(Recipe(match=Align()), published=False),
    DEFAULTS: merging(Recipe(), published=False),
    "parent, readout, own data": refitting(lambda pair: pair.a, apart=True),
    "random, readout, own data": refitting(_random, apart=True),
    "average, readout, own data": Method(lambda pair: (merged(pair, Recipe(fit=Readout()), apart=True),)),
    "refit, not aligned, own data": refitting(lambda pair: average(pair.a, pair.b), apart=True, only_last=False),
    OWN_DATA: Method(lambda pair: (merged(pair, Recipe(), apart=True),)),
    "parent, readout, standardized": refitting(lambda pair: pair.a, standard=True),
    "average, readout, standardized": merging(Recipe(fit=Readout(), targets="standardized"), published=False),
    "refit, not aligned, standardized": refitting(lambda pair: average(pair.a, pair.b), standard=True, only_last=False),
    STANDARDIZED: merging(Recipe(targets="standardized"), published=False),
}


SEARCHES = tuple(
    f"{method}, {name}" if name else base
    for method, base in (("align", BY_ALPHA[0.5]), ("zip", "MuDSC zip"))
    for name in ("", "cosine")
)
"""What is averaged after searches with activations compared by cosine, and by correlation."""

REPAIRS = (BY_ALPHA[0.5], "align, repaired", "MuDSC zip", "zip, repaired")
"""What is averaged, and the same with the means and deviations of the parents' units."""

NO_DATA = ("align, no data, pooled", "align, no data", BY_ALPHA[1.0], "zip, no data", "weight zip")
"""What is averaged by weights alone, and the same with BatchNorm estimated over data."""

REFITS = (
    *("parent, readout", "random, readout", "average, readout"),
    *("refit, not aligned", "refit, aligned", DEFAULTS),
)
"""What is refitted on one set of data for both parents: controls, and fxmerge."""
APART = tuple(name for name in METHODS if name.endswith("own data"))
"""What is refitted on data of each parent's own."""
STANDARD = tuple(name for name in METHODS if name.endswith("standardized"))
"""What is refitted to outputs of mean zero and equal deviation."""


WEIGHTED: dict[str, Recipe] = {"MuDSC zip": Recipe(fit=None), DEFAULTS: Recipe(), OWN_DATA: Recipe()}
"""The methods that are also tried with parents that count unequally, and their recipes."""


def available() -> list[str]:
    """The names of the methods whose packages are installed."""
    return [name for name in METHODS if name != "rebasin" or find_spec("rebasin")]
