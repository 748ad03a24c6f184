"""`imcnet demo`: one command, from nothing to something to look at."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import psutil
import pytest
from PIL import Image

pytestmark = pytest.mark.processes


def demo(out: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "service.cli",
            "demo",
            "--out",
            str(out),
            "--device",
            "cpu",
            *map(str, arguments),
        ],
        env={**os.environ, "IMCNET_INPUT_SIZE": "64", "IMCNET_CPU_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def left_over(out: Path) -> list[str]:
    """Processes and data that belong to the demo in ``out``, named by what gives them away."""
    commands = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return [command for command in commands if str(out) in command] + [
        path.name for path in out.glob(".service-*")
    ]


def test_it_renders_a_scene_runs_the_job_and_compares_the_masks_with_the_truth(
    tmp_path: Path, untrained_weights: Path
) -> None:
    result = demo(tmp_path, "--weights", untrained_weights)
    assert result.returncode == 0, result.stderr
    assert "Mean J against the truth: " in result.stdout
    assert "mean nothing yet" in result.stdout
    with zipfile.ZipFile(tmp_path / "masks.zip") as masks:
        names = [name for name in masks.namelist() if name.endswith(".png")]
    with zipfile.ZipFile(tmp_path / "truth.zip") as truth:
        assert len(names) == len(truth.namelist())
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.size == (4 * 320, 3 * 180)
    assert (tmp_path / "overlay.mp4").stat().st_size > 0
    assert left_over(tmp_path) == []


def test_a_file_that_is_no_video_gets_the_words_of_the_service(
    tmp_path: Path, untrained_weights: Path
) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    result = demo(tmp_path, tmp_path / "text.mp4", "--weights", untrained_weights)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("imcnet: error: ")
    assert left_over(tmp_path) == []
