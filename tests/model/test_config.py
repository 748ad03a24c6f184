from dataclasses import replace
from typing import Any

import pytest
import torch

from model.config import IMCNetConfig, usual_config
from model.imcnet import DecodedFrame, IMCNet
from model.variants import build_network

OFF: dict[str, Any] = {"normalisation": "imagenet", "whitening": False, "motion_cue": False}
ON: dict[str, Any] = {"normalisation": "centred", "whitening": True, "motion_cue": True}


def _built(config: IMCNetConfig, seed: int = 3) -> IMCNet:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build_network(config)


def test_the_papers_network_has_no_options() -> None:
    assert usual_config("resnet101") == IMCNetConfig() == IMCNetConfig(**OFF)


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "efficientnet_lite2"])
def test_an_efficientnet_usually_comes_with_all_options(backbone: str) -> None:
    assert usual_config(backbone) == IMCNetConfig(backbone, variant="no_acm", alignment_stages=0, **ON)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalisation": "none"}, "normalisation must be one of imagenet, centred, got 'none'"),
        ({"whitening": 1}, "whitening must be true or false, got 1"),
        ({"motion_cue": None}, "motion_cue must be true or false, got None"),
        ({"motion_cue": True, "variant": "no_tsc"}, "variant no_tsc lacks"),
        ({"backbone": "efficientnet_lite1"}, "efficientnet_lite0, efficientnet_lite2, got"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IMCNetConfig(**options)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (usual_config("efficientnet_lite0"), 4_530_805),
        (replace(usual_config("efficientnet_lite0"), motion_cue=False), 4_530_805 - 165_297),
        (replace(usual_config("efficientnet_lite0"), whitening=False), 4_530_805),
    ],
)
def test_options_have_the_parameters_of_their_parts(config: IMCNetConfig, parameters: int) -> None:
    with torch.device("meta"):
        network = build_network(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_with_options_all_other_parts_start_as_without() -> None:
    paper = _built(IMCNetConfig("resnet18")).state_dict()
    state = _built(IMCNetConfig("resnet18", **ON)).state_dict()
    widened = {f"compensation.spatial.{name}.weight" for name in ("features", "attention")}
    for name, tensor in paper.items():
        found = state.pop(name)
        assert torch.equal(found[:, :192] if name in widened else found, tensor), name
    assert {name.partition(".")[0] for name in state} == {"compensation", "cue", "whitening"}
    assert {name for name in state if name.startswith("compensation.")} == {
        "compensation.trust.weight",
        "compensation.trust.bias",
    }


def test_whitened_maps_and_only_they_reach_the_decoder_and_the_cue(lite_network: IMCNet) -> None:
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert lite_network.whitening is not None
    with torch.inference_mode():
        frame = lite_network.encode_frame(images)
        expected = lite_network.whitening(lite_network.backbone(images))
        decoded = lite_network.propagation(expected, torch.ones_like(expected.v5))
    assert isinstance(frame, DecodedFrame)
    assert frame.v3 is not None
    assert torch.equal(frame.v3, expected.v3)
    assert torch.equal(frame.features, decoded.features)


def test_two_steps_of_training_move_every_parameter_of_all_options() -> None:
    network = _built(usual_config("efficientnet_lite0"), seed=0).train()
    with torch.no_grad():
        assert network.whitening is not None
        network.whitening.measure([network.backbone(torch.randn(2, 3, 64, 64))])
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    windows = torch.randn(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        prediction = network(windows)
        loss = (prediction.logits - 1).square().mean() + (prediction.side_masks - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = dict(network.named_parameters())
    assert all(parameter.isfinite().all() for parameter in after.values())
    assert not [name for name in before if torch.equal(before[name], after[name])]
