"""Networks of files: an architecture by name, with the weights of a checkpoint."""

from fxmerge.networks.building import Network as Network
from fxmerge.networks.building import build as build
from fxmerge.networks.building import skeleton as skeleton
