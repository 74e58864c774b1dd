"""Proof on the module itself: random group elements, in float64, must leave its outputs unchanged."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxmerge.errors import FxmergeError, OptionError, PermutationError
from fxmerge.program import models
from fxmerge.program.capture import Args, Kwargs, check_example, open_outputs
from fxmerge.program.double import InDouble, WithOwnStatistics, double, in_double, largest_change
from fxmerge.program.models import evaluating
from fxmerge.program.on_use import PIECE, OnDemand, by_pieces, fill, is_stand_in, with_stand_ins
from fxmerge.symmetry.base import Group
from fxmerge.symmetry.freeze import demote
from fxmerge.symmetry.outputs import FreeOutput
from fxmerge.symmetry.units import Ids
from fxmerge.units.applied import check_state
from fxmerge.units.basis import Basis, random_matrices
from fxmerge.units.kind import Kind, UnitKind
from fxmerge.units.permutation import Permutation
from fxmerge.units.scaling import Scaling, random_factors

G = TypeVar("G", bound=Group)

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
    symmetry: G,
    model: nn.Module | ExportedProgram,
    args: Args,
    kwargs: Kwargs | None = None,
    *,
    trials: int = 1,
    generator: torch.Generator | None = None,
) -> G:
    """Applies random elements of the whole group to a copy of the model in float64 and compares outputs: permutations
    first, then changes of basis, signs and positive scales.

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
        that changed the outputs, which are found by bisection and named in `demoted`. A class whose kind is too large
        gets the largest one that leaves the outputs unchanged, with a warning. One whose signs or scales change the
        outputs has none.

    Raises:
        FxmergeError: if the model gives different outputs for the same inputs and parameters.
        OptionError: if the model or its inputs are none, or if it is on the meta device.
        PermutationError: if a parameter of the symmetry is missing in the model, or has another shape.

    Example:
        >>> import torch, fxmerge
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> symmetry = fxmerge.find_symmetry(mlp, (torch.zeros(1, 2),)).verify(mlp, (torch.ones(4, 2),))
        >>> symmetry.demoted, symmetry.error < 1e-9
        ((), True)
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    model = models.accepted(model)
    if isinstance(model, nn.Module) and any(t.is_meta for t in models.tensors(model).values()):
        raise OptionError("The model is on the meta device, and has no values to verify; load them, or build it anew.")
    own = model.state_dict if isinstance(model, ExportedProgram) else models.tensors(model)
    check_state(own, symmetry.layout, PermutationError)
    probe = Probe(model, *check_example(model, args, kwargs), generator, symmetry.free)
    tolerance, worst = TOLERANCE, 0.0
    for _ in range(trials):
        p = symmetry.sample_permutation(generator)
        error = probe.error(p)
        if error > tolerance == TOLERANCE:
            tolerance = max(TOLERANCE, min(10 * probe.rounding(generator), LOOSEST))
        if error > tolerance:
            bad = _bisect(symmetry, p, probe, tolerance)
            logger.warning("classes failed verification and were demoted: %s", [symmetry.names[n] for n in bad])
            symmetry = demote(symmetry, bad)
            probe.free = symmetry.free
            error = probe.error(symmetry.sample_permutation(generator))
        worst = max(worst, error)
        symmetry, error = _prove_kinds(symmetry, probe, generator, tolerance)
        worst = max(worst, error)
    return replace(symmetry, error=worst)


