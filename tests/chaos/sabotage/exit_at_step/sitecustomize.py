"""In a worker: the horse that finds an order kills itself before the step that the order names."""

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

_STEPS = ("fsync", "link", "mkdir", "rename", "replace", "rmdir", "unlink")
_ORDER = os.path.join(os.environ["CHAOS_STEPS"], "die-before")
_TRACE = os.path.join(os.environ["CHAOS_STEPS"], "trace")
_STORAGE = os.environ["CHAOS_STORAGE"] + os.sep
_originals = {name: getattr(os, name) for name in (*_STEPS, "_exit")}


class _Countdown:
    """Of the process that it was made in."""

    def __init__(self, die_before: int, victim: str) -> None:
        self._die_before = die_before
        self._victims = [os.getpid()] if victim == "horse" else [os.getppid(), os.getpid()]
        self._taken = 0

    def step(self, name: str, path: str) -> None:
        self._taken += 1
        with open(_TRACE, "a") as trace:
            trace.write(f"{name} {path}\n")
        if self._taken == self._die_before:
            for pid in self._victims:
                os.kill(pid, signal.SIGKILL)


_countdown: _Countdown | None = None


def _take_order() -> None:
    global _countdown
    try:
        with open(_ORDER) as order:
            step, victim = order.read().split()
        _countdown = _Countdown(int(step), victim)
        _originals["unlink"](_ORDER)
    except FileNotFoundError:
        _countdown = None


def _path_in_storage(arguments: tuple[Any, ...], dir_fd: int | None) -> str | None:
    """What a call makes or changes, below the job's directory; None if it is not about the storage."""
    for argument in reversed(arguments):
        path = os.readlink(f"/proc/self/fd/{argument}") if isinstance(argument, int) else os.fspath(argument)
        if dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        if path.startswith(_STORAGE):
            return "/".join(path.removeprefix(_STORAGE).split(os.sep)[2:])
    return None


def _counted(name: str) -> Callable[..., Any]:
    original = _originals[name]

    @functools.wraps(original)
    def call(*arguments: Any, **options: Any) -> Any:
        if _countdown is not None:
            about = arguments[:1] if name in ("fsync", "mkdir") else arguments[:2]
            dir_fd = options.get("dir_fd")
            path = "" if name == "_exit" else _path_in_storage(about, dir_fd)
            if path is not None:
                _countdown.step(name, path)
        return original(*arguments, **options)

    return call


if sys.orig_argv[-1] == "worker":  # not in its engine, nor in the Python that becomes it
    for _name in _originals:
        setattr(os, _name, _counted(_name))
    os.register_at_fork(after_in_child=_take_order)
