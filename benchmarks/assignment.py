"""Linear assignment: scipy, which fxmerge uses, beside lapx, on the kinds of scores that matching meets.

Correlations of units that have nothing in common ("random"), and of units that have a like one in the other model, with
little noise ("twins") or much ("noisy twins"). Both must find the same sum of scores.

    python benchmarks/assignment.py [--short]

lapx is left out where it is not installed (`pip install lapx`).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

# Before numpy is imported, which reads it.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
from invariance import machine, table

from fxmerge.matching.assignment import Scores, assign
from fxmerge.symmetry.units import Ids

UNITS = (64, 512, 1024, 2048)
NOISE = {"random": None, "twins": 0.1, "noisy twins": 2.0}
REPEATS = 3


def scores(units: int, noise: float | None) -> Scores:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2 * units, 200))
    if noise is not None:
        features[units:] = features[rng.permutation(units)] + noise * features[units:]
    correlations: Scores = np.corrcoef(features)[:units, units:]
    return correlations


def by_lapx(given: Scores) -> Ids:
    import lap

    columns: Ids = lap.lapjv(-given)[1]
    return columns


def timed(solve: Callable[[Scores], Ids], given: Scores) -> tuple[float, float]:
    """Seconds of CPU time, the best of several runs, and the sum of scores."""
    best = np.inf
    for _ in range(REPEATS):
        began = time.process_time()
        columns = solve(given)
        best = min(best, time.process_time() - began)
    return best, float(given[np.arange(len(given)), columns].sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="only up to 512 units")
    options = parser.parse_args()
    rows, same = [], True
    for units in UNITS[:2] if options.short else UNITS:
        for kind, noise in NOISE.items():
            given = scores(units, noise)
            seconds, value = timed(assign, given)
            row = {"units": str(units), "scores": kind, "scipy s": f"{seconds:.4f}"}
            if find_spec("lap"):
                other, found = timed(by_lapx, given)
                same &= abs(value - found) < 1e-9 * units
                row |= {"lapx s": f"{other:.4f}", "times": f"{seconds / other:.1f}"}
            rows.append(row)
    print(f"{machine()}; seconds of CPU time\n\n{table(rows)}")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
