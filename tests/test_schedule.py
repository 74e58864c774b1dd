"""The order in which a graph is computed while its parameters are being found."""

from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.refitting.boundaries import Boundaries, without_the_rest
from fxmerge.refitting.schedule import Step, jump, stages_of, walk


def graph_of(function: Any) -> dict[str, fx.Node]:
    return {node.name: node for node in fx.symbolic_trace(function).graph.nodes}


def branching(x: Tensor) -> Tensor:
    a, b = torch.sin(x), torch.cos(x)
    return torch.tanh(a + b) * x


def test_sets_are_due_as_soon_as_their_inputs_are_final() -> None:
    n = graph_of(branching)
    due, final = stages_of(n["sin"].graph, [[n["sin"]], [n["cos"]], [n["tanh"]]], ())
    assert due == [[0, 1], [2]]
    assert [final[n[name]] for name in ("x", "sin", "add", "tanh", "mul")] == [0, 1, 1, 2, 2]


def test_a_set_is_due_with_its_first_node_and_final_after_it() -> None:
    def looping(x: Tensor) -> Tensor:
        return torch.sin(torch.cos(torch.sin(x)))

    n = graph_of(looping)
    due, final = stages_of(n["sin"].graph, [[n["sin"], n["sin_1"]]], ())
    assert due == [[0]]
    assert final[n["sin_1"]] == 1


def test_every_node_is_computed_once_and_kept_as_long_as_needed() -> None:
    n = graph_of(branching)
    graph = n["sin"].graph
    _, final = stages_of(graph, [[n["sin"]], [n["cos"]], [n["tanh"]]], ())
    first, second, third = walk(graph, [[n["x"]], [n["add"]], [n["mul"]]], (), final)
    assert (first.run, first.show, first.keep) == ((), {n["x"]}, {n["x"]})
    assert (second.run, second.show) == ((n["sin"], n["cos"], n["add"]), {n["add"]})
    assert second.keep == {n["x"], n["add"]}
    assert (third.run, third.show, third.keep) == ((n["tanh"], n["mul"]), {n["mul"]}, set())


def test_steps_in_a_row_are_one_jump_to_what_the_last_one_keeps() -> None:
    n = graph_of(branching)
    graph = n["sin"].graph
    _, final = stages_of(graph, [[n["sin"]], [n["cos"]], [n["tanh"]]], ())
    first, second, third = walk(graph, [[n["x"]], [n["add"]], [n["mul"]]], (), final)
    assert jump([first]) == Step((), frozenset(), first.keep)
    assert jump([first, second]) == Step((n["sin"], n["cos"], n["add"]), frozenset(), second.keep)
    assert jump([second]) == jump([first, second])
    assert jump([first, second, third]) == Step((), frozenset(), frozenset())


def test_a_jump_computes_every_node_once() -> None:
    n = graph_of(branching)
    graph = n["sin"].graph
    _, final = stages_of(graph, [[n["sin"]], [n["tanh"]]], ())
    steps = walk(graph, [[n["add"]], [n["add"]], [n["mul"]]], (), final)
    assert [node for step in steps[:2] for node in step.run].count(n["sin"]) == 2
    assert jump(steps[:2]).run == (n["sin"], n["cos"], n["add"])


def test_what_is_not_final_is_computed_again() -> None:
    n = graph_of(branching)
    graph = n["sin"].graph
    _, final = stages_of(graph, [[n["sin"]]], ())
    first, second = walk(graph, [[n["add"]], [n["add"]]], (), final)
    assert first.run == (n["sin"], n["cos"], n["add"])
    assert second.run == (n["sin"], n["add"])
    assert n["cos"] in first.keep


def test_values_beyond_the_budget_come_back_from_disk() -> None:
    values = {i: {"a": torch.full((100,), float(i)), "b": i} for i in range(3)}
    with Boundaries(budget=800) as kept:
        for i, value in values.items():
            kept.put((i, 0), value)
        assert kept.bytes == 800
        folder = kept._folder
        assert folder is not None
        for i, value in values.items():
            got = kept.take((i, 0))
            assert torch.equal(got["a"], value["a"])
            assert got["b"] == i
        assert kept.bytes == 0


def test_a_part_of_a_large_tensor_counts_and_is_written_as_what_it_shows() -> None:
    data = torch.arange(100_000.0).reshape(-1, 10)
    part = {"rows": data[5:10], "column": [data[:20, 3]], "repeated": data[:1, :1].expand(4, 4)}
    shown = 50 * 4 + 20 * 4 + 16 * 4
    for budget in (shown, 0):
        with Boundaries(budget) as kept:
            kept.put((0, 0), part)
            assert kept.bytes == (shown if budget else 0)
            assert budget or kept._path((0, 0)).stat().st_size < shown + 4000
            got = kept.take((0, 0))
            assert torch.equal(got["rows"], part["rows"])
            assert torch.equal(got["column"][0], part["column"][0])
            assert torch.equal(got["repeated"], part["repeated"])


def test_parts_that_show_all_of_a_tensor_together_share_it_and_count_once() -> None:
    whole = torch.randn(4, 6)
    left, right = whole.chunk(2, dim=1)
    values = {"left": left, "right": right, "turned": whole.T}
    assert all(value is values[key] for key, value in without_the_rest(values).items())
    with Boundaries(1000) as kept:
        kept.put((0, 0), values)
        assert kept.bytes == 24 * 4
