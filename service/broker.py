"""How Redis is reached, and what its errors are called here."""

from collections.abc import Iterator
from contextlib import contextmanager

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, ResponseError, TimeoutError
from redis.retry import Retry

from service.errors import Misconfigured, QueueUnavailable


def connect(url: str, *, timeout_seconds: float) -> Redis:
    """A client that gives up after ``timeout_seconds``; redis-py would wait a minute on a hung server.

    Raises:
        Misconfigured: ``url`` is no address of a Redis.
    """
    try:
        return Redis.from_url(
            url,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError as error:
        raise Misconfigured("IMCNET_REDIS_URL must be redis://…, rediss://… or unix://….") from error


@contextmanager
def translated() -> Iterator[None]:
    """Raises: QueueUnavailable: Redis cannot be reached, does not answer in time, or takes nothing more."""
    try:
        yield
    except (ConnectionError, TimeoutError, ResponseError) as error:
        raise QueueUnavailable("The job queue cannot be reached at the moment; try again later.") from error
