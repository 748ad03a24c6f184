"""Sending a published artifact: Starlette does the ranges, we the validators; errors leave as problems."""

from http import HTTPStatus
from pathlib import Path

from starlette.responses import FileResponse, Response
from starlette.types import Message, Receive, Scope, Send

from service.errors import InvalidRequest
from service.jobs import Artifact
from service.problems import problem_response


class ArtifactResponse(FileResponse):
    """A file with its SHA-256 as ``ETag``.

    Starlette answers ranges and HEAD, but ignores ``If-None-Match`` and refuses ranges in plain text.
    """

    def __init__(self, artifact: Artifact, path: Path, *, if_none_match: str | None) -> None:
        self._etag = f'"{artifact.sha256}"'
        super().__init__(
            path,
            media_type=artifact.media_type,
            filename=artifact.name,
            headers={
                "ETag": self._etag,
                "X-Content-Type-Options": "nosniff",
                "Cache-Control": "private, no-cache",
            },
        )
        self._unchanged = if_none_match is not None and matches(if_none_match, self._etag)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._unchanged:
            await Response(status_code=304, headers={"ETag": self._etag})(scope, receive, send)
            return
        refusal: Response | None = None

        async def send_unless_refused(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start":
                refusal = _refusal(message)
            if refusal is None:
                await send(message)

        await super().__call__(scope, receive, send_unless_refused)
        if refusal is not None:
            await refusal(scope, receive, send)


def matches(if_none_match: str, etag: str) -> bool:
    """Whether the header names ``etag`` (RFC 9110, section 13.1.2: a weak comparison)."""
    candidates = [candidate.strip().removeprefix("W/") for candidate in if_none_match.split(",")]
    return "*" in candidates or etag in candidates


def _refusal(start: Message) -> Response | None:
    if start["status"] == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        content_range = dict(start["headers"])[b"content-range"].decode()
        error = InvalidRequest("The range lies outside the artifact.", code="range_not_satisfiable")
        return problem_response(error, headers={"Content-Range": content_range})
    if start["status"] == HTTPStatus.BAD_REQUEST:
        return problem_response(InvalidRequest("The Range header is malformed."))
    return None
