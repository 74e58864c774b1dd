"""`python -m fxmerge`, as torchrun starts it."""

import sys

from fxmerge.cli import main

sys.exit(main())