def _prove_kinds(symmetry: G, probe: Probe, generator: torch.Generator, tolerance: float) -> tuple[G, float]:
    """The symmetry with kinds, signs and scales under which a random element of the group leaves the outputs unchanged,
    and what it changes.

    Parameters that are of one number each, and scale a class as a whole, have one number each when this is tried.
    """
    open_ = [n for n, own in enumerate(symmetry.kinds) if own.kind > Kind.PERMUTATION]
    touched = {own.axis.parameter for axes in symmetry.mixed for own in axes}
    touched |= {own.axis.parameter for axes in symmetry.scaled for own in axes}
    if not touched:
        return symmetry, 0.0
    scales = {name for n in open_ for name in symmetry.kinds[n].scales}
    probe = probe.prepared(scales, touched)

    def change(symmetry: G) -> float:
        drawn = symmetry.sample(generator)
        return probe.change(probe.each(lambda name, own: drawn.scaling.moved(name, drawn.basis.moved(name, own))))

    error = change(symmetry)
    if error > tolerance:  # Matrices cause more rounding than permutations.
        tolerance = max(tolerance, min(10 * probe.rounding(generator), LOOSEST))
    if error <= tolerance:
        return symmetry, error
    kinds = list(symmetry.kinds)
    for n in open_:
        own, (blocks, size) = kinds[n], symmetry.by_block(n).shape
        for kind in own.kind.subgroups:
            if kind == Kind.PERMUTATION:
                break
            alone = random_matrices(kind, blocks, size, generator)
            if probe.change(probe.each(Basis(symmetry.mixed, {n: alone}).moved)) <= tolerance:
                break
        if kind < own.kind:
            logger.warning("%s failed verification as %s, and is %s", symmetry.names[n], own.kind, kind)
            planes = own.planes if kind.turns else ()
            kinds[n] = replace(own, kind=kind, why="it failed verification", planes=planes)
    for n in (n for n, axes in enumerate(symmetry.scaled) if axes):
        own = kinds[n]
        drawn = random_factors(len(own.signs), len(own.stretches), symmetry.units[n].size, generator)
        if not probe.change(probe.each(Scaling(symmetry.scaled, {n: drawn}).moved)) <= tolerance:
            logger.warning("%s failed verification with signs or scales, and is only permuted", symmetry.names[n])
            kinds[n] = UnitKind(why="it failed verification")
    smaller = replace(symmetry, kinds=tuple(kinds))
    error = change(smaller)
    if error <= tolerance:
        return smaller, error
    logger.warning("changes of basis of several classes failed verification together, so all classes are permuted")
    return replace(symmetry, kinds=tuple(UnitKind(why="it failed verification") for _ in kinds)), 0.0


