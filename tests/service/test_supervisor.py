import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.waiting import wait_until, wait_until_gone

pytestmark = pytest.mark.processes

Supervise = Callable[[str], "subprocess.Popen[bytes]"]

# Children write to the file `journal`; `lives` does so for a start and for a SIGTERM.
PREAMBLE = """
import sys
from pathlib import Path
from service.supervisor import Child, Supervisor

journal = Path("journal")

def shell(name, script, **more):
    return Child(name=name, command=["sh", "-c", script], **more)

def lives(name, **more):
    note = f"trap 'echo {name} ends >> journal; exit 0' TERM; echo {name} starts >> journal;"
    return shell(name, note + " while :; do sleep 0.05; done", **more)

def note(line):
    with journal.open("a") as file:
        file.write(line + "\\n")

"""


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Supervise]:
    """Start a supervisor in a process of its own, given the arguments of its constructor as source."""
    started = []

    def start(arguments: str) -> "subprocess.Popen[bytes]":
        program = f"{PREAMBLE}sys.exit(Supervisor({arguments}).run())"
        started.append(subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def journal(folder: Path) -> list[str]:
    path = folder / "journal"
    return path.read_text().splitlines() if path.exists() else []


def test_a_child_that_died_is_started_again(supervise: Supervise, tmp_path: Path) -> None:
    supervise("[[shell('mayfly', 'echo born >> journal; exit 1')]]")
    wait_until(lambda: len(journal(tmp_path)) >= 2)


def test_a_child_that_ends_with_2_ends_everything_with_2(supervise: Supervise, tmp_path: Path) -> None:
    process = supervise("[[lives('other')], [shell('wrong', 'sleep 0.5; exit 2')]]")
    assert process.wait(60) == 2
    assert journal(tmp_path) == ["other starts", "other ends"]


def test_a_stage_starts_once_those_before_it_are_ready(supervise: Supervise, tmp_path: Path) -> None:
    supervise("[[lives('first', is_ready=lambda: Path('go').exists())], [lives('second')]]")
    wait_until(lambda: journal(tmp_path) == ["first starts"])
    (tmp_path / "go").touch()
    wait_until(lambda: journal(tmp_path) == ["first starts", "second starts"])


def test_it_announces_once_that_all_are_ready(supervise: Supervise, tmp_path: Path) -> None:
    supervise(
        "[[lives('one')], [shell('mayfly', 'sleep 0.3; echo x >> journal; exit 1')]], "
        "on_ready=lambda: note('all ready')"
    )
    wait_until(lambda: journal(tmp_path).count("x") >= 2)
    assert journal(tmp_path).count("all ready") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_last_stage_first(
    supervise: Supervise, tmp_path: Path, number: signal.Signals
) -> None:
    process = supervise("[[lives('first')], [lives('second')], [lives('third')]]")
    wait_until(lambda: len(journal(tmp_path)) == 3)
    process.send_signal(number)
    assert process.wait(60) == 0
    assert journal(tmp_path)[3:] == ["third ends", "second ends", "first ends"]


def test_a_child_that_will_not_end_is_killed_after_the_grace(supervise: Supervise, tmp_path: Path) -> None:
    process = supervise(
        "[[shell('deaf', 'trap \"\" TERM; echo deaf >> journal; while :; do sleep 0.05; done')]], "
        "grace_seconds=0.5"
    )
    wait_until(lambda: journal(tmp_path) == ["deaf"])
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(60) == 0
    wait_until_gone(children)


def test_a_second_signal_does_not_wait_for_the_grace(supervise: Supervise, tmp_path: Path) -> None:
    deaf = 'trap "echo asked >> journal" TERM; echo ready >> journal; while :; do sleep 0.05; done'
    process = supervise(f"[[shell('deaf', '{deaf}')]], grace_seconds=3600")
    wait_until(lambda: journal(tmp_path) == ["ready"])
    process.terminate()
    wait_until(lambda: journal(tmp_path) == ["ready", "asked"])
    process.terminate()
    assert process.wait(60) == 0


def test_nothing_is_left_when_the_supervisor_is_killed(supervise: Supervise, tmp_path: Path) -> None:
    process = supervise("[[lives('first')], [lives('second')]]")
    wait_until(lambda: len(journal(tmp_path)) == 2)
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    process.kill()
    wait_until_gone(children)
