"""The page at ``/``: what is served, and what it does in a real browser."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urljoin

import httpx
import pytest
from redis import Redis

from service.jobs import AttemptEnd, Progress
from service.queue import JobQueue
from service.storage import JobStorage
from tests.integration.conftest import Stack, eventually
from tests.integration.test_api import succeed
from tests.videos import moving_square, write_video

pytestmark = pytest.mark.processes

PARTS = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript", "words.js": "text/javascript"}
REFERENCES = {
    "text/html": r"""(?:href|src|srcset|poster|action)=["']?([^"'\s>]+)""",
    "text/css": r"""(?:url\(|@import )["']?([^"')]+)""",
    "text/javascript": r"""(?:from|import|import\()\s*["']([^"']+)""",
}
POLICY = {
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' data:",
    "media-src 'self'",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
}


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    stack.start_api()
    with stack.client as client:
        yield client


def references(text: str, media_type: str) -> set[str]:
    """Addresses that a part of the page names, but for those within it."""
    found = re.findall(REFERENCES[media_type], text)
    return {address for address in found if not address.startswith(("#", "data:"))}


def test_the_page_is_served_with_its_policy(client: httpx.Client) -> None:
    for path, media_type in PARTS.items():
        answer = client.get(f"/{path}").raise_for_status()
        assert answer.headers["content-type"] == f"{media_type}; charset=utf-8"
        assert set(answer.headers["content-security-policy"].split("; ")) == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        head = client.head(f"/{path}")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(answer.content))


def test_all_that_the_page_refers_to_is_here_and_relative(client: httpx.Client) -> None:
    named = set()
    for path, media_type in PARTS.items():
        for address in references(client.get(f"/{path}").text, media_type):
            assert not re.match(r"/|\w+:", address), f"{address} leaves the page's own root"
            client.get(urljoin(f"/{path}", address)).raise_for_status()
            named.add(address.removeprefix("./"))
    assert named == {*PARTS, "docs"} - {""}


def test_the_page_is_no_part_of_the_documented_api(client: httpx.Client) -> None:
    assert not client.get("/openapi.json").json()["paths"].keys() & {f"/{path}" for path in PARTS}


def test_page_and_documentation_are_found_below_a_root_path_that_a_proxy_strips(stack: Stack) -> None:
    stack.start_api(root_path="/segment")
    with stack.client as client:
        for path in PARTS:
            assert client.get(f"/{path}").status_code == 200
        documentation = client.get("/docs").text
        links = re.findall(r"""(?:src|href|url)[=:] ?['"](/[^'"]+)""", documentation)
        assert len(links) >= 3
        for link in links:
            assert link.startswith("/segment/"), link
            assert client.get(link.removeprefix("/segment")).status_code == 200, link


# -- in a browser ----------------------------------------------------------------------------------------


