"""Warnings of results that may be poor, each in one sentence or two, with what to do about it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fxmerge.emit.fork import Head
from fxmerge.evidence.running import Off
from fxmerge.ordering import error_of
from fxmerge.refitting.output_error import OutputErrors
from fxmerge.symmetry.flow import Flow
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.outputs import name_of, paths_of
from fxmerge.symmetry.propagate import OUTPUT
from fxmerge.symmetry.propagation import Axis, Propagation

logger = logging.getLogger(__name__)

MANY = 0.5
"""More than this share of the parameter entries, or of the layers, is worth a warning."""

ROUNDING = 1e-6
"""Two errors that differ by less, as shares of the variance, are the same but for rounding."""


def warn_of_unused(usage: Mapping[str, Sequence[Tensor]]) -> None:
    """Warns of units that no data chose, such as experts that got no token.

    Arguments:
        usage: for classes by name, one tensor for every model: how often each unit was chosen.
    """
    for name, of_models in usage.items():
        unused = int((torch.stack(list(of_models)).sum(0) == 0).sum())
        if unused:
            logger.warning(
                "%d of the %d units of %r are never chosen on the calibration data, as experts that get no token. What "
                "they compute is lost where they are merged with others: pass more data, or data of more kinds.",
                unused,
                len(of_models[0]),
                name,
            )


def warn_of_outputs(found: Propagation, symmetry: Symmetry, flow: Mapping[Axis, Flow]) -> None:
    """Warns if most parameter entries cannot move because of units that layers read, but that are outputs, too."""
    program, stuck = found.program, {a: reasons[OUTPUT] for a, reasons in symmetry.stuck.items() if OUTPUT in reasons}
    if all(flow.get(axis) is not Flow.CONSUMES for axis in stuck):
        return  # Outputs that no layer reads, such as scores of classes, have an order that counts.
    held = total = 0.0
    for name, tensor in program.parameters.items():
        shares = [len(stuck.get((name, d), ())) / n for d, n in enumerate(tensor.shape) if n]
        held += tensor.numel() * (1 - float(np.prod([1 - share for share in shares])))
        total += tensor.numel()
    if held > MANY * total:
        names = _outputs(found, symmetry)
        logger.warning(
            "%.0f%% of the parameter entries cannot move along an axis whose units are outputs of the model: %s. "
            "If nothing depends on the order along one of these, as of features whose head is not part of the model, "
            "name it: Recipe(free=%r).",
            100 * held / total,
            ", ".join(names),
            names[-1],
        )


def _outputs(found: Propagation, symmetry: Symmetry) -> list[str]:
    """The names of the outputs along which units lie that do not move."""
    program = found.program
    (output,) = program.graph.graph.find_nodes(op="output")
    paths, free = paths_of(program.aten.out, sum(program.aten.outputs)), {o.leaf for o in symmetry.free}
    return [
        name_of(paths[leaf])
        for leaf, node in program.numbered_outputs(output)
        if leaf not in free and node.name in found.labels and found.labels[node.name].columns
    ]


def warn_of_few_rows(layers: Mapping[str, Mapping[str, float]]) -> None:
    """Warns if most refitted layers had fewer rows of data than features."""
    few = [name for name, told in layers.items() if told.get("rows", np.inf) < told.get("features", 0)]
    if len(few) > MANY * len(layers):
        first = layers[few[0]]
        logger.warning(
            "%d of %d refitted layers had fewer rows of data than features (%s%s; %r had %d rows and %d features). "
            "Pass more data: inputs need no labels.",
            len(few),
            len(layers),
            ", ".join(map(repr, few[:3])),
            ", ..." if len(few) > 3 else "",
            few[0],
            first["rows"],
            first["features"],
        )


def warn_of_no_scores(layers: Mapping[str, Mapping[str, float]]) -> None:
    """Warns if outputs were to be fitted as scores of classes, and no layer was."""
    if not any("cross_entropy_after" in told for told in layers.values()):
        logger.warning(
            "LeastSquares.outputs is 'logits', but no layer was fitted to probabilities: report(merged).left tells "
            "why a layer cannot be, and data of one row leave none to hold out."
        )


def warn_of_small_trunk(heads: Sequence[Head], sizes: Mapping[str, int], names: Sequence[str]) -> None:
    """Warns if networks share less than half of the parameters of the smallest of them.

    Arguments:
        heads: the networks.
        sizes: how many entries every tensor of all networks together has.
        names: what to call the networks.
    """
    shares = []
    for head in heads:
        keys = set(head.keys.values())
        shares.append(
            sum(sizes[k] for k in keys if not k.startswith(head.prefix)) / max(sum(sizes[k] for k in keys), 1)
        )
    if max(shares) < MANY:
        logger.warning(
            "The networks share at most %.0f%% of their parameters (%s), and all else is kept for each of them. What "
            "they share ends at the first layers that differ in op, arguments or shapes, or where the recipe says so.",
            100 * max(shares),
            names[shares.index(max(shares))],
        )


def warn_without_data(states: Sequence[Mapping[str, Tensor]], statistics: Sequence[tuple[str, str]]) -> None:
    """Warns if running statistics of models that differ had to be estimated without data."""
    first, *others = states
    names = [name for pair in statistics for name in pair]
    if any(not torch.allclose(first[name], state[name]) for state in others for name in names):
        logger.warning(
            "%d layers normalize by running statistics, such as %r. Without data these are estimated roughly, and the "
            "merged network may be near chance. Pass a loader with a few batches of inputs, which need no labels.",
            len(statistics),
            statistics[0][0],
        )


def warn_of_statistics(off: Mapping[str, Sequence[Off]]) -> None:
    """Warns if running statistics are not of the data.

    Arguments:
        off: for every model by what it is called, those statistics.
    """
    for name, statistics in off.items():
        if statistics:
            first, count = statistics[0], len(statistics)
            logger.warning(
                "The data are not like those that %s was trained on: %d of the %d channels of %r are off by more than "
                "a deviation, or spread over twice or half the range%s. If inputs were prepared in another way than in "
                "training, such as images with another mean and deviation, the result is fitted to outputs that mean "
                "nothing: prepare them as in training.",
                name,
                first.channels,
                first.of,
                first.name,
                f", as are those of {count - 1} more layer{'s' * (count > 2)}" if count > 1 else "",
            )


def warn_of_fold_without_data() -> None:
    """Warns that a folded network computes something else, and was not fitted."""
    logger.warning(
        "Without data no layer of the folded network is fitted to what the network computes, and its outputs on the "
        "example have changed: it may be near chance. Pass a loader with a few batches of inputs, which need no labels."
    )


def warn_of_nearer_parent(errors: OutputErrors, names: Sequence[str]) -> None:
    """Warns if one of the models alone is nearer to the mean of all models' outputs than the merged network is."""
    models = {number: error for number, error in errors.items() if number is not None}
    nearest = min(models, key=lambda number: error_of(models[number]), default=None)
    if nearest is not None and error_of(models[nearest]) + ROUNDING < error_of(errors[None]):
        logger.warning(
            "%s alone is nearer to the mean of all models' outputs than the merged network is: its squared "
            "distance is %.3g times their variance, that of the merged network %.3g. fxmerge.compare measures both, on "
            "data of your choice.",
            names[nearest][:1].upper() + names[nearest][1:],
            models[nearest],
            errors[None],
        )


def warn_of_far_heads(errors: OutputErrors) -> None:
    """Warns if networks with heads of their own miss more of the models' outputs than they have of them: an error is a
    share of the variance, so that above a half, what is missed is larger than what is computed."""
    if errors and error_of(errors[None]) > MANY:
        logger.warning(
            "The merged network is far from its models: it misses %.0f%% of the variance of their outputs. Let them "
            "share less, such as Recipe(share=0.5), keep more units, such as Recipe(match=Zip(width=1.5)), or pass "
            "more data. fxmerge.compare measures it on data of your choice.",
            100 * errors[None],
        )


def warn_of_width(reasons: Sequence[str]) -> None:
    """Warns that a network keeps its size, though another was asked for.

    Arguments:
        reasons: for some classes, why they keep their number of units.
    """
    logger.warning("No class of units has another width, so that the network keeps its size: %s", " ".join(reasons))
