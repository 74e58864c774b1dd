"""What counts as a score."""

import math
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxmerge
from fxmerge.score import judged


@pytest.mark.parametrize("value", [None, "good", torch.zeros(2), 10**400, 1j])
def test_a_score_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(fxmerge.OptionError, match=r"score gave .* for the merged network; it must give a number"):
        judged(lambda network: value, fx.symbolic_trace(nn.ReLU()), "the merged network")


@pytest.mark.parametrize(
    ("value", "number"),
    [(True, 1), (torch.ones(1, requires_grad=True), 1), (-math.inf, -math.inf), (math.nan, -math.inf)],
)
def test_what_counts_as_a_number(value: Any, number: float) -> None:
    assert judged(lambda network: value, fx.symbolic_trace(nn.ReLU()), "the merged network") == number
