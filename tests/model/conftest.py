from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from model.backbone import BackboneName
from model.config import usual_config
from model.imcnet import AlignmentStage, IMCNet, Variant
from model.motion_cue import CUE_CHANNELS
from model.variants import build_network

MakeNetwork = Callable[..., IMCNet]
MakeFrames = Callable[..., list[NDArray[np.uint8]]]


def _make_network(
    num_frames: int = 3,
    frame_stride: int = 4,
    variant: Variant | None = None,
    alignment_stages: int | None = None,
    seed: int = 0,
    backbone: BackboneName = "resnet18",
) -> IMCNet:
    """A small network that does something everywhere: no branch silent, offsets of about a pixel, and
    about as much foreground as background. Untrained networks show one flat mask, which proves little.
    What is None is that of the backbone's usual configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        usual = usual_config(backbone)
        config = replace(
            usual,
            num_frames=num_frames,
            frame_stride=frame_stride,
            variant=variant or usual.variant,
            alignment_stages=usual.alignment_stages if alignment_stages is None else alignment_stages,
        )
        network = build_network(config).eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                # 50 layers without a way around them would silence a network of smaller weights.
                nn.init.uniform_(module.weight, *((0.5, 1.0) if backbone == "resnet18" else (0.9, 1.1)))
                nn.init.uniform_(module.bias, -0.2, 0.2)
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.8, 1.2)
        for module in network.modules():
            if isinstance(module, AlignmentStage):
                nn.init.uniform_(module.offsets.bias, -1.5, 1.5)
                nn.init.normal_(module.offsets.weight, std=0.02)
        _use_options(network)
        with torch.inference_mode():
            logits = network(torch.randn(2, num_frames, 3, 64, 64)).logits
        predict = network.segmentation.predict
        with torch.no_grad():
            scale = 1 / logits.std().item()
            predict.weight.mul_(scale)
            predict.bias.copy_((predict.bias - logits.median()) * scale)
    return network


@torch.no_grad()
def _use_options(network: IMCNet) -> None:
    """Options start without effect, or with statistics that have not been measured."""
    if network.whitening is not None:
        network.whitening.measure([network.backbone(torch.randn(2, 3, 96, 96))])
    if network.cue is not None:
        for conv in (network.compensation.spatial.features, network.compensation.spatial.attention):
            conv.weight[:, -CUE_CHANNELS:].normal_(std=0.05)
        network.compensation.trust.weight.normal_(std=0.5)


@pytest.fixture(scope="session")
def make_network() -> MakeNetwork:
    return _make_network


@pytest.fixture(scope="session")
def network() -> IMCNet:
    """Shared: a test that changes it makes its own."""
    return _make_network()


@pytest.fixture(scope="session")
def network64() -> IMCNet:
    """In float64, where an equality is not drowned in rounding. Shared like ``network``."""
    return _make_network().double()


@pytest.fixture(scope="session")
def lite_network() -> IMCNet:
    """EfficientNet-Lite0 in its usual configuration: no ACM, all options. Shared like ``network``."""
    return _make_network(backbone="efficientnet_lite0")


@pytest.fixture(scope="session")
def make_frames() -> MakeFrames:
    def make(count: int, height: int = 40, width: int = 56, seed: int = 0) -> list[NDArray[np.uint8]]:
        random = np.random.default_rng(seed)
        return list(random.integers(0, 256, (count, height, width, 3), dtype=np.uint8))

    return make
