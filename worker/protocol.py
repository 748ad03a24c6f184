"""What worker, horse and engine say to each other over the engine's private socket. No torch in here.

One connection is one stream. The horse sends a :class:`StreamRequest` as JSON, then one message per frame
(its raw bytes), then an empty message. The engine answers with messages of a one-byte kind and a body: a sign
for every message that it takes, a mask per frame from ``start`` on, in order, and a sign that these were all;
or a failure, after which it ends. In place of a request, :data:`PING` asks for a sign of life, and an
:class:`EngineQuestion` for what would compute a quality.
"""

import struct
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from service.jobs import EngineInfo, ModelInfo, Quality

PING = b"ping"
TAKEN, MASK, DONE, FAILURE, OUT_OF_MEMORY = b"t", b"m", b"d", b"f", b"o"

_SECONDS = struct.Struct("<d")

Frame = NDArray[np.uint8]
Mask = NDArray[np.bool_]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineConfig(_Message):
    """How an engine is to be started."""

    socket: Path
    parent_pid: int
    weights: Path | None  # None: those that ship
    weights_sha256: str | None
    device: str
    input_size: int | None  # None: the one that the weights were made for
    cpu_threads: int
    exact_backend: Literal["torch", "openvino"]
    graphs: Path | None  # None: beside the weights


class EngineReady(_Message):
    """An engine has loaded its model and listens. ``device`` is what ``auto`` turned out to be.

    A window reaches ``margin_frames`` to each side of the frame that is segmented.
    """

    device: str
    input_size: int
    margin_frames: int
    load_s: float
    model: ModelInfo


class EngineRefused(_Message):
    """An engine cannot start as configured; ``reason`` is one line for the operator."""

    reason: str


class EngineQuestion(_Message):
    """What will compute this quality? Answered by :class:`EngineAnswer`, when it is ready to."""

    prepare: Quality


class EngineAnswer(_Message):
    """What computes the quality asked for, or, where ``instead`` is given, that one in its place.

    It needs up to ``max_pending`` frames that wait for their masks: with fewer, it might give none.
    """

    engine: EngineInfo
    max_pending: int
    instead: Quality | None = None


class StreamRequest(_Message):
    """Frames of ``height`` × ``width`` pixels come, masks of ``mask_height`` × ``mask_width`` are wanted.

    The first ``start`` frames are context, and get no mask. After every ``span_frames`` of the others a span
    ends; no more than ``max_pending`` of them are sent before their masks are taken. Job and attempt are for
    the log.
    """

    job_id: str
    attempt: int
    height: int
    width: int
    mask_height: int
    mask_width: int
    threshold: float
    quality: Quality
    start: int
    span_frames: int
    max_pending: int

    def parse_frame(self, message: bytes) -> Frame:
        """``(height, width, 3)`` uint8. Raises: ValueError: The message has another size."""
        return np.frombuffer(message, np.uint8).reshape(self.height, self.width, 3)

    def parse_mask(self, body: bytes) -> tuple[Mask, float]:
        """``(mask_height, mask_width)`` bool, and the seconds as :func:`pack_mask` has them."""
        (inference_s,) = _SECONDS.unpack_from(body)
        count = self.mask_height * self.mask_width
        bits = np.unpackbits(np.frombuffer(body, np.uint8, offset=_SECONDS.size), count=count)
        return bits.reshape(self.mask_height, self.mask_width).view(np.bool_), inference_s


def pack_mask(mask: Mask, inference_s: float) -> bytes:
    """The message of a mask: eight pixels a byte, rows run on.

    Args:
        inference_s: What the stream has cost so far, without waiting for frames or the reader.
    """
    return MASK + _SECONDS.pack(inference_s) + np.packbits(mask).tobytes()
