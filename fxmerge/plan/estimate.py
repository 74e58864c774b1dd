"""How long a merge takes at least, from the sizes of its networks and the speed of the machine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from fxmerge.networks import Network
from fxmerge.plan.parts import Data
from fxmerge.program.run import Call
from fxmerge.refitting.gather import MIN_ROWS, ROWS_PER_FEATURE
from fxmerge.refitting.ridge import NormalEquations

SIDE, SECONDS = 1024, 0.2
"""The matrices by whose product the speed of the machine is measured, and for how long that is done."""

DOUBLE = 2.0
"""How many operations in float32 take the time of one in float64, at least."""


@dataclass(frozen=True)
class Estimate:
    """What a merge with data computes at least.

    Attributes:
        rows: of data.
        passes: floating-point operations of running all networks on them.
        fits: of fitting all layers; those in float64 count twice.
        speed: operations that this machine does in a second, in a product of large matrices.
        seconds: what both take at that speed. Reading and writing files, capture, the proof of the symmetry and
            matching come on top, fits may try several strengths of the ridge, and smaller or other operations are
            slower than such products.
    """

    rows: int
    passes: float
    fits: float
    speed: float
    seconds: float


def estimate(
    networks: Sequence[Network], data: Data, device: str | torch.device | None = None, *, fitted: bool = True
) -> Estimate:
    """What a merge of networks with data takes at least.

    Arguments:
        networks: without values, on the meta device.
        data: how many rows are read, at most.
        device: where it is to run.
        fitted: whether layers are fitted, and not only units matched.
    """
    counted = [_counted(own.model, (own.source.args, own.source.kwargs), data.length) for own in networks]
    passes, (first, layers) = sum(operations for operations, _ in counted), counted[0]
    # Each network is run to match units and to fit layers; the merged one, which is as large as the first, to fit them.
    passes = data.samples * (2 * passes + first if fitted else passes)
    fits = sum(layer.operations(data.samples) for layer in layers) if fitted else 0.0
    speed = speed_of(device)
    return Estimate(data.samples, passes, fits, speed, (passes + fits) / speed)


@dataclass(frozen=True)
class _Layer:
    """A layer that is fitted: its groups, the features and outputs of each, and at how many places of a row it is."""

    groups: int
    features: int
    outputs: int
    places: float

    def operations(self, rows: int) -> float:
        """Those of its normal equations and of solving them for one strength of the ridge, on each part of the data and
        on all of them; or of solving them once by products of rows, if these are fewer than features."""
        f, o = self.features, self.outputs
        equations = min(rows * self.places, max(ROWS_PER_FEATURE * f, MIN_ROWS))
        if equations <= f:
            return self.groups * DOUBLE * (2 * equations**2 * f + equations**3 / 3 + 2 * equations * f * o)
        solved = f**3 / 3 + 2 * f**2 * o
        parts = NormalEquations.parts(self.groups, f, o)
        return self.groups * (2 * equations * f * (f + o) + DOUBLE * (parts + 1) * solved)


def _counted(model: nn.Module, call: Call, length: int) -> tuple[float, list[_Layer]]:
    """The operations of a network on one row of data, or on so many tokens; and its layers.

    The operations are those that torch counts or, if torch cannot run the network without values, one multiplication
    and one addition for each weight, at one place or token (arXiv 2001.08361).
    """
    first = next((v for v in pytree.tree_leaves(call) if isinstance(v, Tensor) and v.ndim), torch.zeros(1))
    tokens = not first.is_floating_point() and first.ndim == 2
    once, scale = (float(length), length / first.numel()) if tokens else (1.0, 1 / len(first))
    weights = [(module, module._parameters.get("weight")) for module in model.modules()]
    known = Counter(id(weight) for _, weight in weights)  # What is tied to an embedding is not fitted.
    own = {m: weight for m, weight in weights if weight is not None and weight.ndim > 1 and known[id(weight)] == 1}
    places: dict[nn.Module, float] = dict.fromkeys(own, once)

    def see(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        looked_up = any(isinstance(value, Tensor) and not value.is_floating_point() for value in inputs)
        if isinstance(output, Tensor):
            places[module] = 0.0 if looked_up else scale * output.numel() / len(own[module])

    hooks = [module.register_forward_hook(see) for module in own]
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            model.eval()(*call[0], **call[1])
        operations = scale * counter.get_total_flops()
    except Exception:  # Whatever a network raises that needs values.
        operations = 2 * once * sum(p.numel() for p in model.parameters() if p.ndim > 1)
    finally:
        for hook in hooks:
            hook.remove()
    layers = []
    for module, weight in own.items():
        groups = getattr(module, "groups", 1)
        if places[module]:
            layers.append(_Layer(groups, weight[0].numel() + 1, len(weight) // groups, places[module]))
    return operations, layers


def speed_of(device: str | torch.device | None = None) -> float:
    """How many operations a second a device does in products of large matrices, in float32."""
    a = torch.ones(SIDE, SIDE, device=device or "cpu")
    a @ a
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < SECONDS:
        float((a @ a)[0, 0])  # It is computed by then, on any device.
        count += 1
    return 2.0 * SIDE**3 * count / spent
