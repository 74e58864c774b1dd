"""Merged units along the values of a graph: what layers are to learn is what their parents give there."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxmerge.combine.average import average
from fxmerge.evidence.activations import similarities
from fxmerge.job import prepare
from fxmerge.matching.models import match_models, pairs_to_correlate
from fxmerge.program.captured import Program
from fxmerge.program.run import Runner
from fxmerge.recipe import Run, Zip
from fxmerge.refitting.gather import LayerFit, Teacher
from fxmerge.refitting.layers import Use, find_layers
from fxmerge.refitting.places import Places
from fxmerge.symmetry.flow import flows
from fxmerge.symmetry.shown import classes_along, units_along
from tests.networks import Attentive, Convolutional, Mixing, pictures


class Everything(Runner):
    """Keeps all values."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def values(program: Program, state: Mapping[str, Tensor], x: Tensor) -> dict[fx.Node, Any]:
    runner = Everything(program)
    runner.call(state, (x,), {})
    return runner.values


Zipped = tuple[Program, list[dict[str, Tensor]], dict[str, Tensor], list[Teacher]]


def zipped(models: tuple[nn.Module, ...], weights: tuple[float, ...]) -> Zipped:
    """The program; the aligned models, their zip, and how they teach it."""
    job = prepare(models, pictures(), Run(progress=False))
    found, symmetry = job.symmetry(None, (), verify=False)
    assert job.data is not None
    pairs = pairs_to_correlate(Zip(), len(models), 0)
    shown = similarities(found, symmetry, job.states, job.data, job.names, pairs, "pearson")
    matching = match_models(symmetry, flows(found), job.states, shown, Zip(), 0)
    states = [matching.alignment.apply(state, m) for m, state in enumerate(job.states)]
    units = matching.merged
    assert units.moving
    along = classes_along(found, symmetry), units_along(found, symmetry)
    teachers = [Teacher(*units.produce(state, m), Places(*along, units, m)) for m, state in enumerate(states)]
    return found.program, states, average(units, states, weights, ()), teachers


@pytest.mark.parametrize(
    ("network", "unknown", "apart"),
    [(Attentive, {"qkv.weight"}, set()), (Convolutional, set(), {"deep.weight"}), (Mixing, set(), {"places.weight"})],
)
def test_layers_learn_their_parents_outputs_in_merged_units(
    network: type[nn.Module], unknown: set[str], apart: set[str]
) -> None:
    """By coefficients whose outputs are merged, or by merging the outputs: the same, but where rows or groups of the
    data are merged, of which coefficients know nothing. In a packed projection queries and keys are of one class, so
    that a unit does not tell its position."""
    program, states, start, teachers = zipped((network(0), network(1)), (0.3, 0.7))
    x = torch.cat(pictures())
    taught = dict(enumerate(values(program, state, x) for state in states))
    for layer in find_layers(program).all:
        (use,) = layer.uses
        known = all(t.places is not None and t.places.known(use.node) for t in teachers)
        assert known == (layer.name not in unknown)
        if known:
            by_outputs, by_coefficients = (
                LayerFit(layer, start, teachers, {}, shown, {(0.3, 0.7): 1}, 0).targets(use, taught, (0.3, 0.7), None)
                for shown in ({use}, set[Use]())
            )
            alike = torch.allclose(by_outputs, by_coefficients, atol=1e-5)
            assert alike == (layer.name not in apart)


def test_units_that_do_not_tell_their_position_are_not_gathered() -> None:
    program, _, _, (teacher, _) = zipped((Attentive(0), Attentive(1)), (0.5, 0.5))
    (layer,) = (layer for layer in find_layers(program).all if layer.name == "qkv.weight")
    assert teacher.places is not None
    with pytest.raises(ValueError, match="along dimension 2 of graph node"):
        teacher.places.gather(layer.uses[0].node, torch.zeros(1, 64, 24))
