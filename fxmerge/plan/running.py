"""Does what a plan says: reads files, builds networks, and merges, aligns or folds them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxmerge import calibration, io, stages
from fxmerge.api import align, fold, merge_many
from fxmerge.calibration import Batches
from fxmerge.errors import CheckpointError, LoaderError
from fxmerge.io import Checkpoint
from fxmerge.job import prepare
from fxmerge.networks import Network, build
from fxmerge.plan.parts import Data, ModelFile, Plan
from fxmerge.plan.wording import worded
from fxmerge.program.run import Call, batch_inputs
from fxmerge.progress import timed, warnings_logged
from fxmerge.recipe import Run, Zip
from fxmerge.validate import Model

logger = logging.getLogger(__name__)

WIDTH = 0.7
"""What a network is folded to where the plan does not say, as by `fold`."""


@dataclass(frozen=True)
class Result:
    """What a plan gave.

    Attributes:
        plan: the plan, with the checksums of all files that were read.
        networks: one for each model, without the base.
        data: the calibration data.
        module: the network that was made.
        warnings: the warnings of the run, each in a sentence.
        call: example inputs: (args, kwargs).
    """

    plan: Plan
    networks: tuple[Network, ...]
    data: tuple[Batches, ...]
    module: fx.GraphModule
    warnings: tuple[str, ...]
    call: Call

    @property
    def parameters(self) -> int:
        """How many numbers the parameters of `module` hold."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def opened(plan: Plan, *, allow_pickle: bool = False) -> tuple[Checkpoint, ...]:
    """The weights of all models of a plan, the base last, with their headers checked."""
    return tuple(io.load(file.path, allow_pickle=allow_pickle) for file in plan.files)


def execute(plan: Plan, checkpoints: Sequence[Checkpoint], run: Run | None = None) -> Result:
    """Does what a plan says, and gives the result without writing it.

    Arguments:
        plan: what to do.
        checkpoints: the weights of its models, as `opened` gives them.
        run: how to run; None is the run of the plan.

    Raises:
        FxmergeError: if a file has changed since its checksum was taken, or does not fit; and as the
            verbs do.
    """
    with warnings_logged() as warnings:
        with timed(logger, {}, "reading models"):
            files = tuple(_summed(*pair) for pair in zip(plan.files, checkpoints, strict=True))
            networks = [build_of(plan, *pair) for pair in zip(files, checkpoints, strict=True)]
        plan, base = replace(plan, models=files[: len(plan.models)]), None
        if plan.base is not None:
            plan, base = replace(plan, base=files[-1]), networks.pop()
        with timed(logger, {}, "reading data"):
            loaders = tuple(_data(one, networks[i], plan.run.seed) for i, one in enumerate(plan.data))
            plan = replace(plan, data=tuple(_checked(*pair) for pair in zip(plan.data, loaders, strict=True)))
        module = _done(plan, networks, base, loaders, run or plan.run)
    # Warnings of damaged files of an earlier run say nothing of the result.
    messages = tuple(worded(record.getMessage()) for record in warnings if record.name != stages.__name__)
    return Result(plan, tuple(networks), loaders, module, messages, _call(networks[0], loaders))


def build_of(plan: Plan, file: ModelFile, checkpoint: Checkpoint) -> Network:
    """One of the networks of a plan."""
    arch = plan.arch_of(file)
    assert arch is not None  # A plan has one for every model.
    return build(checkpoint, arch, plan.settings_of(file), plan.input)


def example_of(network: Network) -> Call:
    """Example inputs of a network."""
    return network.source.args, network.source.kwargs


def whole(plan: Plan, networks: Sequence[Network], *, apart: bool) -> tuple[Model, Call]:
    """The module whose symmetry a merge uses, and example inputs.

    It is the first network. If networks have heads of their own or other widths, it is all of them as one module, as in
    the merge.

    Arguments:
        plan: of the merge.
        networks: the networks of its models.
        apart: whether the result has heads apart.
    """
    models, call = tuple(network.model for network in networks), example_of(networks[0])
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in models]
    if not apart and all(own == shapes[0] for own in shapes):
        return models[0], call
    job = prepare(models, None, plan.run, example=call, inputs=lambda given: given, recipe=plan.recipe)
    return job.model, job.example


def _call(network: Network, data: Sequence[Batches]) -> Call:
    """A few rows of the data as a network takes them, or its example inputs."""
    if not data:
        return example_of(network)
    call = batch_inputs(network.model)(next(iter(data[0])))
    few: Call = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor[:2] if tensor.ndim else tensor, call)
    return few


def _done(
    plan: Plan, networks: Sequence[Network], base: Network | None, data: Sequence[Batches], run: Run
) -> fx.GraphModule:
    models = [network.model for network in networks]
    how: dict[str, Any] = {"run": run}
    if not data:  # The call itself is the example, then.
        how |= {"example": example_of(networks[0]), "inputs": lambda call: call}
    loader = data[0] if len(data) == 1 else None
    if plan.verb == "align":
        return align(models[0], models[1], loader, plan.recipe, **how)
    if plan.verb == "fold":
        asked = plan.recipe.match.width if isinstance(plan.recipe.match, Zip) else 1
        return fold(models[0], loader, WIDTH if asked == 1 else asked, plan.recipe, **how)
    loaders = data if len(data) > 1 else None
    return merge_many(models, loader, plan.recipe, loaders=loaders, base=None if base is None else base.model, **how)


def _data(data: Data, network: Network, seed: int) -> Batches:
    batches = calibration.read(
        data.path, network, samples=data.samples, batch=data.batch, length=data.length, seed=seed
    )
    logger.info("%s", batches.note)
    return batches


# -------------------------------------------------------------------------- checksums


def checksum(*files: Path) -> str:
    """The SHA-256 of a file; of several, that of their checksums, one after the other."""
    sums = []
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while piece := content.read(2**20):
                digest.update(piece)
        sums.append(digest.hexdigest())
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def _summed(file: ModelFile, checkpoint: Checkpoint) -> ModelFile:
    """The file with its checksums.

    Raises:
        CheckpointError: if it had others.
    """
    sums = {path.name: checksum(path) for path in checkpoint.files}
    for name in file.sha256:
        if sums.get(name) != file.sha256[name]:
            raise CheckpointError(
                f"{name!r} of {file.path} is not the file of the recipe: its SHA-256 is {sums.get(name, 'missing')}, "
                f"and the recipe says {file.sha256[name]}. Use that file, or take sha256 out of the recipe."
            )
    return replace(file, path=str(Path(file.path).absolute()), sha256=sums)


def _checked(data: Data, batches: Batches) -> Data:
    """The data with their checksum.

    Raises:
        LoaderError: if they had another.
    """
    if not batches.files:
        return data
    given = checksum(*batches.files)
    if data.sha256 not in (None, given):
        raise LoaderError(
            f"{data.path} are not the data of the recipe: their SHA-256 is {given}, and the recipe says {data.sha256}. "
            "Use those data, or take sha256 out of the recipe."
        )
    return replace(data, path=str(Path(data.path).absolute()), sha256=given)
