"""How many mutations are tried."""

import pytest

# A probe and, where it passes, a reading: three times what they take on two slow cores.
_SECONDS_EACH, _MARGIN_SECONDS = 2, 300
DEFAULT_MUTATIONS = 60


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hostile", "hostile inputs")
    group.addoption("--mutations", type=int, default=DEFAULT_MUTATIONS, help="Mutated videos to try.")
    group.addoption("--mutations-seed", type=int, default=1, help="Decides the mutations.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    count = config.getoption("mutations", DEFAULT_MUTATIONS)
    limit_seconds = _MARGIN_SECONDS + _SECONDS_EACH * count
    for item in items:
        if item.get_closest_marker("mutations"):
            item.add_marker(pytest.mark.timeout(limit_seconds))
