"""How models are merged (`Recipe` and its parts), and how the merge is computed (`Run`)."""

from fxmerge.recipe.parts import DEFAULT_ALPHA as DEFAULT_ALPHA
from fxmerge.recipe.parts import KV_HEADS as KV_HEADS
from fxmerge.recipe.parts import OWN as OWN
from fxmerge.recipe.parts import Align as Align
from fxmerge.recipe.parts import Alpha as Alpha
from fxmerge.recipe.parts import Average as Average
from fxmerge.recipe.parts import Budget as Budget
from fxmerge.recipe.parts import Fit as Fit
from fxmerge.recipe.parts import LeastSquares as LeastSquares
from fxmerge.recipe.parts import Readout as Readout
from fxmerge.recipe.parts import Repair as Repair
from fxmerge.recipe.parts import Similarity as Similarity
from fxmerge.recipe.parts import TaskArithmetic as TaskArithmetic
from fxmerge.recipe.parts import Ties as Ties
from fxmerge.recipe.parts import Zip as Zip
from fxmerge.recipe.recipe import AUTO as AUTO
from fxmerge.recipe.recipe import NOTHING as NOTHING
from fxmerge.recipe.recipe import VERSION as VERSION
from fxmerge.recipe.recipe import Recipe as Recipe
from fxmerge.recipe.run import Run as Run
