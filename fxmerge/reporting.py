"""What is known of a merged network: how it was made, and how well its parts fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any
from weakref import WeakKeyDictionary

from torch import fx, nn

from fxmerge import html
from fxmerge.errors import OptionError
from fxmerge.evidence.sampled import SampledSimilarity
from fxmerge.recipe import NOTHING
from fxmerge.refitting.output_error import OutputErrors
from fxmerge.symmetry.group import Symmetry
from fxmerge.units.unit_map import UnitMap

KEY = "fxmerge"
"""The entry of a GraphModule's `meta` in which its report lies."""


PICKLED = "fxmerge_report"
"""The attribute by which a report outlives pickling, which takes the `meta` of a GraphModule away."""


@dataclass(frozen=True)
class Made:
    """The values that a network was made with, which are written beside it. They do not outlive pickling.

    Attributes:
        symmetry: of the models, verified unless the run says otherwise.
        units: where the units of the models went; None where networks stand side by side.
        similarities: how alike some units of every class are, before and after they were matched.
        names: what the models are called, a base first.
        peak_memory: bytes of memory that the process had in use at most until then; None where that is not known.
    """

    symmetry: Symmetry
    units: UnitMap | None
    similarities: tuple[SampledSimilarity, ...] = ()
    names: tuple[str, ...] = ()
    peak_memory: int | None = None


_MADE: WeakKeyDictionary[fx.GraphModule, Made] = WeakKeyDictionary()
"""What networks were made with. In a network itself it would be pickled, and could then be read with fxmerge only."""


def attach(report: Report, module: fx.GraphModule, made: Made) -> None:
    """Gives a network its report, and the values that it was made with."""
    module.meta[KEY] = report.to_dict()
    _MADE[module] = made
    setattr(module, PICKLED, module.meta[KEY])


def made_with(module: nn.Module) -> Made:
    """The values that a network was made with.

    Raises:
        OptionError: if fxmerge did not make the network, or it was copied or unpickled.
    """
    found = _MADE.get(module) if isinstance(module, fx.GraphModule) else None
    if found is None:
        raise OptionError(
            f"It is not known what the {type(module).__name__} was made with: pass what merge, merge_many, fold or "
            "align returned, in the same process, and no copy of it."
        )
    return found


