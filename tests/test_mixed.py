"""Experts are fitted to the sum of what they give."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.program.capture import capture_program
from fxmerge.program.run import Runner
from fxmerge.refitting.course import Lesson
from fxmerge.refitting.mixed import find_mixed
from fxmerge.refitting.refit import refit
from fxmerge.symmetry.section import end_of, section_of
from tests.slow import but_slow
from tests.test_deferred import linear, net
from tests.test_experts import by_all, by_slots, by_sorted_slots

WAYS = {"by sorted slots": by_sorted_slots, "by slots": by_slots}


def chosen(s: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    best, numbers = s.gate(h).softmax(-1).topk(2, -1)
    return best / best.sum(-1, keepdim=True), numbers


def by_sum(s: Any, x: Tensor) -> Tensor:
    """All experts work on every row."""
    h = s.enc(x)
    best, numbers = chosen(s, h)
    return by_all(s, h, torch.zeros_like(s.gate(h)).scatter(-1, numbers, best))


def by_rows(way: str) -> Any:
    return lambda s, x: WAYS[way](s, s.enc(x), *chosen(s, s.enc(x)))


FORWARDS = {"by sum": by_sum, **{way: by_rows(way) for way in WAYS}}


def mixture(name: str, seed: int = 0) -> Any:
    parts = {"enc": linear(3, 4), "gate": linear(4, 4), "up": (4, 4, 6), "down": (4, 6, 4), "dec": linear(4, 2)}
    return net(FORWARDS[name], parts, seed)


@pytest.mark.parametrize("name", FORWARDS)
def test_the_last_matrices_of_experts_go_into_a_sum(name: str) -> None:
    program = capture_program(mixture(name), (torch.randn(16, 3),))
    ((parameter, end),) = [(root.target, end) for root in program.sources if (end := end_of(program, root)) is not None]
    assert parameter == "p_down"
    assert end.meta["val"].shape[-1] == 4
    (found,) = find_mixed(program, ["down", "up"], [])
    assert (found.parameter, found.end) == ("down", end)
    whole = section_of(program, ["gate.weight", "gate.bias", "up", "down"])
    assert whole.ends == (end,)
    assert set(found.section.nodes) < set(whole.nodes)


def test_scores_that_are_an_output_too_lead_to_the_outputs() -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = mixture("by sum")

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.whole(x), self.whole.gate(self.whole.enc(x))

    program = capture_program(Told(), (torch.randn(16, 3),))
    names = [f"whole.{name}" for name in ("gate.weight", "gate.bias", "up", "down")]
    assert section_of(program, names).ends == program.answers


@pytest.mark.parametrize("batches", [1, 5])
@pytest.mark.parametrize("name", FORWARDS)
def test_experts_are_found_again_from_what_they_give_together(name: str, batches: int) -> None:
    """The network starts with other last matrices than its parent has."""
    torch.manual_seed(0)
    parent, data = mixture(name).state_dict(), [torch.randn(1024, 3) for _ in range(batches)]
    program = capture_program(mixture(name), (data[0],))
    start = {**parent, "down": torch.randn_like(parent["down"])}
    lessons = [Lesson(((x,), {}), (1.0,), 1.0) for x in data]
    refitted = refit(program, [parent], start, lessons, mixed=["down"])
    told = refitted.layers["down"]
    assert told["sum_after"] < 1e-4 < 0.1 < told["sum_before"]
    wanted, given = (Runner(program).outputs(state, (data[0],), {})[0] for state in (parent, refitted.state))
    assert float((given - wanted).square().sum() / wanted.square().sum()) < 1e-4


@pytest.mark.parametrize("name", but_slow(FORWARDS, ["by slots"]))
def test_a_fold_fits_experts_to_what_all_of_them_gave(name: str) -> None:
    torch.manual_seed(0)
    folded = fxmerge.fold(mixture(name), [torch.randn(512, 3) for _ in range(5)], {"up[0]": 3})
    report = fxmerge.report(folded)
    assert report.layers["down"]["sum_after"] < 0.9 * report.layers["down"]["sum_before"]
    assert "down" not in report.left
