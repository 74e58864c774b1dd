"""Proof on the module itself: random group elements, in float64, must leave its outputs unchanged."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxmerge.capture import Args, Kwargs, evaluating
from fxmerge.errors import FxmergeError
from fxmerge.symmetry.double import InDouble, WithOwnStatistics
from fxmerge.symmetry.freeze import demote
from fxmerge.symmetry.permutation import Permutation

if TYPE_CHECKING:
    from fxmerge.symmetry.group import Symmetry
    from fxmerge.symmetry.outputs import FreeOutput
    from fxmerge.symmetry.units import Ids

logger = logging.getLogger(__name__)

TOLERANCE = 1e-8
"""Largest relative change of the outputs, in float64, that counts as rounding. A permutation that is not a
symmetry changes outputs by many orders of magnitude more."""

LOOSEST = 1e-5
"""The tolerance for models that multiply rounding errors, which is ten times what changes in the last places of
their parameters do to their outputs, is at most this."""

SMALLEST = 1e-6
"""Changes of an output that is smaller than this are relative to this: it may be zero but for rounding."""


def verify(
    symmetry: Symmetry,
    model: nn.Module | ExportedProgram,
    args: Args,
    kwargs: Kwargs | None = None,
    *,
    trials: int = 1,
    generator: torch.Generator | None = None,
) -> Symmetry:
    """Applies random elements of the whole group to a copy of the model in float64 and compares outputs.

    The parameters are perturbed first, so that what is constant at initialisation (biases, running
    statistics, scales) cannot hide a wrong permutation.

    Arguments:
        symmetry: the group to prove.
        model: the model it was found for; it is not modified.
        args: inputs for the model.
        kwargs: inputs by keyword.
        trials: number of random group elements.
        generator: source of randomness; seeded with 0 if None.

    Returns:
        The same symmetry with `error`, the largest relative output error, filled in; without the classes
        that changed the outputs, which are found by bisection and named in `demoted`.

    Raises:
        FxmergeError: if the model gives different outputs for the same inputs and parameters.

    Example:
        >>> import torch, fxmerge
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> symmetry = fxmerge.find_symmetry(mlp, (torch.zeros(1, 2),)).verify(mlp, (torch.ones(4, 2),))
        >>> symmetry.demoted, symmetry.error < 1e-9
        ((), True)
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    probe = Probe(model, args, dict(kwargs or {}), generator, symmetry.free)
    tolerance, worst = TOLERANCE, 0.0
    for _ in range(trials):
        p = symmetry.sample(generator)
        error = probe.error(p)
        if error > tolerance == TOLERANCE:
            tolerance = max(TOLERANCE, min(10 * probe.rounding(generator), LOOSEST))
        if error > tolerance:
            bad = _bisect(symmetry, p, probe, tolerance)
            logger.warning("classes failed verification and were demoted: %s", [symmetry.names[n] for n in bad])
            symmetry = demote(symmetry, bad)
            probe.free = symmetry.free
            error = probe.error(symmetry.sample(generator))
        worst = max(worst, error)
    return replace(symmetry, error=worst)


