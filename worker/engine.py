"""The engine: a process that holds the warm model on one device and serves streams of frames, one at a time.

Started by ``worker.engine_process`` with its configuration as its one argument. It says on standard output
whether it is ready, and ends with its parent. After an error within the network it ends too: a new process is
the only sure way to a clean device.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import TextIO

import numpy as np
import structlog
import torch
from pydantic import TypeAdapter

from model.engines import add_fast_engine, graphs_beside, trying_out, use_openvino
from model.errors import ModelError
from model.segmenter import Segmenter
from model.shipped import SHIPPED_WEIGHTS
from model.stages import Stopwatch, WriteBehind, read_ahead
from model.weights import file_sha256, load_weights
from service.jobs import EngineInfo, ModelInfo, Quality
from service.logs import configure_logging
from service.processes import die_with_parent
from service.settings import SharedSettings
from worker.protocol import (
    DONE,
    FAILURE,
    OUT_OF_MEMORY,
    PING,
    TAKEN,
    EngineAnswer,
    EngineConfig,
    EngineQuestion,
    EngineReady,
    EngineRefused,
    Frame,
    Mask,
    StreamRequest,
    pack_mask,
)

logger = logging.getLogger("worker.engine")  # run as a module, its own name is another

# What a bare RuntimeError says: of PyTorch's allocator for the CPU, of CUDA outside of PyTorch's, of Python.
_OUT_OF_MEMORY_SIGNS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "can't start new thread",  # for want of a stack
)
_FRAMES_AHEAD = _MASKS_BEHIND = 4  # what waits before and behind the network
_REQUEST: TypeAdapter[EngineQuestion | StreamRequest] = TypeAdapter(EngineQuestion | StreamRequest)
_BACKLOG = 16  # connections that wait while a stream is served: the next one, and signs of life


def main(argument: str) -> int:
    # Only the greeting goes to the worker; whatever else is printed in this process belongs to the log.
    greeting = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    config = EngineConfig.model_validate_json(argument)
    die_with_parent(config.parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the worker decides
    started = time.monotonic()
    try:
        served = _load(config)
    except (ModelError, ValueError, OSError) as error:
        _tell(greeting, EngineRefused(reason=str(error)))
        return 2
    segmenter = served.segmenter
    _warm_up(segmenter, "exact")
    with Listener(str(config.socket), "AF_UNIX", _BACKLOG) as listener:
        ready = EngineReady(
            device=str(segmenter.device),
            input_size=segmenter.input_size,
            margin_frames=segmenter.layout.margin,
            load_s=time.monotonic() - started,
            model=served.model,
        )
        _tell(greeting, ready)
        while True:
            with listener.accept() as connection:
                _serve(connection, served)


@dataclass(kw_only=True)
class _Served:
    """What the engine offers. ``no_fast`` says why there is no engine for quality ``fast``."""

    segmenter: Segmenter
    model: ModelInfo
    weights: Path
    graphs: Path
    no_fast: str | None = None

    def prepare(self, quality: Quality) -> EngineAnswer:
        """Get ready what computes a quality: that of ``fast`` when it is first asked for."""
        if quality == "fast" and "fast" not in self.segmenter.engines and self.no_fast is None:
            self._add_fast()
        instead: Quality | None = None if quality in self.segmenter.engines else "exact"
        runs = instead or quality
        engine = self.segmenter.engines[runs]
        return EngineAnswer(
            engine=EngineInfo(name=engine.name, device=engine.device.type, quality=runs),
            instead=instead,
            max_pending=self.segmenter.reads_ahead(runs) + _FRAMES_AHEAD + _MASKS_BEHIND,
        )

    def _add_fast(self) -> None:
        try:
            # From the file again: engines copy what they need of a network, and none is kept besides.
            network, _ = load_weights(self.weights, sha256=self.model.weights_sha256)
            add_fast_engine(self.segmenter, network, graphs=self.graphs)
            with trying_out():
                _warm_up(self.segmenter, "fast")
        except ModelError as error:
            self.segmenter.engines.pop("fast", None)
            self.no_fast = str(error)
            logger.warning("Jobs of quality `fast` are computed as `exact`: %s", error)


def _load(config: EngineConfig) -> _Served:
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    weights = config.weights or SHIPPED_WEIGHTS
    network, info = load_weights(weights, sha256=config.weights_sha256)
    segmenter = Segmenter(network, device=config.device, input_size=config.input_size or info.input_size)
    model = ModelInfo(
        name=info.name,
        backbone=info.config.backbone,
        weights_sha256=file_sha256(weights),
        trained=info.trained,
    )
    graphs = config.graphs or graphs_beside(weights)
    if config.exact_backend == "openvino":
        use_openvino(segmenter, network, graphs=graphs)
    return _Served(segmenter=segmenter, model=model, weights=weights, graphs=graphs)


def _warm_up(segmenter: Segmenter, quality: Quality) -> None:
    """Have kernels chosen and memory taken before the first job."""
    blank = np.zeros((segmenter.input_size, segmenter.input_size, 3), np.uint8)
    for _ in segmenter.segment([blank], quality=quality):
        pass


def _tell(greeting: TextIO, message: EngineReady | EngineRefused) -> None:
    """Say the one line that the worker waits for."""
    with greeting:
        greeting.write(message.model_dump_json() + "\n")


def _serve(connection: Connection, served: _Served) -> None:
    """Serve one stream, answer a question, or give a sign of life."""
    try:
        message = connection.recv_bytes()
        if message == PING:
            connection.send_bytes(PING)
            return
        request = _REQUEST.validate_json(message)
        if isinstance(request, EngineQuestion):
            connection.send_bytes(served.prepare(request.prepare).model_dump_json().encode())
            return
        with structlog.contextvars.bound_contextvars(job=request.job_id, attempt=request.attempt):
            _answer(connection, served.segmenter, request)
    except (EOFError, ConnectionError):  # before it said what it wants
        return


def _answer(connection: Connection, segmenter: Segmenter, request: StreamRequest) -> None:
    """Raises: Exception: The network failed. A horse that hangs up is none: its job is over, or it died."""
    try:
        _segment(connection, segmenter, request)
    except (EOFError, ConnectionError):
        logger.info("The stream was dropped")
    except Exception as error:
        logger.exception("The stream failed")
        kind = OUT_OF_MEMORY if _is_out_of_memory(error) else FAILURE
        with suppress(ConnectionError):  # the engine ends, whether there is somebody to tell or not
            connection.send_bytes(kind + f"{type(error).__name__}: {error}".encode())
        raise


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY_SIGNS)
    )


def _segment(connection: Connection, segmenter: Segmenter, request: StreamRequest) -> None:
    """Receive, segment and send side by side. Raises: EOFError, ConnectionError: The horse has hung up."""
    sending = threading.Lock()

    def send(message: bytes) -> None:
        with sending:
            connection.send_bytes(message)

    def received() -> Iterator[Frame]:
        while True:
            message = connection.recv_bytes()
            send(TAKEN)  # small frames wait in the socket: their sender cannot see it
            if not message:
                return
            yield request.parse_frame(message)

    idle = Stopwatch()
    with (
        closing(read_ahead(received(), limit=_FRAMES_AHEAD)) as frames,
        WriteBehind(limit=_MASKS_BEHIND) as out,
    ):
        started = time.monotonic()
        masks = segmenter.segment(
            idle.during_each(frames),
            threshold=request.threshold,
            output_size=(request.mask_height, request.mask_width),
            start=request.start,
            span_frames=request.span_frames,
            quality=request.quality,
        )
        for mask in masks:
            busy = time.monotonic() - started - idle.seconds
            with idle:
                out.put(partial(_send_mask, send, mask, busy))
    send(DONE)


def _send_mask(send: Callable[[bytes], None], mask: Mask, busy_seconds: float) -> None:
    send(pack_mask(mask, busy_seconds))


if __name__ == "__main__":
    settings = SharedSettings()
    configure_logging(settings.log_level, settings.log_format)
    sys.exit(main(sys.argv[1]))
