"""How pytest-xdist spreads the tests over processes, and what makes them fast there."""

import gc
from collections.abc import Iterator

import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling


def pytest_configure(config: pytest.Config) -> None:
    """There is a process for every core, so that each needs one thread."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What all modules have imported stays: searching it for garbage, again and again, took an eighth of the time. What
    tests make is searched less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


class ByParameters(LoadScopeScheduling):
    """Tests of the same parameters run in one process, where they share what is costly, such as a captured network."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("[")[2] or nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByParameters:
    return ByParameters(config, log)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny networks are faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
