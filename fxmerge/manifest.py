"""What the results of a job's stages depend on, to the last bit."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxmerge.errors import OptionError
from fxmerge.job import Job
from fxmerge.processes import Processes
from fxmerge.program.captured import Program
from fxmerge.recipe import Recipe, Run
from fxmerge.stages import Stages, differences, digest
from fxmerge.symmetry.group import Symmetry

PACKAGES = ("torch", "numpy", "scipy")

OF_PROCESSES = ("the device", "the processor", "the graphics card", "the number of threads")
"""In what the processes of a run may differ."""


def with_stages(job: Job, verb: str, recipe: Recipe, run: Run, symmetry: Symmetry | None = None) -> Job:
    """The job with the folder of stages that a run names, if it names one. Several processes must be given the same.

    Arguments:
        verb: what the job is done for.
        recipe: without "auto".
        symmetry: the one that is given in place of an inferred one.

    Raises:
        OptionError: if the folder is of a run that was given something else, or a process was.
        OutputError: if the folder cannot be written.
    """
    if job.processes.size > 1:
        _check_same(job.processes, manifest(job, verb, recipe, run, symmetry))
    if run.resume is None:
        return job
    return replace(job, stages=Stages(Path(run.resume), manifest(job, verb, recipe, run, symmetry)))


def _check_same(processes: Processes, given: Mapping[str, str]) -> None:
    """All processes must be given the same."""
    first, *others = processes.gather("arguments", {n: own for n, own in given.items() if n not in OF_PROCESSES})
    for rank, other in enumerate(others, start=1):
        if other != first:
            raise OptionError(
                f"Process {rank} was given something else than process 0: they differ in {differences(first, other)}. "
                "Give all processes the same models, options and batches; where data are shuffled, with the same seed."
            )


def manifest(job: Job, verb: str, recipe: Recipe, run: Run, symmetry: Symmetry | None) -> dict[str, str]:
    """What the results depend on, by name; large values by their checksums.

    The budget of memory is not among it: activations are the same wherever they are kept.
    """
    found = {"the verb": verb}
    for i, (name, state) in enumerate(zip(job.names, job.states, strict=True)):
        own = ((key, tensor) for key, tensor in state.items() if job.owner.get(key, i) == i)
        found[f"the weights of {name}"] = digest(own)
    found["the calibration data"] = "none" if job.data is None else digest(_leaves(job.data.owned("checksums")))
    found["the example inputs"] = digest(_leaves([job.example]))
    found["the graph of the models"] = _graph(job.program)
    found["the symmetry"] = "inferred" if symmetry is None else hashlib.sha256(symmetry.to_json().encode()).hexdigest()
    found |= dict(_flat("recipe", recipe))
    found |= {"the seed": str(run.seed), "verification": "on" if run.verify else "off"}
    devices = sorted({str(tensor.device) for state in job.states for tensor in state.values()})
    found["the device"] = ", ".join(devices)
    found["the processor"] = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    if any(device.startswith("cuda") for device in devices):
        found["the graphics card"] = torch.cuda.get_device_name(next(d for d in devices if d.startswith("cuda")))
    found["the number of threads"] = str(torch.get_num_threads())
    found["the precision of float32 products"] = torch.get_float32_matmul_precision()
    found["the default dtype"] = str(torch.get_default_dtype())
    found["the code of fxmerge"] = _code()
    return found | {name: version(name) for name in PACKAGES}


def _leaves(values: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested values, each with where it is and with what stands before it and is none."""
    for number, value in enumerate(values):
        beside = f"{number}"
        for place, leaf in pytree.tree_leaves_with_path(value):
            if isinstance(leaf, Tensor):
                yield f"{beside} {pytree.keystr(place)}", leaf
            else:
                beside += f" {pytree.keystr(place)}={leaf!r}"
        yield beside, torch.empty(0)


def _graph(program: Program) -> str:
    """The checksum of a graph and of the constants in it."""
    constants = {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
    return hashlib.sha256(f"{program.graph.graph}{digest(constants)}".encode()).hexdigest()


def _code() -> str:
    """The checksum of this package, which tells more than its version does while it is worked on."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """All fields of nested dataclasses, with names such as `recipe.match.width`."""
    if is_dataclass(value):
        yield name, type(value).__name__
        for one in fields(value):
            yield from _flat(f"{name}.{one.name}", getattr(value, one.name))
    else:
        yield name, repr(value)
