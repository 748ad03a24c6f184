"""Artifacts sent by a real server, to well-behaved clients and to others."""

import hashlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response

from service import problems
from service.downloads import ArtifactResponse, matches
from service.jobs import Artifact
from tests.waiting import wait_until

MIB = 2**20
RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: closing sends RST


class Server:
    """One artifact behind one route. ``content`` was published; what is stored may be something else."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.content = content
        self.goes_when_opened = False
        self.port = 0
        path.write_bytes(content)
        self.artifact = Artifact(
            name="masks.zip",
            media_type="application/zip",
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        self.app = FastAPI()
        problems.install(self.app)
        self.app.add_api_route("/", self.answer, methods=["GET", "HEAD"])
        self.app.add_api_route("/alive", self.alive)

    def answer(self, request: Request) -> Response:
        file = self.path.open("rb")
        if self.goes_when_opened:
            self.path.unlink()
        return ArtifactResponse(self.artifact, file, if_none_match=request.headers.get("if-none-match"))

    def alive(self) -> bool:
        """Needs a thread, as all that is no ``async def``."""
        return True

    def flip(self, index: int) -> None:
        with self.path.open("r+b") as file:
            file.seek(index)
            byte = file.read(1)[0]
            file.seek(index)
            file.write(bytes([byte ^ 1]))

    def connect(self, request: bytes = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") -> socket.socket:
        """A client that has asked, and has not read anything yet."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(request)
        return connection

    def descriptors(self) -> int:
        """How often this process has the artifact open."""
        count = 0
        for name in os.listdir("/proc/self/fd"):
            try:
                count += os.readlink(f"/proc/self/fd/{name}").startswith(str(self.path))
            except FileNotFoundError:
                continue
        return count


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "masks.zip", os.urandom(8 * MIB))
    runner = uvicorn.Server(uvicorn.Config(server.app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        wait_until(lambda: runner.started)
        server.port = runner.servers[0].sockets[0].getsockname()[1]
        yield server
    finally:
        runner.should_exit = True
        thread.join(20)


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=30) as client:
        yield client


def assert_damaged(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert answer.json()["code"] == "artifact_damaged"
    assert "/" not in answer.json()["detail"]


# -- what is stored is what is sent ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "sent"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=100-70000", slice(100, 70001)),
        ("bytes=8000000-", slice(8_000_000, None)),
        ("bytes=-5", slice(-5, None)),
    ],
)
def test_a_good_file_comes_whole_and_in_ranges(
    server: Server, client: httpx.Client, wanted: str, sent: slice
) -> None:
    assert client.get("/").content == server.content
    part = client.get("/", headers={"range": wanted})
    assert (part.status_code, part.content) == (206, server.content[sent])
    wait_until(lambda: server.descriptors() == 0)


@pytest.mark.parametrize("index", [0, 4 * MIB, 8 * MIB - 1])
def test_a_flipped_byte_is_never_sent(server: Server, client: httpx.Client, index: int) -> None:
    server.flip(index)
    assert_damaged(client.get("/"))
    for wanted in ("bytes=0-0", "bytes=5000000-", "bytes=0-9,5000000-5000009"):
        assert_damaged(client.get("/", headers={"range": wanted}))
    server.flip(index)
    assert client.get("/").content == server.content
    wait_until(lambda: server.descriptors() == 0)


def test_a_file_of_another_size_is_damaged_whatever_is_asked(server: Server, client: httpx.Client) -> None:
    os.truncate(server.path, 1000)
    assert_damaged(client.get("/"))
    assert client.head("/").status_code == 500
    server.path.write_bytes(server.content + b"x")
    assert_damaged(client.get("/", headers={"range": "bytes=0-0"}))


def test_headers_and_what_is_known_are_told_without_reading(server: Server, client: httpx.Client) -> None:
    etag = client.head("/").headers["etag"]
    server.flip(0)
    head = client.head("/")
    assert (head.status_code, head.headers["content-length"]) == (200, str(8 * MIB))
    assert client.get("/", headers={"if-none-match": etag}).status_code == 304
    beyond = client.get("/", headers={"range": f"bytes={8 * MIB}-"})
    assert (beyond.status_code, beyond.json()["code"]) == (416, "range_not_satisfiable")
    assert client.get("/", headers={"range": "lines=1-2"}).json()["code"] == "bad_request"
    wait_until(lambda: server.descriptors() == 0)


# -- while it is sent ------------------------------------------------------------------------------------


def test_a_download_that_has_begun_ends_well_though_the_file_goes(
    server: Server, client: httpx.Client
) -> None:
    with client.stream("GET", "/") as answer:
        pieces = answer.iter_bytes()
        received = next(pieces)
        server.path.unlink()
        server.path.write_bytes(b"another file of the same name")
        received += b"".join(pieces)
    assert received == server.content
    wait_until(lambda: server.descriptors() == 0)


@pytest.mark.parametrize("headers", [{}, {"range": "bytes=5-"}, {"range": "bytes=0-4,6-9"}])
def test_all_comes_of_what_was_opened(server: Server, client: httpx.Client, headers: dict[str, str]) -> None:
    expected = client.get("/", headers=headers)
    server.goes_when_opened = True
    answer = client.get("/", headers=headers)
    assert (answer.status_code, len(answer.content)) == (expected.status_code, len(expected.content))


def test_clients_that_vanish_leave_no_descriptors(server: Server) -> None:
    for number in range(40):
        with server.connect() as connection:
            if number % 2:
                connection.recv(number * 100)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    wait_until(lambda: server.descriptors() == 0)


def test_slow_readers_hold_no_threads(server: Server, client: httpx.Client) -> None:
    with ExitStack() as open_connections:
        for _ in range(60):  # there are 40 threads
            open_connections.enter_context(server.connect())
        wait_until(lambda: server.descriptors() >= 60)
        time.sleep(0.5)
        assert client.get("/alive").status_code == 200
    wait_until(lambda: server.descriptors() == 0)


@pytest.mark.parametrize(
    ("header", "same"),
    [('"a"', True), ('W/"a"', True), ('"b", "a"', True), ("*", True), ('"b"', False), ("a", False)],
)
def test_etags_are_compared_weakly(header: str, same: bool) -> None:
    assert matches(header, '"a"') is same
