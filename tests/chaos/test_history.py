import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.client import Client, identity
from tests.chaos.history import Call, History, Window

JOB = {"id": "j", "status": "running", "attempt": 2, "progress": {"frames_done": 5}}


class Service(BaseHTTPRequestHandler):
    """Answers by path: a job, a download, an error, or half an answer."""

    def do_GET(self) -> None:
        if self.path == "/jobs/half":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"only this")
            self.close_connection = True
        elif self.path.endswith(".zip"):
            self._answer(200, "application/zip", b"masks")
        elif self.path == "/jobs/j":
            self._answer(200, "application/json", json.dumps(JOB).encode())
        else:
            self._answer(503, "application/problem+json", b"{}")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(202, "application/json", json.dumps(JOB).encode())

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def url() -> Any:
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_call_is_recorded_with_what_came_of_it(url: str, tmp_path: Path) -> None:
    video = tmp_path / "clip"
    video.write_bytes(b"video")
    history = History()
    with Client(history, url, name="me") as client:
        assert client.post(video, threshold=0.5) == "j"
        assert client.job("j") == JOB
        assert client.job("broken") is None
        assert client.download("j") == b"masks"
        assert client.job("half") is None
    post, job, broken, download, half = history.calls
    assert (post.acknowledges, post.job_id, post.sent) == (True, "j", identity(video, threshold=0.5))
    assert (job.result, job.job_status, job.attempt, job.frames_done) == ("ok", "running", 2, 5)
    assert (broken.result, broken.status_code, broken.job_id) == ("failed", 503, "broken")
    assert download.received is not None
    assert (half.result, half.status_code) == ("unknown", None)
    assert all(call.client == "me" and call.began_at <= call.ended_at for call in history.calls)
    assert history.acknowledged == {"j": post.sent}


def test_a_service_that_is_not_there_answers_nothing(url: str) -> None:
    history = History()
    with Client(history, "http://127.0.0.1:1") as client:
        assert client.job("j") is None
        assert not client.cancel("j")
    assert [call.result for call in history.calls] == ["unknown", "unknown"]


def test_what_is_sent_is_told_apart_by_video_and_options(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"1")
    other.write_bytes(b"2")
    assert len({identity(one), identity(other), identity(one, threshold=0.4)}) == 3


def test_threads_may_write_at_once_and_all_of_it_can_be_dumped(tmp_path: Path) -> None:
    history = History()

    def write() -> None:
        for _ in range(200):
            history.add(
                Call(client="c", method="GET", path="/", began_at=1.0, ended_at=2.0, result="unknown")
            )
            with history.during("a fault"):
                pass

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    history.dump(tmp_path / "dump")
    lines = [json.loads(line) for line in (tmp_path / "dump").read_text().splitlines()]
    assert len(history.calls) == len(history.windows) == 800
    assert len(lines) == 1600
    assert Window(**lines[-1]).fault == "a fault"
    assert Call(**lines[0]) == history.calls[0]
