"""What is measured of a method on a pair: scores, the way from one parent to the other, the plane around a merge."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from models.processes import Note, Row
from torch import Tensor, nn

from fxmerge import Average
from fxmerge.demo import count_parameters, recalibrated
from tasks_suite.methods import METHODS, OWN_DATA, WEIGHTED, Method, Pair, merged, result
from tasks_suite.problem import CHUNK, Problem
from tasks_suite.suite import NETWORKS, PROBLEMS
from tasks_suite.training import load, parents_of

POINTS = 11
"""Points on the way from one parent to the other, with both."""
PLANE = 13
"""Points along each side of a plane."""
MARGIN = 0.25
"""How far a plane goes beyond the parents, as a share of their distance."""

WEIGHTS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""How much the first parent counts, on the way from one task to the other."""
FEW = {"few": 10, "fewest": 40}
"""In settings with few data, one of so many calibration inputs is used: 20 and 5 images of each class."""

State = Mapping[str, Tensor]
Place = tuple[float, float]


def work(task: Row, note: Note) -> None:
    """One method on one pair, in a process of its own."""
    entry = NETWORKS[task["network"]]
    problem, method = PROBLEMS[entry.data](), METHODS[task["method"]]
    a, b = (load(p, Path(task["cache"])) for p in parents_of(task["network"], task["setting"], task["seed"]))
    batches, own = problem.calibration(), problem.apart()
    if every := FEW.get(task["setting"]):
        batches, own = _fewer(batches, every), (_fewer(own[0], every), _fewer(own[1], every))
    pair = Pair(a, b, batches, own, task["seed"])
    if task["measure"] == "plane":
        note("plane")
        note("done", **plane(problem, method, pair))
        return
    if task["measure"] == "tradeoff":
        note("tradeoff")
        note("done", tasks=tradeoff(problem, pair, task["method"]))
        return
    note("merge")
    began = time.perf_counter()
    networks, aligned = result(method, pair)
    note("evaluate", seconds=time.perf_counter() - began, parameters=sum(map(count_parameters, networks)))
    if method.merges:
        networks = tuple(recalibrated(network, pair.batches) for network in networks)
    note("align", scores=problem.evaluate(networks))
    if method.aligned is not None:
        aligned = aligned or method.aligned(pair)
        note("curve", change=change(pair, aligned))
        if task["setting"] == "same":
            losses = curve(problem, pair, aligned)
            note("curve", curve=losses, barrier=barrier(losses))
    note("done")


def _fewer(batches: Sequence[Tensor], every: int) -> list[Tensor]:
    return list(torch.cat(list(batches))[::every].split(CHUNK // every))


def change(pair: Pair, aligned: nn.Module) -> float:
    """How far the outputs of the aligned parent are from its own, relative to the largest, in float64.

    Statistics of BatchNorm are estimated anew for both, as some tools leave them behind.
    """
    batch = pair.batches[0].double() if pair.batches[0].is_floating_point() else pair.batches[0]
    before, after = (recalibrated(copy.deepcopy(model).double(), [batch]) for model in (pair.b, aligned))
    with torch.no_grad():
        expected, found = before(batch), after(batch)
    return float((found - expected).abs().max() / expected.abs().max())


def combined(model: nn.Module, states: Sequence[State], weights: Sequence[float], batches: list[Tensor]) -> nn.Module:
    """A copy of a model with a weighted sum of parameters, its BatchNorm statistics re-estimated."""
    network = copy.deepcopy(model)
    state = {
        name: sum(w * s[name] for w, s in zip(weights, states, strict=True)) if value.is_floating_point() else value
        for name, value in states[0].items()
    }
    network.load_state_dict(state)
    return recalibrated(network, batches)


# ---------------------------------------------------------------------- the way from one parent to the other


def curve(problem: Problem, pair: Pair, aligned: nn.Module) -> list[float]:
    """The losses at evenly spaced points from the first parent to the second in the units of the first."""
    states = (pair.a.state_dict(), aligned.state_dict())
    shares = [number / (POINTS - 1) for number in range(POINTS)]
    return [problem.loss(combined(pair.a, states, (1 - t, t), pair.batches)) for t in shares]


def barrier(losses: Sequence[float]) -> float:
    """How far the losses at evenly spaced points rise above the straight line between their ends, at most."""
    last = len(losses) - 1
    return max(loss - (losses[0] * (last - n) + losses[-1] * n) / last for n, loss in enumerate(losses))


def tradeoff(problem: Problem, pair: Pair, method: str) -> list[tuple[float, float]]:
    """The accuracies on both tasks for every weight of the first parent."""
    found = []
    for weight in WEIGHTS:
        recipe = replace(WEIGHTED[method], combine=Average((weight, 1 - weight)))
        network = recalibrated(merged(pair, recipe, apart=method == OWN_DATA), pair.batches)
        scores = problem.evaluate([network])
        found.append((scores["task_a"], scores["task_b"]))
    return found


# ---------------------------------------------------------------------- the plane


def plane(problem: Problem, method: Method, pair: Pair) -> Row:
    """The losses on the plane through both parents as they are and what a method makes of them.

    Returns:
        The coordinates of the three networks, the coordinates of the columns and rows of a grid, and the
        losses of the grid, row by row. Distances are those of parameter space.
    """
    (network,) = result(method, pair)[0]
    states = [model.state_dict() for model in (pair.a, pair.b, network)]
    names = [name for name, _ in pair.a.named_parameters()]
    flat = [torch.cat([state[name].flatten() for name in names]).double() for state in states]
    places = coordinates(*flat)
    reach = MARGIN * places[1][0]
    columns, rows = (_span([place[axis] for place in places], reach) for axis in (0, 1))
    losses = []
    for y in rows:
        for x in columns:
            weights = barycentric((x, y), places)
            losses.append(problem.loss(combined(pair.a, states, weights, pair.batches)))
    grid = [losses[n : n + PLANE] for n in range(0, len(losses), PLANE)]
    return {"places": places, "columns": columns, "rows": rows, "losses": grid}


def coordinates(a: Tensor, b: Tensor, c: Tensor) -> list[Place]:
    """Three points in a plane of their own: the first at the origin, the second on the first axis."""
    side, other = b - a, c - a
    length = float(side.norm())
    along = float(other @ side) / length
    return [(0.0, 0.0), (length, 0.0), (along, math.sqrt(max(float(other @ other) - along**2, 0.0)))]


def barycentric(point: Place, places: Sequence[Place]) -> tuple[float, float, float]:
    """The weights, which sum to one, that make a point of three others, the first of which is the origin."""
    (_, _), (bx, _), (cx, cy) = places
    third = point[1] / cy
    second = (point[0] - third * cx) / bx
    return 1 - second - third, second, third


def _span(values: Sequence[float], reach: float) -> list[float]:
    return torch.linspace(min(values) - reach, max(values) + reach, PLANE).tolist()
