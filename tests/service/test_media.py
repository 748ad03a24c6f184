import zipfile
from collections.abc import Callable
from pathlib import Path

import av
import av.logging
import numpy as np
import pytest
from av.audio.stream import AudioStream
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image

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
from tests.videos import moving_square, write_video

LIMITS = MediaLimits()


def refusal(path: Path, limits: MediaLimits = LIMITS) -> UnusableVideo:
    with pytest.raises(UnusableVideo) as caught, open_video(path, limits, thread_count=1):
        pass
    assert str(path.parent) not in caught.value.detail
    return caught.value


def first_frame(path: Path) -> av.VideoFrame:
    with open_video(path, LIMITS, thread_count=1) as (container, stream):
        return next(container.decode(stream))


# -- what is refused, and as what ------------------------------------------------------------------------


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "b" * 5000)


def _mp4_without_index(path: Path) -> None:
    data = write_video(path.with_suffix(".mp4"), moving_square(5)).read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 4])


def _video(name: str, codec: str, pix_fmt: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_video(path.with_name(name), moving_square(5), codec=codec, pix_fmt=pix_fmt).rename(path)

    return write


def _silence(sample_format: str) -> av.AudioFrame:
    frame = av.AudioFrame(format=sample_format, layout="stereo", samples=1024)
    frame.sample_rate = 44_100
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    return frame


def _sound(name: str, codec: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with av.open(str(path.with_name(name)), "w") as container:
            stream = container.add_stream(codec, rate=44_100)
            assert isinstance(stream, AudioStream)
            container.mux(stream.encode(_silence(stream.format.name)))
            container.mux(stream.encode(None))
        path.with_name(name).rename(path)

    return write


def _still(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        Image.new("RGB", (64, 48)).save(path.with_name(name))
        path.with_name(name).rename(path)

    return write


REFUSED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "nothing": ("empty_file", Path.touch),
    "one byte": ("not_a_video", lambda path: path.write_bytes(b"x")),
    "zeros": ("not_a_video", lambda path: path.write_bytes(bytes(100_000))),
    "random": ("not_a_video", lambda path: path.write_bytes(np.random.default_rng(0).bytes(100_000))),
    "text": ("not_a_video", lambda path: path.write_text("hello world\n" * 1000)),
    "html": ("not_a_video", lambda path: path.write_text("<!doctype html><html><body>hello</body></html>")),
    "zip": ("not_a_video", _zip),
    "mp4 without an index": ("not_a_video", _mp4_without_index),
    "png": ("unsupported_container", _still("a.png")),
    "jpeg": ("unsupported_container", _still("a.jpg")),
    "gif": ("unsupported_container", _video("a.gif", "gif", "rgb8")),
    "raw h264": ("unsupported_container", _video("a.h264", "libx264", "yuv420p")),
    "mp3": ("unsupported_container", _sound("a.mp3", "libmp3lame")),
    "ffv1": ("unsupported_codec", _video("a.mkv", "ffv1", "yuv420p")),
    "qtrle": ("unsupported_codec", _video("a.mov", "qtrle", "rgb24")),
    "png in mov": ("unsupported_codec", _video("a.mov", "png", "rgb24")),
    "sound alone": ("no_video_stream", _sound("a.m4a", "aac")),
}


@pytest.mark.parametrize(("code", "write"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_video_of_ours_is_refused(
    tmp_path: Path, code: str, write: Callable[[Path], object]
) -> None:
    path = tmp_path / "upload"
    write(path)
    assert refusal(path).code == code
    assert refusal(path).code == code  # FFmpeg's log, which some codes come from, leaves repetitions out


@pytest.mark.parametrize(
    "content",
    [
        "ffconcat version 1.0\nfile neighbour.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nneighbour.mp4\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
    ],
    ids=["ffconcat", "HLS", "SDP"],
)
@pytest.mark.parametrize("name", ["upload", "upload.mp4", "upload.m3u8"])
def test_a_file_that_points_elsewhere_is_refused(tmp_path: Path, name: str, content: str) -> None:
    write_video(tmp_path / "neighbour.mp4", moving_square(5))
    path = tmp_path / name
    path.write_text(content)
    assert refusal(path).code in ("unsupported_container", "not_a_video")


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
    with open_video(path, MediaLimits(max_streams=5), thread_count=1) as (opened, _):
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
    with open_video(path, MediaLimits(max_pixels=12_345), thread_count=1) as (_, stream):
        assert stream.codec_context.options["max_pixels"] == "12345"
        assert "h264" in stream.codec_context.options["codec_whitelist"]
    with (
        open_video(path, MediaLimits(max_pixels=1000), thread_count=1) as (container, stream),
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


def test_cover_art_is_not_the_video(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=25)
        assert isinstance(cover, VideoStream)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        sound = container.add_stream("aac", rate=44_100)
        assert isinstance(sound, AudioStream)
        container.mux(cover.encode(av.VideoFrame(32, 32, "yuvj420p")))
        container.mux(cover.encode(None))
        container.mux(sound.encode(_silence("fltp")))
        container.mux(sound.encode(None))
    assert refusal(path).code == "no_video_stream"


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
    with open_video(path, LIMITS, thread_count=1) as (_, stream):
        duration_seconds = stream_duration_seconds(stream)
        assert duration_seconds == pytest.approx(3.0, abs=0.05)
        assert frame_rate(stream) == 10
        assert claimed_frames(stream, duration_seconds) in (29, 30)


def test_a_live_recording_has_no_length(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.webm", moving_square(5), codec="libvpx", container_options={"live": "1"})
    with open_video(path, LIMITS, thread_count=1) as (_, stream):
        assert stream_duration_seconds(stream) is None
        assert claimed_frames(stream, None) is None
