"""What training starts from: random weights, those of a backbone, or those of a whole network."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from model.backbone import imagenet_normalisation, load_backbone
from model.errors import WeightsError
from model.imcnet import IMCNet, IMCNetConfig
from model.preprocess import normalise
from model.pyramid import Pyramid
from model.training.samples import SampleSource
from model.variants import build_network
from model.weights import file_sha256

BackboneWeights = Path | Literal["imagenet", "random"]
_WHITENING_STILLS = 320
_WHITENING_SIZE = 256  # pixels
_WHITENING_BATCH = 8


def new_network(config: IMCNetConfig, backbone_weights: BackboneWeights, *, seed: int) -> IMCNet:
    """Build a network: random but for its backbone; the same seed makes the same one.

    Args:
        backbone_weights: As ``load_backbone`` takes them, or ``random``.

    Raises:
        WeightsError: The backbone's weights cannot be had, are not this backbone's, or take images that are
            normalised otherwise.
    """
    needed = imagenet_normalisation(config.backbone)
    if backbone_weights == "imagenet" and config.normalisation != needed:
        raise WeightsError(
            f"ImageNet's weights of {config.backbone} take images normalised as {needed!r}, the "
            f"configuration says {config.normalisation!r}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = build_network(config)
    if backbone_weights != "random":
        load_backbone(network.backbone, config.backbone, backbone_weights)
    return network


@torch.inference_mode()
def measure_whitening(network: IMCNet, stills: SampleSource, *, seed: int) -> None:
    """Set the whitening to the statistics of 320 stills at 256 pixels, the same for the same seed.

    A network without whitening stays as it is.
    """
    if network.whitening is not None:
        network.whitening.measure(_pyramids(network, stills, seed))


def _pyramids(network: IMCNet, stills: SampleSource, seed: int) -> Iterator[Pyramid]:
    for start in range(0, _WHITENING_STILLS, _WHITENING_BATCH):
        frames = []
        for place in range(start, start + _WHITENING_BATCH):
            rng = np.random.default_rng((seed, place))
            frames.append(stills.sample(int(rng.integers(len(stills))), rng, _WHITENING_SIZE).frames)
        yield network.backbone(normalise(torch.cat(frames), network.config.normalisation))


def describe_start(weights: Path | Literal["imagenet", "random"]) -> str:
    """Say what a training starts from, for the weights that come of it.

    Args:
        weights: Of a network or of a backbone.

    Raises:
        WeightsError: The file cannot be read.
    """
    if isinstance(weights, Path):
        return f"{weights.name}, SHA-256 {file_sha256(weights)}"
    return {"imagenet": "ImageNet's weights of the backbone", "random": "random weights"}[weights]
