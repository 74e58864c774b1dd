"""Least squares of what a graph computes, over parameters in which it is linear or made so, by conjugate gradients.

Neither the problem's matrix nor its square is stored: derivatives are those of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Parameters = dict[str, Tensor]

B = TypeVar("B", contravariant=True)


class Problem(Protocol[B]):
    """What is computed and wanted on batches."""

    def outputs(self, parameters: Parameters, batch: B) -> tuple[Tensor, ...]:
        """What is computed."""

    def targets(self, batch: B) -> tuple[Tensor, ...]:
        """What is wanted in its place."""


@torch.no_grad()
def squares(problem: Problem[B], parameters: Parameters, batches: Sequence[B]) -> tuple[float, float]:
    """The sums of the squares of what is missed, and of what is wanted."""
    missed = total = 0.0
    for batch in batches:
        for given, wanted in zip(problem.outputs(parameters, batch), problem.targets(batch), strict=True):
            missed += float((wanted - given).square().sum(dtype=torch.float64))
            total += float(wanted.square().sum(dtype=torch.float64))
    return missed, total


def conjugate_steps(
    problem: Problem[B],
    start: Parameters,
    batches: Sequence[B],
    counts: Sequence[int],
    total: Callable[[Parameters], Parameters] = lambda sums: sums,
) -> Iterator[Parameters]:
    """Parameters after more and more steps of conjugate gradients towards the least squared error of outputs as a
    linear function of the parameters; none where no parameter changes the error.

    Arguments:
        problem: the outputs and what they are to be.
        start: the parameters around which the outputs are made linear.
        batches: the data.
        counts: after how many steps parameters are given, ascending.
        total: makes sums over the batches those over all processes.
    """

    def normal(direction: Parameters | None) -> Parameters:
        """J' J of a direction, or J' of what is missed."""
        sums = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        for batch in batches:
            at = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
            # The derivatives of fused attention have none of their own.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                given = problem.outputs(at, batch)
                if direction is None:
                    along = [y - o.detach() for y, o in zip(problem.targets(batch), given, strict=True)]
                else:
                    # J' u is linear in u, and the derivative of its product with a direction by u is J direction.
                    weights = [torch.zeros_like(o, requires_grad=True) for o in given]
                    turned = _gradients(given, at, weights, create_graph=True)
                    product = torch.stack([(turned[name] * direction[name]).sum() for name in at]).sum()
                    along = list(torch.autograd.grad(product, weights, retain_graph=True))
                for name, tensor in _gradients(given, at, along).items():
                    sums[name] += tensor
        return total(sums)

    residual = normal(None)
    step = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    direction, size = residual, _inner(residual, residual)
    for number in range(1, max(counts) + 1):
        if not size > 0:
            break
        turned = normal(direction)
        length = size / max(_inner(direction, turned), torch.finfo(torch.float64).tiny)
        step = {name: step[name] + length * direction[name] for name in step}
        residual = {name: residual[name] - length * turned[name] for name in step}
        size, last = _inner(residual, residual), size
        direction = {name: residual[name] + size / last * direction[name] for name in step}
        if number in counts:
            yield {name: start[name] + step[name] for name in step}


def _gradients(
    given: Sequence[Tensor], at: Parameters, along: Sequence[Tensor], *, create_graph: bool = False
) -> Parameters:
    """The gradients of the products of outputs with other tensors, by parameter."""
    found = torch.autograd.grad(
        given, list(at.values()), along, create_graph=create_graph, retain_graph=True, materialize_grads=True
    )
    return dict(zip(at, found, strict=True))


def _inner(a: Parameters, b: Parameters) -> float:
    return sum(float((a[name] * b[name]).sum(dtype=torch.float64)) for name in a)
