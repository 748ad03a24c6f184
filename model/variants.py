"""The ablations of the paper's tables I and II: their rows, and the networks that they need.

A network of an ablation is the full one with a single part taken out or exchanged. The tables name these
parts in a word or two; what that leaves open is decided at ``build_network`` and at each part.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from model.imcnet import CHANNELS, Affinity, IMCNet, IMCNetConfig, Propagated
from model.layers import Residual, conv1x1, conv3x3, resize
from model.pyramid import Pyramid
from model.views import Quality


@dataclass(frozen=True)
class Row:
    """What one row of the tables trains, and how its masks are made.

    Args:
        config: The network and its windows, with the backbone of the paper; a row can be tried with others.
        quality: How often each frame is looked at.
        training: Both stages, the first alone, or both without still images in the second.
    """

    config: IMCNetConfig
    quality: Quality = "exact"
    training: Literal["both", "stage1_only", "no_joint"] = "both"


# Four stages of alignment, three frames and a stride of 4 are the full network and have no row of their own.
ROWS: dict[str, Row] = {
    "full": Row(IMCNetConfig()),
    "multi_scale": Row(IMCNetConfig(), quality="multi_scale"),
    "no_acm": Row(IMCNetConfig(variant="no_acm")),
    "no_key_encoder": Row(IMCNetConfig(variant="no_key_encoder")),
    "fpn": Row(IMCNetConfig(variant="fpn")),
    "regular_conv": Row(IMCNetConfig(variant="regular_conv")),
    "l1": Row(IMCNetConfig(alignment_stages=1)),
    "l2": Row(IMCNetConfig(alignment_stages=2)),
    "l3": Row(IMCNetConfig(alignment_stages=3)),
    "l5": Row(IMCNetConfig(alignment_stages=5)),
    "no_tsc": Row(IMCNetConfig(variant="no_tsc")),
    "stage1_only": Row(IMCNetConfig(), training="stage1_only"),
    "no_joint": Row(IMCNetConfig(), training="no_joint"),
    "frames5": Row(IMCNetConfig(num_frames=5)),
    "frames7": Row(IMCNetConfig(num_frames=7)),
    "stride1": Row(IMCNetConfig(frame_stride=1)),
    "stride2": Row(IMCNetConfig(frame_stride=2)),
    "stride6": Row(IMCNetConfig(frame_stride=6)),
}


def row_of(config: IMCNetConfig, quality: Quality) -> str:
    """Name the row of a network that went through the whole training, whatever its backbone.

    Normalisation is that of the backbone's weights, and does not count either.

    Raises:
        ValueError: The tables have no such row; they change one thing at a time.
    """
    paper = IMCNetConfig()
    config = replace(config, backbone=paper.backbone, normalisation=paper.normalisation)
    for name, row in ROWS.items():
        if row == Row(config, quality):
            return name
    raise ValueError(f"the paper's tables have no row for {config} with quality {quality!r}")


def build_network(config: IMCNetConfig) -> IMCNet:
    """Build the network that ``config`` describes, randomly initialised.

    ``no_acm`` lets Z be 1, as for still images; a frame's P2 is then the same in every window.
    ``no_key_encoder`` takes V5 itself for the keys, so that P and Q of Eq. 2 grow to T * C_v channels.
    ``no_tsc`` fuses the aligned frames, side by side, by one 3x3 convolution without an activation.

    A part that is exchanged keeps its name. The others start as those of the full network do from the same
    random state.
    """
    network = IMCNet(replace(config, variant="full"))
    network.config = config
    channels = network.backbone.channels
    match config.variant:
        case "no_acm":
            network.key_encoder = network.affinity = None
        case "no_key_encoder":
            network.set_submodule("key_encoder", nn.Identity())
            network.affinity = Affinity(config.num_frames * channels[-1])
        case "fpn":
            network.set_submodule("propagation", PyramidDecoder(channels))
        case "regular_conv":
            stages = (RegularStage() for _ in range(config.alignment_stages))
            network.set_submodule("alignment.stages", nn.ModuleList(stages))
        case "no_tsc":
            fusion = conv3x3(config.num_frames * CHANNELS, CHANNELS)
            network.set_submodule("compensation", nn.Sequential(nn.Flatten(1, 2), fusion))
    return network


class PyramidDecoder(nn.Module):
    """Stands in for ``AttentionPropagation``: a feature pyramid network (Lin et al., CVPR 2017), no guides.

    Its top level is the attended V5 of the full network, or the affinity would be lost with the guides.
    Its side masks are predicted from its four levels by the heads of the full network, and M5, which there
    needs no parameters, by one more of these: the deep supervision of Eq. 16 remains.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork(list(channels), CHANNELS)
        self.head2, self.head3, self.head4, self.head5 = (
            nn.Sequential(Residual(CHANNELS), conv1x1(CHANNELS, 1), nn.Sigmoid()) for _ in channels
        )

    def forward(self, pyramid: Pyramid, enhanced: Tensor) -> Propagated:
        """Decode N frames, each on its own, from their maps and Z, which has the shape of V5."""
        attended = pyramid.v5 * enhanced * enhanced.mean(dim=(2, 3), keepdim=True)
        p2, p3, p4, p5 = self.fpn(pyramid._replace(v5=attended)._asdict()).values()
        return Propagated(p2, (self.head5(p5), self.head4(p4), self.head3(p3)))

    def side_masks(self, decoded: Propagated, size: Sequence[int]) -> Tensor:
        """Bring M5, M4, M3 and M2 to ``size``: ``(N, 4, H, W)`` in [0, 1]."""
        masks = (*decoded.guides, self.head2(decoded.features))
        return torch.cat([resize(mask, size) for mask in masks], dim=1)


class RegularStage(nn.Module):
    """Stands in for ``AlignmentStage``: a 3x3 convolution whose taps stay where they are.

    Without offsets to predict, the reference has no part in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv3x3(CHANNELS, CHANNELS)

    def forward(self, reference: Tensor, features: Tensor) -> Tensor:
        """Args: as those of ``AlignmentStage``. Returns the features convolved, same shape."""
        convolved: Tensor = self.conv(features)
        return convolved
