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
from functools import partial
from multiprocessing.connection import Connection, Listener
from typing import TextIO

import numpy as np
import structlog
import torch

from model.errors import ModelError
from model.segmenter import Segmenter
from model.shipped import SHIPPED_WEIGHTS
from model.stages import WriteBehind, read_ahead
from model.weights import file_sha256, load_weights
from service.jobs import ModelInfo
from service.logs import configure_logging
from service.processes import die_with_parent
from service.settings import SharedSettings
from worker.protocol import (
    DONE,
    FAILURE,
    OUT_OF_MEMORY,
    PING,
    TAKEN,
    EngineConfig,
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
        segmenter, model = _load(config)
    except (ModelError, ValueError, OSError) as error:
        _tell(greeting, EngineRefused(reason=str(error)))
        return 2
    _warm_up(segmenter)
    with Listener(str(config.socket), "AF_UNIX", _BACKLOG) as listener:
        ready = EngineReady(
            device=str(segmenter.device),
            input_size=segmenter.input_size,
            margin_frames=segmenter.layout.margin,
            load_s=time.monotonic() - started,
            model=model,
        )
        _tell(greeting, ready)
        while True:
            with listener.accept() as connection:
                _serve(connection, segmenter)


def _load(config: EngineConfig) -> tuple[Segmenter, ModelInfo]:
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
    return segmenter, model


def _warm_up(segmenter: Segmenter) -> None:
    """Have kernels chosen and memory taken before the first job."""
    blank = np.zeros((segmenter.input_size, segmenter.input_size, 3), np.uint8)
    for _ in segmenter.segment([blank]):
        pass


def _tell(greeting: TextIO, message: EngineReady | EngineRefused) -> None:
    """Say the one line that the worker waits for."""
    with greeting:
        greeting.write(message.model_dump_json() + "\n")


def _serve(connection: Connection, segmenter: Segmenter) -> None:
    """Serve one stream, or give a sign of life."""
    try:
        message = connection.recv_bytes()
        if message == PING:
            connection.send_bytes(PING)
            return
        request = StreamRequest.model_validate_json(message)
        with structlog.contextvars.bound_contextvars(job=request.job_id, attempt=request.attempt):
            _answer(connection, segmenter, request)
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

    idle = _Stopwatch()
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
            quality=request.quality,
        )
        for mask in masks:
            busy = time.monotonic() - started - idle.seconds
            with idle:
                out.put(partial(_send_mask, send, mask, busy))
    send(DONE)


def _send_mask(send: Callable[[bytes], None], mask: Mask, busy_seconds: float) -> None:
    send(pack_mask(mask, busy_seconds))


class _Stopwatch:
    """Adds up the time spent in its blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self._began

    def during_each(self, items: Iterator[Frame]) -> Iterator[Frame]:
        """The same items; the time that it takes to get them counts."""
        while True:
            with self:
                item = next(items, None)
            if item is None:
                return
            yield item


if __name__ == "__main__":
    settings = SharedSettings()
    configure_logging(settings.log_level, settings.log_format)
    sys.exit(main(sys.argv[1]))
