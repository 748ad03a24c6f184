"""How many requests a key may send a minute, counted in Redis for all processes together."""

import time

from redis import Redis

from service.broker import translated
from service.keys import ApiKey

_WINDOW_SECONDS = 60


class RequestRate:
    """Counts requests in windows of a minute.

    Args:
        per_minute: Of a key that has no limit of its own.
    """

    def __init__(self, connection: Redis, *, per_minute: int) -> None:
        self._redis = connection
        self._per_minute = per_minute

    def take(self, key: ApiKey) -> int | None:
        """Count a request.

        Returns:
            None where it is within the limit, else the seconds until the next window.
        Raises:
            QueueUnavailable: Redis cannot be reached.
        """
        now = time.time()
        window = int(now // _WINDOW_SECONDS)
        name = f"imcnet:requests:{key.id}:{window}"
        with translated(), self._redis.pipeline() as pipeline:
            pipeline.incr(name)
            pipeline.expire(name, 2 * _WINDOW_SECONDS)
            count, _ = pipeline.execute()
        if count <= (key.limits.requests_per_minute or self._per_minute):
            return None
        return max(1, round((window + 1) * _WINDOW_SECONDS - now))
