"""How long a merge takes at least, from the sizes of its networks and the speed of the machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from fxmerge.networks import Network
from fxmerge.plan.parts import Data
from fxmerge.program.run import Call
from fxmerge.refitting.gather import MIN_ROWS, ROWS_PER_FEATURE

SIDE, SECONDS = 1024, 0.2
"""The matrices by whose product the speed of the machine is measured, and for how long that is done."""


@dataclass(frozen=True)
class Estimate:
    """What a merge with data computes at least.

    Attributes:
        rows: of data.
        passes: floating-point operations of running all networks on them.
        fits: of fitting all layers.
        speed: operations that this machine does in a second, in a product of large matrices.
        seconds: what both take at that speed. Reading and writing files, capture, the proof of the symmetry and
            matching come on top, and smaller or other operations are slower than such products.
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
    found = [
        _operations(network.model, (network.source.args, network.source.kwargs), data.length) for network in networks
    ]
    # Each network is run to match units and to fit layers; the merged one, which is as large as the first, to fit them.
    passes = data.samples * (2 * sum(found) + found[0] if fitted else sum(found))
    fits = fitted * sum(
        _fit(tensor.shape, data.samples) for tensor in networks[0].model.parameters() if tensor.ndim > 1
    )
    speed = speed_of(device)
    return Estimate(data.samples, passes, fits, speed, (passes + fits) / speed)


def _operations(model: nn.Module, call: Call, length: int) -> float:
    """The operations of a network on one row of data; of rows of tokens, on that many tokens. They are those that torch
    counts or, if torch cannot run the network without values, one multiplication and one addition for each weight, at
    one place or token (arXiv 2001.08361)."""
    first = next((v for v in pytree.tree_leaves(call) if isinstance(v, Tensor) and v.ndim), torch.zeros(1))
    tokens = not first.is_floating_point() and first.ndim == 2
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            model.eval()(*call[0], **call[1])
    except Exception:  # Whatever a network raises that needs values.
        return 2.0 * sum(p.numel() for p in model.parameters() if p.ndim > 1) * (length if tokens else 1)
    return float(counter.get_total_flops()) * (length / first.numel() if tokens else 1 / len(first))


def _fit(shape: Sequence[int], rows: int) -> float:
    """The operations of a layer's normal equations, where every row of data gives one equation at least."""
    outputs, features = shape[0], torch.Size(shape[1:]).numel() + 1
    count = min(rows, max(ROWS_PER_FEATURE * features, MIN_ROWS))
    return 2.0 * count * features * (features + outputs) + 2.0 * features**2 * outputs + features**3


def speed_of(device: str | torch.device | None = None) -> float:
    """How many operations a second a device does in products of large matrices, in float32."""
    a = torch.ones(SIDE, SIDE, device=device or "cpu")
    a @ a
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < SECONDS:
        float((a @ a)[0, 0])  # It is computed by then, on any device.
        count += 1
    return 2.0 * SIDE**3 * count / spent
