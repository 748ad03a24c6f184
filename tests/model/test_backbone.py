import pytest
import torch

from model.backbone import BackboneName, ResNetPyramid


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", (64, 128, 256, 512)),
        ("resnet34", (64, 128, 256, 512)),
        ("resnet50", (256, 512, 1024, 2048)),
        ("resnet101", (256, 512, 1024, 2048)),
        ("resnet152", (256, 512, 1024, 2048)),
    ],
)
def test_maps_have_their_channels_and_strides(name: BackboneName, channels: tuple[int, ...]) -> None:
    with torch.device("meta"):
        backbone = ResNetPyramid(name)
        pyramid = backbone(torch.empty(2, 3, 96, 160))
    assert backbone.channels == channels
    for level, width, stride in zip(pyramid, channels, (4, 8, 16, 32), strict=True):
        assert level.shape == (2, width, 96 // stride, 160 // stride)


def test_an_untrained_deep_backbone_stays_finite_and_small() -> None:
    torch.manual_seed(0)
    backbone = ResNetPyramid("resnet101").eval()
    with torch.inference_mode():
        pyramid = backbone(torch.randn(1, 3, 64, 64))
    assert all(level.abs().max() < 10 for level in pyramid)
