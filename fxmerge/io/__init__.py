"""Files of weights: reading and writing them."""

from fxmerge.io.checkpoint import Checkpoint as Checkpoint
from fxmerge.io.headers import Entry as Entry
from fxmerge.io.reading import load as load
from fxmerge.io.writing import save as save
