import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import WeightsError
from model.imcnet import IMCNet, IMCNetConfig
from model.weights import WeightsInfo, file_sha256, init_weights, load_weights, read_info, save_weights

CONFIG = IMCNetConfig("resnet18")
INFO = WeightsInfo("test", CONFIG, trained=True, provenance="made for a test", licence="MIT")


@pytest.fixture
def path(tmp_path: Path, network: IMCNet) -> Path:
    path = tmp_path / "weights.safetensors"
    save_weights(path, network, INFO)
    return path


def _rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    """Change tensors and information of a weights file in place."""
    tensors, fields = load_file(path), _fields(path)
    change(tensors, fields)
    save_file(tensors, path, {"imcnet": json.dumps(fields)})


def _fields(path: Path) -> dict[str, Any]:
    header_size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + header_size])
    fields: dict[str, Any] = json.loads(header["__metadata__"]["imcnet"])
    return fields


def _refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load_weights(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_weights_come_back_bit_by_bit(path: Path, network: IMCNet) -> None:
    loaded, info = load_weights(path)
    assert info == INFO
    assert read_info(path) == INFO
    assert loaded.config == network.config
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    expected = network.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected.pop(name)), name
    assert not expected


def test_a_file_without_options_is_that_of_the_papers_network(path: Path, network: IMCNet) -> None:
    """Such as earlier releases write and read."""
    stored: list[set[str]] = []
    _rewrite(path, lambda tensors, fields: stored.append(set(fields["config"])))
    assert stored == [{"backbone", "num_frames", "frame_stride", "variant", "alignment_stages"}]
    loaded, info = load_weights(path)
    assert info == INFO
    assert all(
        torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in network.state_dict().items()
    )


def test_weights_with_all_options_come_back(tmp_path: Path, lite_network: IMCNet) -> None:
    info = replace(INFO, config=lite_network.config)
    save_weights(tmp_path / "half", lite_network, info, dtype=torch.float16)
    assert (tmp_path / "half").stat().st_size < 12e6
    loaded, found = load_weights(tmp_path / "half")
    assert found == info
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in lite_network.named_buffers())


def test_weights_of_other_options_are_refused(tmp_path: Path, lite_network: IMCNet) -> None:
    save_weights(tmp_path / "w", lite_network, replace(INFO, config=lite_network.config))
    _rewrite(tmp_path / "w", lambda tensors, fields: fields["config"].update(motion_cue=False))
    message = _refusal(tmp_path / "w")
    assert (
        "0 alignment stage(s), whitening: left over: compensation.trust.bias, compensation.trust" in message
    )
    assert (
        "compensation.spatial.features.weight: expected (64, 192, 1, 1) float32, got (64, 256, 1, 1)"
        in message
    )


def test_the_same_weights_make_the_same_file(path: Path, tmp_path: Path, network: IMCNet) -> None:
    save_weights(tmp_path / "again", network, INFO)
    assert file_sha256(tmp_path / "again") == file_sha256(path)


def test_a_file_is_written_whole_or_not_at_all(path: Path, network: IMCNet) -> None:
    before = file_sha256(path)
    with pytest.raises(WeightsError, match="cannot be written"):
        save_weights(path / "below", network, INFO)
    save_weights(path, network, INFO)
    assert file_sha256(path) == before
    assert os.listdir(path.parent) == [path.name]


def test_a_file_can_be_read_by_whom_the_umask_allows(tmp_path: Path, network: IMCNet) -> None:
    (tmp_path / "plain").touch()
    save_weights(tmp_path / "weights", network, INFO)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "weights")]
    assert modes[0] == modes[1]


