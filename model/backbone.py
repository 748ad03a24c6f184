"""The ResNet under the network: one image to four maps."""

from typing import Literal, NamedTuple

from torch import Tensor, nn
from torchvision.models import get_model

BackboneName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


class Pyramid(NamedTuple):
    """Outputs of the four residual layers, ``(B, C, H/s, W/s)`` at strides s = 4, 8, 16 and 32."""

    v2: Tensor
    v3: Tensor
    v4: Tensor
    v5: Tensor


class ResNetPyramid(nn.Module):
    """A torchvision ResNet without its pooling and classifier, under torchvision's parameter names.

    Randomly initialised; nothing is downloaded. Every residual branch starts at zero: at random they
    add up over the depth, to maps that overflow once the decoder multiplies them with each other.

    Attributes:
        channels: Channels of the four maps.
    """

    def __init__(self, name: BackboneName) -> None:
        super().__init__()
        resnet = get_model(name, weights=None, zero_init_residual=True)
        self.conv1 = resnet.conv1
        self.bn1 = resnet.bn1
        self.relu = resnet.relu
        self.maxpool = resnet.maxpool
        self.layer1 = resnet.layer1
        self.layer2 = resnet.layer2
        self.layer3 = resnet.layer3
        self.layer4 = resnet.layer4
        width = resnet.fc.in_features // 8
        self.channels = (width, 2 * width, 4 * width, 8 * width)

    def forward(self, images: Tensor) -> Pyramid:
        """Args: normalised RGB images, ``(B, 3, H, W)``."""
        stem = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        v2 = self.layer1(stem)
        v3 = self.layer2(v2)
        v4 = self.layer3(v3)
        return Pyramid(v2, v3, v4, self.layer4(v4))
