from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import get_model, get_model_weights

from model.backbone import BackboneName, ResNetPyramid, load_backbone, save_backbone
from model.errors import WeightsError


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


# -- weights to start from -------------------------------------------------------------------------------


def test_a_backbone_is_read_as_it_was_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    written, read = ResNetPyramid("resnet18"), ResNetPyramid("resnet18")
    save_backbone(tmp_path / "backbone", written, "resnet18")
    load_backbone(read, "resnet18", tmp_path / "backbone")
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]), name


def test_the_file_of_another_backbone_is_refused(tmp_path: Path) -> None:
    save_backbone(tmp_path / "backbone", ResNetPyramid("resnet18"), "resnet18")
    with pytest.raises(WeightsError, match="expected the weights of resnet34, these are resnet18"):
        load_backbone(ResNetPyramid("resnet34"), "resnet34", tmp_path / "backbone")


@pytest.mark.parametrize("change", ["missing", "left over", "another shape"])
def test_a_backbone_must_get_every_tensor_and_leave_none(change: str, tmp_path: Path) -> None:
    tensors = ResNetPyramid("resnet18").state_dict()
    if change == "missing":
        del tensors["layer2.0.conv1.weight"]
    elif change == "left over":
        tensors["layer2.9.conv1.weight"] = torch.zeros(1)
    else:
        tensors["layer2.0.conv1.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "backbone", {"backbone": "resnet18"})
    with pytest.raises(WeightsError, match=r"not the weights of resnet18: .*layer2\.[09]\.conv1\.weight"):
        load_backbone(ResNetPyramid("resnet18"), "resnet18", tmp_path / "backbone")


def test_a_file_that_holds_no_backbone_is_refused(tmp_path: Path, untrained_weights: Path) -> None:
    (tmp_path / "text").write_text("text")
    for path in (tmp_path / "text", tmp_path / "missing", untrained_weights):
        with pytest.raises(WeightsError, match=path.name):
            load_backbone(ResNetPyramid("resnet18"), "resnet18", path)


def test_imagenets_weights_are_torchvisions_without_the_classifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of torchvision's cache, where a download would have put them."""
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    published = get_model("resnet18")
    url = get_model_weights("resnet18")["IMAGENET1K_V1"].url
    torch.save(published.state_dict(), cache / Path(url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    backbone = ResNetPyramid("resnet18")
    load_backbone(backbone, "resnet18", "imagenet")
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, published.state_dict()[name]), name


def test_a_download_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    with pytest.raises(WeightsError, match="cannot download ImageNet's weights of resnet18"):
        load_backbone(ResNetPyramid("resnet18"), "resnet18", "imagenet")
