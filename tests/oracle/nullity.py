"""The dimension of the continuous symmetry of a tiny network: the nullity of its Jacobian.

A direction in parameter space leaves the function unchanged if the derivative of all outputs along it is zero, for all
inputs. So the dimension is the number of parameters less the rank of d outputs / d parameters, at random parameters,
over enough random inputs. In float64 the singular values fall by many orders of magnitude at the rank, so the count is
exact. `Nullity.gap` says by how much they fall.

Every redundancy counts, not only changes of basis. `tests/oracle/continuous_networks.py` lists them by name.

A redundancy that is nearly one makes the gap small. A norm whose epsilon is tiny nearly ignores the scale of its input,
so tests use an epsilon of zero or a large one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils import _pytree as pytree

from fxmerge import Symmetry
from fxmerge.units.basis import Basis
from fxmerge.units.kind import Kind
from fxmerge.units.scaling import Scaling
from tests.oracle.generator import Recipe, build

THRESHOLD = 1e-9
"""Singular values below this fraction of the largest count as zero."""

PRECISION = 1e-15
"""No singular value is computed to a smaller fraction of the largest."""

BATCHES = 20
"""The least number of inputs: what a norm divides by may be one number for a whole input."""

GAP = 1e4
"""The least ratio of singular values at the rank for the count to be trusted."""


@dataclass(frozen=True)
class Nullity:
    """How many directions leave a function unchanged, and how sure that is.

    `above` is the smallest singular value that counts and `below` the largest that does not, both relative to the
    largest of all.
    """

    dimension: int
    above: float
    below: float

    @property
    def gap(self) -> float:
        """The ratio of the singular values on both sides of the rank."""
        return self.above / max(self.below, PRECISION)


def nullity(model: nn.Module, args: tuple[Any, ...], seed: int = 0) -> Nullity:
    """The number of directions in parameter space that leave the function of a network unchanged.

    Only parameters count. Buffers, such as running statistics, and parameters that need no gradient are constants.
    Parameters that are used twice count once.

    Arguments:
        model: a network with some hundreds of parameters, taken in eval mode and not modified. Its parameters are
            replaced by random ones.
        args: example inputs. Others of the same shapes are drawn, as many as are needed.
        seed: of the parameters and of the inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    model, parameters = _drawn(model, generator)
    count, rows = sum(p.numel() for p in parameters.values()), 0
    blocks: list[Tensor] = []
    inputs = _inputs(args, generator)
    while rows < 4 * count or len(blocks) < BATCHES:
        blocks.append(_jacobian(model, parameters, next(inputs)))
        rows += len(blocks[-1])
    return _nullity(torch.cat(blocks))


