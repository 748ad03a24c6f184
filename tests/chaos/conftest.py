"""How much is done, the rigs to do it to, and the table at the end."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import pytest

from tests.chaos.rig import Rig, new_rig
from tests.videos import moving_square, write_video

_PROPERTY = "chaos row"
_TIMEOUT_SECONDS = {"quick": 300, "full": 1800}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chaos", "faults injected into real processes")
    group.addoption(
        "--chaos", choices=("quick", "full"), default="quick", help="How often each fault is injected."
    )
    group.addoption("--chaos-seed", type=int, default=1, help="Decides the moments of the faults.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("chaos"):
            item.add_marker(pytest.mark.timeout(_TIMEOUT_SECONDS[config.getoption("chaos", "quick")]))


@dataclass(frozen=True)
class Scale:
    """How much is done: ``quick`` with every change, ``full`` the counts of the catalogue."""

    name: Literal["quick", "full"]

    def of(self, *, quick: int, full: int) -> int:
        return full if self.name == "full" else quick


@pytest.fixture(scope="session")
def scale(pytestconfig: pytest.Config) -> Scale:
    return Scale(pytestconfig.getoption("chaos", "quick"))


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """The same for the same test and seed."""
    return random.Random(f"{request.config.getoption('chaos_seed', 1)} {request.node.name}")


@dataclass
class Row:
    """What a test shows of its line of the catalogue; printed in the table at the end of the session."""

    number: int
    fault: str
    runs: int = 0
    figures: dict[str, str] = field(default_factory=dict)

    def slowest(self, what: str, seconds: list[float], *, limit_seconds: float) -> None:
        """Note the worst of some durations. Raises: AssertionError: It is over the limit."""
        worst = max(seconds)
        self.figures[f"slowest {what}"] = f"{worst:.1f} s of {limit_seconds:.0f} s"
        assert worst <= limit_seconds, f"{what}: {worst:.1f} s"


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Row:
    """The row that the test's marker names: ``@pytest.mark.row(4, "worker stopped past its lease")``."""
    marker = request.node.get_closest_marker("row")
    row = Row(*marker.args)
    request.node.user_properties.append((_PROPERTY, row))
    return row


@pytest.fixture(scope="session")
def _own_settings() -> Iterator[None]:
    """As in every test, but for fixtures that live longer than one."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [*os.environ]:
            if name.startswith("IMCNET_"):
                patch.delenv(name)
        yield


@pytest.fixture(scope="module")
def make_rig(
    tmp_path_factory: pytest.TempPathFactory, untrained_weights: Path, _own_settings: None
) -> Iterator[Callable[..., Rig]]:
    """:func:`new_rig`, with settings by name; what it makes is stopped after the module's last test."""
    with ExitStack() as stack:

        def make(**settings: object) -> Rig:
            rig = new_rig(tmp_path_factory.mktemp("rig"), untrained_weights, **settings)
            stack.callback(rig.stop)
            return rig

        yield make


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The video of so many frames; on one core a worker takes about 20 ms a frame."""
    directory = tmp_path_factory.mktemp("clips")

    @cache
    def of(frames: int) -> Path:
        return write_video(directory / f"{frames}.mp4", moving_square(frames))

    return of


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    shown = [
        (row, report)
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and (report.when == "call" or report.skipped)
        for name, row in report.user_properties
        if name == _PROPERTY
    ]
    if not shown:
        return
    terminalreporter.section("faults")
    terminalreporter.line(f"{'row':>3}  {'fault':<56} {'runs':>5}  {'result':<8} {'seconds':>7}  figures")
    for row, report in sorted(shown, key=lambda each: each[0].number):
        figures = ", ".join(f"{what} {value}" for what, value in row.figures.items())
        result = f"{report.outcome:<8} {report.duration:>7.1f}"
        terminalreporter.line(f"{row.number:>3}  {row.fault:<56} {row.runs:>5}  {result}  {figures}")
