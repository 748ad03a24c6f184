"""Sending a published artifact: Starlette does the ranges, we the rest; errors leave as problems."""

import hashlib
import os
from http import HTTPStatus
from io import BufferedReader

from anyio import CapacityLimiter, to_thread
from starlette.responses import FileResponse, Response
from starlette.types import Message, Receive, Scope, Send

from service.durable import disk_errors_translated
from service.errors import ArtifactDamaged, InvalidRequest
from service.jobs import Artifact
from service.problems import problem_response

_CHECKS_AT_ONCE = CapacityLimiter(4)  # a check keeps a core busy, and the API's other threads free


class ArtifactResponse(FileResponse):
    """An open file with its SHA-256 as ``ETag``. No byte is sent before all of them are known to be good.

    Only what is open is looked at: once a download has begun, its job may go. Starlette answers ranges and
    HEAD, but ignores ``If-None-Match`` and refuses ranges in plain text.

    Args:
        file: Closed once the response has been sent, or could not be.
    """

    def __init__(self, artifact: Artifact, file: BufferedReader, *, if_none_match: str | None) -> None:
        self._artifact = artifact
        self._file = file
        self._etag = f'"{artifact.sha256}"'
        super().__init__(
            f"/proc/self/fd/{file.fileno()}",  # opens what this descriptor has open, under any name or none
            stat_result=os.fstat(file.fileno()),
            media_type=artifact.media_type,
            filename=artifact.name,
            headers={"ETag": self._etag, "Cache-Control": "private, no-cache"},
        )
        self._unchanged = if_none_match is not None and matches(if_none_match, self._etag)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises: ArtifactDamaged, StorageUnavailable: The file is not good; nothing has been sent."""
        with self._file:
            if self._unchanged:
                await Response(status_code=304, headers={"ETag": self._etag})(scope, receive, send)
                return
            self._check_size()
            await self._send(scope, receive, send)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal: Response | None = None

        async def send_unless_refused(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start":
                refusal = _refusal(message)
                if refusal is None and scope["method"] == "GET":
                    await to_thread.run_sync(self._check_content, limiter=_CHECKS_AT_ONCE)
            if refusal is None:
                await send(message)

        await super().__call__(scope, receive, send_unless_refused)
        if refusal is not None:
            await refusal(scope, receive, send)

    def _check_size(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size != self._artifact.bytes:
            raise ArtifactDamaged(f"The artifact has {size} bytes; published were {self._artifact.bytes}.")

    def _check_content(self) -> None:
        with disk_errors_translated():
            sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
        if sha256 != self._artifact.sha256:
            raise ArtifactDamaged("The artifact's SHA-256 is not the one that was published.")


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
