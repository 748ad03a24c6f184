"""Logs as an operator gets them: the standard error of a process of its own."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import REPOSITORY

PREAMBLE = """
import logging, warnings
from structlog.contextvars import bound_contextvars
from service.logs import configure_logging
logger = logging.getLogger("some.module")
"""

# A server with one route that works and one that does not; asks itself, and prints what it is answered.
SERVER = """
import http.client, threading, time
import uvicorn
from fastapi import FastAPI
from starlette.responses import PlainTextResponse
from service.logs import RequestContext, configure_logging

configure_logging("DEBUG", "json")
app = FastAPI()

@app.get("/jobs/{job_id}")
def look() -> PlainTextResponse:
    logging.getLogger("app").info("looked")  # in a thread of the pool
    return PlainTextResponse("")

@app.get("/broken")
def broken() -> None:
    raise RuntimeError("no such luck")

server = uvicorn.Server(uvicorn.Config(RequestContext(app), port=0, log_config=None, lifespan="off"))
thread = threading.Thread(target=server.run)
thread.start()
while not server.started:
    time.sleep(0.01)
port = server.servers[0].sockets[0].getsockname()[1]
for path, given in REQUESTS:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers={} if given is None else {"X-Request-ID": given})
    answer = connection.getresponse()
    print(answer.status, answer.headers["X-Request-ID"])
    connection.close()
server.should_exit = True
thread.join()
"""
JOB = "0190b0aa-1111-7222-8333-444455556666"


def run(program: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


def logged(program: str) -> str:
    return run(PREAMBLE + program).stderr


def records(log: str) -> list[dict[str, Any]]:
    """Every line is a record."""
    return [json.loads(line) for line in log.splitlines()]


def answers(*requests: tuple[str, str | None]) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Status and request id of each answer, and the log."""
    result = run(f"import logging\nREQUESTS = {requests!r}\n{SERVER}")
    return [line.split() for line in result.stdout.splitlines()], records(result.stderr)


def test_a_json_record_has_its_time_level_logger_event_and_context() -> None:
    log = logged(
        """
configure_logging("INFO", "json")
with bound_contextvars(job="j", attempt=2):
    logger.warning("frame %d", 7)
"""
    )
    (record,) = records(log)
    timestamp = record.pop("timestamp")
    assert timestamp.endswith("Z")
    assert "T" in timestamp
    assert record == {
        "level": "warning",
        "logger": "some.module",
        "event": "frame 7",
        "job": "j",
        "attempt": 2,
    }


def test_a_text_record_reads_from_left_to_right() -> None:
    log = logged(
        """
configure_logging("INFO", "text")
with bound_contextvars(job="j", attempt=2):
    logger.warning("frame %d", 7)
logger.info("idle")
"""
    )
    first, second = (line.partition("Z ")[2] for line in log.splitlines())
    assert first == "WARNING some.module: frame 7 [attempt=2 job=j]"
    assert second == "INFO some.module: idle"


def test_the_context_ends_with_its_block_and_the_level_is_kept_to() -> None:
    log = logged(
        """
configure_logging("WARNING", "json")
logger.info("not seen")
with bound_contextvars(job="j"):
    pass
logger.error("seen")
"""
    )
    (record,) = records(log)
    assert record["event"] == "seen"
    assert "job" not in record


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_whatever_a_message_holds_it_stays_one_line(log_format: str) -> None:
    log = logged(
        f"""
configure_logging("INFO", "{log_format}")
with bound_contextvars(job="a\\nb"):
    logger.info("%s", "one\\ntwo\\r\\x1b[31m\\u2028three")
"""
    )
    assert len(log.splitlines()) == 1
    assert "\x1b" not in log
    assert r"one\ntwo\r" in log


def test_an_exception_is_a_field_of_its_json_record() -> None:
    log = logged(
        """
configure_logging("INFO", "json")
try:
    1 / 0
except ZeroDivisionError:
    logger.exception("failed")
"""
    )
    (record,) = records(log)
    assert record["event"] == "failed"
    assert record["exception"].startswith("Traceback")
    assert record["exception"].endswith("ZeroDivisionError: division by zero")


def test_an_exception_follows_its_text_record_indented() -> None:
    log = logged(
        r"""
configure_logging("INFO", "text")
try:
    raise ValueError("x\n2026-01-01T00:00:00Z INFO service.app: forged")
except ValueError:
    logger.exception("failed")
"""
    )
    head, *trace = log.splitlines()
    assert head.endswith("ERROR some.module: failed")
    assert trace[0] == "  Traceback (most recent call last):"
    assert all(line.startswith("  ") for line in trace)


def test_warnings_are_logged_like_everything_else() -> None:
    (record,) = records(logged('configure_logging("INFO", "json")\nwarnings.warn("old ways")'))
    assert record["logger"] == "py.warnings"
    assert "old ways" in record["event"]


def test_a_request_is_known_by_the_clients_id_where_that_is_well_formed() -> None:
    bad = ["", "a" * 65, "a b", "né".encode().decode("latin-1"), 'x" level="error']
    got, _ = answers(("/jobs/1", "client-7_a.B"), *(("/jobs/1", value) for value in bad))
    assert got[0] == ["200", "client-7_a.B"]
    made_up = [request_id for _, request_id in got[1:]]
    assert len(set(made_up)) == len(bad)
    assert all(len(request_id) == 12 and request_id.isalnum() for request_id in made_up)


def test_the_records_of_a_request_carry_its_id_and_its_job_but_no_query() -> None:
    _, log = answers((f"/jobs/{JOB}?token=secret", "first"), ("/jobs/not-an-id", "second"))
    looked = [record for record in log if record["event"] == "looked"]
    assert [(record["request"], record.get("job")) for record in looked] == [("first", JOB), ("second", None)]
    access = [record["event"] for record in log if record["logger"] == "uvicorn.access"]
    assert len(access) == 2
    assert f'"GET /jobs/{JOB} HTTP/1.1" 200' in access[0]
    assert "secret" not in json.dumps(log)


def test_an_unexpected_error_is_answered_and_logged_with_the_requests_id() -> None:
    got, log = answers(("/broken", "mine"))
    assert got == [["500", "mine"]]
    (record,) = [record for record in log if record["level"] == "error"]
    assert record["request"] == "mine"
    assert "RuntimeError: no such luck" in record["exception"]
