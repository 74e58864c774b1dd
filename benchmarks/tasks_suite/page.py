"""The page of results: its sections, in order, and the words beside their tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill

from invariance import table
from models.processes import Row

from tasks_suite.judging import POINTS
from tasks_suite.methods import (
    APART,
    DEFAULTS,
    OWN_DATA,
    PLAIN,
    REFITS,
    REPAIRS,
    SEARCHES,
    STANDARD,
    STANDARDIZED,
)
from tasks_suite.report import (
    BEST,
    Results,
    accuracies,
    barriers,
    changes,
    costs,
    dense_scores,
    failures,
    margins,
    over_alpha,
    over_controls,
    text_losses,
    without_data,
)
from tasks_suite.suite import NETWORKS

Section = tuple[str, str, Callable[[Results], list[Row]]]

SECTIONS: tuple[Section, ...] = (
    (
        "Disjoint tasks: accuracy per task",
        "In percent, the mean of both tasks, choosing among the classes of the task (for text: the next character, "
        f"mean of both domains). `{BEST}` is the best of the grid over alpha, chosen for each pair by this very "
        "number: no method that has no labels can be expected to reach it.",
        lambda r: accuracies(r, "disjoint", "per_task"),
    ),
    (
        "Defaults against the best published method",
        "The same accuracies; fxmerge zips as MuDSC does and then refits. The difference is the mean over pairs, with "
        "its standard error; the best published method is chosen for each network by its mean.",
        lambda r: margins(r, "disjoint", "per_task"),
    ),
    (
        "Disjoint tasks: joint accuracy",
        "In percent, on the images of both tasks, choosing among all ten classes.",
        lambda r: accuracies(r, "disjoint", "joint"),
    ),
    (
        "Refitting and its controls: accuracy per task",
        "All fitted on the same 2,000 images of both tasks (256 windows of text) to the mean of both parents. "
        "Controls: one parent, a random network, and the zipped average, of which only the last layer is fitted; and a "
        "refit of the plain average, nothing matched. fxmerge is the refit of the zipped average.",
        lambda r: accuracies(r, "disjoint", "per_task", REFITS),
    ),
    (
        "Refitting and its controls: joint accuracy",
        "The same networks, choosing among all ten classes.",
        lambda r: accuracies(r, "disjoint", "joint", REFITS),
    ),
    (
        "Refitting with few images: accuracy per task",
        "As above, with 200 images, 20 of each class (26 windows of text), for matching, BatchNorm and refitting.",
        lambda r: accuracies(r, "few", "per_task", ("ensemble", PLAIN, "MuDSC zip", *REFITS)),
    ),
    (
        "Refitting with fewest images: accuracy per task",
        "As above, with 50 images, 5 of each class (7 windows of text).",
        lambda r: accuracies(r, "fewest", "per_task", ("ensemble", PLAIN, "MuDSC zip", *REFITS)),
    ),
    (
        "Refitting on data of each parent's own: accuracy per task",
        "The same inputs, but it is known which task each is of, and three quarters of what is learnt are what the "
        "parent of that task gives.",
        lambda r: accuracies(r, "disjoint", "per_task", APART),
    ),
    (
        "Refitting on data of each parent's own: joint accuracy",
        "The same networks, choosing among all ten classes.",
        lambda r: accuracies(r, "disjoint", "joint", APART),
    ),
    (
        "Refitting to standardized outputs: accuracy per task",
        "One set of images for both, as above, but every output of both parents is first shifted to mean zero over "
        "these images, and scaled to equal deviations. That needs neither labels nor the task of an image. It is for "
        "parents that give different answers: on text, where both give the same, it takes away what they agree on.",
        lambda r: accuracies(r, "disjoint", "per_task", STANDARD),
    ),
    (
        "Refitting to standardized outputs: joint accuracy",
        "The same networks, choosing among all ten classes.",
        lambda r: accuracies(r, "disjoint", "joint", STANDARD),
    ),
    (
        f"{DEFAULTS} over its controls",
        "Accuracy per task, in points: the mean over networks, the least of them, and how many are above zero.",
        lambda r: (
            over_controls(r, "per_task", DEFAULTS, ("MuDSC zip", *REFITS[:-1]))
            + over_controls(r, "per_task", DEFAULTS, ("MuDSC zip", *REFITS[:-1]), "few")
            + over_controls(r, "per_task", DEFAULTS, ("MuDSC zip", *REFITS[:-1]), "fewest")
            + over_controls(r, "per_task", OWN_DATA, APART[:-1])
            + over_controls(r, "per_task", STANDARDIZED, STANDARD[:-1])
        ),
    ),
    (
        f"{DEFAULTS} over its controls, jointly",
        "The same for joint accuracy.",
        lambda r: (
            over_controls(r, "joint", DEFAULTS, ("MuDSC zip", *REFITS[:-1]))
            + over_controls(r, "joint", OWN_DATA, APART[:-1])
            + over_controls(r, "joint", STANDARDIZED, STANDARD[:-1])
        ),
    ),
    (
        "Over alpha",
        "Accuracy per task of alignment, in percent, by the weight of the weight-space similarity.",
        lambda r: over_alpha(r, "disjoint", "per_task"),
    ),
    (
        "Options of the search",
        "Accuracy per task, averaged, alpha 0.5: activations compared by correlation (the default) and by cosine.",
        lambda r: accuracies(r, "disjoint", "per_task", SEARCHES),
    ),
    (
        "REPAIR",
        "Accuracy per task, averaged, and with the means and deviations of every unit reset to those of the parents. "
        "BatchNorm is estimated anew for all.",
        lambda r: accuracies(r, "disjoint", "per_task", REPAIRS),
    ),
    (
        "Without data",
        "Accuracy per task of what weights alone give, for the networks with BatchNorm. Without data, variances are "
        "corrected for what averaging takes from the weights, as in fxmerge without a loader, or they are pooled. The "
        "others have statistics that are estimated over the 2,000 images.",
        without_data,
    ),
    (
        "Maps of images",
        "One parent learns Fashion-MNIST's images without the noise that was added to them, the other their edges (the "
        "length of the gradient); each gives zeros for what it has not learnt. In percent, the share of a map's "
        "variance over all pixels of 2,000 test images that is explained up to scale.",
        dense_scores,
    ),
    ("Loss on text", "Cross-entropy of the next character, in nats.", text_losses),
    (
        "Same tasks: accuracy",
        "In percent, of the merge of two networks that learnt the same from two initialisations.",
        lambda r: (
            accuracies(r, "same", "joint")
            + [
                line
                for line in accuracies(r, "same", "per_task")
                if NETWORKS.get(line["network"]) and NETWORKS[line["network"]].data == "text"
            ]
        ),
    ),
    (
        "Same tasks: loss barrier",
        f"The rise of the test loss above the straight line between the parents' losses, at most over {POINTS} evenly "
        "spaced points from one parent to the other, BatchNorm re-estimated at every point. In parentheses, the share "
        "that is left of the plain average's.",
        barriers,
    ),
    (
        "Function preserved",
        "The largest change of an output when one parent is permuted and nothing else, relative to the largest output, "
        "in float64, over all pairs. BatchNorm is estimated anew on both sides.",
        changes,
    ),
    ("Size and time", "Seconds of a merge: medians, on one thread, two processes at a time.", costs),
)

PICTURES = (
    ("Accuracy over alpha", "tasks-alpha.svg"),
    ("Loss between parents that learnt the same", "tasks-barrier.svg"),
    ("Loss on the plane through two parents and their merge", "tasks-plane.png"),
    ("One task for the other: parents that count unequally, from 0.1 to 0.9", "tasks-tradeoff.svg"),
)

PREFACE = """# Real tasks

