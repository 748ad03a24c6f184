"""A real engine, from the side of the worker and the horse."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Client
from pathlib import Path

import numpy as np
import psutil
import pytest

from model.imcnet import IMCNetConfig
from model.segmenter import Segmenter
from model.weights import init_weights
from service.errors import EngineFailed, Misconfigured
from service.jobs import EngineInfo, Quality
from tests.waiting import wait_until, wait_until_gone
from worker.decode import VideoFrame
from worker.engine_process import EngineProcess, EngineStream
from worker.protocol import TAKEN, EngineAnswer, StreamRequest
from worker.settings import WorkerSettings

pytestmark = pytest.mark.processes

REQUEST = StreamRequest(
    job_id="job",
    attempt=1,
    height=40,
    width=56,
    mask_height=40,
    mask_width=56,
    threshold=0.5,
    quality="exact",
    start=0,
    span_frames=256,
    max_pending=13,
)


LARGE_MASKS = REQUEST.model_copy(update={"mask_height": 12000, "mask_width": 12000})


def starved(engine: EngineProcess) -> psutil.Process:
    """The engine's process, which gets hardly more memory than it has: enough for threads, not for masks."""
    process = psutil.Process(engine.pid)
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + 256 * 2**20, -1))
    return process


def settings(weights: Path | None, **others: object) -> WorkerSettings:
    return WorkerSettings.model_validate(
        {"weights": weights, "device": "cpu", "input_size": 64, "cpu_threads": 1, **others}
    )


@pytest.fixture(scope="module")
def shared_engine(untrained_weights: Path) -> Iterator[EngineProcess]:
    engine = EngineProcess(settings(untrained_weights))
    yield engine
    engine.stop()


@pytest.fixture
def engine(shared_engine: EngineProcess) -> EngineProcess:
    shared_engine.ensure_running()
    return shared_engine


def stream(engine: EngineProcess, *, stall_seconds: float = 60, tick: object = None) -> EngineStream:
    return EngineStream(
        socket_path=engine.socket,
        engine_pid=engine.pid,
        tick=tick if callable(tick) else lambda: None,
        stall_seconds=stall_seconds,
    )


def frames(count: int, *, height: int = 40, width: int = 56) -> Iterator[VideoFrame]:
    random = np.random.default_rng(0)
    for index in range(count):
        yield VideoFrame(random.integers(0, 256, (height, width, 3), np.uint8), index, index / 25)


@pytest.mark.parametrize("quality", ["exact", "multi_scale"])
def test_the_engines_masks_are_the_segmenters(
    engine: EngineProcess, untrained_weights: Path, quality: Quality
) -> None:
    import torch

    # Where an untrained network is undecided: a mask that is all foreground would prove little.
    threshold = 0.5112
    request = REQUEST.model_copy(update={"threshold": threshold, "quality": quality})
    segmented = list(stream(engine).segment(frames(9), request))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        segmenter = Segmenter.load(untrained_weights, device="cpu", input_size=64)
        images = (frame.image for frame in frames(9))
        masks = list(segmenter.segment(images, threshold=threshold, quality=quality))
    finally:
        torch.set_num_threads(threads)
    assert [s.frame.pts for s in segmented] == list(range(9))
    assert all(np.array_equal(s.mask, mask) for s, mask in zip(segmented, masks, strict=True))
    assert 0.05 < np.mean(masks) < 0.95


def test_it_says_what_computes_a_quality(engine: EngineProcess) -> None:
    qualities: list[Quality] = ["exact", "multi_scale"]
    for quality in qualities:
        assert stream(engine).prepare(quality, timeout_seconds=300) == EngineAnswer(
            engine=EngineInfo(name="torch-float32", device="cpu", quality=quality),
            max_pending=REQUEST.max_pending,
        )


def test_masks_that_cannot_be_compared_open_no_gate(engine: EngineProcess) -> None:
    """An untrained network sees objects nowhere, or everywhere."""
    pytest.importorskip("openvino", reason="needs imcnet[cpu]")
    answer = stream(engine).prepare("fast", timeout_seconds=300)
    assert (answer.engine.name, answer.engine.quality, answer.instead) == ("torch-float32", "exact", "exact")
    assert len(list(stream(engine).segment(frames(3), REQUEST))) == 3


