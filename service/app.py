"""Wiring: settings → storage and queue → application."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from service import page, problems, routes
from service.queue import JobQueue, connect
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

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(_sweep_forever(services))
        yield
        sweeper.cancel()
        with suppress(asyncio.CancelledError):
            await sweeper

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
    problems.install(app)
    app.include_router(routes.router)
    app.include_router(page.router)
    problems.correct_schema(app)
    return app


def build_services(settings: ServiceSettings) -> Services:
    """Raises: Misconfigured: No Redis is configured, or the data directory cannot be written."""
    storage = JobStorage(settings.data_dir)
    storage.prepare()
    queue = JobQueue(
        connect(settings.require_redis_url(), timeout_seconds=settings.redis_timeout_seconds),
        job_timeout_seconds=settings.job_timeout_seconds,
        max_attempts=settings.max_attempts,
        max_queued_jobs=settings.max_queued_jobs,
    )
    return Services(settings=settings, storage=storage, queue=queue)


async def _sweep_forever(services: Services) -> None:
    while True:
        try:
            await asyncio.to_thread(sweep, services.storage, services.queue, services.settings)
        except Exception:  # the sweeper outlives a full disk or a lost Redis: it tries again next time
            logger.exception("The sweep failed")
        await asyncio.sleep(services.settings.sweep_interval_seconds)
