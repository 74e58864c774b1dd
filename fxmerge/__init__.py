"""fxmerge merges independently trained PyTorch networks, training-free, for any architecture."""

from fxmerge.capture import capture as capture
from fxmerge.errors import ArchitectureMismatchError as ArchitectureMismatchError
from fxmerge.errors import CaptureError as CaptureError
from fxmerge.errors import FxmergeError as FxmergeError
from fxmerge.errors import LoaderError as LoaderError
from fxmerge.errors import NonFiniteError as NonFiniteError
from fxmerge.errors import OptionError as OptionError
from fxmerge.errors import PermutationError as PermutationError
from fxmerge.errors import SpecError as SpecError
from fxmerge.merge import align as align
from fxmerge.merge import merge as merge
from fxmerge.merge import merge_many as merge_many
from fxmerge.rewriting.task_vectors import TaskArithmetic as TaskArithmetic
from fxmerge.rewriting.task_vectors import Ties as Ties
from fxmerge.symmetry.explain import Chain as Chain
from fxmerge.symmetry.explain import Step as Step
from fxmerge.symmetry.explain import explain as explain
from fxmerge.symmetry.group import EquivalenceClass as EquivalenceClass
from fxmerge.symmetry.group import Symmetry as Symmetry
from fxmerge.symmetry.group import find_symmetry as find_symmetry
from fxmerge.symmetry.permutation import Permutation as Permutation
from fxmerge.symmetry.rules import rule as rule

__version__ = "0.1.0"
