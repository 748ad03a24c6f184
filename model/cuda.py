"""The engine on CUDA: a batch is one launch of a graph, not some 400 kernels a frame.

Graphs, streams and pinned memory have not been measured on a GPU yet; nor has the time that they save. What
can be tested without one runs in eager mode on the CPU: buckets, padding, static inputs, precision.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from model.cuda_runners import (
    EagerRunner,
    GraphRunner,
    Maps,
    PinnedUpload,
    Program,
    Runner,
    SharedByGraphs,
    Upload,
    new_stream,
    stack_into,
)
from model.engine import convolutions, fold_batch_norms, frame_of, maps_of, window_of
from model.errors import DeviceError
from model.imcnet import FrameFeatures, IMCNet, foreground_probability
from model.preprocess import STATISTICS

Capture = Literal["graphs", "eager"]
Entry = TypeVar("Entry")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class CudaEngine:
    """Encodes frames and decodes windows in batches, by CUDA graphs.

    A graph is made for each size and bucket, that is each power of two up to ``batch`` and ``batch`` itself,
    when it is first needed; this takes seconds. A batch is filled up to its bucket by repeating its last
    entry. No entry sees the others, but as libraries choose their kernels by size, and by time, the same
    frame may come out of another bucket, or another process, rounded otherwise.

    Work is put on the current stream of the device, and results are ready in its order. An engine must be
    used by one thread at a time, and on one stream. At a size of 480, with resnet101 and three frames a
    window in 16 bit, the buffers of a bucket of B take some 60 MB times B, besides what the graphs share.

    In 16 bit, deformable convolutions are those of ``model.triton_deform``, and a map that leaves the range
    of float16 becomes infinite, as do the sums over it; bfloat16 has the range of float32. In float32,
    everything is float32, without TF32 in the convolutions.

    Args:
        network: Copied; the original stays as it is.
        dtype: Of the network and the features: float16, bfloat16 or float32.
        batch: Most frames or windows at a time.
        capture: ``eager`` launches every kernel by itself. Only that can be had on the CPU, for tests.

    Raises:
        DeviceError: The device is not there, or cannot do what is asked for. There is no falling back.
        ValueError: ``dtype``, ``batch`` or ``capture`` is not one of those allowed, or a weight is too large
            for ``dtype``.
    """

    def __init__(
        self,
        network: IMCNet,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float16,
        batch: int = 8,
        capture: Capture = "graphs",
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if capture not in get_args(Capture):
            raise ValueError(f"capture must be one of {', '.join(get_args(Capture))}, got {capture!r}")
        self.device = _present(device, capture)
        self.batch, self.lag = batch, 1
        self.name = f"{self.device.type}-{capture}-{str(dtype).removeprefix('torch.')}"
        self._dtype = dtype
        self._num_frames = network.config.num_frames
        self._network = _converted(network, self.device, dtype)
        # normalise() brings these to the device at every call, which a capture does not allow.
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(3, 1, 1)
            for values in STATISTICS[network.config.normalisation]
        )
        with self._on_device():
            self._runner: Callable[[Program, Maps], Runner] = EagerRunner
            if capture == "graphs":
                self._runner = partial(GraphRunner, shared=SharedByGraphs())
            self._copies = new_stream() if self.device.type == "cuda" else None
        self._encoders: dict[tuple[int, ...], tuple[Runner, Upload]] = {}
        self._decoders: dict[tuple[int, ...], Runner] = {}

    @torch.inference_mode()
    def encode(self, images: Tensor) -> list[FrameFeatures]:
        """Encode frames.

        Args:
            images: RGB, ``(B, 3, S, S)`` uint8 on the CPU, at most ``batch``, S a multiple of 32. They may be
                overwritten once this returns.

        Returns:
            One entry a frame, its maps with a batch dimension of 1. They are views: as long as one of them
            is held, so is the memory of the whole batch.

        Raises:
            ValueError: ``images`` are others.
        """
        self._check_images(images)
        count = len(images)
        bucket = bucket_of(count, self.batch)
        with self._on_device():
            runner, upload = self._encoder(bucket, *images.shape[1:])
            upload(pad(images.unbind(), bucket), runner.inputs[0])
            maps = runner.run(count)
        return [frame_of([level[index : index + 1] for level in maps]) for index in range(count)]

    @torch.inference_mode()
    def decode(self, windows: Sequence[Sequence[FrameFeatures]]) -> Tensor:
        """Segment the middle frames of windows.

        Args:
            windows: At most ``batch``, each of ``num_frames`` entries as ``encode`` returned them, in
                temporal order, all of one size.

        Returns:
            Foreground probabilities, ``(B, 1, S, S)`` float32 on the device.

        Raises:
            ValueError: ``windows`` are others.
        """
        self._check_windows(windows)
        bucket = bucket_of(len(windows), self.batch)
        with self._on_device():
            runner = self._decoder(bucket, windows[0][0])
            padded = [
                [level for frame in window for level in maps_of(frame)] for window in pad(windows, bucket)
            ]
            for static, levels in zip(runner.inputs, zip(*padded, strict=True), strict=True):
                torch.cat(levels, out=static)
            (probabilities,) = runner.run(len(windows))
        return probabilities

    def _encoder(self, *shape: int) -> tuple[Runner, Upload]:
        if shape not in self._encoders:
            static = torch.zeros(shape, dtype=torch.uint8, device=self.device)
            upload = PinnedUpload(static, self._copies) if self._copies else stack_into
            self._encoders[shape] = self._runner(self._encode, (static,)), upload
        return self._encoders[shape]

    def _decoder(self, bucket: int, frame: FrameFeatures) -> Runner:
        key = (bucket, *maps_of(frame)[0].shape[-2:])
        if key not in self._decoders:
            static = tuple(
                level.new_empty((bucket, *level.shape[1:])).to(memory_format=torch.channels_last).zero_()
                for _ in range(self._num_frames)
                for level in maps_of(frame)
            )
            self._decoders[key] = self._runner(self._decode, static)
        return self._decoders[key]

    def _encode(self, images: Tensor) -> Maps:
        normalised = (images.float() / 255 - self._mean) / self._std
        with convolutions(self.device, benchmark=True):
            frame = self._network.encode_frame(normalised.to(self._dtype, memory_format=torch.channels_last))
        return maps_of(frame)

    def _decode(self, *maps: Tensor) -> Maps:
        with convolutions(self.device, benchmark=True):
            logits = self._network.decode_window(window_of(maps, self._num_frames))
        return (foreground_probability(logits.float()),)

    def _on_device(self) -> AbstractContextManager[object]:
        """Streams, events and graphs belong to the current device, which another engine may have set."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _check_images(self, images: Tensor) -> None:
        if images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8 or not images.is_cpu:
            raise ValueError(
                "images must be (B, 3, S, S) uint8 on the CPU, "
                f"got {tuple(images.shape)} {images.dtype} on {images.device}"
            )
        if not 1 <= len(images) <= self.batch:
            raise ValueError(f"expected 1 to {self.batch} images, got {len(images)}")

    def _check_windows(self, windows: Sequence[Sequence[FrameFeatures]]) -> None:
        if not 1 <= len(windows) <= self.batch:
            raise ValueError(f"expected 1 to {self.batch} windows, got {len(windows)}")
        if lengths := {len(window) for window in windows} - {self._num_frames}:
            raise ValueError(f"a window holds {self._num_frames} frames, got {min(lengths)}")
        shapes = {tuple(level.shape for level in maps_of(frame)) for window in windows for frame in window}
        if len(shapes) > 1 or any(shape[0] != 1 for shape in next(iter(shapes))):
            raise ValueError(f"frames must be of one size, and one an entry, got maps {sorted(shapes)}")
        for level in (level for window in windows for frame in window for level in maps_of(frame)):
            if level.dtype != self._dtype or level.device != self.device:
                raise ValueError(
                    f"features must be {self._dtype} on {self.device}, as this engine encodes them, "
                    f"got {level.dtype} on {level.device}"
                )


