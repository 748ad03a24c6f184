"""A request's body → one file on disk, hashed on the way. Memory stays at a few MiB, whatever the size.

The body is read by hand: an ``UploadFile`` would be received in full before the route is called. While a
batch is being written nothing more is read, so that a slow disk slows the client down.
"""

import asyncio
import fcntl
import hashlib
import os
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from service.durable import disk_errors_translated
from service.errors import InvalidRequest, StorageFull
from service.forms import FormBody, RawBody

_BATCH_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A received video. ``filename`` and ``fields``, the form's other fields, are the client's words."""

    path: Path
    filename: str | None
    bytes: int
    sha256: str
    fields: dict[str, list[str]]


def declared_bytes(request: Request, *, max_bytes: int) -> int:
    """What the client says that its body has; 0 where it does not say.

    Raises:
        InvalidRequest: ``upload_too_large``.
    """
    declared = int(request.headers.get("content-length", 0))
    if declared > max_bytes:
        raise _too_large(max_bytes)
    return declared


@asynccontextmanager
async def receive(
    request: Request,
    path: Path,
    *,
    max_upload_bytes: int,
    max_form_field_bytes: int,
    max_seconds: float,
    idle_seconds: float,
    min_bytes_per_second: int,
    disk_reserve_bytes: int,
) -> AsyncIterator[Upload]:
    """Write the video in a request's body to ``path``, synced to the disk, for as long as the block lasts.

    The body is a form with the field ``video``, or the video itself. The file is locked, which keeps it from
    the sweeper. What is still at ``path`` in the end is removed, whatever happens, cancellation included.

    Args:
        path: Where there is no file yet.
        max_upload_bytes: Of the whole body.
        max_seconds: From the first byte of the body to the last.
        idle_seconds: Longest wait for more of the body.
        min_bytes_per_second: What a client has to reach that has let us wait for ``idle_seconds`` in all.
        disk_reserve_bytes: To be left free on the disk, beside twice the declared size.
    Raises:
        InvalidRequest: ``unsupported_media_type``, ``upload_too_large``, ``request_timeout``,
            ``bad_request``, ``missing_video``, ``empty_file``.
        StorageFull, StorageUnavailable: The disk has no room for it, or something else is wrong with it.
        starlette.requests.ClientDisconnect: The client has gone.
    """
    body = _body_of(request, max_form_field_bytes)
    declared = declared_bytes(request, max_bytes=max_upload_bytes)
    file = _NewFile(path, disk_reserve_bytes)
    try:
        await _in_thread(file.open, 2 * declared)
        pace = _Pace(max_seconds, idle_seconds, min_bytes_per_second)
        async with aclosing(_read(request, max_upload_bytes, pace)) as chunks:
            async for chunk in chunks:
                body.feed(chunk)
                if len(body.video) >= _BATCH_BYTES:
                    await _in_thread(file.write, body.take_video())
        body.finish()
        await _in_thread(file.write, body.take_video())
        if not file.size:
            raise InvalidRequest("The file is empty.", code="empty_file")
        await _in_thread(file.sync)
        yield Upload(
            path=path, filename=body.filename, bytes=file.size, sha256=file.sha256, fields=body.fields
        )
    finally:
        await _in_thread(file.discard)


def _body_of(request: Request, max_form_field_bytes: int) -> RawBody:
    media_type, parameters = parse_options_header(request.headers.get("content-type"))
    if media_type == b"multipart/form-data":
        boundary = parameters.get(b"boundary")
        if not boundary:
            raise InvalidRequest("The form's content type names no boundary.")
        return FormBody(boundary, max_field_bytes=max_form_field_bytes)
    if media_type.startswith(b"video/") or media_type == b"application/octet-stream":
        return RawBody()
    raise InvalidRequest(
        "Send the video as multipart/form-data, video/* or application/octet-stream.",
        code="unsupported_media_type",
    )


class _Pace(NamedTuple):
    """How long a body may take."""

    max_seconds: float
    idle_seconds: float
    min_bytes_per_second: int


async def _read(request: Request, max_bytes: int, pace: _Pace) -> AsyncGenerator[bytes, None]:
    clock = asyncio.get_running_loop().time
    received_bytes, waited_seconds = 0, 0.0
    ends = clock() + pace.max_seconds
    async with aclosing(request.stream()) as stream:
        while True:
            asked = clock()
            try:
                async with asyncio.timeout_at(min(asked + pace.idle_seconds, ends)):
                    chunk = await anext(stream)
            except TimeoutError as error:
                raise _too_slow() from error
            if not chunk:  # how Starlette says that the body has ended
                return
            received_bytes += len(chunk)
            waited_seconds += clock() - asked
            if received_bytes > max_bytes:
                raise _too_large(max_bytes)
            slow = received_bytes < waited_seconds * pace.min_bytes_per_second
            if (slow and waited_seconds > pace.idle_seconds) or clock() > ends:
                raise _too_slow()
            yield chunk


def _too_large(max_bytes: int) -> InvalidRequest:
    return InvalidRequest(f"The body is larger than {max_bytes} bytes.", code="upload_too_large")


def _too_slow() -> InvalidRequest:
    return InvalidRequest("The body comes too slowly.", code="request_timeout")


async def _in_thread(function: Callable[..., None], *arguments: object) -> None:
    """Like ``asyncio.to_thread``, but being cancelled waits for the thread, whose file is removed next."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


class _NewFile:
    """The file that is being received.

    All methods block; all but ``discard`` raise StorageFull and StorageUnavailable where the disk refuses.
    """

    def __init__(self, path: Path, reserve_bytes: int) -> None:
        self._path = path
        self._reserve_bytes = reserve_bytes
        self._file: BinaryIO | None = None
        self._sha256 = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def open(self, wanted_bytes: int) -> None:
        with disk_errors_translated():
            self._check_room(wanted_bytes)
            self._file = self._path.open("xb")
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def write(self, data: bytearray) -> None:
        assert self._file is not None
        with disk_errors_translated():
            self._check_room(len(data))  # other uploads write as well, and a chunked body declares no size
            self._file.write(data)
        self._sha256.update(data)
        self.size += len(data)

    def sync(self) -> None:
        """Make the file last."""
        assert self._file is not None
        with disk_errors_translated():
            self._file.flush()
            os.fsync(self._file.fileno())

    def discard(self) -> None:
        """Close the file, and remove it unless it has been moved away."""
        if self._file is None:
            return
        with suppress(OSError):  # what is still buffered may find no room either
            self._file.close()
        with suppress(OSError):  # then the sweeper removes it
            self._path.unlink(missing_ok=True)

    def _check_room(self, wanted_bytes: int) -> None:
        if shutil.disk_usage(self._path.parent).free < wanted_bytes + self._reserve_bytes:
            raise StorageFull("The disk has no room for the upload.")
