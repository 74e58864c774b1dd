"""Messages in the words of the command line."""

import ast
import re
from pathlib import Path

import pytest

import fxmerge
from fxmerge.plan.wording import worded


@pytest.mark.parametrize(
    ("said", "options", "yaml"),
    [
        ("Recipe.share is 'no', which", "--share is 'no', which", "recipe.share is 'no', which"),
        ("Zip.width is 1", "--width is 1", "recipe.match.width is 1"),
        ("Zip.alpha is 3; it", "recipe.match.alpha is 3; it", None),
        ("Align.continuous is 'auto'", "recipe.match.continuous is 'auto'", None),
        ("LeastSquares.outputs is 'logits'", "recipe.fit.outputs is 'logits'", None),
        ("Ties.density is 2", "recipe.combine.density is 2", None),
        ("Run.device is 'gpu'", "--device is 'gpu'", "run.device is 'gpu'"),
        ("Run.verify is 3", "run.verify is 3", None),
        ("Output.shard_size is '5X'", "--shard-size is '5X'", "output.shard_size is '5X'"),
        ("pass a loader, or fit=None.", "pass --data, or recipe.fit: null.", None),
        ("pass a loader, or targets='mean'.", "pass --data, or recipe.targets: mean.", None),
        ("Pass Recipe(share='trunk') for", "Pass --share trunk for", "Pass recipe.share: trunk for"),
        (
            "pass names=('first', 'second').",
            "pass --name first --name second.",
            "pass recipe.names: [first, second].",
        ),
        ("name it: Recipe(free=\"output['x']\").", "name it: recipe.free: output['x'].", None),
        ("pass LeastSquares(), Readout() or None", "pass {kind: LeastSquares}, {kind: Readout} or None", None),
        ("pass Zip(continuous=False).", "pass {kind: Zip, continuous: false}.", None),
        ("or Budget(parameters=...)", "or {kind: Budget, parameters: ...}", None),
        ("as Recipe(match=Zip(width=1.5)),", "as --width 1.5,", "as recipe.match: {kind: Zip, width: 1.5},"),
        ("such as Recipe(share=0.5), keep", "such as --share 0.5, keep", "such as recipe.share: 0.5, keep"),
        ("fxmerge.compare measures both", "fxmerge compare measures both", None),
        ("report(merged).left tells", "report.left in report.json tells", None),
        ("or pass verify=False.", "or pass run.verify: false.", None),
        ("pass base=, the model", "pass --base, the model", None),
        ("alike, or pass inputs=batch -> (args, kwargs).", "alike, or pass --data package.module:loader.", None),
        ("pass run=Run(device=...).", "pass --device.", None),
        (
            "'trunk', a number between 0 and 1 or Budget(...)",
            "'trunk', a number between 0 and 1 or {kind: Budget}",
            None,
        ),
        ("Merge Zipped.layers as they are (a=1).", "Merge Zipped.layers as they are (a=1).", None),
    ],
)
def test_options_by_their_names(said: str, options: str, yaml: str | None) -> None:
    assert worded(said) == options
    assert worded(said, yaml=True) == (options if yaml is None else yaml)


OF_USERS = [
    "/home/me/Recipe.names/a.pt has no rows.",
    "runs/width=64/a.pt and width=64.pt, width=64/b.pt differ.",
    "C:\\Run.device\\match=None is no file.",
    "There is no directory 'my Recipe.share', and none called \"match='Zip'\".",
    "Output.safetensors, Data.npz, Run.pt and Zip.pt2 cannot be read.",
    "Average.path and net.Zip.width.weight are no layers; Zip.alpha[0] is.",
    "The models' files are Run(1).pt and Data(1).npz, next to Run(1).",
    "'Run.seed' and fxmerge.merge/a.pt and fxmerge.fold.pt are mine.",
    "The text \ue000 is left.",
]


@pytest.mark.parametrize("text", OF_USERS)
@pytest.mark.parametrize("yaml", [False, True])
def test_names_and_paths_of_users_stay(text: str, yaml: bool) -> None:
    assert worded(text, yaml=yaml) == text
    assert worded(f"{text} Recipe.targets is 3: pass match=None.") == (
        f"{text} recipe.targets is 3: pass recipe.match: null."
    )


def test_words_that_users_typed_stay() -> None:
    typed = ["merge", "Recipe.names", "width=64", "trunk"]
    text = "Recipe.names and width=64 are no files: pass Recipe(share='trunk'), width=0.5, or fit=None."
    assert worded(text, typed=typed) == (
        "Recipe.names and width=64 are no files: pass --share trunk, --width 0.5, or recipe.fit: null."
    )


def messages() -> list[str]:
    """All texts of the package that may be messages: those that end in a full stop, but for docstrings."""
    found = []
    for path in Path(fxmerge.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                said |= {id(part) for part in node.values}
                text = "".join(str(p.value) if isinstance(p, ast.Constant) else "x" for p in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
                text = node.value
            else:
                continue
            if id(node) not in said and text.endswith(".") and " " in text:
                found.append(text)
    return found


def test_no_message_is_in_python_once_it_is_worded() -> None:
    """But for what speaks of arguments of Python functions alone, which no command gets to."""
    own = re.compile(
        r"\b(Recipe|Run|Zip|Align|Ties|LeastSquares|Output)[.(]|\b\w+=(None|False|True|'|batch)|a loader\b"
    )
    texts = [text.replace("Recipe.x", "Recipe.combine") for text in messages() if "merge_many([...])" not in text]
    assert sum(bool(own.search(text)) for text in texts) > 20
    left = [text for text in map(worded, texts) if own.search(text)]
    assert left == []
