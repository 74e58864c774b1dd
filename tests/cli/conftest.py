"""Directories and files that the tests of the command line share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fxmerge import cli
from tests import files

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the command line in this process; gives the exit code, the output and the errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """The weights of two small networks."""
    return files.weights(tmp_path / "a.safetensors", 0), files.weights(tmp_path / "b.safetensors", 1)


@pytest.fixture(scope="session")
def gpts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two tiny GPT-2s, `a` and `b`, and a text, `corpus.txt`."""
    folder = tmp_path_factory.mktemp("gpts")
    files.gpt2(folder / "a", 0)
    files.gpt2(folder / "b", 1)
    files.corpus(folder / "corpus.txt")
    return folder
