"""Passes of windows in training: side masks where they teach, gradients where they are wanted, figures."""

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from model.config import IMCNetConfig, usual_config
from model.imcnet import AlignmentStage, IMCNet
from model.training.forward_pass import ForwardPass, Measurements, cue_dropped
from model.variants import build_network


@pytest.fixture
def network() -> IMCNet:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build_network(usual_config("efficientnet_lite0")).eval()


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randn(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_side_masks_are_left_out_where_nothing_before_them_trains(network: IMCNet, windows: Tensor) -> None:
    with_sides = ForwardPass(network)("video", windows)
    network.requires_grad_(False)
    network.compensation.requires_grad_(True)
    without = ForwardPass(network)("video", windows)
    assert with_sides.side_masks is not None
    assert without.side_masks is None
    torch.testing.assert_close(with_sides.logits, without.logits)
    assert without.logits.requires_grad


def test_the_cue_is_dropped_for_whole_windows(network: IMCNet, windows: Tensor) -> None:
    assert network.cue is not None
    found: list[Tensor] = []
    handle = network.compensation.register_forward_pre_hook(lambda _, inputs: found.append(inputs[1]))
    with cue_dropped(network.cue, [True, False]):
        ForwardPass(network)("video", windows)
    ForwardPass(network)("video", windows)
    handle.remove()
    dropped, whole = found
    assert dropped[0].eq(0).all()
    assert whole[0].any()
    assert torch.equal(dropped[1], whole[1])


def test_a_network_with_neither_has_nothing_to_measure(network: IMCNet, windows: Tensor) -> None:
    measured = Measurements()
    with measured.of(network), torch.no_grad():
        ForwardPass(network)("video", windows)
    assert measured.offsets == []
    assert measured.affinity is None


def test_offsets_and_affinity_are_measured_where_there_are_any(windows: Tensor) -> None:
    network = build_network(IMCNetConfig("resnet18", alignment_stages=3)).eval()
    for stage, offset in zip(network.alignment.stages, (0.5, -1.0, 0.0), strict=True):
        nn.init.constant_(cast("AlignmentStage", stage).offsets.bias, offset)
    assert network.key_encoder is not None
    assert network.affinity is not None
    measured = Measurements()
    with measured.of(network), torch.no_grad():
        ForwardPass(network)("video", windows)
        keys = [network.key_encoder(network.backbone(frame).v5) for frame in windows.unbind(1)]
        columns = network.affinity.weights(torch.stack(keys, dim=1)).amax(dim=1)
    assert measured.affinity == pytest.approx(columns.mean().item(), rel=1e-4)
    assert measured.offsets == pytest.approx([0.5, 1, 0])
