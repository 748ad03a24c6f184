"""The `imcnet` command as a user meets it: in a process of its own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from redis import Redis

from tests.videos import moving_square, write_video


def imcnet(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "service.cli", *map(str, arguments)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def error_of(result: "subprocess.CompletedProcess[str]", *, code: int = 2) -> str:
    """The one line that a command ended with."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("imcnet: error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == errors[0]
    return errors[0]


@pytest.fixture
def frames_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir()
    for name in ("b", "a", "c"):
        Image.fromarray(np.full((24, 40, 3), 128, np.uint8)).save(folder / f"{name}.jpg")
    return folder


def test_it_tells_its_version() -> None:
    assert imcnet("--version").stdout.startswith("imcnet ")


def test_a_package_that_is_not_installed_is_named_with_the_extra_that_brings_it(tmp_path: Path) -> None:
    program = "import sys; sys.modules['torch'] = None; from service.cli import main; main()"
    command = [sys.executable, "-c", program, "weights", "init", str(tmp_path / "new.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert error_of(result) == "imcnet: error: torch is not installed: pip install 'imcnet[worker]'"


# -- up, serve, worker -----------------------------------------------------------------------------------


def test_up_refuses_weights_that_are_not_there(tmp_path: Path) -> None:
    result = imcnet(
        "up", "--weights", tmp_path / "missing.safetensors", IMCNET_DATA_DIR=str(tmp_path / "data")
    )
    assert "missing.safetensors" in error_of(result)
    assert not (tmp_path / "data").exists()


@pytest.mark.processes
def test_up_ends_where_a_part_of_it_is_misconfigured(tmp_path: Path) -> None:
    (tmp_path / "no-weights").write_text("text")
    result = imcnet(
        "up", "--weights", tmp_path / "no-weights", "--port", 0, IMCNET_DATA_DIR=str(tmp_path / "data")
    )
    assert result.returncode == 2
    assert "imcnet: error: " in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_without_a_redis_it_says_which_setting_is_missing(
    command: str, untrained_weights: Path, tmp_path: Path
) -> None:
    result = imcnet(command, IMCNET_WEIGHTS=str(untrained_weights), IMCNET_DATA_DIR=str(tmp_path))
    assert "IMCNET_REDIS_URL" in error_of(result)


def test_serve_says_where_it_looked_for_redis_and_keeps_the_password(tmp_path: Path) -> None:
    message = error_of(
        imcnet("serve", IMCNET_REDIS_URL="redis://:secret@127.0.0.1:1/0", IMCNET_DATA_DIR=str(tmp_path)),
        code=1,
    )
    assert "127.0.0.1:1" in message
    assert "secret" not in message


def test_serve_refuses_a_redis_url_that_is_none(tmp_path: Path) -> None:
    assert "redis://" in error_of(
        imcnet("serve", IMCNET_REDIS_URL="localhost", IMCNET_DATA_DIR=str(tmp_path))
    )


def test_a_worker_without_redis_may_be_started_again(untrained_weights: Path, tmp_path: Path) -> None:
    result = imcnet(
        "worker",
        "--weights",
        untrained_weights,
        IMCNET_REDIS_URL="redis://127.0.0.1:1",
        IMCNET_DATA_DIR=str(tmp_path),
    )
    assert "cannot be reached" in error_of(result, code=1)


@pytest.mark.processes
def test_serve_says_that_its_port_is_taken(redis_url: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = imcnet("serve", "--port", port, IMCNET_REDIS_URL=redis_url, IMCNET_DATA_DIR=str(tmp_path))
    assert f"port {port}: Address already in use" in error_of(result)


def test_a_setting_that_is_not_valid_is_named() -> None:
    assert "IMCNET_PORT" in error_of(imcnet("serve", IMCNET_PORT="http"))
    assert "IMCNET_RECONCILE_SECONDS" in error_of(imcnet("serve", IMCNET_LEASE_SECONDS="6"))


@pytest.mark.processes
def test_a_worker_does_not_fall_back_from_a_gpu_that_is_not_there(
    redis: Redis, redis_url: str, untrained_weights: Path, tmp_path: Path
) -> None:
    result = imcnet(
        *("worker", "--device", "cuda:7", "--weights", untrained_weights),
        IMCNET_REDIS_URL=redis_url,
        IMCNET_DATA_DIR=str(tmp_path),
    )
    assert "cuda:7" in error_of(result)


def test_workers_on_all_gpus_need_a_gpu() -> None:
    assert "no CUDA device" in error_of(imcnet("worker", "--devices", "all"))


def test_one_device_and_several_exclude_each_other() -> None:
    assert "not both" in error_of(imcnet("worker", "--devices", "all", "--device", "cpu"))


# -- segment ---------------------------------------------------------------------------------------------


def test_a_folder_of_frames_gets_a_mask_a_frame_under_the_frames_name(
    frames_folder: Path, untrained_weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "masks"
    result = imcnet("segment", frames_folder, out, "--weights", untrained_weights, "--input-size", 64)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png", "c.png"]
    with Image.open(out / "a.png") as mask:
        assert (mask.mode, mask.size) == ("1", (40, 24))


def test_a_video_gets_a_mask_a_frame_under_its_number(untrained_weights: Path, tmp_path: Path) -> None:
    video, out = write_video(tmp_path / "video.mp4", moving_square(6)), tmp_path / "masks"
    result = imcnet(
        "segment", video, out, "--weights", untrained_weights, "--input-size", 64, "--max-side", 32
    )
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == [f"{ordinal:08d}.png" for ordinal in range(6)]
    with Image.open(out / "00000000.png") as mask:
        assert mask.size == (32, 24)


def test_masks_have_the_quality_asked_for(untrained_weights: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    (tmp_path / "frames").mkdir()
    Image.fromarray(noise).save(tmp_path / "frames" / "a.png")
    masks = []
    for quality in ("exact", "multi_scale"):
        out = tmp_path / quality
        arguments = ("--quality", quality, "--threshold", 0.5112)  # where an untrained network is undecided
        result = imcnet(
            *("segment", tmp_path / "frames", out, "--weights", untrained_weights, "--input-size", 64),
            *arguments,
        )
        assert result.returncode == 0, result.stderr
        masks.append(np.asarray(Image.open(out / "a.png")))
    assert all(0.05 < mask.mean() < 0.95 for mask in masks)
    assert not np.array_equal(*masks)


def test_another_quality_is_refused(frames_folder: Path, untrained_weights: Path, tmp_path: Path) -> None:
    arguments = ("--weights", untrained_weights, "--quality", "best")
    result = imcnet("segment", frames_folder, tmp_path / "masks", *arguments)
    assert result.returncode == 2
    assert "multi_scale" in result.stderr
    assert not (tmp_path / "masks").exists()


def test_untrained_weights_are_called_so(
    frames_folder: Path, untrained_weights: Path, tmp_path: Path
) -> None:
    result = imcnet(
        "segment", frames_folder, tmp_path / "masks", "--weights", untrained_weights, "--input-size", 64
    )
    assert "not trained" in result.stderr


def test_an_unreadable_video_is_one_clear_line(untrained_weights: Path, tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_text("no video")
    result = imcnet("segment", tmp_path / "video.mp4", tmp_path / "masks", "--weights", untrained_weights)
    error_of(result)
    assert not (tmp_path / "masks").exists()


def test_an_unreadable_frame_is_named(frames_folder: Path, untrained_weights: Path, tmp_path: Path) -> None:
    (frames_folder / "b.jpg").write_text("no image")
    result = imcnet(
        "segment", frames_folder, tmp_path / "masks", "--weights", untrained_weights, "--input-size", 64
    )
    assert "b.jpg" in error_of(result)


def test_frames_of_different_sizes_are_refused(
    frames_folder: Path, untrained_weights: Path, tmp_path: Path
) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(frames_folder / "d.png")
    result = imcnet(
        "segment", frames_folder, tmp_path / "masks", "--weights", untrained_weights, "--input-size", 64
    )
    assert "d.png" in error_of(result)


def test_a_folder_without_frames_is_refused(untrained_weights: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = imcnet("segment", tmp_path / "empty", tmp_path / "masks", "--weights", untrained_weights)
    assert "no images" in error_of(result)


def test_masks_do_not_go_into_a_folder_that_holds_files_unless_told_so(
    frames_folder: Path, untrained_weights: Path
) -> None:
    arguments = ("segment", frames_folder, frames_folder, "--weights", untrained_weights, "--input-size", 64)
    assert "--overwrite" in error_of(imcnet(*arguments))
    assert imcnet(*arguments, "--overwrite").returncode == 0
    assert (frames_folder / "a.png").exists()


def test_without_weights_of_ones_own_the_trained_ones_that_ship_are_taken(
    frames_folder: Path, tmp_path: Path
) -> None:
    result = imcnet("segment", frames_folder, tmp_path / "masks", "--input-size", 64)
    assert result.returncode == 0, result.stderr
    assert "not trained" not in result.stderr
    assert len(list((tmp_path / "masks").glob("*.png"))) == len(list(frames_folder.iterdir()))


def test_segmenting_does_not_fall_back_from_a_gpu_that_is_not_there(
    frames_folder: Path, untrained_weights: Path, tmp_path: Path
) -> None:
    result = imcnet(
        "segment", frames_folder, tmp_path / "masks", "--weights", untrained_weights, "--device", "cuda"
    )
    assert "cuda" in error_of(result)


# -- weights ---------------------------------------------------------------------------------------------


def test_new_weights_are_marked_as_untrained(tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    assert imcnet("weights", "init", path, "--backbone", "resnet18", "--seed", 3).returncode == 0
    facts = json.loads(imcnet("weights", "show", path).stdout)
    assert facts["trained"] is False
    assert facts["config"]["backbone"] == "resnet18"
    assert len(facts["sha256"]) == 64


def test_new_weights_can_be_those_of_an_ablation(tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    options = ("--backbone", "resnet18", "--variant", "fpn", "--alignment-stages", 2)
    assert imcnet("weights", "init", path, *options).returncode == 0
    facts = json.loads(imcnet("weights", "show", path).stdout)
    assert (facts["config"]["variant"], facts["config"]["alignment_stages"]) == ("fpn", 2)


def test_new_weights_can_have_the_options_that_are_not_the_papers(tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    options = ("--backbone", "efficientnet_lite0", "--no-whitening", "--num-frames", 5)
    assert imcnet("weights", "init", path, *options).returncode == 0
    config = json.loads(imcnet("weights", "show", path).stdout)["config"]
    assert (config["normalisation"], config["num_frames"]) == ("centred", 5)
    assert [config[name] for name in ("whitening", "motion_cue")] == [False, True]


def test_weights_are_never_overwritten(untrained_weights: Path) -> None:
    assert "exists already" in error_of(imcnet("weights", "init", untrained_weights))


def test_an_unknown_backbone_is_refused_with_those_there_are(tmp_path: Path) -> None:
    assert "resnet101" in error_of(imcnet("weights", "init", tmp_path / "new", "--backbone", "vgg"))


def test_a_file_that_is_no_weights_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    error_of(imcnet("weights", "show", tmp_path / "text"))
    error_of(imcnet("weights", "import", tmp_path / "text", tmp_path / "new"))


# -- demo ------------------------------------------------------------------------------------------------


def test_the_demo_needs_its_video(tmp_path: Path) -> None:
    assert "missing.mp4" in error_of(imcnet("demo", tmp_path / "missing.mp4", "--out", tmp_path / "demo"))


def test_the_demo_says_that_a_service_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "video.mp4").touch()
    result = imcnet("demo", tmp_path / "video.mp4", "--out", tmp_path / "demo", "--url", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1 does not answer" in error_of(result)
