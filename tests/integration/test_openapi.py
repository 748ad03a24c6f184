"""What ``/openapi.json`` says is what the server does: schemathesis asks and checks the answers."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import Stack
from tests.videos import moving_square, write_video

pytestmark = pytest.mark.processes


@pytest.mark.timeout(600)
def test_the_server_keeps_to_its_openapi_document(stack: Stack, tmp_path: Path) -> None:
    stack.start_api(max_queued_jobs=100_000)
    video = write_video(tmp_path / "clip.mp4", moving_square(2))
    with stack.client as client:
        for _ in range(3):  # ended ones, or every made-up `wait` would be waited for
            client.post(f"/jobs/{stack.post(video)['id']}/cancel").raise_for_status()
    schemathesis = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")),
            "run",
            f"http://127.0.0.1:{stack.port}/openapi.json",
            "--checks=all",
            # Made-up bytes are no video: a form that fits the schema may still be refused.
            "--exclude-checks=positive_data_acceptance",
            "--max-examples=15",
            "--seed=1",
            "--no-shrink",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert schemathesis.returncode == 0, schemathesis.stdout[-8000:]
