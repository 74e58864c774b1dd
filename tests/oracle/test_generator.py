"""Random architectures against the exact oracle: nothing is claimed that is no symmetry, and nothing is missed.

The architectures are those of the first seeds, so that an edit elsewhere does not change which are tried. Most are
slow.
`FXMERGE_EXAMPLES=5000 pytest tests/oracle/test_generator.py` tries more of them, and so does
`python -m tests.oracle.hunt 5000`.
"""

from __future__ import annotations

import logging
from random import Random

import pytest
import torch

from tests.oracle.generator import Recipe, build, random_recipe
from tests.oracle.hunt import EXACT, INCOMPLETE, UNUSED, examine, excuses, shorten
from tests.oracle.regressions import REGRESSIONS
from tests.slow import but_slow, examples

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("seed", examples(range, quick=6, count=200))
def test_symmetry_of_random_architectures(seed: int) -> None:
    recipe = random_recipe(Random(seed))
    finding = examine(recipe)
    excused = finding.state == UNUSED or (finding.state == INCOMPLETE and excuses(recipe))
    if finding.state != EXACT and not excused:
        short = shorten(recipe, finding.state)
        pytest.fail(f"{finding.state}: {short}\n{examine(short).detail}")


def test_recipes_are_plain_data() -> None:
    recipe = random_recipe(Random(0))
    assert eval(repr(recipe), {"Recipe": Recipe}) == recipe
    (a, x), (b, y) = build(recipe), build(recipe)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(a(*x), b(*y), strict=True))


@pytest.mark.parametrize("name", but_slow(REGRESSIONS, 7))
def test_regression(name: str, caplog: pytest.LogCaptureFixture) -> None:
    state, recipe = REGRESSIONS[name]
    with caplog.at_level(logging.ERROR):
        finding = examine(recipe)
    assert finding.state == state, f"now {finding.state}: change what REGRESSIONS says\n{finding.detail}"
