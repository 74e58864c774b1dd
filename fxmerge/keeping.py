"""How the results of stages are kept in files: see `fxmerge.stages`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxmerge.evidence.activations import Pair
from fxmerge.matching.models import Matching
from fxmerge.stages import Form, Kept
from fxmerge.symmetry.group import Symmetry
from fxmerge.units.unit_map import UnitMap

State = Mapping[str, Tensor]

Correlations = dict[int, dict[Pair, Tensor]]


def verified(symmetry: Symmetry) -> Form[Symmetry]:
    """How a symmetry is kept that is proven; one of which a part failed is proven again.

    Arguments:
        symmetry: what is to be proven.
    """

    def save(found: Symmetry) -> Kept | None:
        whole = found.units is symmetry.units and found.kinds is symmetry.kinds
        return Kept({}, found.error) if whole else None

    return Form(save, lambda kept: replace(symmetry, error=kept.plain))


def _save_correlations(found: Correlations) -> Kept:
    pairs = [(n, i, j, own) for n, by_pair in found.items() for (i, j), own in by_pair.items()]
    return Kept({f"{n} {i} {j}": own for n, i, j, own in pairs}, list(found))


def _load_correlations(kept: Kept) -> Correlations:
    found: Correlations = {n: {} for n in kept.plain or ()}
    for name, own in kept.tensors.items():
        n, i, j = map(int, name.split())
        found[n][i, j] = own
    return found


CORRELATIONS = Form(_save_correlations, _load_correlations)
"""How similarities of activations are kept. Of nothing, there are none."""


def _save_matching(found: Matching) -> Kept:
    both = {f"{n} {m} {i}": own for (n, m), pair in found.correlations.items() for i, own in enumerate(pair)}
    plain = {name: own.to_json() if isinstance(own, UnitMap) else own for name, own in vars(found).items()}
    del plain["correlations"]
    return Kept({name: torch.from_numpy(own) for name, own in both.items()}, plain)


def _load_matching(kept: Kept) -> Matching:
    own = dict(kept.plain)
    own |= {name: UnitMap.from_json(own[name]) for name in ("alignment", "merged")}
    own |= {name: tuple(own[name]) for name in ("quality", "zip_objective")}
    shown = {name: tensor.numpy() for name, tensor in kept.tensors.items()}
    pairs = {(int(n), int(m)) for n, m, _ in map(str.split, shown)}
    own["correlations"] = {(n, m): (shown[f"{n} {m} 0"], shown[f"{n} {m} 1"]) for n, m in sorted(pairs)}
    return Matching(**own | {"objectives": tuple(map(tuple, own["objectives"]))})


MATCHING = Form(_save_matching, _load_matching)
"""How a matching is kept."""


def changed(before: Sequence[State]) -> Form[tuple[Sequence[State], Any]]:
    """How state dicts and plain data beside them are kept: only the tensors that are other ones than before.

    Arguments:
        before: the state dicts that these are made of, with the same names.
    """

    def save(found: tuple[Sequence[State], Any]) -> Kept:
        states, plain = found
        pairs = [(i, *own) for i, own in enumerate(zip(before, states, strict=True))]
        return Kept({f"{i} {n}": t for i, old, new in pairs for n, t in new.items() if t is not old[n]}, plain)

    def load(kept: Kept) -> tuple[Sequence[State], Any]:
        states = [dict(state) for state in before]
        for name, tensor in kept.tensors.items():
            number, _, own = name.partition(" ")
            states[int(number)][own] = tensor
        return tuple(states), kept.plain

    return Form(save, load)
