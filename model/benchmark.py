"""The published loop against our engines: in turns, in one process, on the same frames.

Published: for every mask, three frames are encoded and the whole ``forward`` runs, side masks and all, with
torchvision's deformable convolution, one window at a time. Machines are noisy, and slow down while they work:
only runs of one round are compared with each other.
"""

import re
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from model.agreement import EXACT_GATE, Agreement, Gate
from model.backbone import ResNetPyramid
from model.deform import DeformableConv
from model.engine import Engine, convolutions
from model.imcnet import (
    AlignmentStage,
    Compensation,
    FrameFeatures,
    IMCNet,
    IMCNetConfig,
    SpatialAttention,
    foreground_probability,
)
from model.motion_cue import CUE_CHANNELS
from model.preprocess import normalise, resize_frame, resize_probability
from model.segmenter import Frame, Mask, Segmenter
from model.stages import Stopwatch
from model.variants import build_network
from model.windows import WindowLayout


@dataclass(kw_only=True)
class Work:
    """What a run over all frames took.

    Attributes:
        encoded: Frames that were encoded.
        cached: The most frames whose features were held at a time.
        encode_s, window_s: Seconds that the device spent encoding, and on the rest of the network. Encoding
            is the backbone in the published loop, ``encode`` in our engines, which has APM too without ACM.
        seconds: All in all, from the first frame to the last mask.
        memory_mib: Resident memory at the peak, beyond that at the beginning.
        device_mib: Memory of the GPU at the peak; what the other candidates hold is part of it.
    """

    encoded: int = 0
    cached: int = 0
    encode_s: float = 0.0
    window_s: float = 0.0
    seconds: float = 0.0
    memory_mib: float = 0.0
    device_mib: float = 0.0


@dataclass(kw_only=True)
class Result:
    """A candidate's runs, a round each, and how its masks compare with the published ones.

    Attributes:
        gate: What the masks must hold to; None for a published loop.
        agreement: With the published masks, in the last round.
        ratios: How many times as fast as the published loop, round by round.
    """

    name: str
    frames: int
    gate: Gate | None
    runs: list[Work] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    agreement: Agreement | None = None

    @property
    def speedup(self) -> float:
        return median(self.ratios)

    @property
    def passes(self) -> bool:
        """Whether it is an engine of ours whose masks are as much the published ones as its gate demands."""
        return bool(self.gate and self.agreement and self.gate.allows(self.agreement))

    def milliseconds(self, of: Callable[[Work], float]) -> float:
        """A frame's, at the median of the rounds."""
        return 1000 * median(of(work) for work in self.runs) / self.frames


class PublishedLoop:
    """The published way from frames to masks.

    Args:
        network: Copied.
        torchvision_deform: With torchvision's operator, as published; or with that of ``model.deform``, which
            on a CPU is the faster one.
    """

    def __init__(
        self, network: IMCNet, *, device: torch.device, input_size: int, torchvision_deform: bool = True
    ) -> None:
        self._network = deepcopy(network).eval().to(device)
        if torchvision_deform:
            for name, module in list(self._network.named_modules()):
                if isinstance(module, DeformableConv):
                    self._network.set_submodule(name, _TorchvisionDeform(module))
        self._layout = WindowLayout(network.config.num_frames, network.config.frame_stride)
        self._device = device
        self._size = input_size
        self._dtype = next(network.parameters()).dtype
        self._normalisation = network.config.normalisation

    @torch.inference_mode()
    def run(self, frames: Sequence[Frame]) -> tuple[list[Mask], Work]:
        with convolutions(self._device):
            return self._run(frames)

    def _run(self, frames: Sequence[Frame]) -> tuple[list[Mask], Work]:
        work, masks = Work(cached=self._layout.num_frames), []
        encoding, all_of_it = DeviceClock(self._device), DeviceClock(self._device)

        def begin(*_: object) -> None:
            work.encoded += 1
            encoding.__enter__()

        backbone = self._network.backbone
        hooks = [
            backbone.register_forward_pre_hook(begin),
            backbone.register_forward_hook(lambda *_: encoding.__exit__()),
        ]
        try:
            for center in range(len(frames)):
                window = self._layout.indices(center, last=len(frames) - 1)
                images = torch.stack([resize_frame(frames[index], self._size) for index in window])
                with all_of_it:
                    windows = normalise(images.to(self._device), self._normalisation, self._dtype).unsqueeze(
                        0
                    )
                    probability = foreground_probability(self._network(windows).logits)
                probability = resize_probability(probability, frames[0].shape[:2])
                masks.append((probability >= 0.5)[0, 0].cpu().numpy())
        finally:
            for hook in hooks:
                hook.remove()
        work.encode_s = encoding.seconds
        work.window_s = all_of_it.seconds - encoding.seconds
        return masks, work


class _TorchvisionDeform(nn.Module):
    def __init__(self, conv: DeformableConv) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, features: Tensor, offsets: Tensor) -> Tensor:
        sampled: Tensor = deform_conv2d(features, offsets, self.weight, self.bias, padding=(1, 1))
        return sampled


