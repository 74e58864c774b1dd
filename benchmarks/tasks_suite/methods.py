"""The methods that make one network of two.

A method that permutes says how: it gives the second parent in the units of the first, and the mean of the two is
its result. A method that does more gives its network itself. BatchNorm statistics are re-estimated by the
benchmark, for all methods alike. To add a method, add a line to `METHODS`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from torch import Tensor, nn

import fxmerge
from fxmerge.demo import average


@dataclass(frozen=True)
class Pair:
    """Two parents, batches of unlabelled inputs of both tasks, and a seed. No method changes it."""

    a: nn.Module
    b: nn.Module
    batches: list[Tensor]
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


def permuting(aligned: Callable[[Pair], nn.Module], *, published: bool = True) -> Method:
    """The mean of the first parent and of the second in the units of the first."""
    return Method(aligned=aligned, published=published)


def merging(*, published: bool = True, **options: object) -> Method:
    """What `fxmerge.merge` gives with some options."""
    return Method(lambda pair: (_merge(pair, options),), published=published)


def aligning(*, published: bool = True, **options: object) -> Method:
    """What `fxmerge.align` gives with some options, averaged."""
    return permuting(lambda pair: _align(pair, options), published=published)


def _merge(pair: Pair, options: dict[str, object]) -> nn.Module:
    merged = fxmerge.merge(pair.a, pair.b, pair.batches, seed=pair.seed, progress=False, **options)  # type: ignore[arg-type]
    return with_state_of(pair.a, merged)


def _align(pair: Pair, options: dict[str, object]) -> nn.Module:
    aligned = fxmerge.align(pair.b, pair.a, pair.batches, seed=pair.seed, progress=False, **options)  # type: ignore[arg-type]
    return with_state_of(pair.a, aligned)


def with_state_of(model: nn.Module, other: nn.Module) -> nn.Module:
    """A copy of a model with the parameters and buffers of another."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(other.state_dict())
    return twin


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
    **{name: aligning(alpha=alpha, published=alpha in (0, 0.5, 1)) for alpha, name in BY_ALPHA.items()},
    "ZipIt": merging(method="zip", alpha=0.0, budget=0.125, damping=0.3),
    "weight zip": merging(method="zip", alpha=1.0),
    "MuDSC zip": merging(method="zip", alpha=0.5),
    "align auto": aligning(alpha="auto", published=False),
    "zip auto": merging(method="zip", alpha="auto", published=False),
    "rebasin": permuting(_rebasin),
    DEFAULTS: Method(lambda pair: (_merge(pair, {}),), lambda pair: _align(pair, {})),
}


def available() -> list[str]:
    """The names of the methods whose packages are installed."""
    return [name for name in METHODS if name != "rebasin" or find_spec("rebasin")]