def _bisect(symmetry: Symmetry, p: Permutation, probe: Probe, tolerance: float) -> list[int]:
    """The classes without which p leaves the outputs unchanged."""
    if probe.error(symmetry.identity()) > TOLERANCE:
        raise FxmergeError(
            "The model gives different outputs for the same inputs and parameters, so its symmetry cannot be verified. "
            "Make its forward deterministic in eval mode, or pass verify=False."
        )
    good: list[int] = []
    bad: list[int] = []

    def sort_out(classes: list[int]) -> None:
        if probe.error(symmetry.restrict(p, good + classes)) <= tolerance:
            good.extend(classes)
        elif len(classes) == 1:
            bad.extend(classes)
        else:
            sort_out(classes[: len(classes) // 2])
            sort_out(classes[len(classes) // 2 :])

    sort_out(list(range(len(symmetry.units))))
    return bad


class Probe:
    """A copy of a model in float64 with perturbed parameters, and its outputs.

    Running statistics become those of the activations that meet them: the statistics of a fresh network, means of
    zero and variances of one, let signals fade from layer to layer, and outputs that hardly depend on the
    parameters prove little.
    """

    def __init__(
        self,
        model: nn.Module | ExportedProgram,
        args: Args,
        kwargs: dict[str, Any],
        generator: torch.Generator,
        free: Sequence[FreeOutput] = (),
    ) -> None:
        self.free = free
        self.exported = isinstance(model, ExportedProgram)
        with ExitStack() as stack:
            if isinstance(model, ExportedProgram):
                model = model.module()  # It shares its tensors with the program.
            else:
                stack.enter_context(evaluating(model))
            self.module = copy.deepcopy(model).double()
        self.inputs: tuple[Args, dict[str, Any]] = pytree.tree_map(_double, (tuple(args), kwargs))
        own = self.module.state_dict(keep_vars=True)
        self.state = {name: _perturb(t, generator) for name, t in own.items()}
        _share(self.state, own)
        mode = WithOwnStatistics({t.data_ptr(): self.state[name] for name, t in own.items() if t.numel()})
        self.expected = self._run(self.state, mode)

    def _run(self, state: Mapping[str, Tensor], mode: InDouble, images: Sequence[Ids] | None = None) -> list[Tensor]:
        if not self.exported:  # Modules drop what they have derived from other values of their parameters.
            self.module.train().eval()
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            for name, tensor in self.module.state_dict(keep_vars=True).items():
                tensor.copy_(state[name])
            torch.manual_seed(0)  # What draws random numbers, draws the same ones every time.
            with mode:
                outputs = pytree.tree_leaves(self.module(*self.inputs[0], **self.inputs[1]))
        for own in self.free if images is not None else ():
            outputs[own.leaf] = own.put_back(outputs[own.leaf], images)  # type: ignore[arg-type]
        found = [o.detach().clone() for o in outputs if isinstance(o, Tensor)]
        return [o.to(torch.int8) if o.dtype == torch.bool else o for o in found]  # Truth has no differences.

    def error(self, p: Permutation) -> float:
        """What a permutation of the parameters changes."""
        return self.change(p.apply(self.state), p.images)

    def rounding(self, generator: torch.Generator) -> float:
        """What changes of the parameters in their last places change."""

        def shaken(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point() or tensor.device.type == "meta":
                return tensor
            noise = torch.rand(tensor.shape, dtype=torch.float64, generator=generator).to(tensor.device)
            return tensor.double() * (1 + 4 * torch.finfo(torch.float64).eps * (noise - 0.5))

        return self.change({name: shaken(tensor) for name, tensor in self.state.items()})

    def change(self, state: Mapping[str, Tensor], images: Sequence[Ids] | None = None) -> float:
        """The largest change of an output under other parameters, relative to the largest value of that output; of free
        outputs, once they are back in their places."""
        worst = 0.0
        for a, b in zip(self.expected, self._run(state, InDouble(), images), strict=True):  # type: ignore[no-untyped-call]
            if a.numel():
                finite = torch.isfinite(a)
                scale = float(a[finite].abs().max()) if finite.any() else 0.0
                same = torch.equal(finite, torch.isfinite(b))
                change = float((a[finite] - b[finite]).abs().max()) if same and finite.any() else (0.0 if same else 1.0)
                worst = max(worst, change / max(scale, SMALLEST))
        return worst


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _perturb(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Generic values near those of the tensor, in float32, which takes half the memory; positive ones stay
    positive, as variances must. What is next to nothing at initialisation, such as the scales of branches,
    grows until it counts."""
    if not tensor.is_floating_point() or tensor.device.type == "meta" or not tensor.numel():
        return tensor.detach().clone()
    value = tensor.detach().float()
    noise = torch.rand(tensor.shape, generator=generator).to(tensor.device)
    usual = math.sqrt(len(value) / value.numel()) if value.ndim > 1 else 1.0
    size = float(value.square().mean().sqrt())
    if 0 < size < usual / 100:
        value = value * (usual / 10 / size)
    return torch.where(value == 0, usual * 0.2 * (noise - 0.5), value * (0.9 + 0.2 * noise))


def _share(state: dict[str, Tensor], module: Mapping[str, Tensor]) -> None:
    """Tied parameters get one value."""
    first: dict[Any, str] = {}
    for name, tensor in module.items():
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        state[name] = state[first.setdefault(key, name)]
