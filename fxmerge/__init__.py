"""fxmerge merges independently trained PyTorch networks, training-free, for any architecture."""

from fxmerge.api import align as align
from fxmerge.api import fold as fold
from fxmerge.api import head as head
from fxmerge.api import merge as merge
from fxmerge.api import merge_many as merge_many
from fxmerge.canonical import canonicalize as canonicalize
from fxmerge.comparison import Comparison as Comparison
from fxmerge.comparison import compare as compare
from fxmerge.errors import ArchitectureMismatchError as ArchitectureMismatchError
from fxmerge.errors import CaptureError as CaptureError
from fxmerge.errors import FxmergeError as FxmergeError
from fxmerge.errors import LoaderError as LoaderError
from fxmerge.errors import NonFiniteError as NonFiniteError
from fxmerge.errors import OptionError as OptionError
from fxmerge.errors import PermutationError as PermutationError
from fxmerge.errors import SpecError as SpecError
from fxmerge.errors import UnitMapError as UnitMapError
from fxmerge.program.capture import capture as capture
from fxmerge.recipe import Align as Align
from fxmerge.recipe import Average as Average
from fxmerge.recipe import Budget as Budget
from fxmerge.recipe import LeastSquares as LeastSquares
from fxmerge.recipe import Readout as Readout
from fxmerge.recipe import Recipe as Recipe
from fxmerge.recipe import Repair as Repair
from fxmerge.recipe import Run as Run
from fxmerge.recipe import TaskArithmetic as TaskArithmetic
from fxmerge.recipe import Ties as Ties
from fxmerge.recipe import Zip as Zip
from fxmerge.reporting import Report as Report
from fxmerge.reporting import report as report
from fxmerge.symmetry.explain import Chain as Chain
from fxmerge.symmetry.explain import Step as Step
from fxmerge.symmetry.explain import explain as explain
from fxmerge.symmetry.group import EquivalenceClass as EquivalenceClass
from fxmerge.symmetry.group import Symmetry as Symmetry
from fxmerge.symmetry.group import find_symmetry as find_symmetry
from fxmerge.symmetry.rules import rule as rule
from fxmerge.units.permutation import Permutation as Permutation
from fxmerge.units.unit_map import UnitMap as UnitMap

__version__ = "0.1.0"
