"""The worker's and the horse's side of the engine. No torch in here."""

import contextlib
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import Client, Connection
from pathlib import Path

from pydantic import TypeAdapter

from service.errors import EngineFailed, Misconfigured
from service.jobs import Quality
from worker.decode import VideoFrame
from worker.protocol import (
    DONE,
    MASK,
    OUT_OF_MEMORY,
    PING,
    TAKEN,
    EngineAnswer,
    EngineConfig,
    EngineQuestion,
    EngineReady,
    EngineRefused,
    Mask,
    StreamRequest,
)
from worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.25
_DEATH_SECONDS = 10.0  # a process that holds gigabytes does not vanish at once
_GREETING: TypeAdapter[EngineReady | EngineRefused] = TypeAdapter(EngineReady | EngineRefused)


class EngineProcess:
    """The one engine of a worker: started, looked after and ended by RQ's parent process."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._directory = Path(tempfile.mkdtemp(prefix="imcnet-"))  # 0700, and short: socket paths are
        self._process: subprocess.Popen[bytes] | None = None
        self._ready: EngineReady | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the engine has not been started"
        return self._process.pid

    @property
    def ready(self) -> EngineReady:
        assert self._ready is not None, "the engine has not been started"
        return self._ready

    @property
    def socket(self) -> Path:
        return self._directory / "engine"

    def ensure_running(self) -> None:
        """Start the engine if there is none, or none that is alive any more.

        Raises:
            Misconfigured: It cannot start as configured: weights, device or input size.
            EngineFailed: It died or was not ready in time.
        """
        if self._process is not None and self._process.poll() is None:
            return
        if self._process is not None:
            logger.warning("The engine (pid %d) is dead; starting a new one", self._process.pid)
        self._start()

    def is_idle(self, timeout_seconds: float) -> bool:
        """Whether the engine gives a sign of life within that time: one at work serves its stream first."""
        try:
            with Client(str(self.socket), "AF_UNIX") as connection:
                connection.send_bytes(PING)
                return connection.poll(timeout_seconds) and connection.recv_bytes() == PING
        except (OSError, EOFError):
            return False

    def replace(self) -> None:
        """Start another engine in place of this one. Raises: as :meth:`ensure_running`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._start()

    def stop(self) -> None:
        """End the engine at once: it holds nothing that would have to be saved."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        shutil.rmtree(self._directory, ignore_errors=True)

    def _start(self) -> None:
        self.socket.unlink(missing_ok=True)
        config = EngineConfig(
            socket=self.socket,
            parent_pid=os.getpid(),
            weights=self._settings.weights,
            weights_sha256=self._settings.weights_sha256,
            device=self._settings.device,
            input_size=self._settings.input_size,
            cpu_threads=self._settings.cpu_threads,
            exact_backend=self._settings.exact_backend,
            graphs=self._settings.graphs,
        )
        self._process = subprocess.Popen(
            # -P: a folder named `worker` in the working directory must not be taken for this package.
            [sys.executable, "-P", "-m", "worker.engine", config.model_dump_json()],
            stdout=subprocess.PIPE,
        )
        self._ready = self._wait_until_ready(self._process)
        logger.info("The engine (pid %d) is ready on %s", self.pid, self._ready.device)

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> EngineReady:
        assert process.stdout is not None
        with process.stdout as stdout:
            timeout = self._settings.engine_start_seconds
            line = stdout.readline() if select.select([stdout], [], [], timeout)[0] else b""
        if not line:
            process.kill()
            process.wait()
            raise EngineFailed("The engine did not start; its log says why.")
        greeting = _GREETING.validate_json(line)
        if isinstance(greeting, EngineRefused):
            process.wait()
            raise Misconfigured(greeting.reason)
        return greeting


@dataclass(frozen=True, kw_only=True)
class SegmentedFrame:
    frame: VideoFrame
    mask: Mask


class EngineStream:
    """One video's way through the engine, from the horse.

    A thread of its own reads and sends the frames, so that decoding runs beside the network, and the caller's
    thread is always free to be stopped. It holds no more frames than the engine needs to go on.

    Args:
        socket_path, engine_pid: The engine.
        tick: Called at least every quarter of a second while masks are waited for; whatever it raises ends
            the stream.
        stall_seconds: An engine that neither takes a frame nor returns a mask for this long is killed.
    """

    def __init__(
        self, *, socket_path: Path, engine_pid: int, tick: Callable[[], None], stall_seconds: float
    ) -> None:
        self._socket_path = socket_path
        self._engine_pid = engine_pid
        self._tick = tick
        self._stall_seconds = stall_seconds
        self._pending: deque[VideoFrame] = deque()
        self._sender_error: BaseException | None = None
        self._last_activity = time.monotonic()
        self._decoding = False
        self._over = False
        self.decode_s = 0.0
        self.inference_s = 0.0

    def prepare(self, quality: Quality, *, timeout_seconds: float) -> EngineAnswer:
        """Have the engine get ready what computes a quality.

        Raises:
            EngineFailed: The engine died, or took longer. It is dead now, as after :meth:`segment`.
            BaseException: Whatever ``tick`` raises, as it is.
        """
        self._last_activity = time.monotonic()
        with self._fatal(), _connected(self._socket_path) as connection:
            try:
                connection.send_bytes(EngineQuestion(prepare=quality).model_dump_json().encode())
                self._wait(connection, timeout_seconds)
                return EngineAnswer.model_validate_json(connection.recv_bytes())
            except (EOFError, ConnectionError) as error:
                raise EngineFailed("The segmentation engine died.") from error

    def segment(
        self, frames: Iterable[VideoFrame | None], request: StreamRequest
    ) -> Generator[SegmentedFrame, None, None]:
        """Send all ``frames`` through the engine and yield those that get masks with them, in order.

        None among the frames stands for one that is skipped. A stream that is given up ends with the frame
        that is being decoded, or skipped, at the time.

        Raises:
            EngineFailed: The engine died, hung or reported an error. It is dead now; the worker sees that and
                starts another one before the next attempt.
            BaseException: Whatever ``frames`` or ``tick`` raise, as it is.
        """
        self._last_activity = time.monotonic()
        self._room = threading.Semaphore(request.max_pending)
        with self._fatal(), _connected(self._socket_path) as connection:
            sender = threading.Thread(target=self._send, args=(connection, frames, request), daemon=True)
            sender.start()
            try:
                yield from self._receive(connection, request)
            finally:
                self._over = True
                self._room.release()
                _hang_up(connection)
                sender.join()

    def _send(
        self, connection: Connection, frames: Iterable[VideoFrame | None], request: StreamRequest
    ) -> None:
        try:
            connection.send_bytes(request.model_dump_json().encode())
            for index, frame in enumerate(self._decoded(frames)):
                if index >= request.start:
                    self._room.acquire()
                    self._pending.append(frame)
                connection.send_bytes(frame.image.data.cast("B"))
                self._last_activity = time.monotonic()
            connection.send_bytes(b"")
        except ConnectionError:
            return  # the receiving side sees the same, and says so
        except BaseException as error:  # handed to the caller's thread, which raises it
            self._sender_error = error

    def _decoded(self, frames: Iterable[VideoFrame | None]) -> Iterator[VideoFrame]:
        """Those that are not skipped, until the stream is over. The time that it takes is accounted for."""
        began = time.monotonic()
        self._decoding = True
        for frame in chain(frames, (None,)):  # one more, for what it takes to find the end
            self._last_activity = time.monotonic()
            self._decoding = False
            self.decode_s += self._last_activity - began
            if self._over:
                return
            if frame is not None:
                yield frame
            began = time.monotonic()
            self._decoding = True
        self._decoding = False

    def _receive(self, connection: Connection, request: StreamRequest) -> Iterator[SegmentedFrame]:
        while True:
            self._wait(connection, self._stall_seconds)
            try:
                message = connection.recv_bytes()
            except (EOFError, ConnectionError) as error:
                raise EngineFailed("The segmentation engine died.") from error
            self._last_activity = time.monotonic()
            kind, body = message[:1], message[1:]
            if kind == MASK:
                mask, self.inference_s = request.parse_mask(body)
                frame = self._pending.popleft()
                self._room.release()
                yield SegmentedFrame(frame=frame, mask=mask)
            elif kind == DONE:
                return
            elif kind != TAKEN:
                logger.error("The engine failed: %s", body.decode(errors="replace"))
                what = "ran out of memory" if kind == OUT_OF_MEMORY else "failed on this video"
                raise EngineFailed(f"The segmentation engine {what}.")

    @contextlib.contextmanager
    def _fatal(self) -> Iterator[None]:
        """No engine outlives its failure."""
        try:
            yield
        except EngineFailed:
            _end_process(self._engine_pid)
            raise

    def _wait(self, connection: Connection, limit_seconds: float) -> None:
        """Return as soon as there is a message to read."""
        while True:
            self._tick()
            if self._sender_error is not None:
                raise self._sender_error
            if connection.poll(_TICK_SECONDS):
                return
            # While a frame is being decoded the engine may have nothing to do.
            if not self._decoding and time.monotonic() - self._last_activity > limit_seconds:
                raise EngineFailed(f"The segmentation engine did nothing for {limit_seconds:.0f} s.")


@contextlib.contextmanager
def _connected(path: Path) -> Iterator[Connection]:
    try:
        connection = Client(str(path), "AF_UNIX")
    except OSError as error:
        raise EngineFailed("The segmentation engine cannot be reached.") from error
    with connection:
        yield connection


def _end_process(pid: int) -> None:
    """Kill a process, whoever's child it is, and wait until it is dead (``pidfd_open(2)``)."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            select.select([descriptor], [], [], _DEATH_SECONDS)
        finally:
            os.close(descriptor)


def _hang_up(connection: Connection) -> None:
    """Wake a sender that is blocked in a write: closing the descriptor alone would not."""
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate, contextlib.suppress(OSError):
        duplicate.shutdown(socket.SHUT_RDWR)
