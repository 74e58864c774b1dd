"""How pytest-xdist spreads the tests over processes."""

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling


class ByParameters(LoadScopeScheduling):
    """Tests of the same parameters run in one process, where they share what is costly, such as a captured network."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("[")[2] or nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByParameters:
    return ByParameters(config, log)
