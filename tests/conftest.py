"""How pytest-xdist spreads the tests over processes."""

import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling


def pytest_configure(config: pytest.Config) -> None:
    """There is a process for every core, so that each needs one thread."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


class ByParameters(LoadScopeScheduling):
    """Tests of the same parameters run in one process, where they share what is costly, such as a captured network."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("[")[2] or nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByParameters:
    return ByParameters(config, log)
