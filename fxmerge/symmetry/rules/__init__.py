"""Propagation rules, one module per family of ops. Without a module its ops are pinned, and nothing else changes."""

from fxmerge.symmetry.rules import (
    attention,
    contraction,
    elementwise,
    grouped,
    indexing,
    lifting,
    movement,
    normalization,
    pooling,
    random,
    recurrent,
    reduction,
    users,
    vision,
)
from fxmerge.symmetry.rules.registry import Lookup, Rule, Site, Value, contracts, find_rule, multiplied, rule

__all__ = [
    "Lookup",
    "Rule",
    "Site",
    "Value",
    "attention",
    "contraction",
    "contracts",
    "elementwise",
    "find_rule",
    "grouped",
    "indexing",
    "lifting",
    "movement",
    "multiplied",
    "normalization",
    "pooling",
    "random",
    "recurrent",
    "reduction",
    "rule",
    "users",
    "vision",
]