def test_openvinos_masks_pass_with_the_weights_that_ship(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs imcnet[cpu]")
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no bfloat16")
    options = {"input_size": None, "cpu_threads": 0, "graphs": tmp_path, "exact_backend": "openvino"}
    engine = EngineProcess(settings(None, **options))
    try:
        engine.ensure_running()
        names = [
            stream(engine).prepare(quality, timeout_seconds=300).engine.name
            for quality in ("exact", "fast", "multi_scale")
        ]
        request = REQUEST.model_copy(update={"quality": "fast"})
        assert len(list(stream(engine).segment(frames(3), request))) == 3
    finally:
        engine.stop()
    assert names == ["openvino-float32", "openvino-bfloat16", "torch-float32"]


def test_an_engine_that_dies_while_it_is_asked_is_an_engine_that_failed(engine: EngineProcess) -> None:
    psutil.Process(engine.pid).suspend()
    with pytest.raises(EngineFailed, match="did nothing for 1 s"):
        stream(engine).prepare("exact", timeout_seconds=1)
    wait_until_gone([psutil.Process(engine.pid)] if psutil.pid_exists(engine.pid) else [])


def test_frames_of_context_get_no_mask_and_change_none_of_the_others(engine: EngineProcess) -> None:
    request = REQUEST.model_copy(update={"threshold": 0.5112})
    whole = list(stream(engine).segment(frames(20), request))
    margin = engine.ready.margin_frames
    assert margin == 4
    part = [frame for frame in frames(20) if frame.pts is not None and frame.pts >= 10 - margin]
    rest = list(stream(engine).segment(part, request.model_copy(update={"start": margin})))
    assert [s.frame.pts for s in rest] == list(range(10, 20))
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(whole[10:], rest, strict=True))


def test_a_stopped_engine_gives_no_sign_of_life_and_can_be_replaced(engine: EngineProcess) -> None:
    assert engine.is_idle(timeout_seconds=10)
    pid = engine.pid
    os.kill(pid, signal.SIGSTOP)
    assert not engine.is_idle(timeout_seconds=0.5)
    engine.replace()
    assert engine.pid != pid
    assert engine.is_idle(timeout_seconds=10)
    assert not psutil.pid_exists(pid)


def test_an_engine_at_work_is_not_idle_until_its_stream_is_dropped(engine: EngineProcess) -> None:
    segmented = stream(engine).segment(frames(5000), REQUEST)
    next(segmented)
    assert not engine.is_idle(timeout_seconds=0.5)
    segmented.close()
    assert engine.is_idle(timeout_seconds=10)


def test_running_out_of_memory_is_told_and_ends_the_engine(untrained_weights: Path) -> None:
    engine = EngineProcess(settings(untrained_weights))
    try:
        engine.ensure_running()
        process = starved(engine)
        with pytest.raises(EngineFailed, match="ran out of memory"):
            list(stream(engine).segment(frames(9), LARGE_MASKS))
        assert not psutil.pid_exists(process.pid) or process.status() == psutil.STATUS_ZOMBIE
        engine.ensure_running()
        assert len(list(stream(engine).segment(frames(2), REQUEST))) == 2
    finally:
        engine.stop()


def test_an_engine_that_failed_ends_even_if_nobody_is_there_to_hear_it(untrained_weights: Path) -> None:
    engine = EngineProcess(settings(untrained_weights))
    try:
        engine.ensure_running()
        process = starved(engine)
        # Its memory may run out on any of these frames: on the last at the latest.
        with Client(str(engine.socket), "AF_UNIX") as connection, suppress(EOFError, ConnectionError):
            connection.send_bytes(LARGE_MASKS.model_dump_json().encode())
            for frame in frames(engine.ready.margin_frames + 1):
                connection.send_bytes(frame.image.tobytes())
                if connection.recv_bytes() != TAKEN:
                    break
        wait_until_gone([process])
    finally:
        engine.stop()


def test_an_engine_serves_stream_after_stream(engine: EngineProcess) -> None:
    pid = engine.pid
    for _ in range(3):
        assert len(list(stream(engine).segment(frames(2), REQUEST))) == 2
        engine.ensure_running()
    assert engine.pid == pid


def test_a_stream_that_is_given_up_leaves_the_engine_warm(engine: EngineProcess) -> None:
    pid = engine.pid

    def stop_at_once() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(stream(engine, tick=stop_at_once).segment(frames(500), REQUEST))
    assert len(list(stream(engine).segment(frames(2), REQUEST))) == 2
    assert engine.pid == pid


def test_a_stream_that_is_given_up_while_frames_are_skipped_does_not_wait_for_the_first(
    engine: EngineProcess,
) -> None:
    """Up to the point where a job goes on there may be hours of video."""
    began = time.monotonic()

    def a_minute() -> Iterator[VideoFrame | None]:
        while time.monotonic() < began + 60:
            time.sleep(0.01)
            yield None

    def stop_after_a_second() -> None:
        if time.monotonic() > began + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(stream(engine, tick=stop_after_a_second).segment(a_minute(), REQUEST))
    assert time.monotonic() < began + 20
    assert engine.is_idle(timeout_seconds=10)


def test_frames_that_are_skipped_are_not_sent(engine: EngineProcess) -> None:
    mixed = (frame for wanted in frames(3) for frame in (None, wanted, None))
    assert [each.frame.pts for each in stream(engine).segment(mixed, REQUEST)] == [0, 1, 2]


def test_an_error_while_decoding_reaches_the_caller(engine: EngineProcess) -> None:
    def broken() -> Iterator[VideoFrame]:
        yield from frames(2)
        raise LookupError("the third frame is missing")

    with pytest.raises(LookupError, match="third"):
        list(stream(engine).segment(broken(), REQUEST))
    assert len(list(stream(engine).segment(frames(2), REQUEST))) == 2


