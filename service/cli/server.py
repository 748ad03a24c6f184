"""uvicorn as this service wants it."""

from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.logs import RequestContext
from service.services import Services
from service.settings import ServiceSettings

_DRAIN_SECONDS = 10  # for requests under way; less than the grace of ``imcnet up`` and of the containers


class Server(uvicorn.Server):
    """Lets those who wait for a job go at once when it is told to end; uvicorn would wait for them."""

    def __init__(self, app: FastAPI, settings: ServiceSettings) -> None:
        config = uvicorn.Config(
            RequestContext(app),
            root_path=settings.root_path,  # and not FastAPI's: only the server puts it back before the path
            log_config=None,
            log_level=settings.log_level.lower(),
            timeout_graceful_shutdown=_DRAIN_SECONDS,
            access_log=settings.log_level == "DEBUG",  # clients poll: at INFO nothing else would be seen
        )
        super().__init__(config)
        self._services: Services = app.state.services

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._services.stopping.set()
        super().handle_exit(sig, frame)
