"""Child processes that end with their parent and keep within limits. Linux only; never imports torch."""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent(parent_pid: int | None = None, *, signal_number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process ``signal_number`` as soon as its parent ends, however it ends.

    The kernel goes by the parent's thread: the signal comes when the thread that started this process ends,
    so start such children from a thread that lives as long as the process. An ``exec`` keeps the setting, a
    ``fork`` does not hand it on.

    Args:
        parent_pid: Who the parent ought to be. If it is no longer, it died before this call and the signal is
            sent at once. Default: whoever is the parent now, which leaves that gap open.

    Raises:
        OSError: The kernel refused.
    """
    expected = os.getppid() if parent_pid is None else parent_pid
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    if os.getppid() != expected:
        os.kill(os.getpid(), signal_number)


def tethered(command: Sequence[str]) -> list[str]:
    """``command``, so that whoever runs it is killed when the calling process ends.

    It goes through a short-lived Python, replaced by ``command`` under the same process id, because a
    ``preexec_fn`` may deadlock in a process that has threads.
    """
    # -P: a folder named `service` in the working directory must not be taken for this package.
    return [sys.executable, "-P", "-m", "service.processes", str(os.getpid()), *command]


def limit_resources(limits: Mapping[int, int]) -> None:
    """Limit what this process may use, for good: values by ``RLIMIT_…``. What is lower already stays so."""
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (allowed, allowed))


def _exec_tethered(parent_pid: str, *command: str) -> None:
    die_with_parent(int(parent_pid))
    os.execvp(command[0], command)


if __name__ == "__main__":
    _exec_tethered(*sys.argv[1:])
