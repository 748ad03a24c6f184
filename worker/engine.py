"""The engine: a process that holds the warm model on one device and serves streams of frames, one at a time.

Started by ``worker.engine_process`` with its configuration as its one argument. It says on standard output
whether it is ready, and ends with its parent. After an error within the network it ends too: a new process is
the only sure way to a clean device.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, Listener
from typing import TextIO

import numpy as np
import torch

from model.errors import ModelError
from model.segmenter import Segmenter
from model.shipped import SHIPPED_WEIGHTS
from model.weights import file_sha256, load_weights
from service.jobs import ModelInfo
from service.processes import die_with_parent
from worker.protocol import (
    DONE,
    FAILURE,
    TAKEN,
    EngineConfig,
    EngineReady,
    EngineRefused,
    Frame,
    StreamDone,
    StreamRequest,
    pack_mask,
)

logger = logging.getLogger(__name__)


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
    with Listener(str(config.socket), "AF_UNIX") as listener:
        load_s = time.monotonic() - started
        _tell(greeting, EngineReady(device=str(segmenter.device), load_s=load_s, model=model))
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
    """Serve one stream. A horse that hangs up is no error: its job was canceled, or it died."""
    try:
        request = StreamRequest.model_validate_json(connection.recv_bytes())
        _segment(connection, segmenter, request)
    except (EOFError, ConnectionError):
        logger.info("The stream was dropped")
    except Exception as error:
        logger.exception("The stream failed")
        connection.send_bytes(FAILURE + f"{type(error).__name__}: {error}".encode())
        raise


def _segment(connection: Connection, segmenter: Segmenter, request: StreamRequest) -> None:
    waited = 0.0

    def frames() -> Iterator[Frame]:
        nonlocal waited
        while True:
            began = time.monotonic()
            message = connection.recv_bytes()
            connection.send_bytes(TAKEN)  # small frames wait in the socket: their sender cannot see it
            waited += time.monotonic() - began
            if not message:
                return
            yield request.parse_frame(message)

    started = time.monotonic()
    masks = segmenter.segment(
        frames(),
        threshold=request.threshold,
        output_size=(request.mask_height, request.mask_width),
        quality=request.quality,
    )
    for mask in masks:
        began = time.monotonic()
        connection.send_bytes(pack_mask(mask))
        waited += time.monotonic() - began
    done = StreamDone(inference_s=time.monotonic() - started - waited)
    connection.send_bytes(DONE + done.model_dump_json().encode())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine: %(message)s")
    sys.exit(main(sys.argv[1]))
