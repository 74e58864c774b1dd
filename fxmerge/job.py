"""What the stages of one call share: checked inputs, the captured program, and how long each stage took."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from fxmerge import validate
from fxmerge.combine.batch_norm import batch_norm_statistics
from fxmerge.combine.derived import Derived, not_averaged
from fxmerge.combine.masks import masks_of
from fxmerge.emit.fork import Head, owner_of
from fxmerge.errors import ArchitectureMismatchError, CaptureError, LoaderError, OptionError
from fxmerge.joined import Joined, join_models
from fxmerge.keeping import verified
from fxmerge.notices import warn_of_small_trunk
from fxmerge.processes import ALONE, Processes
from fxmerge.program.capture import Args, capture_program, check_example
from fxmerge.program.captured import Program
from fxmerge.program.models import accepted, apart, copied, evaluating, tensors
from fxmerge.program.path import SamePath
from fxmerge.program.run import Apart, Data, Inputs, Shapes, batch_inputs, check_shape
from fxmerge.program.training_inputs import left_out, training_only
from fxmerge.progress import timed
from fxmerge.recipe import AUTO, NOTHING, Recipe, Run
from fxmerge.shared import equal_names
from fxmerge.stages import NO_STAGES, Stages
from fxmerge.symmetry.group import Symmetry, analyse
from fxmerge.symmetry.kinds import fitting
from fxmerge.symmetry.propagate import propagate
from fxmerge.symmetry.propagation import Propagation
from fxmerge.symmetry.spec import check_fits
from fxmerge.validate import Model
from fxmerge.widening import of_equal_width

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """What the stages of one call share: checked inputs, the captured program, and how long each stage took.

    `states` are the parameters and buffers of the models. Where the models have heads of their own, the program is of
    all of them, `heads` tells what is whose, and a state also holds the heads of the other models, as they are. The
    `trunks` are the nodes with which a trunk within the recipe's budget may end, the shortest trunk first; `varying`
    are the dimensions of inputs that data have in several sizes; `stages` keeps results of stages; `processes` share
    the work.
    """

    model: Model
    states: tuple[dict[str, Tensor], ...]
    names: list[str]
    data: Data | None
    example: tuple[Args, dict[str, Any]]
    program: Program
    progress: bool | None
    seconds: dict[str, float]
    buffers: frozenset[str] = frozenset()
    heads: tuple[Head, ...] = ()
    trunks: tuple[str, ...] = ()
    varying: frozenset[tuple[int, int]] = frozenset()
    stages: Stages = NO_STAGES
    processes: Processes = ALONE

    @cached_property
    def owner(self) -> dict[str, int]:
        """The number of the model, for every tensor that is of its head."""
        return owner_of(self.heads)

    @cached_property
    def own_buffers(self) -> frozenset[str]:
        """The names of the model's buffers, but for the statistics of normalizations."""
        return self.buffers - {name for pair in batch_norm_statistics(self.program) for name in pair}

    @cached_property
    def masks(self) -> frozenset[str]:
        """The buffers of zeros and ones."""
        return masks_of(self.own_buffers, self.states)

    @cached_property
    def derived(self) -> Derived | None:
        """The buffers that the model derives from its parameters when it is trained, if it has any."""
        return Derived.find(self.model, *self.example, self.own_buffers) if isinstance(self.model, nn.Module) else None

    @cached_property
    def of_one_model(self) -> list[str]:
        """The buffers that differ between models, and cannot be averaged nor derived anew."""
        if len(self.states) == 1:
            return []
        known = set(self.derived.names if self.derived else ()) | equal_names(self.states)
        names = not_averaged(self.program, self.own_buffers - known)
        if names:
            logger.warning(
                "%s differ between the models and are part of how weights are computed. They are taken from the model "
                "that counts most, since no average fits. Pass modules that can run in train mode, so that fxmerge can "
                "derive these buffers anew.",
                ", ".join(map(repr, names)),
            )
        return names

    def rederived(self, state: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with buffers that fit its parameters where an average of buffers does not.

        Arguments:
            state: the merged state dict. What has another size in it than in the model is left as it is.
            model: the state dict of the model that counts most, in the same units.
        """
        derived = self.derived.of_sizes(state) if self.derived else None
        others = [name for name in self.of_one_model if state[name].shape == model[name].shape]
        names = [*(derived.names if derived else ()), *others]
        if not names:
            return dict(state)
        found = {**state, **{name: model[name] for name in names}}
        same = all(torch.equal(value, model[name]) for name, value in found.items() if value.is_floating_point())
        return found if same or derived is None else derived.settle(found)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds spent inside to the entry of a stage, also those of an earlier run on what is not computed
        again, and logs when it begins and ends."""
        before = self.stages.spared
        with timed(logger, self.seconds, stage):
            yield
        self.seconds[stage] += self.stages.spared - before

    def symmetry(
        self, given: Symmetry | None, free: str | Iterable[str], *, verify: bool, continuous: bool = False
    ) -> tuple[Propagation, Symmetry]:
        """The labels of the program, and the symmetry given or else inferred; of permutations only, or `continuous`."""
        if given is not None and free:
            raise OptionError(
                "Both symmetry and Recipe.free are given: pass free to find_symmetry, whose result tells it."
            )
        with self.timed("symmetry"):
            if given is None:
                found, symmetry = analyse(self.program, free=free, states=self.states, continuous=continuous)
            else:
                check_fits(given, self.program)
                found, symmetry = propagate(self.program), fitting(given, self.states)
                symmetry = symmetry if continuous else replace(symmetry, kinds=())
        if verify:
            with self.timed("verification"):
                prove = partial(symmetry.verify, self.model, *self.example)
                prove_once = partial(self.processes.once, "verification", prove)
                symmetry = self.stages.remember("verification", prove_once, verified(symmetry))
        return found, symmetry


def prepare(
    models: tuple[Model, ...],
    loader: Iterable[Any] | None,
    run: Run,
    *,
    loaders: Sequence[Iterable[Any]] | None = None,
    base: Model | None = None,
    example: Any = None,
    inputs: Inputs | None = None,
    recipe: Recipe | None = None,
) -> Job:
    """Checks everything that can be checked before any work is done, and captures the base or else the first model; or,
    where a recipe is given and the models are to share a trunk only, all of them as one."""
    names = validate.names_of(len(models), base)
    models = models if base is None else (base, *models)
    models = tuple(accepted(model, name) for model, name in zip(models, names, strict=True))
    if run.device is not None:
        models = tuple(_to(m, run.device) for m in models)
    # What a call does to buffers, it does to copies: the states are those before any call.
    modules = tuple(m.module() if isinstance(m, ExportedProgram) else apart(m) for m in models)
    originals = [module if isinstance(m, ExportedProgram) else m for m, module in zip(models, modules, strict=True)]
    states = tuple(tensors(m) for m in originals)
    validate.check_values(states, names)
    if recipe is None:
        validate.check_same_tensors(states, names)
    batches, data = inputs or batch_inputs(modules[0]), None
    call = None if example is None else check_example(models[0], *batches(example))
    if loaders is not None:
        loader = Apart([readable_again(own) for own in loaders])
        for i, own in enumerate(loader.loaders):
            if next(iter(own), None) is None:
                raise LoaderError(f"The loader of {validate.name_of(i)} is empty: it gave no batch.")
    if loader is not None:
        loader = readable_again(loader)
        where = next((t.device for t in states[0].values()), torch.device("cpu"))
        data = Data(loader, batches, where, run.progress)
    given = call is not None
    if call is None:
        call = data.first() if data is not None else _example_of(models[0])
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        for model, module in zip(models, modules, strict=True):
            if isinstance(model, nn.Module):
                stack.enter_context(evaluating(module))
        validate.check_batch(modules[0], *call)
        unneeded = training_only(modules[0], call) if isinstance(models[0], nn.Module) else ()
        if unneeded:
            logger.info("Inputs that only a loss is computed from are left out: %s", ", ".join(sorted(unneeded)))
            call = left_out(modules[0], call, unneeded)
            data = data and replace(data, inputs=_without(data.inputs, modules[0], unneeded))
        surveyed, shapes = data.survey() if data is not None else (call, {})
        if not given:
            call = surveyed
        elif pytree.tree_structure(surveyed) != pytree.tree_structure(call):
            shapes = {}
        # A graph that was captured with other strides has guards on them, which a second capture does not pass.
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.contiguous, call)
        call = args, kwargs
        varying = _varying(shapes)
        if recipe is not None and base is None:
            with timed(logger, seconds, "capture"):
                wide = of_equal_width(originals, names, call, varying)
            if any(new is not old for new, old in zip(wide, originals, strict=True)):
                models = wide
                same = (new is old for new, old in zip(wide, originals, strict=True))
                modules = tuple(m if kept else new for m, new, kept in zip(modules, wide, same, strict=True))
                states = tuple(tensors(module) for module in wide)
        join = partial(join_models, models, states, names, call, varying, recipe or Recipe(), based=base is not None)
        path: SamePath | None = None
        with timed(logger, seconds, "capture"):
            joined = Joined(models[0], states) if recipe is None else join(None)
            program = capture_program(joined.model, *call, varying=varying)
        if not joined.heads:
            path = _same_path(program, modules, joined.states, names, call)
            try:
                for i in range(1, len(models)):
                    validate.check_same_function(program, modules[i], joined.states[i], *call, (names[0], names[i]))
            except ArchitectureMismatchError as mismatch:
                if recipe is None or recipe.share != AUTO or base is not None:
                    raise
                with timed(logger, seconds, "capture"):
                    joined = join(mismatch)
                    program = capture_program(joined.model, *call, varying=varying)
        states, heads = joined.states, joined.heads
        if recipe is not None and recipe.names is not None and not heads:
            raise OptionError(
                "Recipe.names is given, but the networks are equal all through, so that they have one head: pass "
                "share='trunk' to keep theirs apart."
            )
        _check_shapes(program, shapes)
        if heads:
            if recipe is not None and recipe.share != NOTHING:
                warn_of_small_trunk(heads, {name: t.numel() for name, t in states[0].items()}, names)
            if program.follows_path:
                raise CaptureError("torch.export cannot capture the networks as one: merge them all through.")
            validate.check_heads(program, modules, states, call, names)
    data = replace(data, check=path) if data is not None else None
    buffers = frozenset(name for name, _ in (program.module if heads else modules[0]).named_buffers())
    return Job(
        joined.model,
        states,
        names,
        data,
        call,
        program,
        run.progress,
        seconds,
        buffers,
        heads,
        joined.trunks,
        frozenset(varying),
        processes=run.processes if isinstance(run.processes, Processes) else ALONE,
    )


