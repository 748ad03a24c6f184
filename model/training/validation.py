"""Validation during training: held-out J of windows and of the still path, and example masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.evaluation.jaccard import region_similarity
from model.imcnet import IMCNet, foreground_probability
from model.preprocess import normalise
from model.training.samples import Sample, SampleSource


class HeldOut(SampleSource, Protocol):
    """Windows of sequences that training never sees."""

    @property
    def names(self) -> Sequence[str]:
        """The sequence of each window."""
        ...


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
    """J on all windows. Leaves the network in evaluation mode."""
    network.eval()
    found: dict[str, list[tuple[float, float]]] = {}
    for place, name in enumerate(held_out.names):
        found.setdefault(name, []).append(_similarities(network, _sample(held_out, place, size)))
    windows, stills = (
        {name: float(np.mean([pair[path] for pair in pairs])) for name, pairs in found.items()}
        for path in (0, 1)
    )
    return Scores(windows, stills)


@torch.inference_mode()
def examples(network: IMCNet, held_out: HeldOut, size: int) -> Tensor:
    """Centre frames of up to 4 windows, spread over all, with their masks in red over them.

    Leaves the network in evaluation mode.

    Returns:
        ``(N, 3, size, size)`` uint8.
    """
    network.eval()
    pictures = []
    for place in np.linspace(0, len(held_out) - 1, min(_EXAMPLES, len(held_out))).round():
        sample = _sample(held_out, int(place), size)
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


def _sample(held_out: HeldOut, place: int, size: int) -> Sample:
    return held_out.sample(place, np.random.default_rng(0), size)


def _input(network: IMCNet, sample: Sample) -> Tensor:
    """``(T, 3, size, size)``, normalised, on the network's device."""
    device = next(network.parameters()).device
    return normalise(sample.frames.to(device), network.config.normalisation)


def _window_logits(network: IMCNet, frames: Tensor) -> Tensor:
    return network.decode_window([network.encode_frame(frame) for frame in torch.split(frames, 1)])


def _mask(logits: Tensor) -> Tensor:
    """``(size, size)`` bool on the CPU."""
    return (foreground_probability(logits.float()) >= 0.5)[0, 0].cpu()
