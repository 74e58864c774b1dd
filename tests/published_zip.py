"""The zip as ZipIt! and MuDSC publish it, step by step and slowly: what `fxmerge.matching.zipping` is tested against.

After match_tensors_zipit of ZipIt! (arXiv 2305.03053) and default_group_fusion_weight of MuDSC (arXiv 2403.01753).
The matrix of similarities is searched as a whole for every merge, and then loses a row and a column. It differs
from the published code in three places, each marked below, where that code does what cannot be meant.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Array = NDArray[np.float64]


@dataclass
class State:
    """The merged units so far, in the order of their first members, and the similarities of all pairs of them."""

    similarity: Array
    links: Array
    members: list[list[int]]
    model: list[int]
    block: list[int]
    budget: dict[int, int]
    block_budget: dict[int, int]
    damping: float
    forced: int = 0
    lifted: set[int] = field(default_factory=set)

    def forbid(self, of: list[int], which: int) -> None:
        own = np.array(of) == which
        self.links[own[:, None] & own[None, :]] = -np.inf

    def merge_best(self, matched: list[int]) -> None:
        """Merges the most similar two units of some blocks."""
        inside = np.isin(self.block, matched)
        allowed = np.where(inside[:, None] & inside[None, :], self.links, -np.inf)
        row, column = np.unravel_index(allowed.argmax(), allowed.shape)
        if allowed[row, column] == -np.inf:
            # First difference: the published code merges unit 0 with itself here, and loses a unit by it.
            self.lift(matched)
            self.merge_best(matched)
            return
        lifted = matched[0] in self.lifted
        self.forced += lifted
        i, j = sorted((int(row), int(column)))
        linkage = np.minimum(self.links[i], self.links[j])
        if lifted:
            pass
        elif self.damping > 0:
            linkage *= self.damping
        else:
            # Second difference: the published code forbids the rows that these models had before any merge.
            linkage[np.isin(self.model, [self.model[i], self.model[j]])] = -np.inf
        linkage[i] = -np.inf
        self.links[i], self.links[:, i] = linkage, linkage
        self.links = np.delete(np.delete(self.links, j, axis=0), j, axis=1)
        self.members[i] += self.members.pop(j)
        same_model = self.model.pop(j) == self.model[i]
        same_block = self.block.pop(j) == self.block[i]
        if same_model and not lifted:
            self.budget[self.model[i]] -= 1
            if self.budget[self.model[i]] <= 0:
                self.forbid(self.model, self.model[i])
        if same_block and not lifted:
            self.block_budget[self.block[i]] -= 1
            if self.block_budget[self.block[i]] <= 0:
                self.forbid(self.block, self.block[i])

    def lift(self, matched: list[int]) -> None:
        """Forgets damping and what is forbidden in some blocks: the minimum linkage and nothing else."""
        self.lifted |= set(matched)
        inside = [k for k in range(len(self.block)) if self.block[k] in matched]
        for x in inside:
            for y in inside:
                if x != y:
                    self.links[x, y] = self.similarity[np.ix_(self.members[x], self.members[y])].min()


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
    links = similarity.copy()
    np.fill_diagonal(links, -np.inf)
    state = State(
        similarity,
        links,
        members=[[k] for k in range(total)],
        model=[k // units for k in range(total)],
        block=[k // (units // parts) for k in range(total)],
        budget=dict.fromkeys(range(models), int(to_remove // models * budget + 1e-4)),
        # A zip without blocks has no budget for them.
        block_budget=dict.fromkeys(range(models * parts), to_remove // (models * parts) if blocks else total),
        damping=damping,
    )
    for m in range(models):
        if state.budget[m] == 0 and not late:
            state.forbid(state.model, m)
    labels = np.empty(total, np.int64)
    matched = match(similarity, models, blocks) if blocks else [list(range(models))]
    for g, group in enumerate(matched):
        goal = units // parts
        for _ in range((models - 1) * goal):
            state.merge_best(group)
        merged = [own for own, block in zip(state.members, state.block, strict=True) if block in group]
        assert len(merged) == goal
        for k, own in enumerate(merged):
            labels[own] = g * goal + k
    return labels.reshape(models, units), state.forced
