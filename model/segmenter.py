"""Frames in, masks out: IMCNet on a stream of any length."""

from collections.abc import Iterable, Iterator
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.errors import DeviceError
from model.imcnet import SIZE_MULTIPLE, FrameFeatures, IMCNet, foreground_probability
from model.preprocess import normalise, resize_frame, resize_probability
from model.shipped import SHIPPED_WEIGHTS
from model.views import Quality, View, views_of
from model.weights import load_weights
from model.windows import WindowLayout

Frame = NDArray[np.uint8]
Mask = NDArray[np.bool_]


class Segmenter:
    """Segments the primary object of streams of frames.

    Args:
        network: Moved to the device and switched to evaluation, in place. It computes in the type of its
            parameters.
        device: As for ``resolve_device``.
        input_size: Height and width that frames are resized to, a multiple of 32.

    Raises:
        DeviceError: The device is not there.
        ValueError: ``input_size`` is not a positive multiple of 32.
    """

    def __init__(self, network: IMCNet, *, device: str, input_size: int = 480) -> None:
        if input_size < SIZE_MULTIPLE or input_size % SIZE_MULTIPLE:
            raise ValueError(f"input_size must be a multiple of {SIZE_MULTIPLE}, got {input_size}")
        self.device = resolve_device(device)
        self.network = network.to(self.device).eval()
        self.input_size = input_size
        self.layout = WindowLayout(network.config.num_frames, network.config.frame_stride)
        self._dtype = next(network.parameters()).dtype

    @classmethod
    def load(
        cls, path: Path | str = SHIPPED_WEIGHTS, *, device: str = "auto", input_size: int | None = None
    ) -> Self:
        """Load a weights file, by default the one that ships.

        Args:
            input_size: By default the one that the weights were made for.

        Raises:
            WeightsError: The file cannot be used.
            DeviceError: The device is not there.
            ValueError: ``input_size`` is not a positive multiple of 32.
        """
        network, info = load_weights(path)
        return cls(network, device=device, input_size=input_size or info.input_size)

    def segment(
        self,
        frames: Iterable[Frame],
        *,
        threshold: float = 0.5,
        output_size: tuple[int, int] | None = None,
        start: int = 0,
        stop: int | None = None,
        quality: Quality = "exact",
    ) -> Iterator[Mask]:
        """Segment a stream, one mask a frame, in order, as the frames come.

        ``frames[start:stop]`` are segmented; the others serve as their context. So a part of a video gets
        exactly the masks that it has within the whole, given ``layout.margin`` frames on each side.
        Never more than ``layout.margin`` frames are read ahead of a mask, and never the features of more
        than ``2 * layout.margin + 1`` frames are held, once a view. At an input size of 480, in float32, one
        view of a frame takes 28 MB with resnet101 and 7 MB with resnet18; the nine of ``multi_scale`` take
        11.7 times as much, and as much more time.

        Args:
            frames: RGB, ``(H, W, 3)`` uint8, all of one size. A buffer may be used again for the next frame.
            threshold: A probability of at least this is foreground.
            output_size: Height and width of the masks; by default those of the frames.
            start: First frame to segment.
            stop: Frame to stop before; by default the end of the stream. If the stream ends earlier, so do
                the masks.
            quality: How often each frame is looked at, and how, see ``model.views``. What is compared with
                the threshold is the mean of the views' probabilities, each brought to the masks' size.

        Yields:
            ``(H, W)`` bool.

        Raises:
            ValueError: An argument is out of range (at once), or a frame has another type or shape (when
                it is read).
        """
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold must be within [0, 1], got {threshold}")
        if output_size is not None and min(output_size) < 1:
            raise ValueError(f"output_size must be positive, got {output_size}")
        if start < 0 or (stop is not None and stop < start):
            raise ValueError(f"start and stop must satisfy 0 <= start <= stop, got {start} and {stop}")
        views = views_of(quality, self.input_size)
        return self._masks(frames, views, threshold, output_size, start, stop)

    def _masks(
        self,
        frames: Iterable[Frame],
        views: tuple[View, ...],
        threshold: float,
        output_size: tuple[int, int] | None,
        start: int,
        stop: int | None,
    ) -> Iterator[Mask]:
        stream = iter(frames)
        held: dict[int, dict[View, FrameFeatures]] = {}
        shape: tuple[int, int, int] | None = None
        first = self.layout.first_needed(start)
        center, count = start, 0
        while stop is None or center < stop:
            for frame in islice(stream, self.layout.last_needed(center) + 1 - count):
                shape = _checked_shape(frame, index=count, expected=shape)
                if count >= first:  # what lies before serves no window of the span
                    held[count] = {view: self._encode(frame, view) for view in views}
                count += 1
            if shape is None or center >= count:
                return
            window = self.layout.indices(center, last=count - 1)
            mask = self._decode([held[index] for index in window], views, output_size or shape[:2], threshold)
            center += 1
            held.pop(self.layout.first_needed(center) - 1, None)
            yield mask

    @torch.inference_mode()
    def _encode(self, frame: Frame, view: View) -> FrameFeatures:
        image = resize_frame(frame, view.size).to(self.device).flip(view.mirrored)
        return self.network.encode_frame(normalise(image, self._dtype).unsqueeze(0))

    @torch.inference_mode()
    def _decode(
        self,
        window: list[dict[View, FrameFeatures]],
        views: tuple[View, ...],
        size: tuple[int, int],
        threshold: float,
    ) -> Mask:
        probabilities = (self._probability([frame[view] for frame in window], view, size) for view in views)
        mean = reduce(torch.add, probabilities) / len(views)
        mask: Mask = (mean >= threshold)[0, 0].cpu().numpy()
        return mask

    def _probability(self, window: list[FrameFeatures], view: View, size: tuple[int, int]) -> Tensor:
        """The foreground in one view, turned back and brought to ``size``: ``(1, 1, H, W)`` in [0, 1]."""
        probability = foreground_probability(self.network.decode_window(window))
        return resize_probability(probability.flip(view.mirrored), size)


def resolve_device(name: str) -> torch.device:
    """Find the device of that name: "cpu", "cuda", "cuda:N", or "auto", which is CUDA if there is any.

    Raises:
        DeviceError: The device is not there. There is no falling back to another one.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, ordinal = name.partition(":")
    if kind == "cuda" and (ordinal.isdecimal() or name == "cuda"):
        present = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(ordinal or 0) >= present:
            raise DeviceError(f"device {name!r} is not there: found {present} CUDA device(s)")
    elif name != "cpu":
        raise DeviceError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    return torch.device(name)


def _checked_shape(frame: Frame, *, index: int, expected: tuple[int, ...] | None) -> tuple[int, int, int]:
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or 0 in frame.shape:
        raise ValueError(f"frame {index} must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
    if expected is not None and frame.shape != expected:
        raise ValueError(f"frame {index} must be {expected} like those before it, got {frame.shape}")
    return frame.shape
