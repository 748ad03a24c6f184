"""Which parameter trains at which rate, and which not at all."""

import re
from dataclasses import replace

import pytest
import torch

from model.config import IMCNetConfig, usual_config
from model.errors import TrainingError
from model.imcnet import IMCNet
from model.training.learning_rates import freeze_all_but, parameter_groups
from model.training.presets import GroupRates
from model.variants import build_network

RATES = GroupRates(decoder=1, motion=2, slow=3, gate=4, top=5, blocks=6, first_block=11)
EXPECTED = (
    (r"backbone\.blocks\.\d+\.depthwise\.(conv|norm)\.weight", None),
    (r"backbone\.blocks\.15\.", 5),
    (r"backbone\.blocks\.1[1-4]\.", 6),
    (r"backbone\.", None),
    (r"propagation\.", 1),
    (r"key_encoder\.|affinity\.|alignment\.stages\.\d\.offsets\.", 3),
    (r"compensation\.trust\.", 4),
    (r"alignment\.|compensation\.|cue\.|segmentation\.", 2),
)


@pytest.fixture(scope="module")
def network() -> IMCNet:
    """The recipe's backbone with all that a group is for."""
    config = replace(usual_config("efficientnet_lite0"), variant="full", alignment_stages=1)
    with torch.device("meta"):
        return build_network(config)


def rates_by_name(network: IMCNet, rates: GroupRates, trained: tuple[str, ...] = ()) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {}
    for group in parameter_groups(network, rates, trained):
        assert group["lr"] == group["peak_lr"]
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group["lr"]
    return found


def test_every_parameter_has_the_rate_of_its_group(network: IMCNet) -> None:
    expected = {}
    for name, _ in network.named_parameters():
        rate = next(rate for pattern, rate in EXPECTED if re.match(pattern, name))
        if rate is not None:
            expected[name] = rate
    assert set(expected.values()) == {1, 2, 3, 4, 5, 6}
    assert rates_by_name(network, RATES) == expected


def test_the_last_block_is_that_of_the_backbone_at_hand() -> None:
    with torch.device("meta"):
        larger = build_network(usual_config("efficientnet_lite2"))
    last = max(int(name.split(".")[2]) for name, _ in larger.named_parameters() if ".blocks." in name)
    assert last > 15
    found = rates_by_name(larger, RATES)
    assert found["backbone.blocks.15.project.conv.weight"] == 6
    assert found[f"backbone.blocks.{last}.project.conv.weight"] == 5


def test_only_what_has_a_prefix_trains(network: IMCNet) -> None:
    found = rates_by_name(network, RATES, ("alignment.", "cue."))
    assert {name.partition(".")[0] for name in found} == {"alignment", "cue"}
    everything = rates_by_name(network, RATES)
    assert found == {name: rate for name, rate in everything.items() if name in found}


def test_what_does_not_train_gets_no_gradient() -> None:
    network = build_network(usual_config("efficientnet_lite0")).eval()
    groups = parameter_groups(network, RATES, ("backbone.", "propagation.", "segmentation."))
    freeze_all_but(network, groups)
    logits, side_masks = network.segment_image(torch.randn(1, 3, 64, 64))
    (logits.sum() + side_masks.sum()).backward()
    trained = rates_by_name(network, RATES, ("backbone.", "propagation.", "segmentation."))
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name


def test_frozen_blocks_leave_no_graph() -> None:
    network = build_network(usual_config("efficientnet_lite0"))
    freeze_all_but(network, parameter_groups(network, RATES))
    pyramid = network.backbone(torch.randn(1, 3, 64, 64))
    # Blocks 2, 4 and 10, which give V2 to V4, are frozen here; block 15 gives V5.
    assert [maps.requires_grad for maps in pyramid] == [False, False, False, True]


def test_a_prefix_without_parameters_is_named() -> None:
    with torch.device("meta"):
        without_cue = build_network(IMCNetConfig("resnet18"))
    with pytest.raises(TrainingError, match=r"no parameter cue\.\* to train"):
        parameter_groups(without_cue, RATES, ("cue.",))


def test_a_network_of_which_nothing_would_train_is_refused(network: IMCNet) -> None:
    with pytest.raises(TrainingError, match="no parameter of the network has a learning rate"):
        parameter_groups(network, GroupRates())
