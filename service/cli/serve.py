"""`imcnet serve` and `imcnet worker`: one part of the service each, for a terminal or a container."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import redis
import typer

from service.cli.settings import read_settings
from service.errors import Misconfigured, QueueUnavailable
from service.keys import KeyRing
from service.logs import configure_logging
from service.settings import ServiceSettings
from service.supervisor import Child, Supervisor
from worker.settings import WorkerSettings

HostOption = Annotated[str | None, typer.Option(help="Address to listen on [IMCNET_HOST]")]
PortOption = Annotated[int | None, typer.Option(help="Port to listen on [IMCNET_PORT]")]
WeightsOption = Annotated[
    Path | None,
    typer.Option(help="Weights file of the network; by default the one that ships [IMCNET_WEIGHTS]"),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda or cuda:N; only auto chooses [IMCNET_DEVICE]")
]


def serve(host: HostOption = None, port: PortOption = None) -> None:
    """Run the HTTP API."""
    from service.app import create_app
    from service.cli.server import Server

    settings = read_settings(ServiceSettings, host=host, port=port)
    configure_logging(settings.log_level, settings.log_format)
    check_redis(settings.require_redis_url(), timeout_seconds=settings.redis_timeout_seconds)
    app = create_app(settings)
    _check_door(settings, app.state.services.keys)
    server = Server(app, settings)
    with _listen(settings.host, settings.port) as listener:
        url = http_url(settings.host, listener.getsockname()[1])
        typer.echo(f"IMCNet's API listens on {url}, docs on {url}/docs")
        # Having shut down, uvicorn raises the signal that ended it once more.
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def worker(
    device: DeviceOption = None,
    devices: Annotated[
        str | None, typer.Option(help="A worker for each: all, or a list like cuda:0,cuda:1")
    ] = None,
    weights: WeightsOption = None,
) -> None:
    """Run a worker on one device, or one on each of several."""
    if device is not None and devices is not None:
        raise Misconfigured("Give --device for one worker or --devices for several, not both.")
    settings = read_settings(WorkerSettings, device=device, weights=weights)
    configure_logging(settings.log_level, settings.log_format)
    if devices is not None:
        names = _all_gpus() if devices == "all" else devices.split(",")
        raise typer.Exit(Supervisor([[_worker_child(name, weights) for name in names]]).run())
    check_redis(settings.require_redis_url(), timeout_seconds=settings.redis_timeout_seconds)
    from worker import gpu_worker

    raise typer.Exit(gpu_worker.run(settings))


def imcnet_command(*arguments: str) -> list[str]:
    """Command line of ``imcnet`` with ``arguments``, run by this same Python."""
    # -P: a folder named `service` in the working directory must not be taken for this package.
    return [sys.executable, "-P", "-m", "service.cli", *arguments]


def worker_arguments(*, device: str | None, weights: Path | None) -> list[str]:
    """What ``imcnet worker`` is given, where anything is."""
    given = {"--device": device, "--weights": weights}
    return [word for option, value in given.items() if value is not None for word in (option, str(value))]


def http_url(host: str, port: int) -> str:
    """Where a client of this machine reaches a server that listens on ``host``."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    # We bind, not uvicorn: it would only log what is wrong, and that after it has started the application.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio looks at it: only then it sets TCP_NODELAY, without which every
    # answer on a kept connection waits 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise Misconfigured(
            f"Cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}."
        ) from error
    return listener


def _check_door(settings: ServiceSettings, keys: KeyRing) -> None:
    """Raises: Misconfigured: The API would be open to others than those on this machine."""
    from service.access import is_loopback

    address = settings.published.rpartition(":")[0] if settings.published else settings.host
    if not keys.closed and not is_loopback(address):  # in this order: a ring that has seen keys stays closed
        raise Misconfigured(
            f"Without API keys, anyone who reaches {address or 'this machine'} could post videos: make a key "
            "with `imcnet keys create NAME`, or listen on 127.0.0.1."
        )


def check_redis(url: str, *, timeout_seconds: float) -> None:
    """Make sure that there is a Redis that lets us in. The messages hold no password.

    Raises:
        Misconfigured: ``url`` is no address of a Redis, or its user or password is refused.
        QueueUnavailable: Nothing answers there.
    """
    from service.broker import connect

    client = connect(url, timeout_seconds=timeout_seconds)
    try:
        client.exists("imcnet:storage")  # a ping is for everybody
    except redis.RedisError as error:
        parts = urlsplit(url)
        where = parts.path if parts.scheme == "unix" else f"{parts.hostname}:{parts.port or 6379}"
        if isinstance(error, redis.AuthenticationError | redis.exceptions.NoPermissionError):
            raise Misconfigured(
                f"The Redis at {where} refuses the user or the password: see IMCNET_REDIS_URL and "
                "IMCNET_REDIS_PASSWORD_FILE."
            ) from error
        raise QueueUnavailable(f"Redis cannot be reached at {where}; is it running?") from error
    finally:
        client.close()


def _worker_child(device: str, weights: Path | None) -> Child:
    command = imcnet_command("worker", *worker_arguments(device=device, weights=weights))
    return Child(name=f"worker on {device}", command=command)


def _all_gpus() -> list[str]:
    # In a process of its own: the supervisor stays free of torch and of a CUDA context.
    script = "import torch; print(torch.cuda.device_count())"
    counted = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if counted.returncode != 0:
        raise Misconfigured("PyTorch cannot be imported: pip install 'imcnet[worker]'.")
    names = [f"cuda:{ordinal}" for ordinal in range(int(counted.stdout))]
    if not names:
        raise Misconfigured("There is no CUDA device for --devices all; use --device cpu.")
    return names