def _same_path(
    program: Program,
    modules: Sequence[nn.Module],
    states: Sequence[dict[str, Tensor]],
    names: Sequence[str],
    call: tuple[Args, dict[str, Any]],
) -> SamePath | None:
    """What refuses batches that lead models on other paths than the example, for a program that follows its path."""
    path = SamePath(program, modules, states, names, call) if program.follows_path else None
    if path is not None:
        path.check_example()
    return path


def _without(inputs: Inputs, model: nn.Module, names: Collection[str]) -> Inputs:
    """Inputs without some of them."""
    return lambda batch: left_out(model, inputs(batch), names)


def _varying(shapes: Shapes) -> set[tuple[int, int]]:
    """The dimensions of inputs whose sizes differ between batches."""
    return {(i, d) for i, own in shapes.items() for d, sizes in enumerate(zip(*own, strict=False)) if len({*sizes}) > 1}


def _check_shapes(program: Program, shapes: Shapes) -> None:
    """The graph must take all batches."""
    inputs = [(name, node.meta["val"]) for node, (kind, name) in program.sources.items() if kind == "input"]
    for i, own in shapes.items():
        for shape in sorted(own):
            check_shape(inputs[i][0], shape, inputs[i][1], program.why_fixed)


def readable_again(loader: Iterable[Any]) -> Iterable[Any]:
    """A loader that can be read several times; an iterator can be read once."""
    return list(loader) if not isinstance(loader, Apart) and iter(loader) is loader else loader


def _to(model: Model, device: str | torch.device) -> Model:
    """A copy of a model on a device."""
    if isinstance(model, ExportedProgram):
        return move_to_device_pass(model, device)
    return copied(model).to(device)


def _example_of(model: Model) -> tuple[Args, dict[str, Any]]:
    """Example inputs that a model carries with it.

    Raises:
        OptionError: if it carries none.
    """
    if isinstance(model, ExportedProgram) and model.example_inputs is not None:
        args, kwargs = model.example_inputs
        return args, kwargs
    if isinstance(model, fx.GraphModule):
        values = [n.meta.get("val") for n in model.graph.nodes if n.op == "placeholder"]
        if values and all(isinstance(v, Tensor) and v.is_floating_point() for v in values):
            drawn = torch.Generator().manual_seed(0)  # All processes draw the same.
            sizes = [([int(s) for s in v.shape], v.dtype) for v in values if v is not None]
            return tuple(torch.randn(shape, dtype=dtype, generator=drawn) for shape, dtype in sizes), {}
    raise OptionError(
        "Without a loader, an example is needed to capture the model: pass example=batch, such as example=x."
    )
