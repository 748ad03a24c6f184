"""One attempt at a job, from the uploaded video to its artifacts: decode → engine → spans → artifacts."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from service.durable import sync
from service.jobs import (
    Artifact,
    ArtifactKind,
    EngineInfo,
    JobRecord,
    JobStatus,
    JobWarning,
    ModelInfo,
    Outcome,
    Progress,
    Timings,
    utc_now,
)
from worker.artifacts import OverlaySegment, write_archive, write_overlay
from worker.decode import VideoReader
from worker.engine_process import EngineStream, SegmentedFrame
from worker.protocol import EngineAnswer, StreamRequest
from worker.spans import FinishedSpan, SpanDraft, SpanStore, SpanTimings, total_timings

UNTRAINED = JobWarning(code="untrained_weights", detail="The network is untrained: its masks mean nothing.")
NOT_FAST = JobWarning(
    code="fast_unavailable",
    detail="The worker has no fast engine whose masks agree with the exact ones: the job ran as `exact`.",
)
ALL_EMPTY = JobWarning(code="empty_masks", detail="Every mask is empty: no frame has any foreground.")


def run_job(
    record: JobRecord,
    video: VideoReader,
    workspace: Path,
    spans: SpanStore,
    *,
    stream: EngineStream,
    model: ModelInfo,
    prepared: EngineAnswer,
    margin_frames: int,
    attempt: int,
    started_at: datetime,
    report: Callable[[Progress], None],
) -> Outcome:
    """Segment ``video`` from the first span on that is not finished, and make the artifacts asked for.

    Args:
        workspace: The attempt's own directory. Spans and artifacts are made in it, the artifacts in
            ``workspace / "artifacts"``; what is renamed out of it is published. Should it be taken away, the
            attempt is to end.
        prepared: What the stream's engine computes the job's quality with.
        margin_frames: How many frames a window reaches to each side.

    Returns:
        The outcome to publish.
    Raises:
        UnusableVideo: The video turns out to be damaged, cut or beyond the limits.
        EngineFailed: The engine died, hung or reported an error.
        SpanDamaged: A finished span turns out to be damaged.
        FileNotFoundError: The workspace or the job was taken away.
        OSError: Something cannot be written.
    """
    finished = spans.finished(overlay=ArtifactKind.OVERLAY in record.options.artifacts)
    done_before = sum(span.frames for span in finished)
    context = min(margin_frames, done_before)
    height, width = mask_size(video.height, video.width, record.options.max_side)
    request = StreamRequest(
        job_id=record.id,
        attempt=attempt,
        height=video.height,
        width=video.width,
        mask_height=height,
        mask_width=width,
        threshold=record.options.threshold,
        quality=prepared.instead or record.options.quality,
        start=context,
        span_frames=spans.length,
        max_pending=prepared.max_pending,
    )
    with (
        # Closed before the video is, in any case: a thread of the stream's decodes it.
        closing(stream.segment(video.frames_from(done_before - context), request)) as segmented,
        _Work(record, video, workspace, spans, stream, finished) as work,
    ):
        for count, each in enumerate(segmented, start=1):
            work.add(each)
            report(_progress(done_before + count, record.input.frames, count, started_at))
        work.finish_span()
    report(Progress(phase="publishing", frames_done=video.frames, frames_total=video.frames))
    began = time.monotonic()
    artifacts = _make_artifacts(
        record, finished, workspace / "artifacts", model=model, engine=prepared.engine, fps=video.fps
    )
    spent = total_timings(finished)
    return Outcome(
        status=JobStatus.SUCCEEDED,
        attempt=attempt,
        started_at=started_at,
        finished_at=utc_now(),
        frames=video.frames,
        artifacts=artifacts,
        warnings=(*_warnings(model, prepared, finished), *video.warnings),
        timings=Timings(
            queue_s=round(max(0.0, (started_at - record.created_at).total_seconds()), 3),
            decode_s=round(spent.decode_s, 3),
            inference_s=round(spent.inference_s, 3),
            encode_s=round(spent.encode_s + time.monotonic() - began, 3),
        ),
        model=model,
        engine=prepared.engine,
    )


class _Work:
    """Cuts the stream of segmented frames into spans, and appends them to ``finished``. A context manager."""

    def __init__(
        self,
        record: JobRecord,
        video: VideoReader,
        workspace: Path,
        spans: SpanStore,
        stream: EngineStream,
        finished: list[FinishedSpan],
    ) -> None:
        self._wants_overlay = ArtifactKind.OVERLAY in record.options.artifacts
        self._video = video
        self._workspace = workspace
        self._spans = spans
        self._stream = stream
        self._finished = finished
        self._draft: SpanDraft | None = None
        self._open = ExitStack()
        self._encode_s = self._decoded_s = self._inferred_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def add(self, segmented: SegmentedFrame) -> None:
        began = time.monotonic()
        if self._draft is None:
            self._draft = self._open.enter_context(self._new_draft())
        self._draft.add(segmented.frame, segmented.mask)
        self._encode_s += time.monotonic() - began
        if self._draft.frames == self._spans.length:
            self.finish_span()

    def finish_span(self) -> None:
        """Finish the span that is in the making, if any."""
        if self._draft is None:
            return
        began = time.monotonic()
        self._open.close()
        self._draft.complete(self._timings())
        self._finished.append(self._spans.publish(self._draft.directory, len(self._finished)))
        self._draft = None
        self._encode_s = time.monotonic() - began  # for the next span's account: this one's is written

    def _new_draft(self) -> SpanDraft:
        directory = self._workspace / f"span-{len(self._finished):06d}"
        overlay = None
        if self._wants_overlay:
            before = self._finished[-1].record.overlay if self._finished else None
            overlay = OverlaySegment(
                directory / "overlay.nut", fps=self._video.fps, last_pts=before.last_pts if before else -1
            )
        return SpanDraft(directory, overlay)

    def _timings(self) -> SpanTimings:
        decode_s, inference_s = self._stream.decode_s, self._stream.inference_s
        timings = SpanTimings(
            decode_s=decode_s - self._decoded_s,
            inference_s=inference_s - self._inferred_s,
            encode_s=self._encode_s,
        )
        self._decoded_s, self._inferred_s = decode_s, inference_s
        return timings


def _make_artifacts(
    record: JobRecord,
    spans: list[FinishedSpan],
    directory: Path,
    *,
    model: ModelInfo,
    engine: EngineInfo,
    fps: float | None,
) -> tuple[Artifact, ...]:
    directory.mkdir()
    made = []
    for kind in record.options.artifacts:
        match kind:
            case ArtifactKind.MASKS:
                size = (spans[0].record.height, spans[0].record.width) if spans else None
                path = directory / "masks.zip"
                made.append(
                    write_archive(
                        path,
                        _masks(spans),
                        size=size,
                        options=record.options,
                        model=model,
                        engine=engine,
                        fps=fps,
                    )
                )
            case ArtifactKind.OVERLAY:
                made.append(write_overlay(directory / "overlay.mp4", [span.overlay() for span in spans]))
    sync(directory)
    return tuple(made)


def _masks(spans: list[FinishedSpan]) -> Iterator[tuple[int | None, float | None, bytes]]:
    return ((entry.pts, entry.time_s, data) for span in spans for entry, data in span.masks())


def mask_size(height: int, width: int, max_side: int | None) -> tuple[int, int]:
    """Height and width of the masks: the video's, scaled down to ``max_side`` where it is larger."""
    longest = max(height, width)
    if max_side is None or longest <= max_side:
        return height, width
    return max(1, round(height * max_side / longest)), max(1, round(width * max_side / longest))


def _progress(done: int, expected: int | None, done_now: int, started_at: datetime) -> Progress:
    seconds = max((utc_now() - started_at).total_seconds(), 1e-3)
    return Progress(
        phase="segmenting",
        frames_done=done,
        frames_total=None if expected is None else max(done, expected),
        fps=round(done_now / seconds, 2),
    )


def _warnings(model: ModelInfo, prepared: EngineAnswer, spans: list[FinishedSpan]) -> tuple[JobWarning, ...]:
    found_any = any(span.record.any_foreground for span in spans)
    holds = {UNTRAINED: not model.trained, NOT_FAST: prepared.instead is not None, ALL_EMPTY: not found_any}
    return tuple(warning for warning, does in holds.items() if does)
