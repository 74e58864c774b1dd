"""Other ways to fewer experts, written from their papers, of networks whose mixtures are `Experts`.

All look once at the whole network on the calibration data, give every mixture the same number of experts, and fit
nothing. Ways that merge leave the router as it is, as published: a token goes to the experts that it went to before,
each of which is now that of its group. Here a group's expert stands in the place of every member, which computes the
same; what would be stored is one for each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor, nn
from torch.nn import functional as F

from tasks_suite.sequences import Experts


@dataclass
class Observed:
    """What the calibration data show of one mixture.

    Attributes:
        logits: of the router, shape (tokens, experts).
        gates: what each expert's output counts, 0 where a token does not go to it, shape (tokens, experts).
        norms: of each expert's output, shape (tokens, experts).
        means: of each expert's output on all tokens, shape (experts, dim).
    """

    logits: Tensor
    gates: Tensor
    norms: Tensor
    means: Tensor

    @property
    def times(self) -> Tensor:
        """How many tokens go to each expert."""
        return (self.gates > 0).sum(0)


def mixtures(network: nn.Module) -> dict[str, Experts]:
    """The mixtures of a network by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Experts)}


@torch.no_grad()
def observe(network: nn.Module, batches: Sequence[Tensor]) -> list[Observed]:
    """Runs a network on calibration data and looks at each of its mixtures."""
    seen: dict[nn.Module, list[tuple[Tensor, ...]]] = {module: [] for module in mixtures(network).values()}

    def note(module: Any, args: tuple[Tensor], _: Tensor) -> None:
        x = args[0].flatten(0, -2)
        logits = module.router(x)
        best, chosen = logits.softmax(-1).topk(2, -1)
        gates = torch.zeros_like(logits).scatter(1, chosen, best / best.sum(1, keepdim=True))
        gate, up = torch.einsum("nd,ehd->neh", x, module.gate_up).chunk(2, -1)
        outputs = torch.einsum("neh,edh->ned", F.silu(gate) * up, module.down)
        seen[module].append((logits, gates, outputs.norm(dim=-1), outputs.sum(0)))

    hooks = [module.register_forward_hook(note) for module in seen]
    for tokens in batches:
        network(tokens)
    for hook in hooks:
        hook.remove()
    found = list[Observed]()
    for parts in seen.values():
        logits, gates, norms, sums = zip(*parts, strict=True)
        rows = torch.cat(logits)
        found.append(Observed(rows, torch.cat(gates), torch.cat(norms), torch.stack(sums).sum(0) / len(rows)))
    return found


def most_frequent(seen: Observed, experts: int) -> Tensor:
    """The experts that most tokens go to, in order."""
    return seen.times.topk(experts).indices.sort().values


def by_reap(seen: Observed, experts: int) -> Tensor:
    """The experts with the highest score of REAP (arXiv 2510.13999, equation 9), in order: the mean, over the tokens
    that go to an expert, of its gate value times the norm of its output."""
    score = (seen.gates * seen.norms).sum(0) / seen.times.clamp(min=1)
    return score.topk(experts).indices.sort().values


def around_most_frequent(seen: Observed, experts: int) -> Tensor:
    """For each expert its group as in MC-SMoE (arXiv 2310.01334, section 3.1), without the alignment of units: the
    experts that most tokens go to are the centres, and every other expert joins the one whose logits over the tokens
    have the largest cosine with its own."""
    centres = most_frequent(seen, experts)
    logits = F.normalize(seen.logits, dim=0)
    groups = (logits.T @ logits[:, centres]).argmax(1)
    groups[centres] = torch.arange(experts)
    return groups


def by_outputs(seen: Observed, experts: int) -> Tensor:
    """For each expert its group as in HC-SMoE (arXiv 2410.08589, section 3.2): hierarchical clustering with average
    linkage of the experts' mean outputs, by Euclidean distance."""
    tree = linkage(seen.means.double().numpy(), method="average")
    groups = fcluster(tree, experts, criterion="maxclust")
    return torch.from_numpy(np.unique(groups, return_inverse=True)[1])


def pruned(network: nn.Module, small: nn.Module, kept: Sequence[Tensor]) -> nn.Module:
    """A network with some experts of every mixture.

    Arguments:
        network: with all experts.
        small: of the same class, with as many experts as are kept.
        kept: for every mixture, the numbers of its experts.
    """
    state = network.state_dict()
    for name, numbers in zip(mixtures(network), kept, strict=True):
        for parameter in ("router.weight", "gate_up", "down"):
            state[f"{name}.{parameter}"] = state[f"{name}.{parameter}"][numbers]
    small.load_state_dict(state)
    return small.eval()


def grouped(network: nn.Module, copy: nn.Module, groups: Sequence[Tensor], seen: Sequence[Observed]) -> nn.Module:
    """A network in which every expert is the mean of its group, weighted by how many tokens go to each member.

    Arguments:
        network: with experts of their own.
        copy: of the same class and sizes.
        groups: for every mixture, the group of each expert.
        seen: the mixtures on the calibration data.
    """
    state = network.state_dict()
    for name, own, observed in zip(mixtures(network), groups, seen, strict=True):
        members = F.one_hot(own).T.double()
        shares = members * observed.times
        unused = shares.sum(1, keepdim=True) == 0
        shares = torch.where(unused, members, shares)
        shares = (shares / shares.sum(1, keepdim=True)).float()
        for parameter in ("gate_up", "down"):
            value = state[f"{name}.{parameter}"]
            state[f"{name}.{parameter}"] = torch.einsum("ge,e...->g...", shares, value)[own]
    copy.load_state_dict(state)
    return copy.eval()
