"""Waiting for other processes: generous deadlines, never a measurement."""

import time
from collections.abc import Callable, Iterable

import psutil


def wait_until(condition: Callable[[], object], *, timeout_seconds: float = 60) -> None:
    """Raises: AssertionError: ``condition`` has not become true in time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_seconds:.0f} s"
        time.sleep(0.05)


def wait_until_gone(processes: Iterable[psutil.Process], *, timeout_seconds: float = 30) -> None:
    """Raises: AssertionError: One of ``processes`` is still alive; a zombie is not."""
    processes = list(processes)
    wait_until(lambda: not any(map(_is_alive, processes)), timeout_seconds=timeout_seconds)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