What `python benchmarks/tasks.py` measured: networks trained apart, merged without training. There are four settings:

- One parent learns the first and the other the last five classes of Fashion-MNIST.
- One parent learns code about concurrency and the other code about formats, from the sources of Python's own library.
- One parent learns to take noise out of images and the other to see their edges.
- Both parents learn everything, from two initialisations.

Images are predicted into a space in which every class has a fixed direction, so that one head serves all classes.
Published methods average; fxmerge fits layers after averaging. All see the same 2,000 unlabelled training images, over
which BatchNorm statistics are re-estimated for all alike. Numbers are means over pairs of parents and, where there are
several, their standard deviation. A number without one is of one pair. No two pairs of a setting share a parent."""


def page(rows: Sequence[Row], plots: Path | None) -> str:
    """The markdown page, with the pictures that are in a folder."""
    results = Results(rows)
    parts = [PREFACE, *dict.fromkeys(row["machine"] for row in rows if "machine" in row)]
    for title, text, make in SECTIONS:
        lines = make(results)
        parts += [f"## {title}", fill(text, 118, break_on_hyphens=False), table(lines)] if lines else []
    pictures = [f"![{title}]({name})" for title, name in PICTURES if plots is not None and (plots / name).is_file()]
    parts += ["## Pictures", *pictures] if pictures else []
    if failed := failures(rows):
        parts += ["## Failures", table(failed)]
    return "\n\n".join(parts) + "\n"