def generic(model: nn.Module, args: tuple[Any, ...], seed: int = 0) -> tuple[nn.Module, tuple[Any, ...]]:
    """A network with the random parameters at which `nullity` takes it, and its example inputs, in float64."""
    model, parameters = _drawn(model, torch.Generator().manual_seed(seed))
    model.load_state_dict(parameters, strict=False)
    double = (x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    return model, tuple(double)


def _drawn(model: nn.Module, generator: torch.Generator) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of a network in float64, and random parameters for it."""
    model = copy.deepcopy(model).double().eval()
    return model, {
        name: 0.6 * torch.randn(p.shape, dtype=torch.float64, generator=generator) + 0.1
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def orbit(symmetry: Symmetry, model: nn.Module) -> int:
    """The number of directions in which changes of basis and scales move the parameters of a network.

    Scales that move a buffer, which is a constant to `nullity`, do not count. The number is less than
    `symmetry.dimension()` where matrices other than the identity change nothing: where a class has more units than
    what writes them can tell apart.
    """
    state, parameters = model.state_dict(), {name for name, _ in model.named_parameters()}
    moved = sorted({own.axis.parameter for axes in (*symmetry.mixed, *symmetry.scaled) for own in axes} & parameters)
    directions = [torch.zeros(sum(state[name].numel() for name in moved), 0, dtype=torch.float64)]
    for number, matrices in symmetry.identity_basis().matrices.items():

        def act(step: Tensor, number: int = number, one: Tensor = matrices) -> Tensor:
            after = Basis(symmetry.mixed, {number: one + step}).apply(state)
            return torch.cat([after[name].flatten() for name in moved])

        frame = _tangent(symmetry.kind(number), matrices.shape[-1])
        own = torch.autograd.functional.jacobian(act, torch.zeros_like(matrices))
        directions += list((own.flatten(-2) @ frame).unbind(1))
    for number, kind in enumerate(symmetry.kinds):
        signs = len(kind.signs)
        ones = torch.ones(signs + len(kind.stretches), symmetry.units[number].size, dtype=torch.float64)
        for k, one in enumerate(kind.stretches, start=signs):
            if {parameter for parameter, *_ in one} <= parameters:

                def stretch(step: Tensor, number: int = number, k: int = k, ones: Tensor = ones) -> Tensor:
                    factors = torch.cat([ones[:k], ones[k : k + 1] + step, ones[k + 1 :]])
                    after = Scaling(symmetry.scaled, {number: factors}).apply(state)
                    return torch.cat([after[name].flatten() for name in moved])

                own = torch.autograd.functional.jacobian(stretch, torch.zeros_like(ones[:1]))
                directions.append(own[:, 0])
    return int(torch.linalg.matrix_rank(torch.cat(directions, 1), rtol=THRESHOLD)) if moved else 0


def _tangent(kind: Kind, size: int) -> Tensor:
    """The directions in which a group of matrices leaves the identity, one for each column."""
    all_of = torch.eye(size * size, dtype=torch.float64).reshape(-1, size, size)
    if kind != Kind.GENERAL_LINEAR:
        all_of = all_of - all_of.mT
    if kind == Kind.CENTRED:
        middle = torch.eye(size, dtype=torch.float64) - 1 / size
        all_of = middle @ all_of @ middle
    return all_of.flatten(1).T


def recipe_nullity(recipe: Recipe, seed: int = 0) -> Nullity:
    """The nullity of an architecture of `tests/oracle/generator.py`."""
    return nullity(*build(recipe, seed), seed=seed)


def _inputs(args: tuple[Any, ...], generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    """Inputs without end, of the shapes of some examples. Integers are drawn from those of the example."""

    def draw(example: Any) -> Any:
        if not isinstance(example, Tensor):
            return example
        if example.is_floating_point():
            return torch.randn(example.shape, dtype=torch.float64, generator=generator)
        return example.flatten()[torch.randint(example.numel(), example.shape, generator=generator)]

    while True:
        yield pytree.tree_map(draw, args)


def _jacobian(model: nn.Module, parameters: dict[str, Tensor], args: tuple[Any, ...]) -> Tensor:
    """The derivatives of all outputs by all parameters, of shape (outputs, parameters)."""

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        found = pytree.tree_leaves(functional_call(model, parameters, args))
        return torch.cat([output.flatten() for output in found])

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # Some ops have no rule for vmap.
        jacobians: dict[str, Tensor] = jacrev(outputs)(parameters)
    return torch.cat([jacobian.flatten(1) for jacobian in jacobians.values()], dim=1)


def _nullity(jacobian: Tensor) -> Nullity:
    """The nullity of a matrix with more rows than columns, its columns first brought to one length.

    That does not change the rank, and makes small singular values larger.
    """
    lengths = jacobian.norm(dim=0)
    scales = torch.where(lengths > PRECISION * lengths.max(), lengths, torch.ones_like(lengths))
    values = torch.linalg.svdvals(jacobian / scales)
    values = values / values[0]
    rank = int((values > THRESHOLD).sum())
    below = float(values[rank]) if rank < len(values) else 0.0
    return Nullity(len(values) - rank, float(values[rank - 1]), below)
