"""The faults do what they say, on processes of no importance."""

import datetime
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from tests.chaos.disk import fill, remount, small_disk
from tests.chaos.faults import family, horse, kill, starve, stopped
from tests.chaos.redis_server import RedisServer
from tests.chaos.sabotage import ExitAtStep, shifted_clock
from tests.waiting import wait_until, wait_until_gone

MIB = 2**20


@pytest.fixture
def parent() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that has forked, as a worker that is at a job."""
    program = "import os, time; os.fork(); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        wait_until(lambda: psutil.Process(process.pid).children())
        yield process
        kill(*family(process))


def test_a_family_can_be_stopped_continued_and_killed(parent: "subprocess.Popen[bytes]") -> None:
    members = family(parent)
    assert members[1] == horse(parent)
    with stopped(*members):
        assert {member.status() for member in members} == {psutil.STATUS_STOPPED}
    wait_until(lambda: {member.status() for member in members} == {psutil.STATUS_SLEEPING})
    assert kill(*members)
    wait_until_gone(members)
    assert not kill(*members)
    assert family(parent) == []
    assert horse(parent) is None


def test_a_starved_process_gets_no_more_memory() -> None:
    program = "import sys; print(flush=True); sys.stdin.read(1); bytearray(300_000_000)"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        hungry = psutil.Process(process.pid)
        starve(hungry, limit_bytes=hungry.memory_info().vms + 10 * MIB)
        _, errors = process.communicate(b"go", timeout=30)
    assert b"MemoryError" in errors


def test_a_killed_redis_comes_back_with_its_data(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        server.client.set("key", "value")
        time.sleep(1.5)  # it syncs once a second
        server.kill()
        assert not server.is_alive
        server.start()
        assert server.client.get("key") == b"value"


def test_a_small_disk_can_be_filled_emptied_and_made_read_only(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size_bytes=2 * MIB) as disk:
        ballast = fill(disk)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            (disk / "file").write_bytes(bytes(MIB))
        ballast.unlink()
        (disk / "file").write_bytes(bytes(MIB))
        remount(disk, "ro")
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            (disk / "file").write_bytes(b"")
        remount(disk, "rw")
        (disk / "file").unlink()
        fill(disk, but_bytes=MIB)
        (disk / "file").write_bytes(bytes(MIB // 2))


def run(program: str, environment: Mapping[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("seconds", [-300, 300])
def test_a_shifted_clock_is_seen_by_every_way_to_ask(seconds: float) -> None:
    program = (
        "import datetime, json, time; from pydantic import TypeAdapter; "
        "d = datetime.datetime; u = d.now(datetime.timezone.utc); "
        "t = TypeAdapter(d).validate_python(u); assert isinstance(t, d) and t == u; "
        "print(json.dumps([time.time(), time.time_ns() / 1e9, d.now().timestamp(), u.timestamp()])); "
        "print(time.monotonic())"
    )
    times, monotonic = run(program, shifted_clock(seconds)).splitlines()
    assert json.loads(times) == pytest.approx([time.time() + seconds] * 4, abs=20)
    assert float(monotonic) == pytest.approx(time.monotonic(), abs=20)
    assert datetime.datetime.now().timestamp() == pytest.approx(time.time(), abs=20)


FORKING = """
import os, pathlib, sys
root = pathlib.Path(sys.argv[1])
def job():
    draft = root / "jobs" / "id" / "draft"
    draft.mkdir()
    draft.rename(draft.with_name("final"))
    (root.parent / "elsewhere").mkdir()
    draft.with_name("final").rmdir()
    (root.parent / "elsewhere").rmdir()
for _ in range(2):
    if os.fork() == 0:
        job()
        os._exit(0)
    print(os.wait()[1])
    for left in (root / "jobs" / "id").iterdir():
        print(left.name)
        left.rmdir()
    if (root.parent / "elsewhere").exists():
        (root.parent / "elsewhere").rmdir()
"""


@pytest.mark.parametrize(("step", "left"), [(1, []), (2, ["draft"]), (3, ["final"]), (4, []), (5, None)])
def test_an_ordered_exit_comes_before_its_step_and_once(
    tmp_path: Path, step: int, left: list[str] | None
) -> None:
    data_dir = tmp_path / "data"
    (data_dir / "jobs" / "id").mkdir(parents=True)
    steps = ExitAtStep(tmp_path / "steps", data_dir)
    environment = steps.environment
    steps.order(step)
    said = run(FORKING, environment, str(data_dir), "worker").split()
    assert said == (["0", "0"] if left is None else ["9", *left, "0"])
    assert steps.taken() == ["mkdir draft", "rename final", "rmdir final", "_exit "][:step]
