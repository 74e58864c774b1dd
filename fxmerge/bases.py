"""Models in bases in which they agree: the stage before units are matched one to one or merged."""

from __future__ import annotations

import logging
from dataclasses import replace

from fxmerge.combine.batch_norm import batch_norm_statistics
from fxmerge.evidence.activations import similarities
from fxmerge.job import Job
from fxmerge.matching.assignment import descendants
from fxmerge.matching.balance import balance
from fxmerge.matching.models import alpha_by_class
from fxmerge.matching.search import match
from fxmerge.matching.universe import canonical_order
from fxmerge.prepared import Prepared
from fxmerge.program.canonicalize import plan_folds
from fxmerge.recipe import Align, Recipe, Run, Zip
from fxmerge.symmetry.freeze import freeze
from fxmerge.symmetry.group import Symmetry
from fxmerge.units.basis import Basis
from fxmerge.units.kind import Kind
from fxmerge.units.permutation import Permutation

logger = logging.getLogger(__name__)

IN_ONE_BASIS = "matched by a change of basis"
"""The reason given for units that no longer move, since all models have them in one basis."""


def with_gains_moved(job: Job) -> Job:
    """The job with gains of one wherever the graph allows it, in all models alike.

    The gains of batch norms stay: their statistics may be estimated anew, and then would no longer be those that the
    gains were moved with.
    """
    with job.timed("canonicalizing"):
        plan = plan_folds(job.program)
        statistics = {name for pair in batch_norm_statistics(job.program) for name in pair}
        wanted = {
            number: where
            for number, where in plan.choose(job.states).items()
            if statistics.isdisjoint(plan.moves[number].fold(where).parameters)
        }
        chosen = plan.checked(job.states[0], wanted)
        for fold in plan.folds(chosen):
            logger.info("moved %s", fold)
        return replace(job, states=tuple(plan.apply(state, chosen) for state in job.states))


def in_one_basis(job: Job, recipe: Recipe, run: Run, given: Symmetry | None, reference: int | None) -> Prepared:
    """The models of a job and their symmetry; if the recipe matches classes by changes of basis, in one basis.

    Arguments:
        job: the checked models and data.
        recipe: without "auto".
        run: how to run.
        given: a symmetry to use in place of an inferred one.
        reference: the number of the model in whose basis all are; None for one that does not depend on their order.
    """
    part = recipe.match
    assert not isinstance(part, str)
    wider = isinstance(part, Zip) and part.width == len(job.states)  # All units of all models: nothing is matched.
    if part is None or part.continuous is not True or len(job.states) == 1 or wider:
        return Prepared.of(job, recipe, run, given)
    group = Prepared.of(with_gains_moved(job), recipe, run, given, continuous=True)
    return _rebased(group, part, run, reference)


def _rebased(group: Prepared, part: Align | Zip, run: Run, reference: int | None) -> Prepared:
    """Models of which all classes that a change of basis may mix are in one basis, with the blocks that these lie in.

    Each model is matched with one of them, the reference or else one that does not depend on their order. The classes
    of which units are only permuted are matched along with these, but stay as they were.
    """
    job, symmetry, trunk = group.job, group.symmetry, group.trunk
    roots = [n for n, c in enumerate(symmetry.units) if not c.parents]
    trees = [descendants(symmetry, root) for root in roots]
    mixing = {n for n in range(len(symmetry.units)) if symmetry.kind(n) > Kind.PERMUTATION}
    chosen = sorted(n for tree in trees if not mixing.isdisjoint(tree) for n in tree)
    if not chosen:
        return group
    home = canonical_order(job.states)[0] if reference is None else reference
    gauges = [balance(symmetry, state) for state in job.states]
    job = replace(job, states=tuple(own.apply(state) for own, state in zip(gauges, job.states, strict=True)))
    others = [i for i in range(len(job.states)) if i != home]
    pairs = [(min(home, i), max(home, i)) for i in others]
    correlations = {}
    if job.data is not None and part.alpha != 1:
        with job.timed("activations"):
            correlations = similarities(
                group.propagation, trunk, job.states, job.data, job.names, pairs, part.similarity, job.owner, mixing
            )
    alpha = alpha_by_class(part, trunk) if job.data is not None else 1.0
    states = list(job.states)
    with job.timed("matching bases"):
        for i, pair in zip(others, pairs, strict=True):
            own = {n: c[pair] if home < i else c[pair].T for n, c in correlations.items()}
            found = match(
                trunk,
                states[home],
                states[i],
                own,
                alpha=alpha,
                continuous=True,
                seed=run.seed,
                progress=run.progress,
            )
            moved = symmetry.restrict(Permutation(symmetry.layout, found.permutation.images), chosen)
            states[i] = Basis(symmetry.mixed, found.basis.matrices).apply(moved.apply(states[i]))
    smaller, names = freeze(symmetry, chosen, lambda _: IN_ONE_BASIS)
    bases = {symmetry.names[n]: str(symmetry.kind(n)) for n in sorted(mixing)}
    back = gauges[home].inverse()  # The reference is in its own basis again, and the others are in it.
    job = replace(job, states=tuple(back.apply(state) for state in states))
    return replace(group, job=job, symmetry=smaller, still=group.still | {*names}, bases=bases)
