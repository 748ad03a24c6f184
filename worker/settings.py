"""The worker's own settings; see ``service.settings`` for those it shares with the API."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from service.settings import GIB, SharedSettings


class WorkerSettings(SharedSettings):
    weights: Path | None = Field(
        default=None, description="Weights file of the network; by default the one that ships."
    )
    weights_sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="Refuse a weights file with another hash."
    )
    device: str = Field(default="auto", description="`auto`, `cpu`, `cuda` or `cuda:N`; only `auto` chooses.")
    input_size: int | None = Field(
        default=None,
        gt=0,
        multiple_of=32,
        description="Side of the square that frames are resized to; by default that of the weights.",
    )
    cpu_threads: NonNegativeInt = Field(
        default=0, description="Threads of the network on a CPU; 0: all cores."
    )
    exact_backend: Literal["torch", "openvino"] = Field(
        default="torch", description="What computes quality `exact`; OpenVINO on CPUs only, with imcnet[cpu]."
    )
    graphs: Path | None = Field(
        default=None,
        description="Folder where OpenVINO's graphs are kept; by default `graphs` beside the weights.",
    )
    engine_start_seconds: PositiveFloat = Field(
        default=180, description="Time limit for loading the model onto the device."
    )
    engine_prepare_seconds: PositiveFloat = Field(
        default=900,
        description="Time limit for getting what computes a job's quality ready: building and checking "
        "graphs, once for a weights file.",
    )
    decode_memory_bytes: PositiveInt = Field(
        default=4 * GIB,
        description="Memory that decoding a job's video and writing its artifacts may take; a job that wants "
        "more fails.",
    )
    span_frames: PositiveInt = Field(
        default=256,
        description="Frames after which what is done is stored, for another attempt to go on.",
    )
    engine_release_seconds: PositiveFloat = Field(
        default=15, description="An engine still at work for a job that is over after this long is replaced."
    )
    engine_stall_seconds: PositiveFloat = Field(
        default=120,
        description="An engine that neither takes a frame nor returns a mask for this long is killed.",
    )
