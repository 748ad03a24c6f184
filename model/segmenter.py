"""Frames in, masks out: IMCNet on a stream of any length."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.engine import Engine, TorchEngine
from model.errors import DeviceError, EngineUnavailable
from model.imcnet import SIZE_MULTIPLE, FrameFeatures, IMCNet
from model.preprocess import resize_frame, resize_probability
from model.shipped import SHIPPED_WEIGHTS
from model.views import Quality, View, views_of
from model.weights import load_weights
from model.windows import WindowLayout, batches_of

Frame = NDArray[np.uint8]
Mask = NDArray[np.bool_]


class Segmenter:
    """Segments the primary object of streams of frames.

    Args:
        network: Copied; the original stays as it is. It computes in the type of its parameters.
        device: As for ``resolve_device``.
        input_size: Height and width that frames are resized to, a multiple of 32.

    Attributes:
        engines: What computes each quality; ``model.engines`` has others than those of PyTorch.

    Raises:
        DeviceError: The device is not there.
        ValueError: ``input_size`` is not a positive multiple of 32.
    """

    def __init__(self, network: IMCNet, *, device: str, input_size: int = 480) -> None:
        if input_size < SIZE_MULTIPLE or input_size % SIZE_MULTIPLE:
            raise ValueError(f"input_size must be a multiple of {SIZE_MULTIPLE}, got {input_size}")
        self.device = resolve_device(device)
        exact = TorchEngine(network, device=self.device)
        self.engines: dict[Quality, Engine] = {"exact": exact, "multi_scale": exact}
        self.input_size = input_size
        self.layout = WindowLayout(network.config.num_frames, network.config.frame_stride)

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

    def reads_ahead(self, quality: Quality) -> int:
        """The most frames that are read, from the first that is segmented on, before its mask is given."""
        engine = self.engines[quality]
        return self.layout.margin + (1 + engine.lag) * engine.batch

    def segment(
        self,
        frames: Iterable[Frame],
        *,
        threshold: float = 0.5,
        output_size: tuple[int, int] | None = None,
        start: int = 0,
        stop: int | None = None,
        span_frames: int | None = None,
        quality: Quality = "exact",
    ) -> Iterator[Mask]:
        """Segment a stream, one mask a frame, in order, as the frames come.

        ``frames[start:stop]`` are segmented; the others serve as their context. So a part of a video gets
        exactly the masks that it has within the whole, given ``layout.margin`` frames on each side.
        A mask comes before more than ``reads_ahead`` frames are read from its own on: on a CPU, where the
        engine takes one window at a time, those of the window alone; on CUDA two batches more. The features
        of at most ``2 * layout.margin`` frames and a batch are held, once a view. At an input size of 480,
        in float32, one view of a frame takes 28 MB with resnet101 and 7 MB with resnet18; the nine of
        ``multi_scale`` take 11.7 times as much, and as much more time.

        Args:
            frames: RGB, ``(H, W, 3)`` uint8, all of one size. A buffer may be used again for the next frame.
            threshold: A probability of at least this is foreground.
            output_size: Height and width of the masks; by default those of the frames.
            start: First frame to segment.
            stop: Frame to stop before; by default the end of the stream. If the stream ends earlier, so do
                the masks.
            span_frames: No batch of windows reaches over the end of a span of so many frames, counted from
                ``start``: each span has those batches that it has when it is segmented by itself.
            quality: How often each frame is looked at, and how, see ``model.views``. What is compared with
                the threshold is the mean of the views' probabilities, each brought to the masks' size.

        Yields:
            ``(H, W)`` bool.

        Raises:
            EngineUnavailable: There is no engine for ``quality`` (at once).
            ValueError: An argument is out of range (at once), or a frame has another type or shape (when
                it is read).
        """
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold must be within [0, 1], got {threshold}")
        if output_size is not None and min(output_size) < 1:
            raise ValueError(f"output_size must be positive, got {output_size}")
        if start < 0 or (stop is not None and stop < start):
            raise ValueError(f"start and stop must satisfy 0 <= start <= stop, got {start} and {stop}")
        if span_frames is not None and span_frames < 1:
            raise ValueError(f"span_frames must be positive, got {span_frames}")
        views = views_of(quality, self.input_size)
        if quality not in self.engines:
            raise EngineUnavailable(f"no engine for quality {quality!r} has been added")
        engine = self.engines[quality]
        batches = batches_of(start, stop, batch=engine.batch, span_frames=span_frames)
        return self._masks(engine, frames, views, threshold, output_size, start, batches)

    def _masks(
        self,
        engine: Engine,
        frames: Iterable[Frame],
        views: tuple[View, ...],
        threshold: float,
        size: tuple[int, int] | None,
        start: int,
        batches: Iterator[range],
    ) -> Iterator[Mask]:
        layout = self.layout
        stream = _checked(frames)
        first = layout.first_needed(start)
        count = sum(1 for _ in islice(stream, first))  # what lies before serves no window of the span
        held: dict[int, tuple[FrameFeatures, ...]] = {}
        computed: deque[_Masks] = deque()
        for centers in batches:
            while missing := layout.last_needed(centers[-1]) + 1 - count:
                group = []
                for frame in islice(stream, min(engine.batch, missing)):
                    size = size or frame.shape[:2]
                    group.append([resize_frame(frame, view.size).flip(view.mirrored) for view in views])
                if not group:
                    break  # the stream has ended
                held.update(enumerate(_encode(engine, group), start=count))
                count += len(group)
            centers = range(centers.start, min(centers.stop, count))
            if size is None or not centers:
                break
            windows = [[held[index] for index in layout.indices(each, last=count - 1)] for each in centers]
            computed.append(_decode(engine, windows, views, size, threshold))
            del windows
            for index in range(layout.first_needed(centers.start), layout.first_needed(centers.stop)):
                held.pop(index, None)
            if len(computed) > engine.lag:
                yield from computed.popleft()
        for masks in computed:
            yield from masks


def _encode(engine: Engine, frames: Sequence[Sequence[Tensor]]) -> Iterator[tuple[FrameFeatures, ...]]:
    """Encode frames, each of which is given as its views, ``(3, S, S)`` uint8."""
    of_views = [engine.encode(torch.stack(images)) for images in zip(*frames, strict=True)]
    return zip(*of_views, strict=True)


@torch.inference_mode()
def _decode(
    engine: Engine,
    windows: Sequence[Sequence[tuple[FrameFeatures, ...]]],
    views: tuple[View, ...],
    size: tuple[int, int],
    threshold: float,
) -> "_Masks":
    total: Tensor | None = None
    for place, view in enumerate(views):
        seen = engine.decode([[frame[place] for frame in window] for window in windows])
        probabilities = resize_probability(seen.flip(view.mirrored), size)
        total = probabilities if total is None else total + probabilities
    assert total is not None, "every quality has a view"
    # A single view needs no division, which would write a whole map.
    mean = total if len(views) == 1 else total / len(views)
    return _Masks((mean >= threshold)[:, 0])


class _Masks:
    """A batch of masks, ``(B, H, W)`` bool, on its way from the device; to be iterated once."""

    def __init__(self, masks: Tensor) -> None:
        self._masks = masks
        self._arrived: torch.cuda.Event | None = None
        if masks.is_cuda:
            self._masks = torch.empty(masks.shape, dtype=masks.dtype, pin_memory=True)
            self._masks.copy_(masks, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            # Of the masks' device, which need not be the current one.
            self._arrived.record(torch.cuda.current_stream(masks.device))

    def __iter__(self) -> Iterator[Mask]:
        if self._arrived is not None:
            self._arrived.synchronize()
        yield from self._masks.numpy()


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


def _checked(frames: Iterable[Frame]) -> Iterator[Frame]:
    """The same frames. Raises: ValueError: One is of another kind, or of another size than the first."""
    expected: tuple[int, ...] | None = None
    for index, frame in enumerate(frames):
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or 0 in frame.shape:
            raise ValueError(f"frame {index} must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
        if expected is not None and frame.shape != expected:
            raise ValueError(f"frame {index} must be {expected} like those before it, got {frame.shape}")
        expected = frame.shape
        yield frame
