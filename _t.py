from fxmerge import find_symmetry
from tests.oracle.continuous_networks import NETWORKS, dimension
from tests.oracle.nullity import generic
for name in ("norms of queries and keys, gains", "RMSNorm, gains"):
    network=NETWORKS[name]
    model, args = generic(network.model(), network.args, network.seed)
    print(find_symmetry(model, args))
