from pathlib import Path

import av
import av.logging
import pytest
from av.video.stream import VideoStream

from service.errors import UnusableVideo
from service.media import (
    MediaLimits,
    check_frame_size,
    claimed_frames,
    clockwise_rotation,
    displayed_size,
    frame_rate,
    open_video,
    stream_duration_seconds,
)
from tests.hostile.corpus import MADE, Entry
from tests.videos import moving_square, write_video

LIMITS = MediaLimits()


def refusal(path: Path, limits: MediaLimits = LIMITS) -> UnusableVideo:
    with pytest.raises(UnusableVideo) as caught, open_video(path, limits, thread_count=1):
        pass
    assert str(path.parent) not in caught.value.detail
    return caught.value


def first_frame(path: Path) -> av.VideoFrame:
    with open_video(path, LIMITS, thread_count=1) as (container, stream, _):
        return next(container.decode(stream))


# -- what is refused, and as what ------------------------------------------------------------------------


UNOPENABLE = ("empty_file", "not_a_video", "unsupported_container", "unsupported_codec", "no_video_stream")


@pytest.mark.parametrize(
    "entry",
    [entry for entry in MADE if entry.refused and entry.refused[1] in UNOPENABLE],
    ids=lambda entry: entry.name,
)
def test_what_is_no_video_of_ours_is_refused(tmp_path: Path, entry: Entry) -> None:
    path = tmp_path / "upload"
    entry.build(path)
    assert entry.refused is not None
    assert refusal(path).code == entry.refused[1]
    assert (
        refusal(path).code == entry.refused[1]
    )  # FFmpeg's log, which some come from, leaves repetitions out


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"), ("ts", "libx264")]
)
def test_too_many_streams_are_refused(tmp_path: Path, suffix: str, codec: str) -> None:
    path = tmp_path / f"v.{suffix}"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream(codec, rate=25) for _ in range(5)]
        for stream in streams:
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for stream in streams:
            assert isinstance(stream, VideoStream)
            for image in moving_square(2):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
    with open_video(path, MediaLimits(max_streams=5), thread_count=1) as (opened, _, _):
        assert len(opened.streams) == 5
    for most in (4, 4, 1):
        assert refusal(path, MediaLimits(max_streams=most)).code == "too_many_streams"


def test_a_file_that_is_not_there_is_not_the_clients_fault(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError),
        open_video(tmp_path / "none", LIMITS, thread_count=1),
    ):
        pass


# -- what is opened, and how -----------------------------------------------------------------------------


def test_the_decoder_that_is_opened_has_the_limits(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", moving_square(2))
    with open_video(path, MediaLimits(max_pixels=12_345), thread_count=1) as (_, stream, _):
        assert stream.codec_context.options["max_pixels"] == "12345"
        assert "h264" in stream.codec_context.options["codec_whitelist"]
    with (
        open_video(path, MediaLimits(max_pixels=1000), thread_count=1) as (container, stream, _),
        pytest.raises(av.FFmpegError),
    ):
        next(container.decode(stream))


def test_ffmpegs_log_is_left_off(tmp_path: Path) -> None:
    with open_video(write_video(tmp_path / "v.mp4", moving_square(2)), LIMITS, thread_count=1):
        assert av.logging.get_level() is None


def test_a_title_that_is_not_utf8_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "v.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Kueche"
        stream = container.add_stream("mpeg4", rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for image in moving_square(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"Kueche", b"K\xfcche "))
    assert first_frame(path).width == 64


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotation_counts_clockwise_and_turns_the_size(tmp_path: Path, rotation: int) -> None:
    frame = first_frame(write_video(tmp_path / "v.mp4", moving_square(2), rotation=rotation))
    assert clockwise_rotation(frame) == rotation
    assert displayed_size(frame) == ((48, 64) if rotation in (90, 270) else (64, 48))


@pytest.mark.parametrize(
    ("width", "height", "code"),
    [
        (16, 16, None),
        (15, 100, "dimensions_below_limit"),
        (100, 15, "dimensions_below_limit"),
        (4096, 2304, None),
        (2304, 4096, None),
        (4096, 2305, "dimensions_exceed_limit"),
        (1, 2**31, "dimensions_below_limit"),
    ],
)
def test_the_size_of_a_frame_is_held_against_the_limits(width: int, height: int, code: str | None) -> None:
    if code is None:
        check_frame_size(width, height, LIMITS)
        return
    with pytest.raises(UnusableVideo) as caught:
        check_frame_size(width, height, LIMITS)
    assert caught.value.code == code
    assert f"{width}×{height}" in caught.value.detail


@pytest.mark.parametrize(
    ("name", "codec"), [("v.mp4", "libx264"), ("v.mkv", "libx264"), ("v.avi", "mpeg4"), ("v.ts", "libx264")]
)
def test_a_stream_tells_its_length(tmp_path: Path, name: str, codec: str) -> None:
    path = write_video(tmp_path / name, moving_square(30), fps=10, codec=codec)
    with open_video(path, LIMITS, thread_count=1) as (_, stream, _):
        duration_seconds = stream_duration_seconds(stream)
        assert duration_seconds == pytest.approx(3.0, abs=0.05)
        assert frame_rate(stream) == 10
        assert claimed_frames(stream, duration_seconds) in (29, 30)


def test_a_live_recording_has_no_length(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.webm", moving_square(5), codec="libvpx", container_options={"live": "1"})
    with open_video(path, LIMITS, thread_count=1) as (_, stream, _):
        assert stream_duration_seconds(stream) is None
        assert claimed_frames(stream, None) is None