# ---- Batches ------------------------------------------------------------------------------------------


def bucket_of(count: int, batch: int) -> int:
    """The size that ``count`` entries are filled up to: the next power of two, but at most ``batch``."""
    return min(1 << (count - 1).bit_length(), batch)


def pad(entries: Sequence[Entry], length: int) -> list[Entry]:
    """Fill ``entries`` up to ``length`` by repeating the last."""
    return [*entries, *(entries[-1] for _ in range(length - len(entries)))]


# ---- Network and device -------------------------------------------------------------------------------


def _present(device: torch.device, capture: Capture) -> torch.device:
    """Check that ``device`` is there; returns it with its number, as tensors on it name it."""
    if device.type == "cuda":
        present = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= present:
            raise DeviceError(f"device {str(device)!r} is not there: found {present} CUDA device(s)")
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if device.type != "cpu" or capture != "eager":
        raise DeviceError(f"a CUDA engine needs a CUDA device, got {str(device)!r} with capture {capture!r}")
    return device


def _converted(network: IMCNet, device: torch.device, dtype: torch.dtype) -> IMCNet:
    converted = fold_batch_norms(network)  # in the network's own type: 16 bit would round variances to zero
    if dtype != torch.float32:
        _fuse(converted, device)
    converted.to(device, dtype).to(memory_format=torch.channels_last)
    for name, tensor in converted.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite, or too large for {dtype}")
    return converted


def _fuse(network: nn.Module, device: torch.device) -> None:
    try:  # here, not above: nothing else needs Triton, which is not there on every platform
        from model.triton_deform import INTERPRETED, fuse_deformable_convs
    except ModuleNotFoundError as error:
        raise DeviceError(f"a CUDA engine in 16 bit needs Triton: {error}") from error
    if device.type == "cpu" and not INTERPRETED:
        raise DeviceError("on the CPU, the engine's 16 bit run in Triton's interpreter only")
    fuse_deformable_convs(network)
