import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from model.backbone import BackboneName
from model.checkpoints import infer_backbone, infer_num_frames, read_checkpoint, release_name
from model.errors import WeightsError
from model.imcnet import IMCNet, IMCNetConfig
from model.weights import file_sha256, import_checkpoint, load_weights

# Every module outside the backbone that holds parameters in the authors' code.
RELEASED_MODULES = {
    "K_r3.Key",
    "co_att_x3.left_transform",
    "co_att_x3.right_transform",
    "decoder.head",
    *(f"decoder.l3.{conv}" for conv in ("conv1", "conv2")),
    *(f"decoder.l{level}_head" for level in (2, 1, 0)),
    *(f"decoder.{kind}{level}.{conv}" for kind in "le" for level in (2, 1, 0) for conv in ("conv1", "conv2")),
    *(f"decoder.pd{level}.{part}" for level in (2, 1, 0) for part in ("0.conv1", "0.conv2", "1")),
    *(f"align.{name}" for name in ("cr0", "cr1", "cr2", "cr")),
    *(f"align.{name}" for name in ("off2d_0", "off2d_1", "off2d_2", "off2d")),
    *(f"align.{name}" for name in ("dconv_0", "dconv_1", "dconv_2", "dconv")),
    "fusion.temporal_attn1",
    "fusion.temporal_attn2",
    "fusion.feat_fusion",
    *(f"fusion.spatial_attn{number}" for number in (1, 2, 3, 4, 5)),
    *(f"fusion.spatial_attn_l{number}" for number in (1, 2, 3)),
    *(f"fusion.spatial_attn_add{number}" for number in (1, 2)),
    "segmentation.reslayer.conv1",
    "segmentation.reslayer.conv2",
    "segmentation.predlayer",
}


def _meta(backbone: BackboneName = "resnet18", num_frames: int = 3) -> IMCNet:
    with torch.device("meta"):
        return IMCNet(IMCNetConfig(backbone, num_frames))


def _released(network: IMCNet) -> dict[str, Tensor]:
    return {release_name(name): tensor for name, tensor in network.state_dict().items()}


@pytest.fixture
def released(make_network: Callable[..., IMCNet]) -> dict[str, Tensor]:
    return _released(make_network())


def _save(path: Path, model: object, **others: object) -> Path:
    torch.save({"model": model, **others}, path)
    return path


def _import(source: Path, path: Path) -> Any:
    return import_checkpoint(source, path, name="released", licence="MIT")


def test_every_parameter_has_one_name_in_the_release() -> None:
    network = _meta()
    names = [release_name(name) for name in network.state_dict()]
    assert len(set(names)) == len(names)
    heads = {name for name in names if not name.startswith("feature_extractor.backbone.")}
    assert heads == {f"{module}.{kind}" for module in RELEASED_MODULES for kind in ("weight", "bias")}


def test_a_name_of_no_module_is_refused() -> None:
    with pytest.raises(KeyError, match=r"propagation\.level9"):
        release_name("propagation.level9.merge.conv1.weight")


@pytest.mark.parametrize("backbone", [name for name in get_args(BackboneName) if name.startswith("resnet")])
def test_the_backbone_is_told_from_the_names(backbone: BackboneName) -> None:
    assert infer_backbone(_released(_meta(backbone)).keys()) == backbone


def test_an_unknown_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match="has 0 basic blocks in layer3"):
        infer_backbone({"features.0.weight"})


@pytest.mark.parametrize("num_frames", [3, 5, 7])
def test_the_frames_a_window_are_told_from_the_transform(num_frames: int) -> None:
    assert infer_num_frames(_released(_meta(num_frames=num_frames))) == num_frames


@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_imported_checkpoint_gives_equal_outputs(
    tmp_path: Path, make_network: Callable[..., IMCNet], prefix: str
) -> None:
    original = make_network(num_frames=5, frame_stride=2)
    model = OrderedDict((prefix + name, tensor) for name, tensor in _released(original).items())
    source = _save(tmp_path / "IMCNET_best.pth", model, model_name="IMCNET", epoch=99)
    info = import_checkpoint(source, tmp_path / "w", name="released", licence="MIT", frame_stride=2)
    assert info.trained
    assert info.config == original.config
    assert info.provenance == f"the authors' checkpoint IMCNET_best.pth, SHA-256 {file_sha256(source)}"

    imported, loaded_info = load_weights(tmp_path / "w")
    assert loaded_info == info
    windows = torch.randn(1, 5, 3, 32, 64)
    with torch.inference_mode():
        assert torch.equal(imported(windows).logits, original(windows).logits)


