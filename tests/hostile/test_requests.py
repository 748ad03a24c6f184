"""Requests that lie, that do not end, or that want to be answered with more than they should be told."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from service.errors import PROBLEMS
from tests.hostile.api import MIB, Api, private_api
from tests.hostile.test_corpus import TELLTALE
from tests.videos import moving_square, write_video

pytestmark = pytest.mark.processes

GROWTH_BYTES = 30 * MIB
MAX_UPLOAD_BYTES = 8 * MIB
HEADER_SECONDS = 2
SLACK_SECONDS = 5
FORM = b"Content-Type: multipart/form-data; boundary=limit\r\n"
VIDEO = b"Content-Type: video/mp4\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
EVIL = "http://evil.example"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    directory = tmp_path_factory.mktemp("api")
    with private_api(directory, max_upload_bytes=MAX_UPLOAD_BYTES, header_seconds=HEADER_SECONDS) as api:
        api.post(write_video(directory / "first.mp4", moving_square(3)))  # what it needs once, it has now
        yield api


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", moving_square(3)).read_bytes()


def head(*lines: bytes) -> bytes:
    return b"POST /jobs HTTP/1.1\r\nHost: localhost\r\n" + b"".join(lines) + b"\r\n"


def part(disposition: bytes, content: bytes, *headers: bytes) -> bytes:
    lines = (b"--limit", b"Content-Disposition: form-data; " + disposition, *headers, b"", content, b"")
    return b"\r\n".join(lines)


def sized(body: bytes, *lines: bytes) -> bytes:
    return head(*lines, b"Content-Length: %d\r\n" % len(body)) + body


def answer_to(api: Api, request: bytes) -> tuple[int | None, bytes]:
    """Send a request, as far as it is taken. Returns: The status of the first answer, and all that came."""
    with socket.create_connection(("127.0.0.1", api.stack.port), timeout=20) as connection:
        sender = threading.Thread(target=_send, args=(connection, request))
        sender.start()
        received = b""
        with suppress(ConnectionResetError):  # closed while we were still sending
            while data := connection.recv(65536):
                received += data
                if _is_whole(received):
                    break
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        sender.join()
    found = re.match(rb"HTTP/1.1 (\d+)", received)
    return int(found[1]) if found else None, received


def _send(connection: socket.socket, request: bytes) -> None:
    with suppress(OSError):
        connection.sendall(request)


def _is_whole(received: bytes) -> bool:
    top, end, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", top, re.IGNORECASE)
    return bool(end) and length is not None and len(body) >= int(length[1])


# -- row 5: bodies and heads that lie, or are too much ---------------------------------------------------

LYING: dict[str, tuple[bytes, set[int | None]]] = {
    "a negative length": (head(VIDEO, b"Content-Length: -1\r\n"), {400}),
    "a length that is no number": (head(VIDEO, b"Content-Length: many\r\n"), {400}),
    "two lengths": (head(VIDEO, b"Content-Length: 1\r\nContent-Length: 2\r\n"), {400}),
    "a length above the limit": (head(VIDEO, b"Content-Length: %d\r\n" % (2**40)), {413}),
    "a length with twenty digits": (head(VIDEO, b"Content-Length: %s\r\n" % (b"9" * 20)), {413}),
    "more than was declared": (head(VIDEO, b"Content-Length: 10\r\n") + bytes(MIB), {422}),
    "a chunk whose length is no number": (head(VIDEO, CHUNKED) + b"many\r\n", {400, None}),
    "chunks above the limit": (
        head(VIDEO, CHUNKED) + (b"%x\r\n" % MIB + bytes(MIB) + b"\r\n") * (MAX_UPLOAD_BYTES // MIB + 1),
        {413},
    ),
    "a thousand parts": (sized(1000 * part(b'name="a"', b"1") + b"--limit--\r\n", FORM), {400}),
    "a thousand videos": (sized(1000 * part(b'name="video"; filename="v"', b"1"), FORM), {400}),
    "a part with a header of megabytes": (
        sized(part(b'name="video"', b"1", b"X-Much: " + bytes(4 * MIB)), FORM),
        {400},
    ),
    "a part with thousands of headers": (
        sized(part(b'name="video"', b"1", *[b"X-Many: 1"] * 10_000), FORM),
        {400},
    ),
    "a field of megabytes": (sized(part(b'name="threshold"', b"1" * (4 * MIB)), FORM), {400}),
    "a field name of megabytes": (sized(part(b'name="%s"' % (b"n" * 4 * MIB), b"1"), FORM), {400}),
    "a form without a boundary": (sized(b"--x\r\n", b"Content-Type: multipart/form-data\r\n"), {400}),
    "a form without an end": (sized(part(b'name="video"; filename="v"', b"1"), FORM), {400}),
    "headers of megabytes": (head(VIDEO, b"X-Much: %s\r\n" % (b"x" * 10 * MIB)), {400}),
    "thousands of headers": (head(VIDEO, *[b"X-Many: 1\r\n"] * 10_000), {400, 431}),
    "an address above the limit": (
        b"GET /jobs?cursor=%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"x" * 17_000),
        {431},
    ),
    "an address of megabytes": (b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"x" * 4 * MIB), {400}),
    "no HTTP at all": (bytes(MIB), {400}),
    "no host": (b"GET /jobs HTTP/1.1\r\n\r\n", {400}),
    "another host": (b"GET /jobs HTTP/1.1\r\nHost: evil.example\r\n\r\n", {421}),
    "a range of a page that is none": (
        b"GET /page.js HTTP/1.1\r\nHost: localhost\r\nRange: bytes=x\r\n\r\n",
        {200},
    ),
}


@pytest.mark.parametrize("name", LYING)
def test_a_request_that_lies_or_is_too_much_is_refused_and_costs_little(api: Api, name: str) -> None:
    request, statuses = LYING[name]
    api.forget_the_peak()
    before = api.resident_bytes
    status, received = answer_to(api, request)
    # A server that closes while much is still under way may reset what it has said.
    assert status in statuses or (status is None and len(request) > MIB), received
    if status is not None and status >= 400:
        assert b"\ncontent-type: application/problem+json" in received.lower()
        assert b"\nx-content-type-options: nosniff" in received.lower()
    assert api.peak_bytes - before < GROWTH_BYTES
    assert not TELLTALE.search(received.decode("latin-1").replace("HTTP/1.1", ""))
    assert api.is_alive()
    wait_until_gone_from(api)


def test_a_body_that_ends_before_it_should_leaves_nothing(api: Api, video: bytes) -> None:
    with socket.create_connection(("127.0.0.1", api.stack.port)) as connection:
        connection.sendall(head(VIDEO, b"Content-Length: %d\r\n" % (len(video) + 1)) + video)
    wait_until_gone_from(api)
    assert api.is_alive()


def left_uploads(api: Api) -> list[str]:
    return [path.name for path in (api.stack.data_dir / "uploads").iterdir()]


def wait_until_gone_from(api: Api) -> None:
    deadline = time.monotonic() + SLACK_SECONDS
    while left_uploads(api):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# -- slow heads ------------------------------------------------------------------------------------------

SLOW = {
    "nothing": b"",
    "half a head": b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
    "a body that was answered before": head(b"Content-Type: text/plain\r\nContent-Length: 1000000\r\n"),
    "half a second request": b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\nGET /livez HTTP/1.1\r\nX-Slow: ",
}


@pytest.mark.parametrize("beginning", SLOW)
def test_a_connection_on_which_no_request_arrives_is_closed(api: Api, beginning: str) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", api.stack.port), timeout=20) as connection:
        connection.sendall(SLOW[beginning])
        with suppress(ConnectionError):
            while time.monotonic() - began < HEADER_SECONDS + 2 * SLACK_SECONDS:
                if beginning != "nothing":
                    connection.sendall(b"x")
                connection.settimeout(0.2)
                try:
                    if not connection.recv(65536):
                        break
                except TimeoutError:
                    continue
    assert HEADER_SECONDS - 0.5 < time.monotonic() - began < HEADER_SECONDS + SLACK_SECONDS


def test_a_request_that_is_being_answered_is_not_cut(api: Api, tmp_path: Path) -> None:
    job_id = api.post(write_video(tmp_path / "clip.mp4", moving_square(3))).job_id
    with api.stack.client as client:
        began = time.monotonic()
        answer = client.get(f"/jobs/{job_id}", params={"wait": HEADER_SECONDS + 2})
    assert answer.json()["status"] == "queued"
    assert time.monotonic() - began > HEADER_SECONDS + 1


# -- row 7: names of files -------------------------------------------------------------------------------

NAMES = {
    "a path": b'filename="../../x.mp4"',
    "an absolute path": b'filename="/etc/passwd"',
    "a path of another system": b'filename="..\\\\..\\\\x.mp4"',
    "a pattern": b'filename="%d%s%n.mp4"',
    "right to left": 'filename="\u202egpj.4pm"'.encode(),
    "a zero": b'filename="a%00b\x00.mp4"',
    "lines": b"filename*=UTF-8''a%0D%0AX-Evil:%201",
    "markup": b'filename="<img src=x onerror=alert(1)>.mp4"',
    "no UTF-8": b'filename="\xff\xfe\xed\xa0\x80.mp4"',
    "three hundred letters": b'filename="%s.mp4"' % (b"n" * 300),
    "nothing": b'filename=""',
}


@pytest.mark.parametrize("name", NAMES)
def test_a_files_name_is_shown_in_json_and_used_nowhere(api: Api, video: bytes, name: str) -> None:
    body = part(b'name="video"; ' + NAMES[name], video) + b"--limit--\r\n"
    with api.stack.client as client:
        headers = {"Content-Type": "multipart/form-data; boundary=limit"}
        answer = client.post("/jobs", content=body, headers=headers)
        # A byte that may not stand in a header is refused with the form.
        assert answer.status_code in ((202, 400) if name == "a zero" else (202,)), answer.text
        if answer.status_code == 400:
            return
        shown = client.get(answer.headers["location"])
    told = shown.json()["input"]["filename"]
    assert told is None or len(told) <= 255
    for response in (answer, shown):
        assert "x-evil" not in response.headers
        everything = " ".join(value for _, value in response.headers.multi_items())
        assert everything.isascii()
        assert everything.isprintable()
        assert told is None or told not in everything
    for path in api.stack.data_dir.rglob("*"):
        assert re.fullmatch(r"[\w./-]+", str(path.relative_to(api.stack.data_dir))), path
        assert told is None or told != path.name
    assert not Path("/etc/passwd").read_bytes().startswith(video[:8])


def test_a_field_that_nobody_knows_is_refused(api: Api, video: bytes) -> None:
    """There is no field by which the service would fetch or call anything."""
    for field in ("url", "video_url", "webhook", "callback"):
        with api.stack.client as client:
            files = {"video": ("v.mp4", video)}
            answer = client.post("/jobs", files=files, data={field: "http://169.254.169.254/"})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_options"), field


# -- row 14: what answers tell ---------------------------------------------------------------------------

ODD_PATHS = (
    "/nothing",
    "/jobs/x",
    "/jobs/..%2f..%2fetc%2fpasswd",
    "/jobs/%00",
    "/jobs/" + "a" * 300,
    "/jobs/00000000-0000-7000-8000-000000000000",
    "/jobs/00000000-0000-7000-8000-000000000000/artifacts/..%2fjob.json",
    "/jobs/00000000-0000-7000-8000-000000000000/events",
    "/jobs?limit=-1",
    "/jobs?cursor=x",
    "/jobs?status=%ff",
    "/docs/../../etc/passwd",
    "/static/../app.py",
    "/page.js/x",
)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW")


@pytest.mark.parametrize("method", METHODS)
def test_an_error_tells_nothing_but_a_known_code(api: Api, method: str) -> None:
    with api.stack.client as client:
        document = client.get("/openapi.json").json()
        paths = [
            *ODD_PATHS,
            *(path.replace("{job_id}", "x").replace("{name}", "x") for path in document["paths"]),
        ]
        for path in paths:
            # What would change something is refused for its origin alone.
            headers = {"Origin": EVIL} if method in ("GET", "HEAD", "OPTIONS") else {}
            answer = client.request(method, httpx.URL(path), headers=headers)
            check_headers(answer)
            if answer.status_code < 400 or method == "HEAD":
                continue
            assert answer.status_code < 500, path
            assert answer.headers["content-type"] == "application/problem+json", path
            problem = answer.json()
            assert problem["code"] in PROBLEMS
            assert not TELLTALE.search(answer.text), answer.text


def check_headers(answer: httpx.Response) -> None:
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["referrer-policy"] == "no-referrer"
    told = {name.lower() for name in answer.headers}
    assert not told & {"server", "x-powered-by", "via"}
    assert not [name for name in told if name.startswith("access-control-")]


def test_options_that_make_no_sense_are_answered_without_a_word_of_ours(api: Api, video: bytes) -> None:
    for options in (
        {"threshold": "NaN"},
        {"max_side": "1e999"},
        {"quality": "/etc/passwd"},
        {"threshold": "x" * 9000},
    ):
        with api.stack.client as client:
            answer = client.post("/jobs", files={"video": ("v.mp4", video)}, data=options)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_options")
        assert not TELLTALE.search(answer.text.replace("/etc/passwd", "")), answer.text


def test_another_sites_page_is_told_nothing(api: Api) -> None:
    with api.stack.client as client:
        asked = {
            "Origin": EVIL,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "x",
        }
        check_headers(client.options("/jobs", headers=asked))
        check_headers(client.get("/jobs", headers={"Origin": EVIL}))
        assert json.loads(client.get("/livez").text)
