"""Faults of processes: whom to hit, and how. Workers are given as the process that a rig has started."""

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.waiting import wait_until

Worker = subprocess.Popen[bytes]


def engine(worker: Worker) -> psutil.Process | None:
    """The worker's child that holds the network; None while there is none."""
    return next((child for child in _children(worker) if _is_engine(child)), None)


def horse(worker: Worker) -> psutil.Process | None:
    """The worker's child that works at a job; None while there is none."""
    return next((child for child in _children(worker) if not _is_engine(child)), None)


def family(worker: Worker) -> list[psutil.Process]:
    """The worker and all its children, the worker first: the order in which to stop or kill them."""
    return [psutil.Process(worker.pid), *_children(worker)] if worker.poll() is None else []


def kill(*processes: psutil.Process | None) -> bool:
    """SIGKILL at once; whether all of them were alive."""
    # Looked at before the first dies: its children may go with it.
    alive = [process for process in processes if process is not None and _is_alive(process)]
    for process in alive:
        _signal(process, signal.SIGKILL)
    return len(alive) == len(processes)


@contextmanager
def stopped(*processes: psutil.Process | None) -> Iterator[None]:
    """SIGSTOP, and SIGCONT for whoever is still there at the end: hung, swapped out, or a host that slept."""
    for process in processes:
        _signal(process, signal.SIGSTOP)
    try:
        wait_until(lambda: all(map(_is_at_rest, processes)), timeout_seconds=10)
        yield
    finally:
        for process in processes:
            _signal(process, signal.SIGCONT)


def peak_bytes(process: psutil.Process) -> int:
    """The most address space that a process has had (``VmPeak`` of ``proc(5)``): starting takes some too."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmPeak:")[1].split()[0]) * 1024


def starve(*processes: psutil.Process, limit_bytes: int) -> None:
    """Limit the address space of running processes, and of those that they will start."""
    for process in processes:
        process.rlimit(psutil.RLIMIT_AS, (limit_bytes, limit_bytes))


def _children(worker: Worker) -> list[psutil.Process]:
    try:
        children = psutil.Process(worker.pid).children()
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if _is_alive(child)]


def _is_at_rest(process: psutil.Process | None) -> bool:
    return process is None or _state(process) in (None, psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)


def _is_engine(process: psutil.Process) -> bool:
    try:
        return "worker.engine" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def _is_alive(process: psutil.Process) -> bool:
    return _state(process) not in (None, psutil.STATUS_ZOMBIE)


def _state(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.NoSuchProcess):
        return str(process.status())
    return None


def _signal(process: psutil.Process | None, number: signal.Signals) -> None:
    if process is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
