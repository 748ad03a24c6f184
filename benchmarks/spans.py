"""What it costs to store a job in spans: ``python benchmarks/spans.py``.

Runs whole attempts at a job, from a video of 854×480 pixels to the synced artifacts, in turn with spans of
256 frames and with one span for the whole video. Engines are as fast as they get, the worst case: the
smallest network at its smallest input size, and a stand-in that takes bright pixels for foreground. A ratio
is that of the two attempts of a round. The disk is that of ``--directory``.

Equal attempts differ by more than spans cost. What tells is the last column: the share of the time that goes
into the ends of spans, which is all that an attempt with spans does more.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, Listener
from pathlib import Path

import av
import numpy as np

from model.imcnet import IMCNetConfig
from model.weights import init_weights
from service.jobs import ArtifactKind, EngineInfo, JobInput, JobOptions, JobRecord, ModelInfo, utc_now
from service.media import MediaLimits
from worker import pipeline
from worker.decode import VideoReader
from worker.engine_process import EngineProcess, EngineStream
from worker.protocol import DONE, TAKEN, EngineAnswer, EngineReady, StreamRequest, pack_mask
from worker.settings import WorkerSettings
from worker.spans import SpanStore

WIDTH, HEIGHT = 854, 480
MARGIN_FRAMES = 4
STAND_IN = ModelInfo(name="brightness", backbone="none", weights_sha256="0" * 64, trained=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--frames", type=int, default=1024)
    parser.add_argument("--span", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where the job is stored; default: as tempfile has it")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        serve_brightness(given.child)
        return
    with tempfile.TemporaryDirectory(dir=given.directory) as name:
        video = make_video(Path(name) / "video.mp4", given.frames)
        print(
            f"| engine | artifacts | one span, frames/s | spans of {given.span}, frames/s | ratio | spread "
            "| ends of spans |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for engine in given.engines:
            with ENGINES[engine](Path(name)) as (socket, pid, ready):
                for kinds in ((ArtifactKind.MASKS,), tuple(ArtifactKind)):
                    job = Job(video, given.frames, kinds, Path(name) / "job", socket, pid, ready)
                    compare(engine, job, given.span, given.rounds)


def compare(engine: str, job: "Job", span: int, rounds: int) -> None:
    job.frames_per_second(span)  # caches
    whole, spans, shares = [], [], []
    for index in range(rounds):
        for length, found in ((job.frames, whole), (span, spans))[:: 1 if index % 2 else -1]:
            with span_ends() as ends:
                found.append(job.frames_per_second(length))
            if length == span:
                shares.append(sum(ends) * found[-1] / job.frames)
    ratios = [b / a for a, b in zip(whole, spans, strict=True)]
    whole_fps, spans_fps, ratio = map(statistics.median, (whole, spans, ratios))
    print(
        f"| {engine} | {' + '.join(job.kinds)} | {whole_fps:.1f} | {spans_fps:.1f} | {ratio:.3f} "
        f"| {min(ratios):.3f} to {max(ratios):.3f} | {statistics.median(shares):.2%} |",
        flush=True,
    )


@contextmanager
def span_ends() -> Iterator[list[float]]:
    """The seconds that each end of a span takes within the block."""
    ends: list[float] = []
    finish = pipeline._Work.finish_span

    def timed(work: pipeline._Work) -> None:
        began = time.monotonic()
        finish(work)
        ends.append(time.monotonic() - began)

    pipeline._Work.finish_span = timed  # type: ignore[method-assign]
    try:
        yield ends
    finally:
        pipeline._Work.finish_span = finish  # type: ignore[method-assign]


class Job:
    """A job on one engine, to be done again and again in ``directory``."""

    def __init__(
        self,
        video: Path,
        frames: int,
        kinds: tuple[ArtifactKind, ...],
        directory: Path,
        socket: Path,
        pid: int,
        engine: EngineReady,
    ) -> None:
        self.frames = frames
        self.kinds = kinds
        self._video = video
        self._directory = directory
        self._socket = socket
        self._pid = pid
        self._engine = engine
        self._record = JobRecord(
            id="job",
            created_at=utc_now(),
            options=JobOptions(artifacts=kinds),
            input=JobInput(
                filename=video.name,
                bytes=video.stat().st_size,
                sha256="0" * 64,
                width=WIDTH,
                height=HEIGHT,
                rotation=0,
                fps=25,
                frames=frames,
                duration_s=frames / 25,
                container="mov",
                codec="h264",
            ),
        )

    def frames_per_second(self, span: int) -> float:
        workspace = self._directory / "attempt-0001"
        workspace.mkdir(parents=True)
        stream = EngineStream(
            socket_path=self._socket, engine_pid=self._pid, tick=lambda: None, stall_seconds=120
        )
        began = time.monotonic()
        with VideoReader(self._video, MediaLimits(), max_corrupt_fraction=0) as video:
            outcome = pipeline.run_job(
                self._record,
                video,
                workspace,
                SpanStore(self._directory / "spans", span),
                stream=stream,
                model=self._engine.model,
                prepared=EngineAnswer(engine=EngineInfo(name="stand-in", device="cpu"), max_pending=32),
                margin_frames=self._engine.margin_frames,
                attempt=1,
                started_at=utc_now(),
                report=lambda progress: None,
            )
        seconds = time.monotonic() - began
        if outcome.frames != self.frames:
            raise SystemExit(f"{outcome.frames} of {self.frames} frames were done")
        shutil.rmtree(self._directory)
        return self.frames / seconds


@contextmanager
def network(directory: Path) -> Iterator[tuple[Path, int, EngineReady]]:
    weights = directory / "weights.safetensors"
    init_weights(weights, IMCNetConfig(backbone="resnet18"), seed=0)
    engine = EngineProcess(WorkerSettings(weights=weights, device="auto", input_size=32))
    try:
        engine.ensure_running()
        yield engine.socket, engine.pid, engine.ready
    finally:
        engine.stop()


@contextmanager
def stand_in(directory: Path) -> Iterator[tuple[Path, int, EngineReady]]:
    socket = directory / "engine"
    ready = EngineReady(device="cpu", input_size=32, margin_frames=MARGIN_FRAMES, load_s=0, model=STAND_IN)
    with subprocess.Popen([sys.executable, __file__, "--child", str(socket)]) as process:
        try:
            while not socket.exists():
                time.sleep(0.1)
            yield socket, process.pid, ready
        finally:
            process.kill()


ENGINES = {"network": network, "stand-in": stand_in}


def serve_brightness(socket: Path) -> None:
    """The engine's side of the protocol. Masks have the frames' size."""
    with Listener(str(socket), "AF_UNIX") as listener:
        while True:
            with listener.accept() as connection:
                serve_stream(connection)


def serve_stream(connection: Connection) -> None:
    request = StreamRequest.model_validate_json(connection.recv_bytes())
    index = 0
    while message := connection.recv_bytes():
        connection.send_bytes(TAKEN)
        if index >= request.start:
            connection.send_bytes(pack_mask(request.parse_frame(message)[..., 0] > 128, 0.0))
        index += 1
    connection.send_bytes(TAKEN)
    connection.send_bytes(DONE)


def make_video(path: Path, frames: int) -> Path:
    """A bright disc that moves over a texture, which moves as well."""
    texture = np.random.default_rng(0).integers(20, 110, (HEIGHT // 8, WIDTH // 7, 3), np.uint8)
    texture = texture.repeat(8, axis=0).repeat(7, axis=1)
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for index in range(frames):
            image = np.roll(texture, index, axis=1)
            row, column = 240 + 120 * np.sin(index / 30), 427 + 250 * np.cos(index / 40)
            image[(rows - row) ** 2 + (columns - column) ** 2 < 90**2] = (230, 210, 60)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


if __name__ == "__main__":
    main()