@dataclass(frozen=True)
class Report:
    """What `merge`, `merge_many` and `align` tell of their result.

    Attributes:
        models: how many models there were, without a base.
        recipe: the recipe without "auto", as `Recipe.to_dict` gives it; None for `align`.
        weights: how much each model counted.
        units_of: the number of the model in whose units the result is; None for those of the base.
        images: for every model, by class, the merged unit that each of its units went into.
        quality: for every model that was matched, by class, the mean similarity of matched units, by "weights" and by
            "activations".
        objective: the objectives of the alignment, at the start and after every step; none ever falls.
        zip_objective: the same of the zip.
        zipped_within: by class, how many merged units have several members of one model.
        layers: by fitted layer, the numbers of its fit: see `Refitted.layers`.
        left: by parameter, why it was left as it was.
        errors: what the outputs of the "merged" network, and those of each of the "models", miss of the variance of the
            mean of the models' outputs; empty where it was not measured.
        held_out: whether the error of the merged network is on data that its last layers were not fitted to.
        heads: where the networks have heads of their own, what `head` takes them out by.
        widths: for every class of which there are more or fewer merged units than a model has units, both numbers: of a
            model, and merged.
        config: where the class of the first model is built from a `config`, as in transformers, and can have these
            widths: what to change in it. The state dict then loads into a new instance, which computes the same.
        shared: the names of tensors that are equal in all models and stayed as they are.
        classes: the classes of the symmetry, with their axes, and why anything is pinned.
        bases: the kinds of the classes that were matched by a change of basis, by name. Their units have no places in
            `images`. Of classes whose units were matched up to "signs" or "scales", or both, it says so.
        demoted: classes that failed verification.
        unknown_ops: how often each op occurs that has no rule.
        verification_error: the largest relative change of an output under random elements of the group.
        route: how the model was captured.
        seconds: time spent, by stage.
    """

    models: int
    recipe: Mapping[str, Any] | None = None
    weights: tuple[float, ...] = ()
    units_of: int | None = None
    images: tuple[Mapping[str, list[int]], ...] = ()
    quality: tuple[Mapping[str, Mapping[str, float]], ...] = ()
    objective: tuple[tuple[float, ...], ...] = ()
    zip_objective: tuple[float, ...] = ()
    zipped_within: Mapping[str, int] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, Any] = field(default_factory=dict)
    held_out: bool = False
    heads: tuple[Mapping[str, Any], ...] = ()
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    config: Mapping[str, int] | None = None
    shared: tuple[str, ...] = ()
    classes: tuple[Mapping[str, Any], ...] = ()
    bases: Mapping[str, str] = field(default_factory=dict)
    demoted: tuple[str, ...] = ()
    unknown_ops: Mapping[str, int] = field(default_factory=dict)
    verification_error: float | None = None
    route: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, so that a result can be unpickled without fxmerge."""
        return asdict(self)

    def __str__(self) -> str:
        models = "1 model" if self.models == 1 else f"{self.models} models"
        lines = [f"{models}, {self.kind}; captured by {self.route}"]
        if self.heads:
            names = ", ".join(repr(head["name"]) for head in self.heads)
            nothing = self.recipe is not None and self.recipe.get("share") == NOTHING
            lines.append(f"nothing shared, side by side {names}" if nothing else f"one trunk, with the heads {names}")
        elif self.recipe is not None and self.models > 1 and self.recipe["combine"]["kind"] == "Average":
            lines.append("the outputs stand for all models; Recipe(share='trunk') keeps their last layers apart")
        matched = [q for own in self.quality for q in own.values()]
        for space in ("weights", "activations"):
            values = [q[space] for q in matched if space in q]
            if values:
                lines.append(f"matched units are alike by {sum(values) / len(values):.2f} in {space}, on average")
        if self.layers:
            lines.append(f"{len(self.layers)} layers fitted, {len(self.left)} parameters not fitted")
        if self.widths:
            before, after = (sum(pair[i] for pair in self.widths.values()) for i in (0, 1))
            lines.append(f"{len(self.widths)} classes of another width, with {after} units in place of {before}")
        if self.errors:
            models = ", ".join(f"{error:.3g}" for error in self.errors["models"].values())
            name = "folded" if self.models == 1 else "merged"
            lines.append(
                f"{self.distance}: "
                f"{name} {self.errors['merged']:.3g}{f', models {models}' if models and self.models > 1 else ''}"
            )
        if self.demoted:
            lines.append(f"failed verification: {', '.join(self.demoted)}")
        lines.append("seconds: " + ", ".join(f"{stage} {spent:.1f}" for stage, spent in self.seconds.items()))
        return "\n".join(lines)

    @property
    def kind(self) -> str:
        """What was done: "merged", "aligned" or "folded"."""
        return "folded" if self.models == 1 else "aligned" if self.recipe is None else "merged"

    @property
    def distance(self) -> str:
        """What the numbers of `errors` are."""
        where = "held-out data" if self.held_out else "the data of the fit"
        what = "each model's own outputs, as a share of their" if self.heads else "the ensemble, as a share of its"
        what = "the model, as a share of its outputs'" if self.models == 1 else what
        return f"distance to {what} variance, on {where}"

    def _repr_html_(self) -> str:
        """The same for notebooks, with a table of the fitted layers that a reader opens."""
        text = html.lines(str(self))
        if self.layers:
            rows = [
                (name, *(f"{own[key]:.3g}" if key in own else "-" for key in ("before", "after", "held_out")))
                for name, own in self.layers.items()
            ]
            head = ("layer", "before", "after", "held out")
            inner = html.table("squared errors, as shares of the squares of the targets", head, rows)
            text += html.folded(f"{len(self.layers)} fitted layers", inner)
        if self.left:
            inner = html.table("parameters that were not fitted", ("parameter", "why"), list(self.left.items()))
            text += html.folded(f"{len(self.left)} parameters not fitted", inner)
        return text


def report(module: nn.Module) -> Report:
    """The report of a network that fxmerge made.

    Arguments:
        module: what `merge`, `merge_many` or `align` gave.

    Raises:
        OptionError: if fxmerge did not make it, or it was made by another version.

    Example:
        >>> import torch, fxmerge
        >>> def mlp():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> merged = fxmerge.merge(mlp(), mlp(), [torch.randn(16, 4)])
        >>> sorted(fxmerge.report(merged).layers)
        ['0.weight', '2.weight']
    """
    found = getattr(module, "meta", {}).get(KEY) or getattr(module, PICKLED, None)
    if not isinstance(found, Mapping) or {f.name for f in fields(Report)} != set(found):
        raise OptionError(
            f"The {type(module).__name__} has no report, or one of another version of fxmerge; pass what merge, "
            "merge_many, fold or align returned."
        )
    return Report(**found)


def named_errors(errors: OutputErrors) -> dict[str, Any]:
    """Errors of outputs as a report has them.

    Example:
        >>> named_errors({None: 0.1, 0: 0.3, 1: 0.2})
        {'merged': 0.1, 'models': {0: 0.3, 1: 0.2}}
    """
    models = {number: error for number, error in errors.items() if number is not None}
    return {"merged": errors[None], "models": dict(sorted(models.items()))} if errors else {}


def widths_of(units: UnitMap) -> dict[str, tuple[int, int]]:
    """Of the classes of other widths, the units of a model and the merged ones."""
    return {units.names[n]: (len(units.maps[0][n]), units.widths[n]) for n in sorted(units.resized)}


def classes_of(symmetry: Symmetry) -> tuple[dict[str, Any], ...]:
    """The classes of a symmetry as plain data."""
    return tuple(
        {
            "name": c.name,
            "size": c.size,
            "structure": c.structure,
            "axes": [(axis.parameter, axis.dim) for axis in c.axes],
            "parents": list(c.parents),
            "why": c.why,
        }
        for c in symmetry.classes
    )
