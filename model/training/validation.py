"""How good a network is while it trains: J of windows of the validation videos, and masks to look at."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from model.evaluation.jaccard import region_similarity
from model.imcnet import IMCNet, foreground_probability
from model.preprocess import normalise
from model.training.samples import Sample, SampleSource

_WINDOWS = 64
_EXAMPLES = 4
_TINT = (230, 60, 60)


def mean_similarity(network: IMCNet, source: SampleSource, size: int) -> float:
    """Mean J of up to 64 windows, spread over the source. Leaves the network in evaluation mode."""
    scores = []
    for sample in _spread(source, _WINDOWS, size):
        truth = sample.masks[len(sample.masks) // 2]
        scores.append(region_similarity(_mask(network, sample).numpy(), truth.numpy()))
    return float(np.mean(scores))


def examples(network: IMCNet, source: SampleSource, size: int) -> Tensor:
    """Centre frames of up to 4 windows, spread over the source, with their masks in red over them.

    Leaves the network in evaluation mode.

    Returns:
        ``(N, 3, size, size)`` uint8.
    """
    pictures = []
    for sample in _spread(source, _EXAMPLES, size):
        frame = sample.frames[len(sample.frames) // 2]
        tinted = (frame.float() + torch.tensor(_TINT).view(3, 1, 1)) / 2
        pictures.append(torch.where(_mask(network, sample), tinted.to(torch.uint8), frame))
    return torch.stack(pictures)


def _spread(source: SampleSource, count: int, size: int) -> Iterator[Sample]:
    for place in np.linspace(0, len(source) - 1, min(count, len(source))).round():
        yield source.sample(int(place), np.random.default_rng(0), size)


@torch.inference_mode()
def _mask(network: IMCNet, sample: Sample) -> Tensor:
    """``(size, size)`` bool on the CPU."""
    device = next(network.parameters()).device
    frames = normalise(sample.frames.to(device), network.config.normalisation)
    logits = network.eval()(frames.unsqueeze(0)).logits
    return (foreground_probability(logits.float()) >= 0.5)[0, 0].cpu()
