"""What training starts from: random weights, those of a backbone, or those of a whole network."""

from pathlib import Path
from typing import Literal

import torch

from model.backbone import imagenet_normalisation, load_backbone
from model.errors import WeightsError
from model.imcnet import IMCNet, IMCNetConfig
from model.variants import build_network
from model.weights import file_sha256

BackboneWeights = Path | Literal["imagenet", "random"]


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


def describe_start(weights: Path | Literal["imagenet", "random"]) -> str:
    """Say what a training starts from, for the weights that come of it.

    Args:
        weights: Of a network or of a backbone.

    Raises:
        WeightsError: The file cannot be read.
    """
    if isinstance(weights, Path):
        return f"{weights.name}, SHA-256 {file_sha256(weights)}"
    return {"imagenet": "torchvision's IMAGENET1K_V1", "random": "random weights"}[weights]
