"""What a network costs to run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from fxmerge.program.capture import Args
from fxmerge.program.captured import Program, quiet
from fxmerge.program.run import Runner


def flops_of(program: Program, state: Mapping[str, Tensor], call: tuple[Args, Mapping[str, Any]]) -> Counter[str]:
    """How many floating-point operations a program takes on some inputs, as torch counts them, by the parameter that
    they multiply with; those of none, such as queries with keys, under "".

    Arguments:
        program: the program.
        state: its parameters.
        call: (args, kwargs).
    """
    counter = _Counter(program)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, quiet(), torch.no_grad():  # Shapes are enough.
        args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, call)
        counter.outputs({name: mode.from_tensor(tensor.detach()) for name, tensor in state.items()}, args, kwargs)
    return counter.found


class _Counter(Runner):
    """Counts the operations of every node."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.found: Counter[str] = Counter()
        self.reads: dict[fx.Node, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counted:
            value = super().run_node(n)
        kind, name = self.program.sources.get(n, ("", ""))
        read = next((self.reads[a] for a in n.all_input_nodes if a in self.program.derived and self.reads[a]), "")
        self.reads[n] = name if kind == "parameter" else read if n in self.program.derived else ""
        self.found[read] += counted.get_total_flops()
        return value
