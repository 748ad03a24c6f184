"""Wiring: settings → storage and queue → application."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from service import page, problems, routes
from service.access import Access
from service.broker import connect
from service.errors import QueueUnavailable
from service.idempotency import IdempotencyKeys
from service.keys import KeyRing, KeyStore
from service.metrics import Metrics, RequestMetrics
from service.ownership import Ownership
from service.queue import JobQueue
from service.rate import RequestRate
from service.services import Services
from service.settings import ServiceSettings
from service.storage import JobStorage
from service.sweeper import sweep

logger = logging.getLogger(__name__)


def create_app(settings: ServiceSettings) -> FastAPI:
    """The API as an ASGI application.

    Raises:
        Misconfigured: No Redis is configured, or the data directory cannot be written.
    """
    services = build_services(settings)
    services.storage.prepare()
    services.idempotency.prepare()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        chores = [
            asyncio.create_task(_repeat(chore, every_seconds=seconds)) for chore, seconds in _chores(services)
        ]
        yield
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)

    # As FastAPI, but /docs comes from here instead of a CDN that a GPU host may not reach.
    app = FastAPIOffline(
        title="IMCNet",
        summary="Cuts the primary moving object out of any video.",
        description="Post a video to `/jobs`, poll the job, download its masks.",
        version=version("imcnet"),
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.services = services
    app.state.metrics = Metrics(services.storage, services.queue, services.queue.tally)
    rate = RequestRate(services.queue.connection, per_minute=settings.key_requests_per_minute)
    app.add_middleware(
        Access, ring=services.keys, max_header_bytes=settings.max_header_bytes, take_request=rate.take
    )
    app.add_middleware(RequestMetrics, metrics=app.state.metrics)
    problems.install(app)
    app.include_router(routes.router)
    app.include_router(page.router)
    problems.correct_schema(app)
    return app


def build_services(settings: ServiceSettings) -> Services:
    """Raises: Misconfigured: No Redis is configured."""
    storage = JobStorage(settings.data_dir)
    queue = JobQueue(
        connect(settings.require_redis_url(), timeout_seconds=settings.redis_timeout_seconds),
        lease_seconds=settings.lease_seconds,
        job_timeout_seconds=settings.job_timeout_seconds,
        max_queued_jobs=settings.max_queued_jobs,
    )
    idempotency = IdempotencyKeys(settings.data_dir / "idempotency")
    return Services(
        settings=settings,
        storage=storage,
        queue=queue,
        idempotency=idempotency,
        keys=KeyRing(KeyStore(settings.data_dir / "keys")),
        owners=Ownership(storage),
        probing=asyncio.Semaphore(settings.max_probes),
    )


def _chores(services: Services) -> tuple[tuple[Callable[[], None], float], ...]:
    """What is to be done at start and on a timer, and how often (seconds)."""
    settings, storage, queue = services.settings, services.storage, services.queue

    def keep_promises() -> None:
        queue.serve(storage.identity)
        services.promises.run(interval_seconds=settings.reconcile_seconds)

    return (
        (keep_promises, settings.reconcile_seconds),
        (partial(sweep, storage, queue, settings), settings.sweep_interval_seconds),
        (
            partial(services.idempotency.sweep, settings.tombstone_seconds),
            settings.sweep_interval_seconds,
        ),
        (services.owners.sweep, settings.sweep_interval_seconds),
    )


async def _repeat(chore: Callable[[], None], *, every_seconds: float) -> None:
    while True:
        try:
            await asyncio.to_thread(chore)
        except QueueUnavailable as error:
            logger.warning("%s", error.detail)
        except Exception:  # a full disk, say: the next time will do
            logger.exception("A chore failed")
        await asyncio.sleep(every_seconds)
