"""How many mutations are tried."""

import pytest

_SECONDS_EACH, _MARGIN_SECONDS = (
    2,
    300,
)  # a probe and, where it passes, a reading; twenty times what they take


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hostile", "hostile inputs")
    group.addoption("--mutations", type=int, default=60, help="How many mutated videos are tried.")
    group.addoption("--mutations-seed", type=int, default=1, help="Decides the mutations.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    limit_seconds = _MARGIN_SECONDS + _SECONDS_EACH * config.getoption("mutations", 60)
    for item in items:
        if item.get_closest_marker("mutations"):
            item.add_marker(pytest.mark.timeout(limit_seconds))
