import os
import signal
import subprocess
import sys

import psutil

from service.processes import tethered
from tests.waiting import wait_until_gone

PARENT = """
import subprocess, sys
from service.processes import tethered
child = subprocess.Popen(tethered(["sleep", "600"]), start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""


def test_a_tethered_child_dies_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    wait_until_gone([child])


def test_a_child_whose_parent_is_dead_already_is_killed_at_once() -> None:
    somebody_else = "1" if os.getpid() != 1 else "2"
    command = [sys.executable, "-m", "service.processes", somebody_else, "sleep", "600"]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL


def test_a_tethered_command_keeps_its_arguments_and_its_exit_code() -> None:
    command = tethered(["sh", "-c", 'echo "$1"; exit 7', "sh", "two words"])
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("two words\n", 7)


def test_limits_are_lowered_for_good_and_never_raised() -> None:
    program = (
        "import resource; from service.processes import limit_resources\n"
        "for value in (64, 32, 128): limit_resources({resource.RLIMIT_NOFILE: value})\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["32", "32"]
