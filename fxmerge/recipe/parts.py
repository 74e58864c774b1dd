"""The parts of a recipe: how to match, how to combine, how to fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from fxmerge.errors import OptionError
from fxmerge.recipe.checks import (
    check_alpha,
    check_multiple,
    check_reference,
    check_scale,
    check_share,
    check_weights,
    check_width,
    check_word,
    is_number,
    wrong,
)

Alpha = float | Mapping[str, float]
Similarity = Literal["pearson", "cosine"]
OutputKind = Literal["values", "logits"]

DEFAULT_ALPHA = 0.5

KV_HEADS = "kv heads of "
"""What names of key/value heads begin with, of which there may be fewer than query heads."""


# -------------------------------------------------------------------------- costs


@dataclass(frozen=True)
class Budget:
    """What the result may cost, or how far from the networks it may be.

    As `Recipe.share`, where the trunk of networks with heads of their own ends follows from it: one of the places
    through which all goes that depends on parameters. As `Zip.width`, how many units each class has: classes have fewer
    where that loses least for what it saves.

    Attributes:
        parameters: how many parameters the result may have, as a multiple of those of the first network, once networks
            of other widths have as many units.
        flops: how many floating-point operations it may take on the example, as a multiple likewise.
        distance: how far its outputs may be from those of the networks, as a share of their variance, on held-out data:
            `report(merged).errors["merged"]`. It needs data and a fit. Of a width, there is none.

    With a distance, the longest trunk is taken that is within it and, if these are given, within the other two. Without
    one, it is the shortest within these, since the less is shared, the nearer the result is to its networks.

    Raises:
        OptionError: if none is given, or one is not positive.

    Example:
        >>> Budget(parameters=1.5)
        Budget(parameters=1.5, flops=None, distance=None)
    """

    parameters: float | None = None
    flops: float | None = None
    distance: float | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("parameters", "flops", "distance")}
        for name, value in given.items():
            if value is not None and not (is_number(value) and value > 0):
                raise wrong(self, name, "a positive number, or None")
        if all(value is None for value in given.values()):
            raise wrong(self, "parameters", "a positive number where flops and distance are None")


Width = float | Mapping[str, float] | Budget


# -------------------------------------------------------------------------- matching


@dataclass(frozen=True)
class Align:
    """Matches units one to one.

    The similarity is alpha times the cosine of the units' weights, plus (1 - alpha) times the similarity of their
    activations (MuDSC, arXiv 2403.01753, equation 5). With `alpha=1` this is the weight matching of Git Re-Basin (arXiv
    2209.04836). Without data, weights alone count.

    Attributes:
        alpha: weight of the weight-space similarity, from 0 (activations only) to 1 (weights only). A mapping gives it
            for classes by name, as in `Symmetry.names`; other classes have 0.5.
        similarity: how activations of units are compared: by "pearson" correlation or by "cosine".
        reference: the number of the model, from 0, to whose units all others are matched. None is the first of two
            models; three or more are all matched with each other (C2M3, arXiv 2405.17897).
        continuous: whether classes whose units a change of basis may mix, such as the dimensions of a residual stream,
            are matched by matrices in place of permutations: see `Symmetry.kind`. Units of other classes are matched up
            to the signs and positive scales that they may have. Gains and shifts of normalizations are moved into the
            layers around them first, as by `canonicalize`. "auto" merges in both ways, if there are such classes, and
            keeps the result whose outputs miss less of the ensemble's on held-out data; without data or a fit, it
            permutes. Of three or more models, each is matched with the mean of all others in these classes (generalized
            Procrustes analysis).

    Raises:
        OptionError: if a field is out of range.

    Example:
        >>> Align(alpha=1)
        Align(alpha=1, similarity='pearson', reference=None, continuous=False)
    """

    alpha: Alpha = DEFAULT_ALPHA
    similarity: Similarity = "pearson"
    reference: int | None = None
    continuous: bool | Literal["auto"] = False

    def __post_init__(self) -> None:
        check_alpha(self)
        check_word(self, "similarity", get_args(Similarity))
        check_reference(self)
        check_word(self, "continuous", (True, False, "auto"))


@dataclass(frozen=True)
class Zip:
    """Aligns units, then merges the most similar ones, also units of one and the same model.

    This is the greedy merge of ZipIt! (arXiv 2305.03053) with the similarity and the group zip of MuDSC (arXiv
    2403.01753, sections 4.2 and 4.3).

    Attributes:
        alpha: as for `Align`.
        budget: in [0, 1], the share of the merges that may be of two units of one model.
        damping: in [0, 1], what the similarities of a merged unit are multiplied with, so that it is less likely to be
            merged again.
        similarity: as for `Align`.
        reference: as for `Align`.
        width: how many merged units there are, as a share of the units of one model: 1 is the size of one model, 0.5
            half of it, 2 for two models is all of their units. A mapping gives shares, or as whole numbers above 1
            the number of merged units, for classes by name or pattern such as "layer3.*"; of patterns that fit, the
            first counts, and what none fits has width 1. "kv heads of *" names heads of keys and values, which `fold`
            merges while all heads of queries stay. Classes of which the graph allows no other number keep theirs, and
            so do blocks, such as heads, where one number below 1 is for all. A `Budget` chooses the widths.
        multiple_of: what the number of merged units is rounded to a multiple of, where the width is not 1.
        continuous: as for `Align`, but for signs and scales. Of classes that a change of basis may mix, no units are
            merged. Where there are data, residual streams go into the principal directions of all models' streams. With
            a width below 1, the directions that count most are left (SliceGPT, arXiv 2401.15024, by the similarity
            above). None is False for several models, and True where `fold` makes one smaller.

    Raises:
        OptionError: if a field is out of range.

    Example:
        >>> Zip(budget=0.5).budget
        0.5
    """

    alpha: Alpha = DEFAULT_ALPHA
    budget: float = 1.0
    damping: float = 0.5
    similarity: Similarity = "pearson"
    reference: int | None = None
    width: Width = 1.0
    multiple_of: int = 1
    continuous: bool | Literal["auto"] | None = None

    def __post_init__(self) -> None:
        check_alpha(self)
        check_multiple(self)
        if not isinstance(self.width, Budget):
            check_width(self)
        elif self.width.distance is not None:
            raise OptionError(
                "Zip.width is a Budget with a distance: give parameters or flops only, and compare results."
            )
        check_share(self, "budget")
        check_share(self, "damping")
        check_word(self, "similarity", get_args(Similarity))
        check_reference(self)
        check_word(self, "continuous", (True, False, "auto", None))


# -------------------------------------------------------------------------- combining


@dataclass(frozen=True)
class Average:
    """Averages the parameters of matched units.

    Attributes:
        weights: how much each model counts, in the average and in what layers are fitted to; normalized to sum to one.
            None: all alike.

    Raises:
        OptionError: if a weight is negative or not finite, or all are zero.
    """

    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_weights(self)


@dataclass(frozen=True)
class TaskArithmetic:
    """Adds the task vectors to the base (Ilharco et al., arXiv 2212.04089).

    Attributes:
        scale: what the sum of the task vectors is multiplied with. 0.4 is what the TIES paper takes for this
            method where no data is left to choose it on (arXiv 2306.01708, appendix C.4). A negative one makes
            the base forget.
        weights: how much each model counts; None: all alike.

    Raises:
        OptionError: if `scale` is not a finite number, or the weights are out of range.

    Example:
        >>> TaskArithmetic()
        TaskArithmetic(scale=0.4, weights=None)
    """

    scale: float = 0.4
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_scale(self)
        check_weights(self)


@dataclass(frozen=True)
class Ties:
    """Adds what is large in the task vectors and agrees in sign to the base (TIES-Merging, arXiv 2306.01708).

    Attributes:
        density: the share of its entries that a task vector keeps, in (0, 1]: those of largest magnitude.
        scale: what the combined task vector is multiplied with.
        weights: how much each model counts; None: all alike.

    Raises:
        OptionError: if a field is out of range.

    Example:
        >>> Ties(density=0.5)
        Ties(density=0.5, scale=1.0, weights=None)
    """

    density: float = 0.2
    scale: float = 1.0
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not is_number(self.density) or not 0 < self.density <= 1:
            raise wrong(self, "density", "a number above 0, up to 1 (keep every entry)")
        check_scale(self)
        check_weights(self)


# -------------------------------------------------------------------------- fitting

OWN = 0.75
"""Where every model has data of its own, the share of its own outputs in what is to be learnt on these data. On eleven
networks (`benchmarks/own.py`) it is within 0.3 points of the best, for each task alone and for all outputs together."""


@dataclass(frozen=True)
class Fit:
    """What is fitted to data after combining: `LeastSquares`, `Readout` or `Repair`.

    Attributes:
        own: with `loaders`, the share of a model's own output in the targets on its own data, from 0 to 1. The rest is
            the mean of all models' outputs.

    Raises:
        OptionError: if `own` is out of range.
    """

    own: float = OWN

    def __post_init__(self) -> None:
        check_share(self, "own")


@dataclass(frozen=True)
class LeastSquares(Fit):
    """Fits every layer, in closed form and in graph order, to what the models compute there (a ridge regression).

    Its attribute `own` is that of `Fit`.

    Attributes:
        outputs: what the outputs are. Of "values", the squared error counts. "logits" are scores of classes, along the
            last dimension of every output that a last layer writes. Once the last layers have the least squared error,
            their weights and biases are fitted again: to the least cross-entropy between the softmax of the merged
            network and the ensemble's probabilities, the weighted mean of the models'. No labels are needed. The
            squared-error fit is kept if it predicts held-out data as well.
        products: whether layers whose outputs are multiplied with each other, such as those of queries, keys and
            values, are fitted together after their own fits: to what the next layer is to give. New parameters are kept
            if they lower the error of that on held-out data. Attention then takes several times as long to fit.

    Raises:
        OptionError: if `outputs` is another word, or `products` is not True or False. `merge` raises it, before any
            unit is matched, if no output of the models can be scores of classes.

    Example:
        >>> import torch, fxmerge
        >>> def classifier(seed):
        ...     torch.manual_seed(seed)
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> recipe = fxmerge.Recipe(fit=fxmerge.LeastSquares(outputs="logits"))
        >>> merged = fxmerge.merge(classifier(0), classifier(1), [torch.randn(512, 4) for _ in range(5)], recipe)
        >>> told = fxmerge.report(merged).layers["2.weight"]
        >>> told["entropy"] < told["cross_entropy_after"] <= told["cross_entropy_before"]
        True
    """

    outputs: OutputKind = "values"
    products: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word(self, "outputs", get_args(OutputKind))
        check_word(self, "products", (True, False))


@dataclass(frozen=True)
class Readout(Fit):
    """Fits only the layers that no other layer comes after.

    Its attribute `own` is that of `Fit`.
    """


@dataclass(frozen=True)
class Repair(Fit):
    """Gives every unit the mean and the deviation of the models' units (REPAIR, arXiv 2211.08403); fits nothing.

    Its attribute `own` is that of `Fit`.
    """


Match = Zip | Align
Combine = Average | TaskArithmetic | Ties