def test_no_frames_give_no_masks(engine: EngineProcess) -> None:
    assert list(stream(engine).segment(iter(()), REQUEST)) == []


def test_a_killed_engine_fails_its_stream_and_is_replaced(engine: EngineProcess) -> None:
    pid = engine.pid
    segmented = stream(engine).segment(frames(500), REQUEST)
    next(segmented)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineFailed):
        list(segmented)
    engine.ensure_running()
    assert engine.pid != pid
    assert len(list(stream(engine).segment(frames(2), REQUEST))) == 2


def test_a_hanging_engine_is_killed(engine: EngineProcess) -> None:
    segmented = stream(engine, stall_seconds=1).segment(frames(500), REQUEST)
    next(segmented)
    os.kill(engine.pid, signal.SIGSTOP)
    with pytest.raises(EngineFailed, match="did nothing for 1 s"):
        list(segmented)
    pid = engine.pid
    engine.ensure_running()
    assert engine.pid != pid


def test_a_slow_decoder_is_not_taken_for_a_hanging_engine(engine: EngineProcess) -> None:
    def slow() -> Iterator[VideoFrame]:
        for frame in frames(2):
            time.sleep(2)
            yield frame

    assert len(list(stream(engine, stall_seconds=1).segment(slow(), REQUEST))) == 2


def test_an_engine_is_not_hanging_while_it_takes_frames(tmp_path: Path) -> None:
    weights = tmp_path / "long-window.safetensors"
    init_weights(weights, IMCNetConfig("resnet18", frame_stride=30), seed=0)
    engine = EngineProcess(settings(weights, input_size=32))
    engine.ensure_running()
    small = {"height": 16, "width": 16, "quality": "multi_scale"}
    request = REQUEST.model_copy(update={**small, "max_pending": 31})

    def seconds_to_the_first_mask(stall_seconds: float) -> float:
        # So small that the socket takes them all at once: only the engine knows how far it is.
        tiny = frames(31, height=16, width=16)
        masks = stream(engine, stall_seconds=stall_seconds).segment(tiny, request)
        began = time.monotonic()
        next(masks)
        masks.close()
        return time.monotonic() - began

    try:
        patient = seconds_to_the_first_mask(stall_seconds=60)
        assert seconds_to_the_first_mask(stall_seconds=patient / 3) > patient / 3
    finally:
        engine.stop()


def test_frames_of_another_size_than_announced_end_the_engine(engine: EngineProcess) -> None:
    wrong = REQUEST.model_copy(update={"height": 41})
    with pytest.raises(EngineFailed):
        list(stream(engine).segment(frames(3), wrong))
    pid = engine.pid
    engine.ensure_running()
    assert engine.pid != pid


@pytest.mark.parametrize("side", [40, 4000])
def test_a_slow_reader_holds_the_decoder_back(engine: EngineProcess, side: int) -> None:
    """Small masks would wait in the sockets by the hundred, and as many frames in memory."""
    decoded = 0

    def counted() -> Iterator[VideoFrame]:
        nonlocal decoded
        for frame in frames(2000):
            decoded += 1
            yield frame

    request = REQUEST.model_copy(update={"mask_height": side, "mask_width": side})
    segmented = stream(engine).segment(counted(), request)
    next(segmented)
    time.sleep(2)  # nobody takes masks meanwhile
    assert decoded <= 1 + REQUEST.max_pending + 1  # done, waiting, and the one that would be the next
    segmented.close()


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({"weights_sha256": "0" * 64}, "sha256|hash|SHA-256"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"weights": "/nowhere.safetensors"}, "nowhere"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    untrained_weights: Path, others: dict[str, object], reason: str
) -> None:
    engine = EngineProcess(settings(untrained_weights).model_copy(update=_paths(others)))
    try:
        with pytest.raises(Misconfigured, match=reason) as refusal:
            engine.ensure_running()
    finally:
        engine.stop()
    assert "\n" not in refusal.value.detail


def test_without_weights_of_its_own_it_runs_those_that_ship(untrained_weights: Path) -> None:
    engine = EngineProcess(settings(untrained_weights).model_copy(update={"weights": None}))
    try:
        engine.ensure_running()
        assert engine.ready.model.trained
    finally:
        engine.stop()


def test_a_stopped_engine_leaves_no_process_and_no_directory(untrained_weights: Path) -> None:
    engine = EngineProcess(settings(untrained_weights))
    engine.ensure_running()
    process, directory = psutil.Process(engine.pid), engine.socket.parent
    engine.stop()
    wait_until(lambda: not process.is_running(), timeout_seconds=10)
    assert not directory.exists()


def _paths(others: dict[str, object]) -> dict[str, object]:
    return {k: Path(v) if k == "weights" and isinstance(v, str) else v for k, v in others.items()}
