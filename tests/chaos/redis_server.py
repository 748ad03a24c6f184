"""A Redis that may be killed and started again: on a port of its own, with an append-only file."""

import subprocess
from pathlib import Path
from typing import Self

import redis

from service.cli.up import free_port
from service.embedded import find_redis_server
from service.processes import tethered
from tests.waiting import wait_until


class RedisServer:
    """A server that keeps its port and its data. As a context manager it runs."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.client = redis.Redis(port=self.port, socket_timeout=5)
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [
            *(find_redis_server(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(directory)),
            *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
            *("--logfile", str(directory / "redis.log"), "--daemonize", "no"),
        ]

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the server has not been started"
        return self._process

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server and wait until it has read its file. Starts it again if it is dead."""
        self._process = subprocess.Popen(tethered(self._command), start_new_session=True)
        wait_until(self._answers, timeout_seconds=30)

    def kill(self) -> None:
        """kill -9, and wait until it is dead."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it for good."""
        self.client.close()
        if self.is_alive:
            self.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _answers(self) -> bool:
        assert self.process.poll() is None, "Redis has ended; see its log"
        try:
            return bool(self.client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False
