"""Writes the page that follows a model, a batch and a unit through the stages, from a real run.

    python docs/walk.py            writes docs/pages/walk.md anew

The page is a doctest, so that a test fails if its outputs are no longer what the code gives. This one fails if the
page was edited by hand:

>>> page() == PAGE.read_text(encoding="utf-8")
True
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "pages" / "walk.md"

TEXT = r"""
# A walk through the stages

This page follows two small networks, a batch and one hidden unit from `merge`'s arguments to its result. Each step
calls what `fxmerge.merge` calls, and shows the value that comes out. At the end both results are compared.
`docs/walk.py` writes this page from a real run.

## The networks

Two networks with six hidden units each have learnt one of two outputs, and zero for the other one.

>>> import torch, fxmerge
>>> from torch import nn
>>> _ = torch.set_printoptions(precision=2, sci_mode=False)
>>> def network(seed):
...     torch.manual_seed(seed)
...     return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double()
>>> x = torch.randn(128, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
>>> with torch.no_grad():
...     y = 2 * network(10)(x)
>>> def trained(seed, output):
...     model, target = network(seed), y * torch.eye(2, dtype=torch.float64)[output]
...     optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
...     for _ in range(400):
...         optimizer.zero_grad()
...         (model(x) - target).square().mean().backward()
...         optimizer.step()
...     return model.eval()
>>> a, b = trained(8, 0), trained(9, 1)

The unit that we follow is **hidden unit 0 of B**. Its incoming weights are row 0 of `0.weight`, its outgoing weights
are column 0 of `2.weight`:

>>> b[0].weight[0].detach(), b[2].weight[:, 0].detach()

## 1. Capture

`capture_program` turns a model and a batch into a program: a GraphModule to emit, and an ATen graph to analyse.

>>> from fxmerge.program.capture import capture_program
>>> program = capture_program(a, (x,))
>>> program.route
>>> for node in program.graph.graph.nodes:
...     print(f"{node.op:13} {node.name}")

## 2. Symmetry

`analyse` walks this graph, labels every value with units, and gives the classes.

>>> from fxmerge.symmetry.group import analyse
>>> propagation, symmetry = analyse(program)
>>> print(symmetry)

There is one class that may move, with six units: the hidden units. Our unit is number 0 of this class. It lies on
three axes, which are `0.weight[0]`, `0.bias[0]` and `2.weight[1]`. What the walk left on the activations after the
`relu` are these very units, along dimension 1:

>>> from fxmerge.symmetry.columns import core, support
>>> [(support(column), core(column, support(column)).tolist()) for column in propagation.labels["relu"].columns]

## 3. Verify

A random element of the group is applied to the model in float64. The outputs must not change.

>>> symmetry = symmetry.verify(a, (x,))
>>> symmetry.error < 1e-12, symmetry.demoted

## 4. Evidence

Activations are measured where a contraction consumes them: here, where the second layer reads the `relu`. `Data`
gives the batches as the model takes them. For the class there is one matrix: rows are A's units, columns are B's.

>>> from fxmerge.program.run import Data, batch_inputs
>>> from fxmerge.evidence.activations import similarities
>>> data = Data([x], batch_inputs(a))
>>> states = a.state_dict(), b.state_dict()
>>> names = "model A", "model B"
>>> found = similarities(propagation, symmetry, states, data, names, [(0, 0), (0, 1), (1, 1)])
>>> found[0][0, 1]

Our unit is column 0. It is most like A's unit {{nearest}}, by {{by}}.

## 5. Match

`match_models` aligns the units of both networks, by weights and by these correlations, and then zips them. It gives
two unit maps. The first is one to one:

>>> from fxmerge.matching.models import match_models
>>> from fxmerge.recipe import Zip
>>> from fxmerge.symmetry.flow import flows
>>> matching = match_models(symmetry, flows(propagation), states, found, Zip(), None)
>>> print(matching.alignment)
>>> [units[0].tolist() for units in matching.alignment.maps]

A's units stay where they are: the result is in A's units. Our unit 0 of B goes to place {{place}}. The second map
merges the aligned units, and may merge two units of one network:

>>> print(matching.merged)
>>> [units[0].tolist() for units in matching.merged.maps]

So our unit, which is at place {{place}} now, goes into merged unit {{into}}. Both maps, one after the other, are
`matching.units`.

Two units of B, columns 1 and 2, are both like A's unit 1, and go into one merged unit with it. A's units 2 and 5 are
never active, as their rows of zeros show, and share a merged unit.

## 6. Combine

The parameters of B are brought into A's units, and those of both are averaged in merged units. Here are the incoming
weights of all merged units. One is the mean of our unit's weights and those of A's unit that is most like it.

>>> aligned = [matching.alignment.apply(state, m) for m, state in enumerate(states)]
>>> averaged = matching.merged.merge(aligned)
>>> averaged["0.weight"]

Our merged unit has one member of each network, and its row is the mean of their rows:

>>> u = int(matching.units.maps[1][0][0])
>>> members = [state["0.weight"][matching.units.maps[m][0] == u] for m, state in enumerate(states)]
>>> [len(own) for own in members]
>>> torch.allclose(averaged["0.weight"][u], torch.cat(members).mean(0))

## 7. Fit

The average is a start. `merge` then fits every layer, in graph order, to what both networks compute there, and its
report says how well. `before` and `after` are squared errors of a layer's outputs, as shares of its targets' squares.

>>> merged = fxmerge.merge(a, b, [x])
>>> report = fxmerge.report(merged)
>>> for name, layer in report.layers.items():
...     print(name, {key: round(layer[key], 3) for key in ("before", "after", "held_out")}, "rows", layer["rows"])

The first layer reads the inputs, which are the same for both networks, so its average is its fit. The second layer
reads merged units. The column that reads our merged unit, averaged and fitted:

>>> averaged["2.weight"][:, u], merged.state_dict()["2.weight"][:, u]

## 8. Emit

The fitted parameters are put into a copy of the GraphModule. It loads into the original class.

>>> [node.name for node in merged.graph.nodes]
>>> network(2).load_state_dict(merged.state_dict())

Without the fit, the stages of this page give what `merge` gives:

>>> from fxmerge.emit.bake import bake
>>> by_hand = bake(program, averaged)
>>> torch.allclose(by_hand(x), fxmerge.merge(a, b, [x], fxmerge.Recipe(fit=None))(x))

## 9. Report

The report holds what all stages told. `errors` are distances to the ensemble, as shares of its variance, and `images`
is where the units of each network went. The merge is far nearer to the ensemble than either network is.

>>> {key: round(value, 3) for key, value in report.errors["models"].items()}, round(report.errors["merged"], 3)
>>> report.images[1]["0.weight[0]"]
>>> _ = torch.set_printoptions(profile="default")
"""

FACTS = {
    "nearest": "int(found[0][0, 1][:, 0].argmax())",
    "by": "round(float(found[0][0, 1][:, 0].max()), 2)",
    "place": "int(matching.alignment.maps[1][0][0])",
    "into": "int(matching.units.maps[1][0][0])",
}
"""What the text tells of the run, by name."""


def page() -> str:
    """The page, with the outputs of a run."""
    names: dict[str, Any] = {}
    found: list[str] = []
    for piece in doctest.DocTestParser().parse(TEXT.lstrip()):
        if isinstance(piece, str):
            found.append(re.sub(r"\{\{(.+?)\}\}", lambda m: str(eval(FACTS[m[1]], names)), piece))
        else:
            found.append(_prompted(piece.source) + _printed(piece.source, names))
    return _fenced("".join(found))


def _prompted(source: str) -> str:
    first, *rest = source.splitlines()
    return "\n".join([f">>> {first}", *(f"... {line}".rstrip() for line in rest)]) + "\n"


def _printed(source: str, names: dict[str, Any]) -> str:
    """What a statement prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(source, "<walk>", "single"), names)
    return (
        re.sub(r"^$", "<BLANKLINE>", printed.getvalue().rstrip("\n"), flags=re.MULTILINE) + "\n"
        if printed.getvalue()
        else ""
    )


def _fenced(text: str) -> str:
    """The page with fences around examples."""
    paragraphs = re.split(r"\n\n+", text.strip())
    return "\n\n".join(f"```python\n{p}\n\n```" if p.startswith(">>>") else p for p in paragraphs) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
