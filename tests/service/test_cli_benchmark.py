import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.videos import moving_square, write_video


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory, untrained_weights: Path) -> dict[str, object]:
    directory = tmp_path_factory.mktemp("benchmark")
    video = write_video(directory / "video.mp4", moving_square(12))
    document = directory / "figures.json"
    options = ["--input-size", "32", "--frames", "10", "--rounds", "1", "--json", str(document)]
    arguments = ["benchmark", str(video), "--weights", str(untrained_weights), "--device", "cpu", *options]
    result = subprocess.run(
        [sys.executable, "-m", "service.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "| published loop |" in result.stdout
    read: dict[str, object] = json.loads(document.read_text())
    return read


def test_loop_and_engine_are_compared(figures: dict[str, object]) -> None:
    loop, sampled, *engines = figures["engines"]  # type: ignore[misc]
    assert [each["encodes_per_frame"] for each in (loop, sampled)] == [3, 3]
    assert [each["encodes_per_frame"] for each in engines] == [1] * len(engines)
    assert [each["name"] for each in engines[:2]] == ["torch-float32", "openvino-float32"]
    unavailable = figures["unavailable"]
    assert isinstance(unavailable, dict)
    assert {"openvino-bfloat16"} == {each["name"] for each in engines[2:]} | unavailable.keys()
    assert all("does not compute in bfloat16" in reason for reason in unavailable.values())
    assert engines[0]["flipped"] == 0
    assert figures["speedup"] == max((each["ratio"] for each in engines if each["passes"]), default=None)


def test_a_whole_job_is_told_by_stage(figures: dict[str, object]) -> None:
    job = figures["job"]
    assert isinstance(job, dict)
    assert job["engine"] == "torch-float32"  # these weights see nothing: no other is known to be right
    stages = [job[f"{name}_s"] for name in ("decode", "resize", "encode", "window", "write")]
    assert min(stages) > 0
    assert job["overlap"] == pytest.approx(sum(stages) / job["wall_s"])
    assert job["frames_per_second"] == pytest.approx(10 / job["wall_s"])
