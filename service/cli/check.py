"""`imcnet check`: is the API, or a worker, of this machine well? For the health checks of containers."""

import json
import socket
import urllib.request
from typing import Annotated, Literal
from urllib.error import HTTPError

import typer

from service.broker import connect
from service.cli.serve import http_url
from service.cli.settings import read_settings
from service.queue import JobQueue
from service.settings import ServiceSettings, SharedSettings

_TIMEOUT_SECONDS = 5.0


def check(part: Annotated[Literal["api", "worker"], typer.Argument(help="What is to be looked at.")]) -> None:
    """Exit with 0 if the API, or a worker, of this machine is well, and say what is known of it."""
    well, report = _check_api() if part == "api" else _check_worker()
    typer.echo(report)
    raise typer.Exit(0 if well else 1)


def _check_api() -> tuple[bool, str]:
    settings = read_settings(ServiceSettings)
    url = f"{http_url(settings.host, settings.port)}/readyz"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy is for the way out
    try:
        with opener.open(url, timeout=_TIMEOUT_SECONDS) as answer:
            return True, json.dumps(json.load(answer))
    except HTTPError as error:
        return False, error.read().decode()
    except OSError:
        return False, f"{url} does not answer"


def _check_worker() -> tuple[bool, str]:
    settings = read_settings(SharedSettings)
    queue = JobQueue(connect(settings.require_redis_url(), timeout_seconds=settings.redis_timeout_seconds))
    here = [worker for worker in queue.workers() if worker.host == socket.gethostname()]
    return bool(here), "\n".join(worker.model_dump_json() for worker in here) or "no living worker here"
