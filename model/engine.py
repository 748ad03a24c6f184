"""What computes the network for a stream: images to features, windows of features to probabilities."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.imcnet import DecodedFrame, EncodedFrame, FrameFeatures, IMCNet, foreground_probability
from model.preprocess import normalise
from model.pyramid import FoldedWhitening, Pyramid, Whitening


class Engine(Protocol):
    """Computes a network on one device; used by one thread at a time.

    Attributes:
        name: Back end and precision, such as ``torch-float32``.
        batch: Most images, or windows, at a time.
        lag: How many batches of masks may still be computed while the caller goes on: 1 where a device works
            by itself, 0 where a call returns what is finished.
    """

    name: str
    device: torch.device
    batch: int
    lag: int

    def encode(self, images: Tensor) -> list[FrameFeatures]:
        """Encode frames.

        Args:
            images: RGB, ``(B, 3, S, S)`` uint8 on the CPU, B at most ``batch``, S a multiple of 32.

        Returns:
            One entry a frame, its maps with a batch dimension of 1.
        """
        ...

    def decode(self, windows: Sequence[Sequence[FrameFeatures]]) -> Tensor:
        """Segment the middle frames of windows.

        Args:
            windows: At most ``batch``, each of ``num_frames`` entries of ``encode`` in temporal order.

        Returns:
            Foreground probabilities, ``(B, 1, S, S)`` on ``device``.
        """
        ...


class TorchEngine:
    """The network itself, in the type of its parameters, its batch norms folded into the convolutions.

    The reference for all other engines: in float64 at most 1e-7 off ``IMCNet.forward``, in float32 without
    TF32. On a CPU, batches save nothing; on CUDA they save launches of kernels.

    Args:
        network: Copied; the original stays as it is.
    """

    def __init__(self, network: IMCNet, *, device: torch.device) -> None:
        self.device = device
        self.batch, self.lag = (8, 1) if device.type == "cuda" else (1, 0)
        self._dtype = next(network.parameters()).dtype
        self.name = f"torch-{str(self._dtype).removeprefix('torch.')}"
        self.network = fold_batch_norms(network).to(device)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> list[FrameFeatures]:
        with convolutions(self.device):
            normalised = normalise(images.to(self.device), self.network.config.normalisation, self._dtype)
            features = self.network.encode_frame(normalised)
        return split_frames(features)

    @torch.inference_mode()
    def decode(self, windows: Sequence[Sequence[FrameFeatures]]) -> Tensor:
        merged = [merge_frames(frames) for frames in zip(*windows, strict=True)]
        with convolutions(self.device):
            return foreground_probability(self.network.decode_window(merged))


class StillEngine(TorchEngine):
    """The network's still path: segments the middle frame of a window by itself, without motion."""

    @torch.inference_mode()
    def decode(self, windows: Sequence[Sequence[FrameFeatures]]) -> Tensor:
        frames = merge_frames([window[len(window) // 2] for window in windows])
        with convolutions(self.device):
            return foreground_probability(self.network.decode_image(frames))


def convolutions(device: torch.device, *, benchmark: bool = False) -> AbstractContextManager[object]:
    """Within the block, convolutions in float32 are that on CUDA too: by default, PyTorch has them in TF32.

    Args:
        benchmark: Whether cuDNN tries out its kernels for each shape and takes the fastest. Without, it
            chooses by rule, and the same for the same shape.
    """
    if device.type != "cuda":
        return nullcontext()
    settings: AbstractContextManager[object] = torch.backends.cudnn.flags(
        enabled=True, benchmark=benchmark, allow_tf32=False
    )
    return settings


def split_frames(features: FrameFeatures) -> list[FrameFeatures]:
    """Part a batch into its frames; they share the batch's memory."""
    maps = maps_of(features)
    if len(maps[0]) == 1:
        return [features]
    levels = (torch.split(level, 1) for level in maps)
    return [frame_of(maps) for maps in zip(*levels, strict=True)]


def merge_frames(frames: Sequence[FrameFeatures]) -> FrameFeatures:
    """Undo ``split_frames``. A single frame is not copied."""
    if len(frames) == 1:
        return frames[0]
    levels = zip(*map(maps_of, frames), strict=True)
    return frame_of([torch.cat(maps) for maps in levels])


def maps_of(frame: FrameFeatures) -> tuple[Tensor, ...]:
    """The maps in a fixed order, for code that handles only tensors; the first one is at stride 4."""
    if isinstance(frame, EncodedFrame):
        return (*frame.pyramid, frame.key)
    return (frame.features,) if frame.v3 is None else (frame.features, frame.v3)


def frame_of(maps: Sequence[Tensor]) -> FrameFeatures:
    """Undo ``maps_of``."""
    if len(maps) > 2:
        *pyramid, key = maps
        return EncodedFrame(Pyramid(*pyramid), key)
    features, *v3 = maps
    return DecodedFrame(features, v3[0] if v3 else None)


def window_of(maps: Sequence[Tensor], num_frames: int) -> list[FrameFeatures]:
    """Undo ``maps_of`` for a window, whose maps are given frame by frame."""
    count = len(maps) // num_frames
    return [frame_of(maps[start : start + count]) for start in range(0, len(maps), count)]


def fold_batch_norms(network: IMCNet) -> IMCNet:
    """Copy a network in evaluation mode, each batch norm made part of the convolution before it.

    Exact but for rounding: at inference, a batch norm scales and shifts by constants. So does whitening,
    whose constants are computed once.
    """
    folded = deepcopy(network).eval()
    for parent in list(folded.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Whitening):
                setattr(parent, name, FoldedWhitening(child))
        # Every backbone lists its norms right behind their convolutions.
        for (name, child), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(child, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(child, norm))
                setattr(parent, norm_name, nn.Identity())
    return folded
