"""Merged units along the values of a graph: what layers are to learn is what their parents give there."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxmerge.job import prepare
from fxmerge.merger import Merger, Plan
from fxmerge.program import Program
from fxmerge.refitting.gather import LayerFit
from fxmerge.refitting.layers import Use, find_layers
from fxmerge.run import Runner
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
    models = [network(seed) for seed in (0, 1)]
    job = prepare(models, pictures(), 0.5, None, False, None, (), None)
    merger = Merger(job, *job.symmetry(None, False), Plan((0.3, 0.7), "zip"))
    attempt = merger.attempt(0.5)
    assert attempt.zipped is not None
    states = [p.apply(s) for p, s in zip(attempt.aligned.permutations, merger.states, strict=True)]
    program = merger.found.program
    teachers = merger.teachers(program, states, attempt.zipped)
    x = torch.cat(pictures())
    taught = dict(enumerate(values(program, state, x) for state in states))
    for layer in find_layers(program).all:
        (use,) = layer.uses
        known = all(t.places is not None and t.places.known(use.node) for t in teachers)
        assert known == (layer.name not in unknown)
        if known:
            by_outputs, by_coefficients = (
                LayerFit(layer, attempt.state, teachers, {}, shown, {(0.3, 0.7): 1}, 0).targets(
                    use, taught, (0.3, 0.7), None
                )
                for shown in ({use}, set[Use]())
            )
            alike = torch.allclose(by_outputs, by_coefficients, atol=1e-5)
            assert alike == (layer.name not in apart)


def test_units_that_do_not_tell_their_position_are_not_gathered() -> None:
    job = prepare([Attentive(0), Attentive(1)], pictures(), 0.5, None, False, None, (), None)
    merger = Merger(job, *job.symmetry(None, False), Plan((0.5, 0.5), "zip"))
    attempt = merger.attempt(0.5)
    assert attempt.zipped is not None
    program = merger.found.program
    (teacher, _) = merger.teachers(program, merger.states, attempt.zipped)
    (layer,) = (layer for layer in find_layers(program).all if layer.name == "qkv.weight")
    assert teacher.places is not None
    with pytest.raises(ValueError, match="along dimension 2 of graph node"):
        teacher.places.gather(layer.uses[0].node, torch.zeros(1, 64, 24))
