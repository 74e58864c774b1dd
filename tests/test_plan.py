"""Plans: what a YAML file may say, and where its mistakes are told to be."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from fxmerge import Align, Average, Budget, LeastSquares, OptionError, Readout, Recipe, Run, Zip
from fxmerge.plan import Data, ModelFile, Output, Plan, from_yaml, recipe_from_yaml, to_yaml
from fxmerge.plan.schema import schema

PLANS = [
    Plan((ModelFile("/a.pt"), ModelFile("/b.pt")), arch="timm:resnet18"),
    Plan(
        (ModelFile("/a", set={"num_classes": 5}, sha256={"w.pt": "00"}), ModelFile("/b", arch="tests.files:mlp")),
        arch="hf",
        set={"depth": 2},
        input=("1x3x32x32",),
        base=ModelFile("/base"),
        data=(Data("/x.npz", samples=5), Data("tests.files:batches", batch=2, length=9, sha256="1")),
        recipe=Recipe(match=Align(alpha={"a": 0.5}), fit=None, names=("x", "y"), free=("output",)),
        run=Run(device="cpu", memory=0.5, seed=3, progress=False, verify=False),
        output=Output("/out", "5GB"),
    ),
    Plan((ModelFile("/a"),), "hf", "fold", recipe=Recipe(match=Zip(width=Budget(flops=0.5)), fit=Readout(own=0.5))),
    Plan(
        (ModelFile("/a"), ModelFile("/b"), ModelFile("/c")),
        "hf",
        recipe=Recipe(
            match=Zip(width={"layer*": 0.5}, continuous="auto"),
            combine=Average(weights=(1, 2, 3)),
            fit=LeastSquares(outputs="logits"),
            share=Budget(distance=0.1),
        ),
    ),
]


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_goes_to_yaml_and_back(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(to_yaml(plan))
    assert from_yaml(tmp_path / "recipe.yaml") == plan
    assert recipe_from_yaml(tmp_path / "recipe.yaml") == plan.recipe


def test_a_recipe_alone_is_read(tmp_path: Path) -> None:
    recipe = PLANS[3].recipe
    assert recipe_from_yaml(recipe_file(tmp_path, recipe.to_yaml())) == recipe
    assert recipe_from_yaml(recipe_file(tmp_path, recipe.to_json())) == recipe
    with pytest.raises(OptionError, match=r"recipe.yaml, line 2, column 10: Align.alpha is 3; it must be"):
        recipe_from_yaml(recipe_file(tmp_path, "match:\n  alpha: 3\n  kind: Align"))


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_one_entry_needs_no_list_and_paths_are_those_of_the_file(tmp_path: Path) -> None:
    text = "models: [{path: a.pt}, {path: /b.pt}]\narch: m:f\ninput: 1x4\ndata: {path: m:loader}\noutput: {path: out}"
    plan = from_yaml(recipe_file(tmp_path, text))
    assert [model.path for model in plan.models] == [str(tmp_path / "a.pt"), "/b.pt"]
    assert (plan.input, plan.data[0].path) == (("1x4",), "m:loader")
    assert plan.output == Output(str(tmp_path / "out"))


# -------------------------------------------------------------------------- mistakes

HEAD = "models: [{path: a}, {path: b}]\narch: hf\n"

MISTAKES: list[tuple[str, str]] = [
    ("", ": the file is no mapping"),
    ("- a", ", line 1, column 1: the file is no mapping"),
    ("models: [", ", line 1, column 10: this is no YAML"),
    ("models:\n\t- a", ", line 2, column 1: this is no YAML"),
    ("a: 'b", ", line 1, column 6: this is no YAML"),
    ("arch: hf", ", line 1, column 1: the file has no 'models', which it needs: a list."),
    ("modles: []", ", line 1, column 1: the file has no field 'modles'; did you mean 'models'?"),
    ("models: a.pt", ", line 1, column 9: models is the text 'a.pt'; it must be a list."),
    ("models: [a.pt]", ", line 1, column 10: models[0] is the text 'a.pt'; it must be a mapping."),
    ("models: [{path: 3}]", ", line 1, column 17: models[0].path is 3; it must be text."),
    ("models: [{}]", ", line 1, column 10: models[0] has no 'path', which it needs: text."),
    ("models: [{path: ''}]", ", line 1, column 17: ModelFile.path is ''; it must be a file"),
    ("models: [{path: a}]\narch: hf", ", line 1, column 9: merge takes 2 or more models, and 1 is given."),
    ("models: [{path: a}, {path: b}]", ", line 1, column 1: a has no architecture: pass --arch"),
    (
        HEAD + "verb: mrege",
        ", line 3, column 7: verb is the text 'mrege'; it must be 'merge', 'align' or 'fold'. Did you mean 'merge'?",
    ),
    (HEAD + "verb: fold", ", line 1, column 9: fold takes 1 model, and 2 are given."),
    (HEAD + "verb: align\nbase: {path: c}", ", line 4, column 7: align takes no base"),
    (HEAD + "arch: hf", ", line 3, column 1: the file has 'arch' twice; keep one."),
    (HEAD + "fxmerge: 2", ", line 3, column 10: the format has version 2; this fxmerge reads version 1."),
    (HEAD + "3: 4", ", line 3, column 1: the file has no field 3; its fields are models"),
    (HEAD + "set: {1: 2}", ", line 3, column 7: set has the key 1; keys are text: put it in quotes."),
    (HEAD + "data: x.npz", ", line 3, column 7: data[0] is the text 'x.npz'; it must be a mapping."),
    (
        HEAD + "data: {path: x, samples: 1e3}",
        ", line 3, column 26: data[0].samples is the text '1e3'; it must be a whole",
    ),
    (
        HEAD + "data: {path: x, smaples: 3}",
        ", line 3, column 17: data[0] has no field 'smaples'; did you mean 'samples'?",
    ),
    (HEAD + "data: [{path: x}, {path: y}, {path: z}]", ", line 3, column 7: data has 3 entries for 2 models"),
    (
        HEAD + "output: {path: o, shard_size: 5XB}",
        ", line 3, column 31: Output.shard_size is '5XB'; it must be a number",
    ),
    (HEAD + "run: {seed: true}", ", line 3, column 13: run.seed is true; it must be a whole number."),
    (HEAD + "run: {device: gpu}", ", line 3, column 15: Run.device is 'gpu'; it must be a device of torch"),
    (HEAD + "run: {memory: 0}", ", line 3, column 15: Run.memory is 0; it must be a positive number of GiB."),
    (
        HEAD + "recipe:\n  match: Zip",
        ", line 4, column 10: recipe.match is the text 'Zip'; it must be a mapping with kind",
    ),
    (
        HEAD + "recipe:\n  match: {alpha: 1}",
        ", line 4, column 10: recipe.match has no kind; it must be 'Zip' or 'Align'.",
    ),
    (HEAD + "recipe:\n  match: {kind: Zpi}", ", line 4, column 17: recipe.match has the kind 'Zpi'; it must be"),
    (
        HEAD + "recipe:\n  match: {kind: Zip, alhpa: 1}",
        ", line 4, column 22: recipe.match has no field 'alhpa'; did you",
    ),
    (
        HEAD + "recipe:\n  match: {kind: Zip, alpha: 2}",
        ", line 4, column 29: Zip.alpha is 2; it must be a number from 0",
    ),
    (
        HEAD + "recipe: {match: {kind: Zip, alpha: '1'}}",
        ", line 3, column 36: recipe.match.alpha is the text '1'; it must",
    ),
    (HEAD + "recipe: {fit: {kind: Repair}, match: {kind: Zip, width: 2}}", ", line 3, column 9: Recipe.fit is Repair"),
    (HEAD + "recipe: {targets: means}", "it must be 'mean' or 'standardized'. Did you mean 'mean'?"),
    (HEAD + "recipe: {share: {kind: Budget}}", ", line 3, column 17: Budget.parameters is None; it must be a positive"),
    (HEAD + "recipe: {version: 9}", ", line 3, column 19: recipe.version is 9; this fxmerge reads version 1."),
    (HEAD + "run: &a\n  device: *a", ", line 3, column 6: run.device holds itself, by an alias."),
    (
        HEAD + "arch2: !!python/name:os.system a",
        ", line 3, column 8: this is no YAML: could not determine a constructor",
    ),
    (
        HEAD + "run: !!python/object:os.system {}",
        ", line 3, column 6: run has the tag 'tag:yaml.org,2002:python/object:os.system'; leave it out.",
    ),
]


@pytest.mark.parametrize(("text", "sentence"), MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes_are_told_with_their_line_and_column(text: str, sentence: str, tmp_path: Path) -> None:
    path = recipe_file(tmp_path, text)
    with pytest.raises(OptionError) as raised:
        from_yaml(path)
    assert str(raised.value).startswith(str(path))
    assert sentence in str(raised.value).removeprefix(str(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read: No such file"):
        from_yaml(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff")
    with pytest.raises(OptionError, match="is not text in UTF-8"):
        from_yaml(tmp_path / "bytes.yaml")
    (tmp_path / "deep.yaml").write_text("[" * 100_000)
    with pytest.raises(OptionError, match="this is no YAML"):
        from_yaml(tmp_path / "deep.yaml")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_told_of_in_a_sentence(seed: int, tmp_path: Path) -> None:
    import random

    rng, text = random.Random(seed), to_yaml(PLANS[1]).encode()
    for _ in range(50):
        at, bit = rng.randrange(len(text)), rng.randrange(8)
        changed = rng.choice([text[:at], text[:at] + bytes([text[at] ^ (1 << bit)]) + text[at + 1 :]])
        (tmp_path / "recipe.yaml").write_bytes(changed)
        try:
            from_yaml(tmp_path / "recipe.yaml")
        except OptionError as error:
            assert str(tmp_path / "recipe.yaml") in str(error)


# -------------------------------------------------------------------------- schema


def test_the_schema_takes_every_plan_and_no_mistake_of_names() -> None:
    validator: Any = jsonschema.Draft202012Validator
    validator.check_schema(schema())
    check = validator(schema())
    for plan in PLANS:
        check.validate(yaml.safe_load(to_yaml(plan)))
    for text in (
        "modles: []",
        HEAD + "recipe: {match: {kind: Zip, alhpa: 1}}",
        HEAD + "verb: mrege",
        HEAD + "run: {sed: 1}",
    ):
        assert list(check.iter_errors(yaml.safe_load(text)))
    check.validate(yaml.safe_load(HEAD + "data: {path: x}\ninput: 1x4"))