class DeviceClock:
    """Adds up the time that a device spends on its blocks.

    On CUDA that is measured on the device, and nobody waits for it before ``seconds`` is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_host = Stopwatch()
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self._events.append((begins, ends))
            begins.record(torch.cuda.current_stream(self._device))
        else:
            self._on_host.__enter__()

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self._events[-1][1].record(torch.cuda.current_stream(self._device))
        else:
            self._on_host.__exit__()

    @property
    def seconds(self) -> float:
        if self._events:
            torch.cuda.synchronize(self._device)
        milliseconds: float = sum(begun.elapsed_time(ended) for begun, ended in self._events)
        return self._on_host.seconds + milliseconds / 1000


class Observed:
    """An engine, and an account of what it does.

    Attributes:
        calls: What the caller spends in its calls; on CUDA, that is not what the device spends on them.
    """

    def __init__(self, engine: Engine) -> None:
        self.name, self.device, self.batch, self.lag = engine.name, engine.device, engine.batch, engine.lag
        self.calls = Stopwatch()
        self._work = Work()
        self._encoding, self._windows = DeviceClock(engine.device), DeviceClock(engine.device)
        self._engine = engine
        self._alive: weakref.WeakSet[FrameFeatures] = weakref.WeakSet()

    def encode(self, images: Tensor) -> list[FrameFeatures]:
        with self.calls, self._encoding:
            features = self._engine.encode(images)
        self._work.encoded += len(images)
        # A frame that is looked at several times leaves several entries; here it is looked at once.
        for each in features:
            self._alive.add(each)
        self._work.cached = max(self._work.cached, len(self._alive))
        return features

    def decode(self, windows: Sequence[Sequence[FrameFeatures]]) -> Tensor:
        with self.calls, self._windows:
            return self._engine.decode(windows)

    @property
    def work(self) -> Work:
        self._work.encode_s, self._work.window_s = self._encoding.seconds, self._windows.seconds
        return self._work


def compare(
    network: IMCNet,
    frames: Sequence[Frame],
    *,
    device: torch.device,
    input_size: int,
    rounds: int,
    others: Mapping[Engine, Gate] | None = None,
) -> Iterator[list[Result]]:
    """Run every candidate once a round, over all frames.

    Args:
        others: Engines beside PyTorch's, and what their masks must hold to.

    Yields:
        After each round the results so far: of the published loop, of the same with the faster deformable
        convolution if the network has any, and of our engines. A round before the first warms up, and does
        not count: on CUDA with all frames, so that every batch has been captured, or its kernels chosen.
    """
    segmenter = Segmenter(network, device=str(device), input_size=input_size)

    def segment(engine: Engine, images: Sequence[Frame]) -> tuple[list[Mask], Work]:
        segmenter.engines["exact"] = observed = Observed(engine)
        return list(segmenter.segment(images)), observed.work

    published_loop = partial(PublishedLoop, network, device=device, input_size=input_size)
    loops = {"published loop": published_loop(torchvision_deform=True)}
    if any(isinstance(module, DeformableConv) for module in network.modules()):
        loops["published loop, sampled deformable convolution"] = published_loop(torchvision_deform=False)
    engines = {segmenter.engines["exact"]: EXACT_GATE, **(others or {})}
    runs: dict[str, tuple[Callable[[Sequence[Frame]], tuple[list[Mask], Work]], Gate | None]] = {
        **{name: (loop.run, None) for name, loop in loops.items()},
        **{engine.name: (partial(segment, engine), gate) for engine, gate in engines.items()},
    }
    results = [Result(name=name, frames=len(frames), gate=gate) for name, (_, gate) in runs.items()]
    for run, _ in runs.values():
        run(frames if device.type == "cuda" else frames[:2])
    for _ in range(rounds):
        published: list[Mask] = []
        for result, (run, _) in zip(results, runs.values(), strict=True):
            masks, work = _measured(run, frames, device)
            published = published or masks
            result.runs.append(work)
            result.ratios.append(results[0].runs[-1].seconds / work.seconds)
            result.agreement = Agreement.of(masks, published)
        yield results


def _measured(
    run: Callable[[Sequence[Frame]], tuple[list[Mask], Work]], frames: Sequence[Frame], device: torch.device
) -> tuple[list[Mask], Work]:
    before = _resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, see proc(5)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    masks, work = run(frames)
    work.seconds = time.perf_counter() - began
    work.memory_mib = _resident_mib("VmHWM") - before
    if device.type == "cuda":
        work.device_mib = torch.cuda.max_memory_allocated(device) / 2**20
    return masks, work


def _resident_mib(name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def untrained_network(config: IMCNetConfig, frames: Sequence[Frame], input_size: int) -> IMCNet:
    """A network with random weights that do something everywhere, the same in every run.

    As initialised, residual branches, offsets and the cue's weights are zero, and masks flat: that
    costs as much, but would not tell right masks from wrong ones. Here offsets are of about a pixel, and half
    of ``frames[0]`` is foreground. More pixels are near the threshold than with trained weights.
    """
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        torch.default_generator.manual_seed(0)
        network = build_network(config).eval()
        image = normalise(resize_frame(frames[0], input_size), config.normalisation)
        _let_all_parts_act(network, image)
        logits = network(image.expand(1, config.num_frames, -1, -1, -1)).logits
        scale = 1 / logits.std()
        network.segmentation.predict.weight.mul_(scale)
        bias = network.segmentation.predict.bias
        assert bias is not None
        bias.copy_((bias - logits.median()) * scale)
    return network


def _let_all_parts_act(network: IMCNet, image: Tensor) -> None:
    """Draw what starts at zero at random, in place; whitening takes its statistics from ``image``."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and isinstance(network.backbone, ResNetPyramid):
            module.weight.uniform_(0.2, 0.4)
        elif isinstance(module, AlignmentStage) and module.offsets.bias is not None:
            module.offsets.bias.uniform_(-1, 1)
        elif isinstance(module, SpatialAttention) and network.cue is not None:
            for conv in (module.features, module.attention):
                conv.weight[:, -CUE_CHANNELS:].normal_(std=0.05)
        elif isinstance(module, Compensation) and module.trust is not None:
            module.trust.weight.normal_(std=0.5)
    if network.whitening is not None:
        network.whitening.measure([network.backbone(image.unsqueeze(0))])
