import json
import subprocess
import sys

import pytest

from tests.accelerator import ALIKE


@pytest.mark.slow
@pytest.mark.parametrize("cases", [ALIKE[:1], ALIKE], ids=["one", "all"])
def test_models_on_another_device_are_merged_there_as_on_the_cpu(cases: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.accelerator", *["--quick"] * (len(cases) == 1), *cases],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    assert {result["case"] for result in results} == set(cases)
    assert len({result["way"] for result in results if result["case"] == cases[0]}) > 1
    for result in results:
        assert result["devices"] == ["elsewhere"] and result["same units"], result
        assert result["apart"] == pytest.approx(0, abs=1e-9), result
