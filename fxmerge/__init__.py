from fxmerge.capture import capture
from fxmerge.symmetry.group import find_symmetry, Symmetry