def test_information_about_another_network_is_refused(tmp_path: Path, network: IMCNet) -> None:
    info = replace(INFO, config=IMCNetConfig("resnet50"))
    with pytest.raises(ValueError, match=r"info describes .*resnet50.* but the network is .*resnet18"):
        save_weights(tmp_path / "weights", network, info)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_as_float32(
    tmp_path: Path, make_network: Callable[..., IMCNet], dtype: torch.dtype
) -> None:
    network = make_network().to(dtype)
    save_weights(tmp_path / "half", network, INFO)
    assert (tmp_path / "half").stat().st_size < 30e6
    loaded, _ = load_weights(tmp_path / "half")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for half, full in zip(network.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(half.float(), full)


def test_weights_can_be_stored_in_half_precision(tmp_path: Path, network: IMCNet) -> None:
    save_weights(tmp_path / "half", network, INFO, dtype=torch.float16)
    stored = load_file(tmp_path / "half")
    parameters = dict(network.named_parameters())
    for name, tensor in network.state_dict().items():
        if name in parameters:
            assert stored[name].dtype == torch.float16
            torch.testing.assert_close(stored[name].float(), tensor, rtol=2**-11, atol=2**-25)
        else:
            assert torch.equal(stored[name], tensor)
            assert stored[name].dtype == tensor.dtype
    loaded, _ = load_weights(tmp_path / "half")
    assert all(
        torch.equal(tensor, stored[name].to(tensor.dtype)) for name, tensor in loaded.state_dict().items()
    )
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_a_value_too_large_for_half_precision_is_refused(
    tmp_path: Path, make_network: Callable[..., IMCNet]
) -> None:
    network = make_network()
    bias = network.backbone.bn1.bias.data
    bias[3] = 65_519  # still rounds to the largest number there is
    save_weights(tmp_path / "half", network, INFO, dtype=torch.float16)
    bias[3] = 65_520
    with pytest.raises(WeightsError) as caught:
        save_weights(tmp_path / "over", network, INFO, dtype=torch.float16)
    message = "backbone.bn1.bias holds 65520, too large for torch.float16"
    assert str(caught.value) == f"{tmp_path / 'over'}: {message}"
    assert not (tmp_path / "over").exists()


def test_weights_are_not_stored_as_integers(tmp_path: Path, network: IMCNet) -> None:
    with pytest.raises(ValueError, match=r"dtype must be a floating type, got torch\.int8"):
        save_weights(tmp_path / "weights", network, INFO, dtype=torch.int8)


def test_a_file_that_says_nothing_of_variants_is_the_full_network(path: Path) -> None:
    def change(tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
        del fields["config"]["variant"]
        del fields["config"]["alignment_stages"]

    _rewrite(path, change)
    network, info = load_weights(path)
    assert network.config == info.config == CONFIG


def test_untrained_weights_are_marked_and_follow_their_seed(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    info = init_weights(tmp_path / "a", CONFIG, seed=1)
    init_weights(tmp_path / "b", CONFIG, seed=1)
    init_weights(tmp_path / "c", CONFIG, seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not info.trained
    assert read_info(tmp_path / "a") == info
    hashes = [file_sha256(tmp_path / name) for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_checksum_must_be_right(path: Path) -> None:
    found = file_sha256(path)
    load_weights(path, sha256=found.upper())
    with pytest.raises(WeightsError, match=f"expected SHA-256 {'0' * 64}, got {found}"):
        load_weights(path, sha256="0" * 64)


def test_every_difference_in_the_tensors_is_listed(path: Path) -> None:
    def change(tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
        del tensors["key_encoder.bias"]
        del tensors["affinity.left.bias"]
        tensors["extra"] = torch.zeros(1)
        tensors["segmentation.predict.bias"] = torch.zeros(2)
        tensors["backbone.bn1.num_batches_tracked"] = torch.tensor(0.5)

    _rewrite(path, change)
    assert _refusal(path) == (
        "not the weights of resnet18, variant full, with 3 frames a window and 4 alignment stage(s): "
        "missing: affinity.left.bias, key_encoder.bias; left over: extra; "
        "backbone.bn1.num_batches_tracked: expected () int64, got () float32; "
        "segmentation.predict.bias: expected (1,) float32, got (2,) float32"
    )


def test_an_unknown_version_is_refused(path: Path) -> None:
    _rewrite(path, lambda tensors, fields: fields.update(format_version=2))
    assert _refusal(path) == "metadata cannot be used: expected format version 1, got 2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trained": "false"}, "trained must be true or false, got 'false'"),
        ({"config": {"backbone": "vgg"}}, "backbone must be one of"),
        ({"config": {"variant": None}}, "variant must be one of"),
        ({"config": {"depth": 3}}, "unexpected keyword argument 'depth'"),
        ({"config": None}, "must be a mapping"),
        ({"surprise": 1}, "unexpected keyword argument 'surprise'"),
    ],
)
def test_information_of_another_form_is_refused(path: Path, change: dict[str, Any], message: str) -> None:
    _rewrite(path, lambda tensors, fields: fields.update(change))
    refusal = _refusal(path)
    assert refusal.startswith("metadata cannot be used: ")
    assert message in refusal


def test_missing_information_is_refused(path: Path) -> None:
    _rewrite(path, lambda tensors, fields: fields.pop("licence"))
    assert "licence" in _refusal(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_of_something_else_are_refused(path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"weight": torch.zeros(2)}, path, metadata)
    assert _refusal(path) == "not a weights file of this network: no 'imcnet' in its metadata"


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{"])
def test_metadata_that_is_no_object_is_refused(path: Path, text: str) -> None:
    save_file({"weight": torch.zeros(2)}, path, {"imcnet": text})
    assert _refusal(path).startswith("metadata cannot be used: ")


@pytest.mark.parametrize("kept", [0, 7, 1000, -1])
def test_a_truncated_file_is_refused(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    assert _refusal(path).startswith("not a readable safetensors file: ")


def test_other_files_are_refused(path: Path) -> None:
    torch.save({"model": {}}, path)
    assert _refusal(path).startswith("not a readable safetensors file: ")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert _refusal(tmp_path / "none").startswith("not a readable safetensors file: ")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_weights(tmp_path / "none", sha256="0" * 64)
    with pytest.raises(WeightsError, match="not a readable"):
        load_weights(tmp_path)
