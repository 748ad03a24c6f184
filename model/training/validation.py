"""How good a network is while it trains: J on held-out sequences, with motion and without, and masks to view."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.evaluation.jaccard import region_similarity
from model.imcnet import IMCNet, foreground_probability
from model.preprocess import normalise
from model.training.samples import Sample, SampleSource

HeldOut = Mapping[str, SampleSource]
"""Windows of each held-out sequence, by its name."""

_WINDOWS = 64
_EXAMPLES = 4
_TINT = (230, 60, 60)


@dataclass(frozen=True)
class Scores:
    """Mean J of each sequence, in [0, 1].

    Args:
        windows: J of the network's masks of windows.
        stills: J of the same weights' masks of the centre frames alone.
    """

    windows: dict[str, float]
    stills: dict[str, float]

    @property
    def j(self) -> float:
        """Mean of the windows' J over sequences."""
        return float(np.mean(list(self.windows.values())))

    @property
    def still_j(self) -> float:
        """Mean of the still path's J over sequences."""
        return float(np.mean(list(self.stills.values())))


@torch.inference_mode()
def score(network: IMCNet, held_out: HeldOut, size: int) -> Scores:
    """J on about 64 windows, as many of each sequence. Leaves the network in evaluation mode."""
    count = max(1, round(_WINDOWS / len(held_out)))
    network.eval()
    windows: dict[str, float] = {}
    stills: dict[str, float] = {}
    for name, source in held_out.items():
        pairs = [_similarities(network, sample) for sample in _spread(source, count, size)]
        windows[name], stills[name] = (float(np.mean(of_path)) for of_path in zip(*pairs, strict=True))
    return Scores(windows, stills)


@torch.inference_mode()
def examples(network: IMCNet, held_out: HeldOut, size: int) -> Tensor:
    """A centre frame of each of up to 4 sequences, with its mask in red over it.

    Leaves the network in evaluation mode.

    Returns:
        ``(N, 3, size, size)`` uint8.
    """
    network.eval()
    pictures = []
    for source in list(held_out.values())[:_EXAMPLES]:
        (sample,) = _spread(source, 1, size)
        frame = sample.frames[len(sample.frames) // 2]
        tinted = (frame.float() + torch.tensor(_TINT).view(3, 1, 1)) / 2
        mask = _mask(_window_logits(network, _input(network, sample)))
        pictures.append(torch.where(mask, tinted.to(torch.uint8), frame))
    return torch.stack(pictures)


def _similarities(network: IMCNet, sample: Sample) -> tuple[float, float]:
    """J of the window's mask and of the still path's."""
    frames, centre = _input(network, sample), len(sample.frames) // 2
    truth = (sample.masks[centre] >= 128).numpy()
    still = network.segment_image(frames[centre : centre + 1]).logits
    both = _mask(_window_logits(network, frames)), _mask(still)
    first, second = (float(region_similarity(mask.numpy(), truth)) for mask in both)
    return first, second


def _spread(source: SampleSource, count: int, size: int) -> Iterator[Sample]:
    """Samples in the middles of ``count`` equal parts of the source."""
    count = min(count, len(source))
    for place in range(count):
        yield source.sample((2 * place + 1) * len(source) // (2 * count), np.random.default_rng(0), size)


def _input(network: IMCNet, sample: Sample) -> Tensor:
    """``(T, 3, size, size)``, normalised, on the network's device."""
    device = next(network.parameters()).device
    return normalise(sample.frames.to(device), network.config.normalisation)


def _window_logits(network: IMCNet, frames: Tensor) -> Tensor:
    return network.decode_window([network.encode_frame(frame) for frame in frames.split(1)])


def _mask(logits: Tensor) -> Tensor:
    """``(size, size)`` bool on the CPU."""
    return (foreground_probability(logits.float()) >= 0.5)[0, 0].cpu()
