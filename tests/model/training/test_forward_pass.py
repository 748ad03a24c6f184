"""Passes of windows in training: side masks where they teach, gradients where they are wanted, figures."""

import pytest
import torch
from torch import Tensor, nn

from model.config import IMCNetConfig, usual_config
from model.imcnet import AlignmentStage, IMCNet
from model.training.forward_pass import (
    ForwardPass,
    Measurements,
    alignment_without_gradients,
    cue_dropped,
)
from model.training.starts import centre_alignment
from model.variants import build_network


@pytest.fixture
def network() -> IMCNet:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = build_network(usual_config("efficientnet_lite0")).eval()
        for stage in network.alignment.modules():  # from zero, nothing that is in the offsets would show
            if isinstance(stage, AlignmentStage):
                nn.init.normal_(stage.offsets.bias, std=0.5)
    return network


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


def test_the_alignment_can_pass_features_on_without_gradients(network: IMCNet, windows: Tensor) -> None:
    expected = ForwardPass(network)("video", windows)
    with alignment_without_gradients(network):
        maps = ForwardPass(network)("video", windows)
    torch.testing.assert_close(maps.logits, expected.logits)
    maps.logits.sum().backward()
    assert all(parameter.grad is None for parameter in network.alignment.parameters())
    # The centre frame keeps its way back through the decoder.
    assert network.propagation.level2.merge.conv1.weight.grad is not None
    assert all(parameter.requires_grad for parameter in network.alignment.parameters())


def test_without_gradients_only_the_centre_frame_teaches_the_decoder(network: IMCNet) -> None:
    with alignment_without_gradients(network):
        features = torch.randn(1, 3, 64, 16, 16, requires_grad=True)
        network.alignment(features).sum().backward()
    assert features.grad is not None
    assert features.grad[:, 1].eq(1).all()
    assert features.grad[:, ::2].eq(0).all()


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


def test_offsets_are_measured(network: IMCNet, windows: Tensor) -> None:
    measured = Measurements()
    with measured.of(network), torch.no_grad():
        ForwardPass(network)("video", windows)
    (offset,) = measured.offsets
    assert 0.1 < offset < 2
    assert measured.affinity is None


def test_the_affinity_is_measured_where_there_is_one(windows: Tensor) -> None:
    network = build_network(IMCNetConfig("resnet18", alignment_stages=3)).eval()
    assert network.key_encoder is not None
    assert network.affinity is not None
    measured = Measurements()
    with measured.of(network), torch.no_grad():
        ForwardPass(network)("video", windows)
        keys = [network.key_encoder(network.backbone(frame).v5) for frame in windows.unbind(1)]
        columns = network.affinity.weights(torch.stack(keys, dim=1)).amax(dim=1)
    assert measured.affinity == pytest.approx(columns.mean().item(), rel=1e-4)
    assert measured.offsets == [0, 0, 0]


def test_a_centred_alignment_is_the_identity(network: IMCNet) -> None:
    centre_alignment(network)
    frames = torch.randn(1, 3, 64, 16, 16)
    torch.testing.assert_close(network.alignment(frames), frames, atol=1e-4, rtol=1e-4)
    measured = Measurements()
    with measured.of(network), torch.no_grad():
        network.alignment(frames)
    assert measured.offsets == [0]