def test_the_state_of_a_training_run_beside_the_weights_is_no_obstacle(
    tmp_path: Path, released: dict[str, Tensor]
) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [35, 75], 0.5)
    stats = {"best_iou": np.float64(0.82), "best_f": np.float32(0.81), "loss_tr": [0.5], "loss_ts": []}
    source = _save(
        tmp_path / "full.pth",
        released,
        model_name="IMCNET",
        type="best",
        epoch=99,
        stats=stats,
        optimizer=optimizer.state_dict(),
        scheduler=scheduler.state_dict(),
    )
    assert _import(source, tmp_path / "w").config.backbone == "resnet18"


def test_absent_batch_counters_are_zero(tmp_path: Path, released: dict[str, Tensor]) -> None:
    old = {name: tensor for name, tensor in released.items() if "num_batches_tracked" not in name}
    assert len(old) < len(released)
    _import(_save(tmp_path / "old.pth", old), tmp_path / "w")
    network, _ = load_weights(tmp_path / "w")
    assert network.backbone.bn1.num_batches_tracked == 0


def test_missing_and_left_over_names_are_listed(tmp_path: Path, released: dict[str, Tensor]) -> None:
    del released["decoder.e1.conv2.bias"]
    released["feature_extractor.backbone.fc.weight"] = torch.zeros(2)
    released["segmentation.predlayer.bias"] = torch.zeros(2)
    source = _save(tmp_path / "odd.pth", released)
    with pytest.raises(WeightsError) as caught:
        _import(source, tmp_path / "w")
    assert str(caught.value) == (
        f"{source}: not the weights of resnet18, variant full, with 3 frames a window and "
        "4 alignment stage(s): missing: decoder.e1.conv2.bias; "
        "left over: feature_extractor.backbone.fc.weight; "
        "segmentation.predlayer.bias: expected (1,) float32, got (2,) float32"
    )
    assert not (tmp_path / "w").exists()


def test_another_number_of_frames_is_refused(tmp_path: Path, released: dict[str, Tensor]) -> None:
    released["co_att_x3.left_transform.weight"] = torch.zeros(4 * 64, 4 * 64, 1, 1)
    with pytest.raises(WeightsError, match="num_frames must be 3, 5 or 7, got 4"):
        _import(_save(tmp_path / "odd.pth", released), tmp_path / "w")


@pytest.mark.parametrize("contents", [{"state_dict": {}}, {"model": 3}, [1, 2], torch.zeros(2)])
def test_a_file_without_weights_is_refused(tmp_path: Path, contents: object) -> None:
    torch.save(contents, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match="expected a dictionary with the weights under 'model'"):
        read_checkpoint(tmp_path / "odd.pth")


def test_values_other_than_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="expected tensors only, got something else under a, 1"):
        read_checkpoint(_save(tmp_path / "odd.pth", {"a": 1.0, "b": torch.zeros(1), 1: "x"}))


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    marker, source = tmp_path / "marker", tmp_path / "bomb.pth"
    for write in (torch.save, _pickle):
        write({"model": {}, "stats": Bomb(marker)}, source)
        with pytest.raises(WeightsError, match="holds more than tensors and plain values"):
            _import(source, tmp_path / "w")
        assert not marker.exists()
    # The bomb is live: it is the reading that keeps it from going off.
    with source.open("rb") as file:
        pickle.load(file)["stats"].close()
    assert marker.exists()


def _pickle(contents: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(contents, protocol=2))


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, kept: float) -> None:
    path = _save(tmp_path / "cut.pth", {"a": torch.zeros(1000)})
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(WeightsError, match="not a readable checkpoint"):
        read_checkpoint(path)


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.pth: not a readable checkpoint"):
        read_checkpoint(tmp_path / "none.pth")
