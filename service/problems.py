"""Errors on their way out: everything leaves as RFC 9457 ``application/problem+json``."""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from service.errors import PROBLEMS, ImcnetError, InvalidRequest, StorageUnavailable
from service.jobs import Problem

logger = logging.getLogger(__name__)

_CHALLENGE = 'Bearer realm="imcnet", Basic realm="imcnet", charset="UTF-8"'
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_CODE_OF_STATUS = {
    HTTPStatus.NOT_FOUND: "not_found",
    HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
}


def problem_response(error: ImcnetError, *, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer to an error; a code that no request may end with is answered as ``internal_error``."""
    if PROBLEMS[error.code].status is None:
        error = ImcnetError("The request could not be completed.")
    problem = Problem.of(error)
    assert problem.status is not None
    all_headers = dict(headers or {})
    if problem.status == HTTPStatus.UNAUTHORIZED:
        all_headers["WWW-Authenticate"] = _CHALLENGE  # RFC 9110, section 15.5.2
    if error.retry_after_seconds is not None:
        all_headers["Retry-After"] = str(error.retry_after_seconds)
    return JSONResponse(
        problem.model_dump(),
        status_code=problem.status,
        headers=all_headers,
        media_type="application/problem+json",
    )


Responses = dict[int | str, dict[str, Any]]


def documented(*codes: str) -> Responses:
    """The OpenAPI ``responses`` of an endpoint that may answer with these codes."""
    by_status: dict[int, list[str]] = {}
    for code in codes:
        status = PROBLEMS[code].status
        assert status is not None, f"{code} has no HTTP status"
        by_status.setdefault(int(status), []).append(code)
    return {
        status: {
            "description": ", ".join(f"`{code}`" for code in codes),
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status, codes in by_status.items()
    }


def _allowed_methods(request: Request) -> str:
    """What ``Allow`` has to say of the path asked for (RFC 9110, section 10.2.1)."""

    def answers(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    return ", ".join(filter(answers, _METHODS))


def correct_schema(app: FastAPI) -> None:
    """Take FastAPI's own validation error out of the schema of ``app``: nothing here answers with it."""
    schema = app.openapi()
    for operations in schema["paths"].values():
        for operation in operations.values():
            if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)


def install(app: FastAPI) -> None:
    """Let ``app`` answer every error as a problem."""

    @app.exception_handler(ImcnetError)
    async def known(request: Request, error: ImcnetError) -> Response:
        ours = isinstance(error, StorageUnavailable)
        if ours or PROBLEMS[error.code].status in (None, HTTPStatus.INTERNAL_SERVER_ERROR):
            logger.error("%s %s: %s", request.method, request.url.path, error.__cause__ or error.detail)
        return problem_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        complaints = (f"{e['loc'][-1]}: {e['msg']}" for e in error.errors())
        return problem_response(InvalidRequest("; ".join(complaints), code="invalid_options"))

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        code = _CODE_OF_STATUS.get(HTTPStatus(error.status_code), "bad_request")
        # Starlette's own Allow holds the methods of one route; ours have a route per method.
        headers = {"Allow": _allowed_methods(request)} if code == "method_not_allowed" else error.headers
        return problem_response(InvalidRequest(str(error.detail), code=code), headers=headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return problem_response(InvalidRequest("The client went away."))  # nobody is there to read it

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return problem_response(ImcnetError("Something went wrong on our side."))
