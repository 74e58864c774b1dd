"""Fewer key/value heads and as many query heads: from multi-head attention to grouped-query attention.

Grouped-query attention (arXiv 2305.13245) has one head of keys and values for several heads of queries. That paper
takes the mean of the keys and values of neighbouring heads. Here the heads are ordered first, so that those with like
keys and values are neighbours. The dimensions inside of them are ordered too, or rotated by Procrustes analysis (arXiv
2412.20677). This moves query heads and what reads them along, and leaves the function as it is. Then the graph gets an
op that repeats each key/value head for its query heads. What lies before that op has classes of its own, which are
merged by the stages that merge other units.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np
from torch import fx

from fxmerge.bases import transformed
from fxmerge.emit.kv_sites import Attentions, Operand, with_repeat, with_written_parts
from fxmerge.emit.resize import twins_of
from fxmerge.errors import OptionError
from fxmerge.evidence.activations import whole
from fxmerge.matching.assignment import Scores, descendants
from fxmerge.matching.head_bases import agreeing
from fxmerge.matching.head_groups import counterparts, neighbours, placed, translated, units_of
from fxmerge.matching.mix import Mix
from fxmerge.matching.models import alpha_by_class
from fxmerge.matching.room import Room, fits
from fxmerge.matching.zip_search import ZipProblem
from fxmerge.prepared import Prepared
from fxmerge.program.capture import capture_program
from fxmerge.program.double import in_double
from fxmerge.program.forms import op_name
from fxmerge.recipe import KV_HEADS, Recipe, Run, Zip
from fxmerge.sizing import check_joined
from fxmerge.symmetry.cuts import Cut, Cuts, repeats
from fxmerge.symmetry.flow import flows
from fxmerge.symmetry.freeze import demote, moving_together
from fxmerge.symmetry.group import Symmetry, analyse
from fxmerge.symmetry.propagation import Propagation
from fxmerge.symmetry.shown import places_and_blocks
from fxmerge.units.basis import Basis
from fxmerge.units.kind import Kind, UnitKind
from fxmerge.units.layout import Ids
from fxmerge.units.permutation import Permutation

PARTS = ("chunk", "split", "unsafe_chunk", "unsafe_split")
"""The ops that cut a dimension into equal parts."""


def names_kv_heads(width: object) -> bool:
    """Whether key/value heads are named in a width."""
    return bool(_named(width))


def _named(width: object) -> dict[str, float]:
    """The part of a width that names key/value heads."""
    given = width if isinstance(width, Mapping) else {}
    return {pattern: share for pattern, share in given.items() if pattern.startswith(KV_HEADS.removesuffix(" of "))}


def check_one_network(recipe: Recipe, models: int) -> None:
    """Key/value heads are merged in one network only.

    Raises:
        OptionError: if they are named for several.
    """
    own = _named(recipe.match.width) if isinstance(recipe.match, Zip) else {}
    if own and models > 1:
        raise OptionError(
            f"Zip.width names {next(iter(own))!r}, which fxmerge.fold merges in one network: fold each network before, "
            "or the merged one after."
        )


def with_fewer_kv_heads(group: Prepared, recipe: Recipe, run: Run) -> tuple[Prepared, Recipe]:
    """A model with its key/value heads ready to be merged, and the recipe with the widths of all other classes.

    Arguments:
        group: one model, and its symmetry.
        recipe: how to match. Key/value heads are named in `Zip.width`.
        run: how to run.

    Raises:
        OptionError: if key/value heads are named that the model does not have, or their number cannot be had.
    """
    part = recipe.match
    if not isinstance(part, Zip) or not isinstance(part.width, Mapping) or not (own := _named(part.width)):
        return group, recipe
    rest = replace(recipe, match=replace(part, width={n: w for n, w in part.width.items() if n not in own}))
    if group.job.program.follows_path:
        return group, rest
    widths = _widths(group, own)
    if not widths:
        return group, rest
    symmetry = _with_bases(group, recipe, run, widths) if part.continuous else group.symmetry
    cut, heads = _cut(group, symmetry, widths)
    cut = _arranged(cut, symmetry, part, heads, {n: width for n, (width, _) in widths.items()})
    with group.job.timed("resizing"):
        check_joined(cut, run)
    return cut, rest


def _widths(group: Prepared, named: Mapping[str, float]) -> dict[int, tuple[int, list[Operand]]]:
    """For the classes of blocks of which there are to be fewer key/value heads, how many, and where these are read.

    Raises:
        OptionError: if a pattern fits none, or a number cannot be had.
    """
    symmetry = group.symmetry
    attentions = Attentions(group.propagation, symmetry)
    read = {n: attentions.kv_operands(n) for n, c in enumerate(symmetry.units) if c.size > 1}
    names = {n: _name(symmetry, n) for n, operands in read.items() if operands}
    for pattern in named:
        if not any(fits(name, pattern) for name in names.values()):
            there = ", ".join(map(repr, names.values()))
            raise OptionError(
                f"Zip.width names {pattern!r}, and the model has no such heads of keys and values. "
                + (f"It has {there}." if there else "It has none whose heads may take the place of each other.")
            )
    found = {}
    for n, name in names.items():
        asked = [share for pattern, share in named.items() if fits(name, pattern)]
        if not asked:
            continue
        share, size = asked[0], symmetry.units[n].size
        width = share if isinstance(share, int) and share > 1 else round(share * size)
        if not 0 < width <= size or size % width:
            possible = [k for k in range(1, size + 1) if size % k == 0]
            nearest = min(possible, key=lambda k: (abs(k - width), k))
            raise OptionError(
                f"Zip.width asks for {width} of the {size} heads {name!r}. Each merged head stands for as many, "
                f"so that their number has to divide {size}: the nearest one is {nearest}."
            )
        if width < size:
            found[n] = width, read[n]
    return found


def _name(symmetry: Symmetry, number: int) -> str:
    """What the key/value heads of a class of blocks are called."""
    name = symmetry.names[number]
    while name.startswith("blocks of "):
        name = name.removeprefix("blocks of ")
    return KV_HEADS + name


def _cut(
    group: Prepared, symmetry: Symmetry, widths: Mapping[int, tuple[int, list[Operand]]]
) -> tuple[Prepared, dict[int, int]]:
    """The model as a graph that reads key/value heads through repeats, with its labels and classes; and the classes of
    these heads, each with the class of heads that it was before."""
    job = group.job
    with job.timed("capture"):
        module, cuts = _with_cuts(group, {n: operands for n, (_, operands) in widths.items()})
        program = replace(capture_program(module, *job.example, varying=set(job.varying)), route="torch.export")
    with job.timed("symmetry"):
        rule = Cuts(cuts)
        found, apart = analyse(program, rules={"aten::repeat_interleave": rule}, states=job.states, continuous=False)
        apart = demote(apart, [n for n, name in enumerate(apart.names) if name in symmetry.demoted])
        heads, settled = _heads_before(group, found, apart, rule)
    units = [replace(c, name=_name(symmetry, heads[n])) if n in heads else c for n, c in enumerate(apart.units)]
    apart = replace(apart, units=tuple(units))
    cut = replace(
        group,
        job=replace(job, program=program),
        propagation=found,
        whole=apart,
        symmetry=apart,
        still=frozenset(),
        flow=flows(found),
        settled=settled,
        repeats=module,
    )
    return cut, heads


def _arranged(
    cut: Prepared, symmetry: Symmetry, part: Zip, heads: Mapping[int, int], widths: Mapping[int, int]
) -> Prepared:
    """The model in an order in which the heads to merge are neighbours, and in which the dimensions inside of these
    agree. Its function is the same.

    Arguments:
        cut: the model as a graph that reads key/value heads through repeats.
        symmetry: of the model itself, by which it may be changed.
        part: how to match.
        heads: the classes of key/value heads, each with the class of heads in `symmetry`.
        widths: for these, how many there are to be.
    """
    job, apart = cut.job, cut.symmetry
    based = {k: _based(symmetry, n, apart, k) for k, n in heads.items()}
    problem, products = _problem(cut, part, heads, {c for own in based.values() for c in own.values()})
    steps: list[Basis | Permutation] = []
    images, joined = symmetry.identity().images, dict[int, Ids]()
    with job.timed("matching"):
        for k, n in heads.items():
            size = apart.units[k].size // widths[n]
            order = neighbours(problem, k, widths[n], {c: products[c] for c in based[k].values()})
            moved = translated(symmetry, n, apart, k, order)
            images = tuple(after[before] for before, after in zip(images, moved, strict=True))
            alike = {c: _moved(products[c], order[c]) for c in based[k].values()}
            turns = {m: agreeing(alike[c], units_of(apart, c, k), size) for m, c in based[k].items()}
            steps += [Permutation(symmetry.layout, moved), Basis(symmetry.mixed, turns)]
            joined[k] = np.arange(apart.units[k].size) // size
    tied = counterparts(symmetry, [m for own in based.values() for m in own], apart, cut.settled)
    names = {apart.names[c] for own in tied.values() for c, _ in own.values()}
    return replace(
        cut,
        job=replace(job, states=(transformed(symmetry, job.states[0], steps),)),
        joined=joined,
        bases=dict.fromkeys(sorted(names), str(Kind.ORTHOGONAL)),
        placed=(placed(symmetry, images, apart, cut.settled),),
    )


def _moved(products: Scores, image: Ids) -> Scores:
    """The products of all pairs of units after these went to other places."""
    found = np.empty_like(products)
    found[np.ix_(image, image)] = products
    return found


def _with_bases(group: Prepared, recipe: Recipe, run: Run, numbers: Iterable[int]) -> Symmetry:
    """The symmetry with the kinds of the classes that lie in some blocks, and in nothing else."""
    symmetry = group.job.symmetry(None, recipe.free, verify=run.verify, continuous=True)[1]
    if symmetry.names != group.symmetry.names:  # Something failed verification.
        return group.symmetry
    inner = {
        m for n in numbers for m in descendants(symmetry, n)[1:] if [p for p, _ in symmetry.units[m].parents] == [n]
    }
    turned = (Kind.ORTHOGONAL, Kind.GENERAL_LINEAR)
    kinds = (own if n in inner and own.kind in turned else UnitKind() for n, own in enumerate(symmetry.kinds))
    return replace(symmetry, kinds=tuple(kinds))


def _based(symmetry: Symmetry, number: int, apart: Symmetry, number_there: int) -> dict[int, int]:
    """The classes that have a basis of their own in each of some blocks, each with the class that its units before a
    cut are."""
    found = {}
    mixing = [m for m in descendants(symmetry, number) if symmetry.kind(m) > Kind.PERMUTATION]
    known = counterparts(symmetry, mixing, apart, descendants(apart, number_there))
    for m in mixing:
        units, there = units_of(symmetry, m, number), {c for c, _ in known[m].values()}
        if len(there) == 1 and len(known[m]) == units.size:
            (c,) = there
            at = np.array([known[m][u][1] for u in range(units.size)])
            if np.array_equal(at[units], units_of(apart, c, number_there)):
                found[m] = c
    return found


def _with_cuts(group: Prepared, read: Mapping[int, list[Operand]]) -> tuple[fx.GraphModule, list[Cut | None]]:
    """The model as a graph of ops in which some operands are read through repeats, and for all repeats of the graph, in
    order, what they are of; None for those that the model has itself.

    Raises:
        OptionError: if heads lie in another order than that of grouped queries, or the graph has no such product.
    """
    job, symmetry = group.job, group.symmetry
    module = group.ops  # It is changed: the group that is made here takes it along, and no other one reads it.
    attentions = Attentions(group.propagation, symmetry)
    twins = twins_of(module, job.program, group.propagation)
    ops: dict[str, fx.Node] = {}
    for node, twin in twins.items():
        if node.target is twin.target:
            ops.setdefault(twin.name, node)
    cuts: dict[fx.Node, Cut] = {}
    for n, operands in read.items():
        size = symmetry.units[n].size
        for operand in operands:
            if operand.node.name not in ops:
                raise _cannot(symmetry, n, f"graph node {operand.node.name!r} is not one op of the graph to change")
            if not np.array_equal(operand.heads, np.repeat(np.arange(size), len(operand.heads) // size)):
                raise _cannot(symmetry, n, f"graph node {operand.node.name!r} reads them in an order of its own")
            repeated = with_repeat(module, ops[operand.node.name], operand.name, operand.dim)
            cuts[repeated] = Cut(n, operand.dim, operand.heads)
        with_written_parts(node for node, t in twins.items() if op_name(node) in PARTS and attentions.holds(t, n))
    module.recompile()
    return module, [cuts.get(node) for node in repeats(module.graph)]


def _heads_before(
    group: Prepared, found: Propagation, apart: Symmetry, rule: Cuts
) -> tuple[dict[int, int], frozenset[int]]:
    """The classes of the heads before cuts, each with the class of heads that it was before; and all classes that lie
    before or beyond cuts, with those tied to them.

    Raises:
        OptionError: if the two sides of a cut are tied by something else, or there cannot be fewer of what gives heads.
    """
    number, place = places_and_blocks(found, apart)
    heads = dict[int, int]()
    for n, blocks in rule.blocks.items():
        k = int(number[blocks[0]])
        if k < 0 or (number[blocks] != k).any() or not np.array_equal(place[blocks], np.arange(len(blocks))):
            raise _cannot(group.symmetry, n, "beside attention, something else tells them apart")
        heads[k] = n
    rows = {(axis.parameter, d) for axis in apart.layout if len(axis.dims) > 1 for d in axis.dims}
    for k, n in heads.items():
        tree = set(descendants(apart, k))
        for axis in apart.layout:
            if (axis.parameter, axis.dim) in rows and any(m in tree for m, _ in axis.roles):
                raise _cannot(group.symmetry, n, f"rows of {axis.parameter!r} have inputs of their own")
    beyond = {*np.unique(number[rule.beyond()]).tolist()} - {-1}
    above = beyond.union(*map(apart.ancestors, beyond))
    for k, n in heads.items():
        if k in above:
            raise _cannot(group.symmetry, n, "beside attention, something else ties them to the heads of queries")
    return heads, frozenset(moving_together(apart, beyond.union(heads)))


def _problem(
    cut: Prepared, part: Zip, numbers: Iterable[int], mixing: Collection[int]
) -> tuple[ZipProblem, dict[int, Scores]]:
    """What tells how alike key/value heads are, and what lies in them; and of classes that have a basis of their own in
    each head, the products of all pairs of units."""
    job, symmetry = cut.job, cut.symmetry
    inner = {n for k in numbers for n in descendants(symmetry, k)}
    alpha = alpha_by_class(part, symmetry) if job.data is not None else 1.0
    alike = {}
    if job.data is not None and part.alpha != 1:
        layout = (replace(a, roles=tuple(role for role in a.roles if role[0] in inner)) for a in symmetry.layout)
        inside = replace(symmetry, layout=tuple(layout))
        found = cut.similarities(inside, job.states, job.names, [(0, 0)], part.similarity, mixing)
        alike = {n: whole(own, 1) for n, own in found.items()}
    correlation = {n: own for n, own in alike.items() if n not in mixing}
    problem = ZipProblem(symmetry, job.states, correlation, Mix.of(alpha, correlation), Room.of(symmetry))
    products = {}
    for n in mixing:
        rows = [(s.of(in_double(job.states[0][s.axis.parameter])), s.axis.parameter) for s in problem.slices[n]]
        own = sum(problem.scales[name] * (x @ x.T).cpu().numpy() for x, name in rows)
        products[n] = own / max(np.trace(own), np.finfo(float).tiny)
        if n in alike:
            share = alpha[n] if isinstance(alpha, Mapping) else alpha
            products[n] = share * products[n] + (1 - share) * alike[n] / max(np.trace(alike[n]), np.finfo(float).tiny)
    return problem, products


def _cannot(symmetry: Symmetry, number: int, why: str) -> OptionError:
    return OptionError(f"Zip.width names {_name(symmetry, number)!r}, which cannot be merged: {why}. Leave it out.")
