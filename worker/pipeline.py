"""One job, from the uploaded video to its artifacts: decode → engine → write."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from service.jobs import JobRecord, JobStatus, JobWarning, ModelInfo, Outcome, Progress, Timings, utc_now
from worker.artifacts import finish, open_writer
from worker.decode import VideoReader
from worker.engine_process import EngineStream
from worker.protocol import StreamRequest

UNTRAINED = JobWarning(code="untrained_weights", detail="The network is untrained: its masks mean nothing.")
ALL_EMPTY = JobWarning(code="empty_masks", detail="Every mask is empty: no frame has any foreground.")


def run_job(
    record: JobRecord,
    video: VideoReader,
    workspace: Path,
    *,
    stream: EngineStream,
    model: ModelInfo,
    attempt: int,
    started_at: datetime,
    report: Callable[[Progress], None],
) -> Outcome:
    """Segment ``video`` and leave the artifacts asked for in ``workspace``.

    Returns:
        The outcome to publish.
    Raises:
        UnusableVideo: The video turns out to be damaged, cut or beyond the limits.
        EngineFailed: The engine died, hung or reported an error.
        OSError: An artifact cannot be written.
    """
    clock = _Clock()
    height, width = mask_size(video.height, video.width, record.options.max_side)
    request = StreamRequest(
        height=video.height,
        width=video.width,
        mask_height=height,
        mask_width=width,
        threshold=record.options.threshold,
        quality=record.options.quality,
    )
    found_any = False
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                open_writer(kind, workspace, options=record.options, model=model, fps=video.fps)
            )
            for kind in record.options.artifacts
        ]
        for done, segmented in enumerate(stream.segment(video, request), start=1):
            found_any = found_any or bool(segmented.mask.any())
            with clock:
                for writer in writers:
                    writer.add(segmented.frame, segmented.mask)
            report(_progress(done, record.input.frames, started_at))
    report(Progress(phase="publishing", frames_done=video.frames, frames_total=video.frames))
    with clock:
        artifacts = tuple(finish(writer) for writer in writers)
    return Outcome(
        status=JobStatus.SUCCEEDED,
        attempt=attempt,
        started_at=started_at,
        finished_at=utc_now(),
        workspace=workspace.name,
        frames=video.frames,
        artifacts=artifacts,
        warnings=(*_warnings(model, found_any), *video.warnings),
        timings=Timings(
            queue_s=round(max(0.0, (started_at - record.created_at).total_seconds()), 3),
            decode_s=round(stream.decode_s, 3),
            inference_s=round(stream.inference_s, 3),
            encode_s=round(clock.seconds, 3),
        ),
        model=model,
    )


def mask_size(height: int, width: int, max_side: int | None) -> tuple[int, int]:
    """Height and width of the masks: the video's, scaled down to ``max_side`` where it is larger."""
    longest = max(height, width)
    if max_side is None or longest <= max_side:
        return height, width
    return max(1, round(height * max_side / longest)), max(1, round(width * max_side / longest))


def _progress(done: int, expected: int | None, started_at: datetime) -> Progress:
    seconds = max((utc_now() - started_at).total_seconds(), 1e-3)
    return Progress(
        phase="segmenting",
        frames_done=done,
        frames_total=None if expected is None else max(done, expected),
        fps=round(done / seconds, 2),
    )


def _warnings(model: ModelInfo, found_any: bool) -> tuple[JobWarning, ...]:
    return (() if model.trained else (UNTRAINED,)) + (() if found_any else (ALL_EMPTY,))


class _Clock:
    """Adds up the seconds spent within its ``with`` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self._began
