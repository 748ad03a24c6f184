"""uvicorn as this service wants it."""

import asyncio
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.errors import InvalidRequest
from service.headers import SECURITY_HEADERS, SecurityHeaders
from service.logs import RequestContext
from service.problems import problem_response
from service.services import Services
from service.settings import ServiceSettings

_DRAIN_SECONDS = 10  # for requests under way; less than the grace of ``imcnet up`` and of the containers


class Server(uvicorn.Server):
    """Lets those who wait for a job go at once when it is told to end; uvicorn would wait for them."""

    def __init__(self, app: FastAPI, settings: ServiceSettings) -> None:
        super().__init__(_Config(app, settings))
        self._services: Services = app.state.services

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._services.stopping.set()
        super().handle_exit(sig, frame)


class _Config(uvicorn.Config):
    def __init__(self, app: FastAPI, settings: ServiceSettings) -> None:
        super().__init__(
            RequestContext(SecurityHeaders(app)),
            http=_Protocol,
            h11_max_incomplete_event_size=settings.max_header_bytes,
            root_path=settings.root_path,  # and not FastAPI's: only the server puts it back before the path
            log_config=None,
            log_level=settings.log_level.lower(),
            server_header=False,
            timeout_graceful_shutdown=_DRAIN_SECONDS,
            access_log=settings.log_level == "DEBUG",  # clients poll: at INFO nothing else would be seen
        )
        self.header_seconds = settings.header_seconds


class _Protocol(H11Protocol):
    """Closes a connection whose next request does not come in time, and answers what is no HTTP as a problem.

    uvicorn's own limit ends with the first byte: it would wait for the rest of the headers for ever, and for
    the rest of a body that has been answered already.
    """

    config: _Config
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_request()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer is on its way already
            answer = problem_response(
                InvalidRequest("The request is no valid HTTP."),
                headers={**SECURITY_HEADERS, "Connection": "close"},
            )
            for event in (
                h11.Response(status_code=answer.status_code, headers=answer.raw_headers),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _expect_request(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(self.config.header_seconds, self._close_unless_requested)

    def _close_unless_requested(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
