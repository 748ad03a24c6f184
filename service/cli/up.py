"""`imcnet up`: the whole service in one terminal."""

import contextlib
import json
import os
import socket
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any
from urllib.error import URLError

import typer

from service.cli.serve import (
    DeviceOption,
    HostOption,
    PortOption,
    WeightsOption,
    check_redis,
    http_url,
    imcnet_command,
    worker_arguments,
)
from service.cli.settings import read_settings, require_weights
from service.embedded import EmbeddedRedis
from service.logs import configure_logging
from service.settings import PRIVATE_REDIS, ServiceSettings
from service.supervisor import Child, Supervisor
from worker.settings import WorkerSettings

_HTTP_TIMEOUT_SECONDS = 1.0


def up(
    host: HostOption = None,
    port: PortOption = None,
    weights: WeightsOption = None,
    device: DeviceOption = None,
) -> None:
    """Run API, worker and, unless IMCNET_REDIS_URL is set, a private Redis."""
    settings = read_settings(ServiceSettings, host=host, port=port)
    require_weights(read_settings(WorkerSettings, weights=weights, device=device))
    configure_logging(settings.log_level, settings.log_format)
    if settings.redis_url is not None:
        check_redis(settings.require_redis_url(), timeout_seconds=settings.redis_timeout_seconds)
    api = Api(settings.host, settings.port or free_port(settings.host))
    worker = imcnet_command("worker", *worker_arguments(device=device, weights=weights))
    with contextlib.ExitStack() as stack:
        environment, first_stage = dict(os.environ), []
        if settings.redis_url is None:
            private = EmbeddedRedis(settings.data_dir / PRIVATE_REDIS)
            stack.callback(private.stop)
            environment["IMCNET_REDIS_URL"] = private.url
            first_stage = [Child(name="Redis", command=private.command, is_ready=private.answers)]
        second_stage = [
            Child(name="API", command=api.command, environment=environment, is_ready=api.is_alive),
            Child(name="worker", command=worker, environment=environment, is_ready=api.has_worker),
        ]
        raise typer.Exit(Supervisor([first_stage, second_stage], on_ready=api.announce).run())


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on at the moment."""
    with socket.create_server(
        (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
    ) as listener:
        port: int = listener.getsockname()[1]
        return port


class Api:
    """The API as its clients see it."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port, self.url = host, port, http_url(host, port)
        self.command: Sequence[str] = imcnet_command("serve", "--host", host, "--port", str(port))
        # No proxy: the environment's is for the way out.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def is_alive(self) -> bool:
        return self._get("/livez") is not None

    def has_worker(self) -> bool:
        return bool((self._get("/version") or {}).get("workers"))

    def announce(self) -> None:
        workers = (self._get("/version") or {}).get("workers") or []
        typer.echo(
            f"\nIMCNet is ready on {self.url}\n\n"
            + "".join(f"  worker  {_describe(worker)}\n" for worker in workers)
            + f"  docs    {self.url}/docs\n"
            f"  try     curl -F video=@clip.mp4 {self.url}/jobs\n"
            f"  stop    Ctrl-C\n"
        )

    def _get(self, path: str) -> dict[str, Any] | None:
        try:
            with self._opener.open(self.url + path, timeout=_HTTP_TIMEOUT_SECONDS) as response:
                body: dict[str, Any] = json.load(response)
                return body
        except (URLError, TimeoutError, ConnectionError, HTTPException, ValueError):  # not up, or going down
            return None


def _describe(worker: dict[str, Any]) -> str:
    model = worker["model"]
    note = "" if model["trained"] else ": random weights, masks mean nothing"
    return f"{model['name']} on {worker['device']}{note}"
