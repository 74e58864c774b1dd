"""fxmerge as a method of FusionBench (github.com/tanganke/fusion_bench): the target of a method's configuration.

_target_: fxmerge.fusion_bench.FxMergeAlgorithm
recipe: {match: {kind: Zip}, fit: {kind: LeastSquares}}
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool, auto_register_config
from torch import nn
from torch.utils.data import DataLoader, Subset

from fxmerge.api import merge_many
from fxmerge.errors import OptionError
from fxmerge.recipe import Recipe, Run, TaskArithmetic, Ties
from fxmerge.reporting import PICKLED, report
from fxmerge.sources import example

TARGETS = "_fusion_bench_target_modules"
"""The attribute by which FusionBench is told to merge some modules of a model only."""


@auto_register_config
class FxMergeAlgorithm(BaseAlgorithm):  # type: ignore[misc]
    """Merges the models of a pool by a recipe.

    Arguments:
        recipe: fields of `Recipe`, as in YAML files. With task vectors, the pool's `_pretrained_` is their base; else
            it is left out.
        datasets: the datasets of the pool that are calibration data: "train", "val" or "test"; None takes none. If
            there is one of every model's name, each model has its own; else all models have all of them.
        samples: how many rows of a dataset are taken at most, a random choice.
        batch: how many rows a batch has at most.
        inputs: without data, shapes of example inputs such as "1x3x224x224". Models of transformers need none.
        device: where to compute.
        seed: of all random choices.
    """

    def __init__(
        self,
        recipe: Mapping[str, Any] | None = None,
        datasets: Literal["train", "val", "test"] | None = "train",
        samples: int = 1024,
        batch: int = 32,
        inputs: Sequence[str] = (),
        device: str | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)

    def run(self, modelpool: Any) -> nn.Module:
        """Merges the models of a pool.

        Arguments:
            modelpool: a pool, or models in a list or by name.

        Returns:
            A model of the first one's class; or a GraphModule, where the class cannot have the result, as with heads
            apart or another width. `fxmerge.report` reads how it was made from either.

        Raises:
            FxmergeError: as `fxmerge.merge_many`.
        """
        pool = modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(modelpool)
        recipe = Recipe.from_dict(_plain(self.recipe or {}))
        models = [pool.load_model(name) for name in pool.model_names]
        if any(getattr(model, TARGETS, None) is not None for model in models):
            raise OptionError(
                f"A model has {TARGETS}, and fxmerge merges whole networks: take it away, and let the networks share a "
                "trunk by the recipe."
            )
        vectors = isinstance(recipe.combine, TaskArithmetic | Ties)
        base = pool.load_pretrained_model() if vectors and pool.has_pretrained else None
        data = self._data(pool)
        apart = len(data) == len(models) and set(data) == set(pool.model_names)
        loaders = [data[name] for name in pool.model_names] if apart else None
        joined = [batch for own in data.values() for batch in own] if data and not apart else None
        given = self._example(models[0]) if not data else None
        merged = merge_many(
            models,
            joined,
            recipe,
            loaders=loaders,
            base=base,
            example=given,
            inputs=None if given is None else lambda call: call,
            run=Run(device=self.device, seed=self.seed),
        )
        return _in_class(models[0], merged)

    def _data(self, pool: Any) -> dict[str, Iterable[Any]]:
        """The batches of every dataset of the pool that is calibration data."""
        if self.datasets is None:
            return {}
        found: dict[str, Iterable[Any]] = {}
        for name in getattr(pool, f"{self.datasets}_dataset_names"):
            dataset = getattr(pool, f"load_{self.datasets}_dataset")(name)
            generator = torch.Generator().manual_seed(self.seed)
            chosen = torch.randperm(len(dataset), generator=generator)[: self.samples].sort().values.tolist()
            found[name] = list(DataLoader(Subset(dataset, chosen), batch_size=self.batch))
        return found

    def _example(self, model: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Example inputs: (args, kwargs)."""
        if self.inputs:
            return tuple(example(text) for text in self.inputs), {}
        dummy = getattr(model, "dummy_inputs", None)
        if dummy is None:
            raise OptionError(
                f"The pool has no {self.datasets or 'train'} datasets, and no example inputs: give datasets, or "
                "inputs: ['1x3x224x224'], the shapes that the models take."
            )
        return (), dict(dummy)


def _plain(value: Any) -> Any:
    """Plain data of what may be a configuration of omegaconf."""
    if isinstance(value, Mapping):
        return {key: _plain(own) for key, own in value.items()}
    return [_plain(own) for own in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _in_class(model: nn.Module, merged: Any) -> nn.Module:
    """The merged network as an instance of a model's class, if it can be one."""
    told, state = report(merged), merged.state_dict()
    own = model.state_dict()
    if told.heads or {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in state.items()}:
        return merged  # type: ignore[no-any-return]
    made = copy.deepcopy(model).to(next(iter(state.values())).device)
    made.load_state_dict(state)
    setattr(made, PICKLED, getattr(merged, PICKLED))
    return made.eval()
