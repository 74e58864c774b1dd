"""Where the trunk of networks ends."""

import pytest
import torch
from torch import Tensor, fx, nn

import fxmerge
from fxmerge.emit.trunk import trunk_of
from fxmerge.program.capture import capture_ops


class Residual(nn.Module):
    """A stem, two blocks around shortcuts, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 8)
        self.first = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        x = x + self.second(x)
        out: Tensor = self.head(x.tanh())
        return out


def graph() -> fx.GraphModule:
    return capture_ops(Residual().eval(), (torch.zeros(2, 3),))


def trunk(share: str | float, module: fx.GraphModule | None = None) -> list[str]:
    """The ops of the trunk, if all is common."""
    module = module or graph()
    nodes = [n for n in module.graph.nodes if n.op != "output"]
    found = trunk_of(module, nodes, share, ("model A", "model B"))
    for node in found:
        assert found.issuperset(node.all_input_nodes)
    read = {a for n in found for a in n.all_input_nodes}
    assert all(share == "auto" or n in read for n in found if n.op == "get_attr")
    return [n.name for n in nodes if n in found and n.op == "call_function" and "aten" in str(n.target)]


UP_TO_FIRST = ["linear", "linear_1", "relu"]
ALL_BUT_LAST = [*UP_TO_FIRST, "add", "linear_2", "relu_1", "add_1", "tanh"]


def test_all_that_is_common() -> None:
    assert trunk("auto") == [*ALL_BUT_LAST, "linear_3"]


def test_all_but_the_last_layers() -> None:
    assert trunk("trunk") == ALL_BUT_LAST


def test_up_to_a_module_or_a_node() -> None:
    assert trunk("stem") == ["linear"]
    assert trunk("first") == UP_TO_FIRST
    assert trunk("first.0") == UP_TO_FIRST[:2]
    assert trunk("add") == [*UP_TO_FIRST, "add"]
    assert trunk("second") == [*UP_TO_FIRST, "add", "linear_2", "relu_1"]


def test_up_to_a_share_of_the_parameters() -> None:
    """There are 32, 72, 72 and 18 parameters; all goes through the stem and both sums, not through the blocks."""
    assert trunk(32 / 194) == ["linear"]
    assert trunk(0.53) == ["linear"]
    assert trunk(104 / 194) == [*UP_TO_FIRST, "add"]
    assert trunk(0.95) == ALL_BUT_LAST


def test_a_share_below_the_first_layer_says_what_that_has() -> None:
    with pytest.raises(fxmerge.OptionError, match=r"share is 0\.01, but the first node .* has 0\.165 of the param"):
        trunk(0.01)


def test_a_name_that_is_none_is_told_with_those_near_it() -> None:
    with pytest.raises(fxmerge.OptionError, match=r"'frist', which is no module or node of model A, .*'first'"):
        trunk("frist")


def test_what_is_not_common_cannot_be_shared() -> None:
    module = graph()
    nodes = [n for n in module.graph.nodes if n.name in ("x", "linear") or n.op == "get_attr"]
    with pytest.raises(fxmerge.ArchitectureMismatchError, match="differ in it, or before: node 'linear_1' of model A"):
        trunk_of(module, nodes, "first", ("model A", "model B"))
    assert {n.name for n in trunk_of(module, nodes, 0.99, ("model A", "model B"))} >= {"linear"}


def test_masks_are_shared_though_all_goes_past_them() -> None:
    """What no parameter has a part in is of the trunk, and is in the way of no cut."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            mask = (x.sum(1, keepdim=True) > 0).float()
            out: Tensor = self.c(self.b(self.a(x) * mask) * mask)
            return out

    module = capture_ops(Masked().eval(), (torch.zeros(2, 3),))
    assert "linear_1" in trunk(0.9, module) and "linear_2" not in trunk(0.9, module)
    assert "gt" in trunk("a", module) and "mul" not in trunk("a", module)
