"""Golden texts: what every rule says of a tiny case of its op, and what has to be refused.

`python -m tests.golden.test_golden --write` writes the last column of `rules.txt`, and `refused.txt`, anew.
"""

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.symmetry.rules.registry import _RULES, find_rule
from tests.golden.oneop import Analysis, analyse, ops, read
from tests.golden.refused import REFUSED

GOLDEN = Path(__file__).parent
TRIALS = 3

WITHOUT = {
    "aten::cudnn_batch_norm": "it has no kernel on the CPU",
    "aten::pointwise": "the name of the rule for all ops that torch tags as pointwise",
}
"""Names in the registry of which there is no case."""

UNDEFINED = ("empty_like", "new_empty")
"""Ops that leave their values open."""


def cases() -> Iterator[tuple[str, str, str]]:
    """Name, expression and printed rule of every case."""
    for line in (GOLDEN / "rules.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            parts = [part.strip() for part in f"{line} ".split(" | ")]
            assert len(parts) == 3, f"write 'name | expression | rule', not {line!r}"
            yield parts[0], parts[1], parts[2]


CASES = list(cases())
IDS = [name for name, _, _ in CASES]


@cache
def analysis(expression: str) -> Analysis:
    return analyse(read(expression))


@pytest.mark.parametrize(("name", "expression", "printed"), CASES, ids=IDS)
def test_a_rule_says_what_is_written(name: str, expression: str, printed: str) -> None:
    assert str(analysis(expression)) == printed


@pytest.mark.parametrize(("name", "expression", "printed"), CASES, ids=IDS)
def test_the_op_does_what_its_rule_says(name: str, expression: str, printed: str) -> None:
    if not name.startswith(UNDEFINED):
        generator = np.random.default_rng(0)
        failures = {analysis(expression).holds(generator) for _ in range(TRIALS)} - {""}
        assert not failures


def test_no_case_lacks_a_rule() -> None:
    assert [name for name, expression, _ in CASES if analysis(expression).unknown] == []


def test_the_cases_are_in_order_and_named_by_their_ops() -> None:
    assert sorted(IDS) == IDS
    assert len(set(IDS)) == len(IDS)
    assert [name for name, expression, _ in CASES if name.split(" ")[0] != expression.partition("(")[0]] == []


def test_every_rule_has_a_case() -> None:
    seen = {op._schema.name for _, expression, _ in CASES for op in ops(read(expression))}
    own = {name for name in _RULES if name.startswith("aten::")}
    assert own - seen == set(WITHOUT)
    pointwise = _RULES["aten::pointwise"]
    assert any(find_rule(op) is pointwise and op._schema.name not in own for _, e, _ in CASES for op in ops(read(e)))


@cache
def refused(name: str) -> tuple[nn.Module, fxmerge.Symmetry]:
    """A model of which something must not move, and its symmetry."""
    model, example = REFUSED[name]
    torch.manual_seed(0)
    net = model()
    return net, fxmerge.find_symmetry(net, example)


def blocks() -> dict[str, str]:
    """The reports in `refused.txt` by name."""
    text = (GOLDEN / "refused.txt").read_text(encoding="utf-8")
    parts = (part.partition("\n") for part in text.split("\n== ")[1:])
    return {name: body.strip() for name, _, body in parts}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_must_not_move_is_refused(name: str) -> None:
    assert str(refused(name)[1]) == blocks().get(name)


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "op that cannot be probed"])
def test_what_is_left_is_a_symmetry(name: str) -> None:
    net, symmetry = refused(name)
    example = tuple(torch.randn_like(x) if x.is_floating_point() else x for x in REFUSED[name][1])
    assert symmetry.verify(net, example, trials=4).demoted == ()


def test_no_refusal_is_left_over() -> None:
    assert list(blocks()) == sorted(REFUSED)


def write() -> None:
    """Writes what is printed today."""
    path = GOLDEN / "rules.txt"
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    lines = sorted(f"{name} | {expression} | {analysis(expression)}" for name, expression, _ in CASES)
    path.write_text("\n".join([*head, "", *sorted(lines, key=lambda s: s.split(" | ")[0])]) + "\n", encoding="utf-8")
    texts = (f"== {name}\n{refused(name)[1]}\n" for name in sorted(REFUSED))
    head = ["# Reports on models of which something must not move; the models are in tests/golden/refused.py."]
    (GOLDEN / "refused.txt").write_text("\n".join([*head, "", *texts]), encoding="utf-8")


if __name__ == "__main__" and "--write" in sys.argv:
    write()
