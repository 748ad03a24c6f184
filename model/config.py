"""Configuration of a network: backbone, window, variant, and options beyond the paper."""

from dataclasses import dataclass
from typing import Literal, get_args

from model.backbone import BackboneName, imagenet_normalisation
from model.preprocess import Normalisation

Variant = Literal["full", "no_acm", "no_key_encoder", "fpn", "regular_conv", "no_tsc"]


@dataclass(frozen=True)
class IMCNetConfig:
    """Configuration of a network, stored with its weights.

    Args:
        backbone: Network that encodes frames.
        num_frames: Frames a window, 3, 5 or 7.
        frame_stride: Distance between neighbouring frames of a window, in frames of the video.
        variant: Ablation, which lacks or replaces a part; see ``model.variants.build_network``.
        alignment_stages: Stages of the cascading alignment, L of Eq. 8-10, 0 to 5; at 0, the
            neighbours are not aligned.
        normalisation: Normalisation of images x in [0, 255], by channel: ``imagenet`` is
            (x / 255 - mean) / deviation with ImageNet's statistics, ``centred`` is (x - 127) / 128.
        whitening: Whether V2 to V4 become W(V) and V5 becomes 2.5 ReLU(W(V5)), where W(V) is
            (V - mean) / sqrt(variance + 1e-5) by channel with fixed statistics; otherwise V stays V.
        motion_cue: Whether the fusion takes 64 more maps, which show motion against the camera: softmax
            (25 C) of the correlation C(p, d) = <V3(p), V3'(p + d)> over displacements d gives the expected
            flow F(p) and its confidence, an affine camera motion A is fitted to F, and convolutions read
            F - A, confidence and C beside V3 and P2 of the centre frame; see ``model.motion_cue``. Its
            features become P2 + t (fused - P2), where the cue gives t in (0, 1); see ``Compensation``.

    Raises:
        ValueError: A value is not one of those allowed, or an option asks for a part that the variant lacks.
    """

    backbone: BackboneName = "resnet101"
    num_frames: int = 3
    frame_stride: int = 4
    variant: Variant = "full"
    alignment_stages: int = 4
    normalisation: Normalisation = "imagenet"
    whitening: bool = False
    motion_cue: bool = False

    def __post_init__(self) -> None:
        backbones = get_args(BackboneName)
        if self.backbone not in backbones:
            raise ValueError(f"backbone must be one of {', '.join(backbones)}, got {self.backbone!r}")
        if self.num_frames not in (3, 5, 7):
            raise ValueError(f"num_frames must be 3, 5 or 7, got {self.num_frames!r}")
        if not isinstance(self.frame_stride, int) or self.frame_stride < 1:
            raise ValueError(f"frame_stride must be an integer of at least 1, got {self.frame_stride!r}")
        variants = get_args(Variant)
        if self.variant not in variants:
            raise ValueError(f"variant must be one of {', '.join(variants)}, got {self.variant!r}")
        if not isinstance(self.alignment_stages, int) or not 0 <= self.alignment_stages <= 5:
            raise ValueError(
                f"alignment_stages must be an integer from 0 to 5, got {self.alignment_stages!r}"
            )
        normalisations = get_args(Normalisation)
        if self.normalisation not in normalisations:
            raise ValueError(
                f"normalisation must be one of {', '.join(normalisations)}, got {self.normalisation!r}"
            )
        for name in ("whitening", "motion_cue"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.motion_cue and self.variant == "no_tsc":
            raise ValueError("motion_cue needs the spatial attention, which variant no_tsc lacks")


def usual_config(backbone: BackboneName) -> IMCNetConfig:
    """For a ResNet the paper's network; for an EfficientNet-Lite the network of the shipped recipe."""
    if imagenet_normalisation(backbone) == "imagenet":
        return IMCNetConfig(backbone)
    return IMCNetConfig(
        backbone,
        variant="no_acm",
        alignment_stages=0,  # neither ACM nor alignment gained anything: see docs/training.md
        normalisation="centred",
        whitening=True,
        motion_cue=True,
    )
