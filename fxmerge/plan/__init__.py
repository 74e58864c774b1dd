"""What the command line is asked to do, as one value and one YAML file: models, data, recipe, run and output."""

from fxmerge.plan.parts import Data as Data
from fxmerge.plan.parts import ModelFile as ModelFile
from fxmerge.plan.parts import Output as Output
from fxmerge.plan.parts import Plan as Plan
from fxmerge.plan.text import from_yaml as from_yaml
from fxmerge.plan.text import recipe_from_yaml as recipe_from_yaml
from fxmerge.plan.text import to_yaml as to_yaml