class Browser:
    """A page of a headless Chromium, spoken to over the pipe of its DevTools protocol."""

    def __init__(self, commands: IO[bytes], answers: IO[bytes]) -> None:
        self._commands, self._answers = commands, answers
        self._calls = 0
        self._session: dict[str, str] = {}
        self.requested: list[str] = []
        self.complaints: list[Any] = []
        target = self.call("Target.createTarget", url="about:blank")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Log", "Network", "Page", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: object) -> dict[str, Any]:
        self._calls += 1
        command = {"id": self._calls, "method": method, "params": params, **self._session}
        self._commands.write(json.dumps(command).encode() + b"\0")
        self._commands.flush()
        while True:
            message = self._receive()
            if message.get("id") == self._calls:
                assert "error" not in message, f"{method}: {message}"
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def text(self, selector: str) -> str:
        text: str = self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")
        return text

    def choose_file(self, selector: str, path: Path) -> None:
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=found["result"]["objectId"])

    def _receive(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has gone"
            message += byte
        received: dict[str, Any] = json.loads(message)
        return received

    def _note(self, event: dict[str, Any]) -> None:
        match event["method"]:
            case "Network.requestWillBeSent":
                self.requested.append(event["params"]["request"]["url"])
            case "Log.entryAdded" | "Runtime.exceptionThrown":  # a breach of the policy is among the former
                self.complaints.append(event["params"])


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("neither chromium nor google-chrome is on the PATH")
    with subprocess.Popen(
        # The protocol's pipes have to be the descriptors 3 and 4; the shell puts them there.
        [
            *("sh", "-c", 'exec "$@" 3<&0 4>&1 0</dev/null 1>&2', "sh", chromium),
            *("--headless", "--remote-debugging-pipe", f"--user-data-dir={tmp_path / 'browser'}"),
            *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            browser = Browser(process.stdin, process.stdout)
            yield browser
            browser.call("Browser.close")
            process.wait(timeout=20)
        finally:
            process.kill()


def test_a_video_goes_through_the_page_from_the_upload_to_the_downloads(
    stack: Stack, browser: Browser, tmp_path: Path
) -> None:
    stack.start_api()
    stack.start_worker()
    video = write_video(tmp_path / "<b>clip & co.mp4", moving_square(20))
    site = f"http://127.0.0.1:{stack.port}/"

    def succeeded() -> bool:
        assert browser.text("#upload-problem") == browser.text("#job-problem") == ""
        return browser.text("#job-status").lower() == "succeeded"

    browser.call("Page.navigate", url=site)
    eventually(lambda: "untrained" in browser.text("#service-notice"), within_seconds=20, what="it warns")
    browser.choose_file("#file", video)
    assert browser.text("#file-name") == video.name
    browser.evaluate("document.querySelector('#quality').value = 'multi_scale'")
    browser.evaluate("document.querySelector('#send').click()")
    eventually(succeeded, within_seconds=60, what="the page tells of the success")

    address = browser.evaluate("location.href")
    job = stack.job(address.removeprefix(f"{site}#"))
    assert job["status"] == "succeeded"
    assert job["input"]["filename"] == video.name
    assert job["options"]["artifacts"] == ["masks", "overlay"]
    assert job["options"]["quality"] == "multi_scale"
    assert "multi-scale" in browser.text("#job-facts")
    assert browser.text("#recent-jobs strong") == video.name

    browser.call("Page.reload")
    eventually(succeeded, within_seconds=20, what="the page finds the job again")
    assert browser.text("#job-name") == video.name
    assert "untrained" in browser.text("#job-warnings")
    links = browser.evaluate("[...document.querySelectorAll('#job-artifacts a')].map((link) => link.href)")
    assert links == [urljoin(site, artifact["url"]) for artifact in job["artifacts"]]
    eventually(
        lambda: browser.evaluate("document.querySelector('#overlay-video').videoWidth") == 64,
        within_seconds=20,
        what="the overlay plays",
    )

    assert browser.complaints == []
    assert all(url.startswith((site, "data:", "about:")) for url in browser.requested)


def test_the_page_is_told_of_progress_and_survives_a_restart(
    stack: Stack, browser: Browser, redis: Redis, tmp_path: Path
) -> None:
    stack.start_api()
    job_id = stack.post(write_video(tmp_path / "clip.mp4", moving_square(20)))["id"]

    def shows(selector: str, text: str) -> None:
        eventually(
            lambda: text in browser.text(selector).lower(), within_seconds=30, what=f"{selector}: {text}"
        )

    browser.call("Page.navigate", url=f"http://127.0.0.1:{stack.port}/#{job_id}")
    shows("#job-text", "next in line")
    storage, queue = JobStorage(stack.data_dir), JobQueue(redis)
    attempt = storage.begin(job_id, delivery="delivery", worker="worker")
    queue.begun(job_id, attempt)
    shows("#job-status", "running")
    for frames in (5, 15):
        progress = Progress(phase="segmenting", frames_done=frames, frames_total=20, fps=2.0)
        queue.report(job_id, progress)
        shows("#job-pace", f"{frames} of 20 frames")
        assert browser.evaluate("document.querySelector('#job-bar').value") == 5 * frames
    looked_up = [url for url in browser.requested if url.endswith(f"/jobs/{job_id}")]
    assert len(looked_up) == 1  # all else came as events

    stack.stop()
    shows("#job-problem", "cannot be reached")
    storage.end(attempt, AttemptEnd.PREEMPTED)
    succeed(stack, job_id)
    stack.start("serve", "--port", str(stack.port))
    shows("#job-status", "succeeded")
    assert browser.text("#job-problem") == ""
