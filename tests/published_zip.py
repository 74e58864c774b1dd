"""The zip as ZipIt! and MuDSC publish it, step by step and slowly: what `fxmerge.matching.zipping` is tested against.

After match_tensors_zipit of ZipIt! (arXiv 2305.03053) and default_group_fusion_weight of MuDSC (arXiv 2403.01753), with
the same state and the same steps in torch: for every merge the whole matrix of similarities is searched, two of
its columns and rows become one, and it and the matrix that tells which units are merged are copied without
the other. It differs from the published code in three places, each marked below, where that code does what cannot be
meant; and it adds up similarities of blocks where that code takes their mean, which rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Array = NDArray[np.float64]
INF = torch.inf


def without(x: Tensor, column: int) -> Tensor:
    return torch.cat([x[:, :column], x[:, column + 1 :]], dim=1)


@dataclass
class State:
    """What is left of the units after some merges; all but `similarity` and the budgets shrink with every merge.

    Attributes:
        similarity: of all units, before any merge.
        links: similarities of all pairs of merged units; those that must not be merged have -inf.
        unmerge: shape (units, merged units), with ones where a unit went into a merged one.
        model: for every merged unit, the model of its first member.
        block: for every merged unit, the block of its first member.
        budget: for every model, how many merges of its own units are left.
        block_budget: for every block, the same.
        damping: a of the papers.
        mask: zero for pairs in the blocks that are merged now, -inf for all others; None without blocks.
        matched: the blocks that are merged now.
        forced: how many merges were forced.
        lifted: blocks in which merges are forced.
    """

    similarity: Tensor
    links: Tensor
    unmerge: Tensor
    model: Tensor
    block: Tensor
    budget: list[int]
    block_budget: list[int]
    damping: float
    mask: Tensor | None
    matched: list[int] = field(default_factory=list)
    forced: int = 0
    lifted: set[int] = field(default_factory=set)

    def forbid(self, of: Tensor, which: int) -> None:
        own = of == which
        self.links[own[:, None] & own[None, :]] = -INF

    def enter(self, matched: list[int]) -> None:
        """From here on only units of these blocks are merged, with each other."""
        self.matched = matched
        if self.mask is not None:
            self.mask = torch.full_like(self.links, -INF)
            inside = torch.isin(self.block, torch.tensor(matched))
            self.mask[inside[:, None] & inside[None, :]] = 0

    def merge_best(self) -> None:
        """Merges the most similar two units."""
        allowed = self.links if self.mask is None else self.links + self.mask
        best = int(allowed.reshape(-1).argmax())
        i, j = sorted((best % len(self.links), best // len(self.links)))
        if allowed[i, j] == -INF:
            # First difference: the published code merges unit 0 with itself here, and loses a unit by it.
            self.lift()
            self.merge_best()
            return
        lifted = self.matched[0] in self.lifted
        self.forced += lifted
        self.unmerge[:, i] += self.unmerge[:, j]
        self.unmerge = without(self.unmerge, j)
        # Second difference: the published code forbids the rows that these models had before any merge.
        of_both = (self.model == self.model[i]) | (self.model == self.model[j])
        self.links[:, i] = torch.minimum(self.links[:, i], self.links[:, j])
        if not lifted:
            if self.damping > 0:
                self.links[:, i] *= self.damping
            else:
                self.links[of_both, i] = -INF
        self.links = without(self.links, j)
        self.links[i, :] = torch.minimum(self.links[i, :], self.links[j, :])
        if not lifted:
            if self.damping > 0:
                self.links[i, :] *= self.damping
            else:
                self.links[i, of_both[torch.arange(len(of_both)) != j]] = -INF
        self.links = without(self.links.T, j).T
        if self.mask is not None:
            self.mask = without(without(self.mask, j).T, j).T
        same_model, same_block = self.model[i] == self.model[j], self.block[i] == self.block[j]
        self.model, self.block = without(self.model[None], j)[0], without(self.block[None], j)[0]
        if same_model and not lifted:
            model = int(self.model[i])
            self.budget[model] -= 1
            if self.budget[model] <= 0:
                self.forbid(self.model, model)
        if self.mask is not None and same_block and not lifted:
            block = int(self.block[i])
            self.block_budget[block] -= 1
            if self.block_budget[block] <= 0:
                self.forbid(self.block, block)

    def lift(self) -> None:
        """Forgets damping and what is forbidden in the blocks: the minimum linkage and nothing else."""
        self.lifted |= set(self.matched)
        inside = [k for k in range(len(self.block)) if int(self.block[k]) in self.matched]
        members = {k: self.unmerge[:, k].nonzero()[:, 0] for k in inside}
        for x in inside:
            for y in inside:
                if x != y:
                    self.links[x, y] = self.similarity[members[x]][:, members[y]].min()


def match(similarity: Array, models: int, blocks: int) -> list[list[int]]:
    """For every block of the first model, the blocks of all models that are merged with it."""
    size = len(similarity) // (models * blocks)
    by_block = similarity.reshape(models, blocks, size, models, blocks, size)
    matched = [[g] for g in range(blocks)]
    for m in range(1, models):
        scores = np.empty((blocks, blocks))
        for g in range(blocks):
            for h in range(blocks):
                pair = by_block[0, g, :, m, h, :]
                # Published as a mean, which rounds; all pairs are of one size.
                scores[g, h] = pair[linear_sum_assignment(pair, maximize=True)].sum()
        for g, h in zip(*linear_sum_assignment(scores, maximize=True), strict=True):
            matched[g].append(m * blocks + int(h))
    return matched


def published_zip(
    similarity: Array, models: int, budget: float, damping: float, blocks: int | None = None, late: bool = False
) -> tuple[NDArray[np.int64], int]:
    """Which merged unit every unit goes into, shape (models, units), and the merges that had to be forced.

    Arguments:
        similarity: symmetric, shape (models * units, models * units).
        models: the number of models.
        budget: b of the papers.
        damping: a of the papers.
        blocks: the number of blocks of each model, which lie one after the other; None for no blocks.
        late: as published, look at a budget only when it was used once. Else, and this is the third difference, a
            budget of no merge is none from the beginning.
    """
    total = len(similarity)
    units = total // models
    to_remove = total - units
    parts = blocks or 1
    links = torch.from_numpy(similarity.copy())
    links.fill_diagonal_(-INF)
    state = State(
        torch.from_numpy(similarity),
        links,
        unmerge=torch.eye(total),
        model=torch.arange(total) // units,
        block=torch.arange(total) // (units // parts),
        budget=[int(to_remove // models * budget + 1e-4)] * models,
        block_budget=[to_remove // (models * parts)] * (models * parts),
        damping=damping,
        mask=torch.zeros_like(links) if blocks else None,
    )
    for m in range(models):
        if state.budget[m] == 0 and not late:
            state.forbid(state.model, m)
    labels = np.empty(total, np.int64)
    matched = match(similarity, models, blocks) if blocks else [list(range(models))]
    for g, group in enumerate(matched):
        goal = units // parts
        state.enter(group)
        for _ in range((models - 1) * goal):
            state.merge_best()
        merged = state.unmerge[:, torch.isin(state.block, torch.tensor(group))].T
        assert len(merged) == goal
        for k, own in enumerate(merged.bool().numpy()):
            labels[own] = g * goal + k
    return labels.reshape(models, units), state.forced
