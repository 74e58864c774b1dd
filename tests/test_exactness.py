"""Merging what is one network, over random architectures: the network comes back.

`FXMERGE_EXAMPLES=200 pytest tests/test_exactness.py` tries more of them.
"""

import copy
import itertools
from random import Random

import pytest
import torch
from torch.utils import _pytree as pytree

import fxmerge
from fxmerge.combine.batch_norm import statistics_nodes
from fxmerge.program.capture import capture_program
from tests.oracle.generator import build, random_recipe
from tests.slow import examples

RECIPES = [
    fxmerge.Recipe(),
    fxmerge.Recipe(match=fxmerge.Align()),
    fxmerge.Recipe(fit=None),
    fxmerge.Recipe(match=fxmerge.Align(), fit=None),
]


def seeds(count: int) -> list[int]:
    """Of recipes without BatchNorm, which is estimated anew, so that the function changes."""
    plain = (s for s in itertools.count() if all("batch" not in more for _, _, more in random_recipe(Random(s)).steps))
    return list(itertools.islice(plain, count))


@pytest.mark.parametrize("seed", examples(seeds, quick=1, count=16))
def test_a_network_and_its_permuted_copy_give_the_network_back(seed: int) -> None:
    net, args = build(random_recipe(Random(seed)))
    net, args = net.double().eval(), tuple(a.double() for a in args)
    assert not statistics_nodes(capture_program(net, args))
    generator = torch.Generator().manual_seed(seed)
    data = [(tuple(torch.randn(a.shape, generator=generator).double() for a in args),) for _ in range(3)]
    symmetry = fxmerge.find_symmetry(net, args).verify(net, args)
    copied = copy.deepcopy(net)
    copied.load_state_dict(symmetry.sample_permutation(generator).apply(net.state_dict()))
    with torch.no_grad():
        expected = pytree.tree_leaves(net(*args))
        for recipe in RECIPES:
            for other in (net, copied):
                merged = fxmerge.merge(net, other, data, recipe, symmetry=symmetry, run=fxmerge.Run(verify=False))
                found = pytree.tree_leaves(merged(*args))
                for y, z in zip(expected, found, strict=True):
                    torch.testing.assert_close(z, y, rtol=1e-6, atol=1e-6 * float(y.abs().max()))
