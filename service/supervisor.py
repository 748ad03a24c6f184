"""Runs a few commands as children: starts them in order, restarts what dies, leaves nothing behind."""

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from service.processes import tethered

logger = logging.getLogger(__name__)

EXIT_MISCONFIGURED = 2
_POLL_SECONDS = 0.1
_FIRST_DELAY_SECONDS = 1.0
_LAST_DELAY_SECONDS = 30.0


def _always() -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Child:
    """A command to keep running. ``is_ready`` is asked while it runs, and must answer within a second or so.

    Without ``environment`` it inherits the supervisor's.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] | None = None
    is_ready: Callable[[], bool] = _always


class Supervisor:
    """Keeps stages of children running until a signal comes.

    A child is started once all children of the stages before its own are ready, and started again when it has
    died, after a delay that grows from 1 to 30 seconds and starts over when the child lived that long. They
    get SIGTERM stage by stage, last stage first, and SIGKILL after ``grace_seconds`` or on a second signal.
    Each is in a session of its own, so that Ctrl-C in a terminal reaches the supervisor alone, and is killed
    by the kernel should the supervisor itself be killed.

    Args:
        on_ready: Called once, as soon as all children are ready.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[Child]],
        *,
        on_ready: Callable[[], None] = lambda: None,
        grace_seconds: float = 20,
    ) -> None:
        self._stages = [[_Slot(child) for child in stage] for stage in stages]
        self._on_ready = on_ready
        self._announced = False
        self._grace_seconds = grace_seconds
        self._signals_seen = 0

    def run(self) -> int:
        """Run until SIGINT, SIGTERM or SIGHUP. Call it in the main thread.

        Returns:
            0 after a signal; 2 if a child ended with 2, which says that a restart would not help it. One that
            has lived for half a minute is restarted all the same: it was well configured, and the others are.
        """
        with self._handling_signals():
            try:
                while not self._signals_seen:
                    if any(
                        slot.reap() == EXIT_MISCONFIGURED and not slot.has_lived for slot in self._slots()
                    ):
                        return EXIT_MISCONFIGURED
                    self._start_what_is_due()
                    self._announce()
                    time.sleep(_POLL_SECONDS)
                return 0
            finally:
                for stage in reversed(self._stages):
                    self._stop(stage)

    def _slots(self) -> Iterator["_Slot"]:
        return (slot for stage in self._stages for slot in stage)

    def _start_what_is_due(self) -> None:
        for position, stage in enumerate(self._stages):
            due = [slot for slot in stage if slot.is_due()]
            if due and all(slot.is_ready() for before in self._stages[:position] for slot in before):
                for slot in due:
                    slot.start()

    def _announce(self) -> None:
        if not self._announced and all(slot.is_ready() for slot in self._slots()):
            self._announced = True
            self._on_ready()

    def _stop(self, stage: Sequence["_Slot"]) -> None:
        for slot in stage:
            slot.terminate()
        deadline = time.monotonic() + self._grace_seconds
        while (
            any(slot.is_alive() for slot in stage) and time.monotonic() < deadline and self._signals_seen < 2
        ):
            time.sleep(_POLL_SECONDS)
        for slot in stage:
            slot.kill()

    @contextlib.contextmanager
    def _handling_signals(self) -> Iterator[None]:
        def count(_number: int, _frame: FrameType | None) -> None:
            self._signals_seen += 1

        before = {
            number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Slot:
    """A child's place: its process while there is one, and when the next is due."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._due_at = 0.0
        self._delay_seconds = _FIRST_DELAY_SECONDS
        self.has_lived = False

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def is_ready(self) -> bool:
        return self.is_alive() and self._child.is_ready()

    def is_due(self) -> bool:
        return self._process is None and time.monotonic() >= self._due_at

    def start(self) -> None:
        self._started_at = time.monotonic()
        self._process = subprocess.Popen(
            tethered(self._child.command),
            env=self._child.environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def reap(self) -> int | None:
        """Exit code of the process if it has ended, once; the next one is then due after the delay."""
        if self._process is None or (code := self._process.poll()) is None:
            return None
        self.kill()
        if time.monotonic() - self._started_at > _LAST_DELAY_SECONDS:
            self.has_lived = True
            self._delay_seconds = _FIRST_DELAY_SECONDS
        self._due_at = time.monotonic() + self._delay_seconds
        if code != EXIT_MISCONFIGURED or self.has_lived:
            logger.warning(
                "%s ended with %d, starting it again in %.0f s", self._child.name, code, self._delay_seconds
            )
        self._delay_seconds = min(2 * self._delay_seconds, _LAST_DELAY_SECONDS)
        return code

    def terminate(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """Kill whatever is left of the child and of its process group, and forget it."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
