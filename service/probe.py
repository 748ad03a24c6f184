"""Look into an uploaded file: in a child process, so that a hostile one costs neither the API nor the worker.

The child limits its own memory, processor time and open files before it touches the file, decodes one frame
and writes one line of JSON. Whatever else it does, dying included, counts as ``resource_limit``.
"""

import asyncio
import json
import logging
import resource
import sys
from dataclasses import asdict
from pathlib import Path

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from pydantic import BaseModel

from service.errors import UnusableVideo
from service.jobs import VideoInfo
from service.media import (
    MediaLimits,
    OpenVideo,
    check_frame_size,
    claimed_frames,
    clockwise_rotation,
    displayed_size,
    frame_rate,
    no_frame,
    open_video,
    out_of_memory,
    stream_duration_seconds,
)
from service.processes import limit_resources

logger = logging.getLogger(__name__)

CPU_SECONDS = 20
OPEN_FILES = 32
_MAX_REPLY_BYTES = 64 * 1024


class _Reply(BaseModel):
    """What the child says: the video, or the code and the sentence of why it is unusable."""

    video: VideoInfo | None = None
    code: str = ""
    detail: str = ""


async def probe_video(
    path: Path, *, limits: MediaLimits, timeout_seconds: float, memory_bytes: int
) -> VideoInfo:
    """Find out what kind of video a file holds; at least one of its frames has been decoded.

    Args:
        timeout_seconds: Wall clock, after which the child is killed.
        memory_bytes: Address space of the child.
    Raises:
        UnusableVideo: The file is none that the service takes, or reading it exceeds the child's limits.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-s", "-m", __name__, str(path.absolute())),
        *(json.dumps(asdict(limits)), str(memory_bytes)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        # None of our own environment: it may hold passwords, and the child reads hostile files.
        env={"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "LC_ALL": "C.UTF-8"},
    )
    try:
        async with asyncio.timeout(timeout_seconds):
            reply = await _output_of(process)
    except TimeoutError as error:
        raise UnusableVideo("Reading the file takes too long.", code="resource_limit") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()  # wait() alone does not return while a pipe is full
    if not reply.endswith(b"\n"):
        logger.warning("The probe of an upload ended with status %s and gave no reply", process.returncode)
        raise UnusableVideo("Reading the file takes more than it is allowed.", code="resource_limit")
    said = _Reply.model_validate_json(reply)
    if said.video is None:
        raise UnusableVideo(said.detail, code=said.code)
    return said.video


async def _output_of(process: asyncio.subprocess.Process) -> bytes:
    """Wait for the child's end. Returns: What it wrote, of which no more is kept than a reply can have."""
    assert process.stdout is not None
    output = b""
    while chunk := await process.stdout.read(_MAX_REPLY_BYTES):
        output = (output + chunk)[:_MAX_REPLY_BYTES]
    await process.wait()
    return output


# -- the child -------------------------------------------------------------------------------------------


def describe_video(path: Path, limits: MediaLimits) -> VideoInfo:
    """Open a file and decode its first frame, here and now.

    Raises:
        UnusableVideo: The file is none that the service takes.
    """
    with open_video(path, limits, thread_count=1) as video:
        container, stream, _ = video
        duration_seconds = _check_claims(video, limits)
        frame = _first_frame(video, limits)
        width, height = displayed_size(frame)
        check_frame_size(width, height, limits)
        return VideoInfo(
            width=width,
            height=height,
            rotation=clockwise_rotation(frame),
            fps=frame_rate(stream),
            frames=claimed_frames(stream, duration_seconds),
            duration_s=duration_seconds,
            container=container.format.name,
            codec=stream.codec.canonical_name,
        )


def _check_claims(video: OpenVideo, limits: MediaLimits) -> float | None:
    """Hold what the container claims against the limits.

    Returns:
        The duration in seconds: the video's own if it is known, else the file's.
    """
    if video.stream.frames > limits.max_frames:
        raise UnusableVideo(
            f"The video has {video.stream.frames} frames; at most {limits.max_frames} are allowed.",
            code="too_many_frames",
        )
    duration_seconds = stream_duration_seconds(video.stream)
    whole_seconds = _container_duration_seconds(video.container)
    longest = max(duration_seconds or 0.0, whole_seconds or 0.0)
    if longest > limits.max_duration_seconds:
        raise UnusableVideo(
            f"The video lasts {longest:.1f} s; at most {limits.max_duration_seconds:g} s are allowed.",
            code="duration_exceeds_limit",
        )
    return whole_seconds if duration_seconds is None else duration_seconds


def _container_duration_seconds(container: InputContainer) -> float | None:
    return None if container.duration is None else container.duration / av.time_base


def _first_frame(video: OpenVideo, limits: MediaLimits) -> VideoFrame:
    try:
        for packet in video.container.demux(video.stream):
            try:
                frames = packet.decode()
            except MemoryError as error:
                raise out_of_memory() from error
            except av.FFmpegError:
                continue  # damaged, or in need of a key frame that is still to come
            if frames:
                return frames[0]
    except av.FFmpegError as error:  # the container breaks off
        raise no_frame(video, limits) from error
    raise no_frame(video, limits)


def main(path: str, limits: str, memory_bytes: str) -> None:
    """The child: describe the file in one line of JSON."""
    limit_resources(
        {
            resource.RLIMIT_AS: int(memory_bytes),
            resource.RLIMIT_CPU: CPU_SECONDS,
            resource.RLIMIT_NOFILE: OPEN_FILES,
            resource.RLIMIT_CORE: 0,
        }
    )
    try:
        reply = _Reply(video=describe_video(Path(path), MediaLimits(**json.loads(limits))))
    except UnusableVideo as error:
        reply = _Reply(code=error.code, detail=error.detail)
    except MemoryError:
        refusal = out_of_memory()
        reply = _Reply(code=refusal.code, detail=refusal.detail)
    sys.stdout.write(reply.model_dump_json() + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
