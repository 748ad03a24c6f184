"""Logs: one record a line, as text for people or as JSON for machines, with what the work is about.

Modules log through the standard library. Whoever knows what a stretch of work is about says it once, by
``structlog.contextvars.bound_contextvars(job=…, attempt=…)``, and every record within carries it, those of
uvicorn, RQ and redis-py too. The fields in use are ``job``, ``attempt``, ``worker`` and ``request``.
"""

import logging
import re
from typing import Literal
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars, merge_contextvars
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, Processor, WrappedLogger

LogFormat = Literal["text", "json"]

_FIRST = ("timestamp", "level", "logger", "event")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # line breaks and terminal escapes
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_JOB_OF_PATH = re.compile(r"/jobs/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?:/|$)")


def configure_logging(level: str, log_format: LogFormat) -> None:
    """Send every record of this process to standard error, warnings included.

    A record has ``timestamp`` (ISO 8601, UTC), ``level``, ``logger``, ``event``, the context's fields, and
    ``exception`` where there is one. As text, an exception follows on lines of its own, which are indented.
    """
    handler = logging.StreamHandler()
    handler.addFilter(_without_query)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                merge_contextvars,
                structlog.processors.StackInfoRenderer(),
                structlog.processors.format_exc_info,
            ],
            processors=[ProcessorFormatter.remove_processors_meta, _in_order, _RENDERERS[log_format]],
        )
    )
    logging.basicConfig(level=level, handlers=[handler])
    logging.captureWarnings(True)


class RequestContext:
    """ASGI middleware: what is logged while a request is answered carries its id, and the job's of its path.

    The id is the client's ``X-Request-ID`` where that is well-formed (1 to 64 of ``A-Za-z0-9._-``), else a
    random one; the answer says it in its own ``X-Request-ID``. The middleware belongs outside of everything
    else, so that answers to unexpected errors have it too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id", ""))
        # The context is left as it is afterwards: it is this request's own, and the server logs in it what
        # the application has raised.
        clear_contextvars()
        bind_contextvars(request=request_id)
        if match := _JOB_OF_PATH.search(scope["path"]):
            bind_contextvars(job=match[1])

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def _request_id(given: str) -> str:
    return given if _REQUEST_ID.fullmatch(given) else uuid4().hex[:12]


def _without_query(record: logging.LogRecord) -> bool:
    """Take the query out of uvicorn's access log."""
    if record.name == "uvicorn.access" and isinstance(record.args, tuple):
        client, method, path, *rest = record.args
        record.args = (client, method, str(path).partition("?")[0], *rest)
    return True


def _in_order(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {key: event.pop(key) for key in _FIRST} | dict(sorted(event.items()))


def _render_text(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    timestamp, level, logger, message = (event.pop(key) for key in _FIRST)
    traces = [event.pop(key) for key in ("stack", "exception") if key in event]
    context = " ".join(f"{key}={value}" for key, value in event.items())
    line = f"{timestamp} {level.upper()} {logger}: {message}" + (f" [{context}]" if context else "")
    indented = (f"  {_escaped(line)}" for trace in traces for line in trace.splitlines())
    return "\n".join([_escaped(line), *indented])


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


_RENDERERS: dict[LogFormat, Processor] = {
    "text": _render_text,
    "json": structlog.processors.JSONRenderer(),
}
