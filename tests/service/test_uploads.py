"""Bodies sent to a real server, by a well-behaved client and over bare sockets."""

import asyncio
import hashlib
import json
import resource
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator, MutableMapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from service.durable import remove_older
from service.errors import PROBLEMS, ImcnetError
from service.uploads import Upload, receive
from tests.waiting import wait_until

MIB = 2**20
FORM_END = b"\r\n--limit--\r\n"
FORM_START = b'--limit\r\nContent-Disposition: form-data; name="video"; filename="v.mp4"\r\n\r\n'
FORM_TYPE = "multipart/form-data; boundary=limit"


class Server:
    """``receive`` behind one route. ``uploads`` is where it writes, ``ends`` how its calls ended.

    What has been received lies at ``uploads / "taken"``.
    """

    def __init__(self, uploads: Path, limits: dict[str, float]) -> None:
        self.uploads = uploads
        self.ends: Queue[Upload | Exception] = Queue()
        self.port = 0
        self._limits: dict[str, Any] = {
            "max_upload_bytes": 64 * MIB,
            "max_form_field_bytes": 1000,
            "idle_seconds": 10.0,
            "max_seconds": 7200,
            "min_bytes_per_second": 64 * 1024,
            "disk_reserve_bytes": 0,
            **limits,
        }

    async def answer(self, request: Request) -> JSONResponse:
        try:
            async with receive(request, self.uploads / "body.part", **self._limits) as upload:
                upload.path.rename(self.uploads / "taken")
        except ImcnetError as error:
            self.ends.put(error)
            status = PROBLEMS[error.code].status
            assert status is not None
            return JSONResponse({"code": error.code, "detail": error.detail}, status)
        except ClientDisconnect as error:
            self.ends.put(error)
            return JSONResponse({})
        self.ends.put(upload)
        return JSONResponse(
            {"filename": upload.filename, "bytes": upload.bytes, "sha256": upload.sha256, **upload.fields}
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def end(self) -> Upload | Exception:
        return self.ends.get(timeout=20)

    @property
    def left(self) -> list[str]:
        return [path.name for path in self.uploads.iterdir()]


@contextmanager
def serving(uploads: Path, **limits: float) -> Iterator[Server]:
    server = Server(uploads, limits)
    app = Starlette(routes=[Route("/", server.answer, methods=["POST"])])
    runner = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        while not runner.started:
            time.sleep(0.01)
        server.port = runner.servers[0].sockets[0].getsockname()[1]
        yield server
    finally:
        runner.should_exit = True
        thread.join(20)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as running:
        yield running


def head(*headers: str, content_type: str = "video/mp4") -> bytes:
    lines = ["POST / HTTP/1.1", "Host: x", f"Content-Type: {content_type}", *headers, "", ""]
    return "\r\n".join(lines).encode()


def chunked(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def reply(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and body of the one answer on a connection."""
    with closing(connection.makefile("rb")) as stream:
        status = int(stream.readline().split()[1])
        length = 0
        while (line := stream.readline().strip()) != b"":
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return status, json.loads(stream.read(length))


# -- what arrives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 1000, MIB - 1, MIB, MIB + 1, 5 * MIB + 17])
def test_a_raw_body_arrives_as_it_was_sent(server: Server, size: int) -> None:
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    answer = httpx.post(server.url, content=data, headers={"Content-Type": "video/mp4"})
    assert answer.status_code == 200
    assert answer.json() == {"filename": None, "bytes": size, "sha256": hashlib.sha256(data).hexdigest()}
    assert (server.uploads / "taken").read_bytes() == data


def test_a_form_arrives_with_its_fields(server: Server) -> None:
    data = bytes(range(256)) * 10_000
    answer = httpx.post(
        server.url,
        files={"video": ("Käfer.mp4", data, "video/mp4")},
        data={"threshold": "0.5", "artifacts": ["masks", "overlay"]},
    )
    assert answer.json() == {
        "filename": "Käfer.mp4",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "threshold": ["0.5"],
        "artifacts": ["masks", "overlay"],
    }
    assert (server.uploads / "taken").read_bytes() == data


@pytest.mark.parametrize("content_type", ["video/mp4", "application/octet-stream", "Video/X-Matroska; a=b"])
def test_a_raw_video_may_have_these_types(server: Server, content_type: str) -> None:
    assert httpx.post(server.url, content=b"x", headers={"Content-Type": content_type}).status_code == 200


def test_single_bytes_as_chunks_are_put_together(server: Server) -> None:
    data = bytes(range(256)) * 8
    with server.connect() as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        for value in data:
            connection.sendall(chunked(bytes([value])))
        connection.sendall(chunked(b""))
        assert reply(connection)[0] == 200
    assert (server.uploads / "taken").read_bytes() == data


def test_a_form_in_awkward_pieces_is_put_together(server: Server) -> None:
    data = b"\r\n--limit" * 3000 + b"\r\n--limi"
    form = FORM_START + data.replace(b"\r\n--limit", b"\r\n--limiT") + FORM_END
    with server.connect() as connection:
        connection.sendall(head(f"Content-Length: {len(form)}", content_type=FORM_TYPE))
        for start in range(0, len(form), 1009):
            connection.sendall(form[start : start + 1009])
        status, body = reply(connection)
    assert (status, body["filename"], body["bytes"]) == (200, "v.mp4", len(data))


def test_memory_does_not_grow_with_the_body(server: Server) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(48 * 4):
            yield bytes(MIB // 4)

    httpx.post(server.url, content=b"x", headers={"Content-Type": "video/mp4"})
    server.end()
    (server.uploads / "taken").unlink()
    tracemalloc.start()
    try:
        answer = httpx.post(server.url, content=pieces(), headers={"Content-Type": "video/mp4"}, timeout=60)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert answer.json()["bytes"] == 48 * MIB
    assert peak < 12 * MIB


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("content_type", ["text/plain", "application/json", "image/png", "audio/mpeg", None])
def test_other_types_are_refused(server: Server, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = httpx.post(server.url, content=b"x", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert server.left == []


def test_an_empty_body_is_refused(server: Server) -> None:
    answer = httpx.post(server.url, content=b"", headers={"Content-Type": "video/mp4"})
    assert (answer.status_code, answer.json()["code"]) == (422, "empty_file")
    assert server.left == []


def test_an_empty_file_in_a_form_is_refused(server: Server) -> None:
    answer = httpx.post(server.url, files={"video": ("v.mp4", b"")})
    assert answer.json()["code"] == "empty_file"
    assert server.left == []


def test_a_form_without_a_video_is_refused(server: Server) -> None:
    answer = httpx.post(server.url, files={"other": ("v.mp4", b"x")})
    assert (answer.status_code, answer.json()["code"]) == (422, "missing_video")
    assert server.left == []


def test_a_form_that_turns_bad_after_megabytes_leaves_nothing(server: Server) -> None:
    form = FORM_START + b"x" * 3 * MIB + FORM_END[:-4]
    answer = httpx.post(server.url, content=form, headers={"Content-Type": FORM_TYPE})
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert server.left == []


def test_a_form_without_a_boundary_is_refused(server: Server) -> None:
    answer = httpx.post(server.url, content=b"x", headers={"Content-Type": "multipart/form-data"})
    assert answer.json()["code"] == "bad_request"


def test_a_declared_length_above_the_limit_is_refused_before_the_body(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(head(f"Content-Length: {2**40}"))
        status, body = reply(connection)
    assert (status, body["code"]) == (413, "upload_too_large")
    assert server.left == []


def test_a_chunked_body_above_the_limit_is_refused_on_the_way(tmp_path: Path) -> None:
    with serving(tmp_path, max_upload_bytes=3 * MIB) as server, server.connect() as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        for _ in range(3):
            connection.sendall(chunked(bytes(MIB)))
        connection.sendall(chunked(b"x"))
        status, body = reply(connection)
        assert (status, body["code"]) == (413, "upload_too_large")
        assert server.left == []


def test_a_body_of_just_the_limit_is_taken(tmp_path: Path) -> None:
    with serving(tmp_path, max_upload_bytes=MIB) as server:
        answer = httpx.post(server.url, content=bytes(MIB), headers={"Content-Type": "video/mp4"})
    assert answer.status_code == 200


@pytest.mark.parametrize("content_type", ["video/mp4", FORM_TYPE])
def test_a_client_that_vanishes_leaves_nothing(server: Server, content_type: str) -> None:
    with server.connect() as connection:
        connection.sendall(head(f"Content-Length: {8 * MIB}", content_type=content_type) + FORM_START)
        connection.sendall(bytes(3 * MIB))
    assert isinstance(server.end(), ClientDisconnect)
    assert server.left == []


@pytest.mark.parametrize("content_type", ["video/mp4", FORM_TYPE])
def test_a_client_that_falls_silent_is_told_so(tmp_path: Path, content_type: str) -> None:
    with serving(tmp_path, idle_seconds=0.3) as server, server.connect() as connection:
        connection.sendall(head(f"Content-Length: {8 * MIB}", content_type=content_type) + FORM_START)
        connection.sendall(bytes(2 * MIB))
        status, body = reply(connection)
        assert (status, body["code"]) == (408, "request_timeout")
        assert server.left == []


@pytest.mark.parametrize(
    ("limits", "drop"),
    [({"idle_seconds": 0.5}, 1), ({"max_seconds": 0.5}, 1), ({"max_seconds": 0.5}, MIB // 8)],
    ids=["too slow", "too slow for the time it has", "fast, and without an end"],
)
def test_a_client_that_takes_too_long_is_told_so(tmp_path: Path, limits: dict[str, float], drop: int) -> None:
    with serving(tmp_path, **limits) as server, server.connect() as connection:
        connection.sendall(head(f"Content-Length: {64 * MIB}"))
        ended = threading.Event()

        def drip() -> None:
            with suppress(ConnectionError):  # what was sent after the answer
                while not ended.wait(0.05):
                    connection.send(bytes(drop))

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            error = server.end()
        finally:
            ended.set()
            dripping.join()
        assert isinstance(error, ImcnetError)
        assert error.code == "request_timeout"
        assert server.left == []


def test_a_disk_without_room_refuses_before_the_body(tmp_path: Path) -> None:
    with serving(tmp_path, disk_reserve_bytes=2**60) as server, server.connect() as connection:
        connection.sendall(head(f"Content-Length: {MIB}"))
        status, body = reply(connection)
        assert (status, body["code"]) == (507, "storage_full")
        assert server.left == []


def test_a_disk_that_fills_up_on_the_way_leaves_nothing(server: Server) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, hard))
    try:
        with server.connect() as connection:
            connection.sendall(head(f"Content-Length: {8 * MIB}"))
            connection.sendall(bytes(3 * MIB))
            status, body = reply(connection)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (status, body["code"]) == (507, "storage_full")
    assert server.left == []


def test_a_disk_that_is_gone_is_told_from_a_full_one(tmp_path: Path) -> None:
    (tmp_path / "uploads").mkdir()
    with serving(tmp_path / "uploads") as server:
        (tmp_path / "uploads").rmdir()
        answer = httpx.post(server.url, content=b"x", headers={"Content-Type": "video/mp4"})
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
        (tmp_path / "uploads").mkdir()
        assert httpx.post(server.url, content=b"x", headers={"Content-Type": "video/mp4"}).status_code == 200


def test_a_disk_that_goes_on_the_way_is_said_so(tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    with serving(uploads) as server, server.connect() as connection:
        connection.sendall(head("Transfer-Encoding: chunked") + chunked(bytes(2 * MIB)))
        wait_until(lambda: server.left)
        uploads.rename(tmp_path / "elsewhere")
        connection.sendall(chunked(bytes(2 * MIB)) + chunked(b""))
        status, body = reply(connection)
    assert (status, body["code"]) == (503, "storage_unavailable")


def test_a_file_that_is_there_already_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "body.part").write_bytes(b"another's")

    async def body() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b"x"}

    with pytest.raises(FileExistsError):
        asyncio.run(_receive(tmp_path, body))
    assert (tmp_path / "body.part").read_bytes() == b"another's"


@pytest.mark.parametrize("pause_seconds", [0.0, 0.001, 0.01, 0.1])
def test_a_cancelled_upload_leaves_nothing(tmp_path: Path, pause_seconds: float) -> None:
    async def endless() -> MutableMapping[str, Any]:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": bytes(MIB // 2), "more_body": True}

    async def cancel() -> None:
        task = asyncio.create_task(_receive(tmp_path, endless))
        await asyncio.sleep(pause_seconds)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert list(tmp_path.iterdir()) == []


async def _receive(directory: Path, body: Any) -> Upload:
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", b"video/mp4")]}
    async with receive(
        Request(scope, body),
        directory / "body.part",
        max_upload_bytes=2**40,
        max_form_field_bytes=1000,
        idle_seconds=10,
        max_seconds=7200,
        min_bytes_per_second=64 * 1024,
        disk_reserve_bytes=0,
    ) as upload:
        remove_older(directory, age_seconds=-1)
        assert upload.path.exists()
        return upload


def test_what_waits_for_its_turn_is_not_swept_and_is_gone_in_the_end(tmp_path: Path) -> None:
    async def body() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b"x"}

    upload = asyncio.run(_receive(tmp_path, body))
    assert upload.bytes == 1
    assert list(tmp_path.iterdir()) == []