def _bisect(symmetry: Group, p: Permutation, probe: Probe, tolerance: float) -> list[int]:
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
            self.module = with_stand_ins(model, double)._apply(in_double)
        self.inputs: tuple[Args, dict[str, Any]] = pytree.tree_map(in_double, (tuple(args), kwargs))
        own, light = models.tensors(model, keep_vars=True), models.tensors(self.module, keep_vars=True)
        self.first = models.first_names(own)
        seeds = {name: _seed(generator) for name in own}
        held = {name: _perturb(t, seeds[name]) for name, t in own.items() if not is_stand_in(light[name])}

        def perturbed(name: str) -> Tensor:
            name = self.first[name]
            return held[name] if name in held else _perturb(own[name], seeds[name])

        self.state: Mapping[str, Tensor] = OnDemand(own, perturbed)
        self.expected = self.outputs(self.state, statistics=True)

    def outputs(
        self, state: Mapping[str, Tensor], images: Sequence[Ids] | None = None, *, statistics: bool = False
    ) -> list[Tensor]:
        """The outputs under some parameters, free ones with their units put back where `images` took them from; running
        statistics are to fit the activations if asked for."""
        module = models.apart(self.module)  # A forward may count its calls.
        if not self.exported:  # Modules drop what they have derived from other values of their parameters.
            models.switch(module, True)
            models.switch(module, False)
        own = models.tensors(module, keep_vars=True)
        mode: InDouble = InDouble()  # type: ignore[no-untyped-call]
        if statistics:
            held = {name: t for name, t in own.items() if t.numel() and not is_stand_in(t)}
            mode = WithOwnStatistics({t.data_ptr(): self.state[name] for name, t in held.items()})
        with torch.no_grad(), models.same_draws(*own.values()):
            filled = fill(own, state)
            with mode, filled:
                outputs = filled.with_values(module(*self.inputs[0], **self.inputs[1]))
        open_outputs(module, outputs)
        leaves = pytree.tree_leaves(outputs)
        for output in self.free if images is not None else ():
            leaves[output.leaf] = output.put_back(leaves[output.leaf], images)  # type: ignore[arg-type]
        found = [o.detach().clone() for o in leaves if isinstance(o, Tensor)]
        return [o.to(torch.int8) if o.dtype == torch.bool else o for o in found]  # Truth has no differences.

    def error(self, p: Permutation) -> float:
        """What a permutation of the parameters changes."""
        return self.change(self.each(p.moved), p.images)

    def each(self, change: Callable[[str, Tensor], Tensor]) -> Mapping[str, Tensor]:
        """The state with a change of every tensor, which is given with the first of its names."""
        return OnDemand(self.state, lambda name: change(self.first[name], self.state[name]))

    def prepared(self, uniform: Collection[str], mixed: Collection[str]) -> Probe:
        """The same module with the mean of some parameters in place of their entries, and with parameters in float64
        that are to be mixed."""
        wide, flat = ({self.first[name] for name in names} for names in (mixed, uniform))

        def prepared(name: str, own: Tensor) -> Tensor:
            if name in flat:
                return torch.full_like(own, float(own.mean()))
            return in_double(own) if name in wide else own

        other = copy(self)
        other.state = self.each(prepared)
        other.expected = other.outputs(other.state) if uniform else self.expected
        return other

    def rounding(self, generator: torch.Generator) -> float:
        """What changes of the parameters in their last places change."""

        seeds = {name: _seed(generator) for name in self.state}

        def shaken(name: str, tensor: Tensor) -> Tensor:
            if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.device.type == "meta":
                return tensor
            drawn = torch.Generator().manual_seed(seeds[name])
            noise = torch.rand(tensor.shape, dtype=torch.float64, generator=drawn).to(tensor.device)
            wide: Tensor = in_double(tensor)
            return wide * (1 + 4 * torch.finfo(torch.float64).eps * (noise - 0.5))

        return self.change(self.each(shaken))

    def change(self, state: Mapping[str, Tensor], images: Sequence[Ids] | None = None) -> float:
        """The largest change of an output under other parameters, relative to the largest value of that output; of free
        outputs, once they are back in their places."""
        return largest_change(self.expected, self.outputs(state, images), SMALLEST)


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))


def _perturb(tensor: Tensor, seed: int) -> Tensor:
    """Generic values near those of the tensor, in float32, which takes half the memory; positive ones stay
    positive, as variances must. What is next to nothing at initialisation, such as the scales of branches,
    grows until it counts. They are the same for the same seed."""
    if tensor.is_complex() and tensor.device.type != "meta":
        parts = torch.view_as_real(tensor.detach().to(torch.complex64).resolve_conj())
        return torch.view_as_complex(_perturb(parts, seed))
    if not tensor.is_floating_point() or tensor.device.type == "meta" or not tensor.numel():
        return tensor.detach().clone()
    own, drawn = tensor.detach(), torch.Generator().manual_seed(seed)
    usual = math.sqrt(len(own) / own.numel()) if own.ndim > 1 else 1.0
    norms = (float(piece.norm(dtype=torch.float64)) for piece in own.reshape(-1).split(PIECE))
    size = math.hypot(*norms) / math.sqrt(own.numel())
    grown = usual / 10 / size if 0 < size < usual / 100 else 1.0

    def perturbed(value: Tensor) -> Tensor:
        noise = torch.rand(value.shape, dtype=torch.float32, generator=drawn).to(value.device)
        return torch.where(value == 0, usual * 0.2 * (noise - 0.5), value * grown * (0.9 + 0.2 * noise))

    return by_pieces(perturbed, own, torch.float32)
