import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.errors import WeightsError
from model.imcnet import DecodedFrame, EncodedFrame, IMCNet, IMCNetConfig, Variant
from model.variants import ROWS, PyramidDecoder, build_network, row_of
from model.views import Quality
from model.weights import WeightsInfo, load_weights, save_weights

VARIANTS = get_args(Variant)
ARCHITECTURES = [*((variant, 4) for variant in VARIANTS), *(("full", stages) for stages in (1, 2, 3, 5))]
# The softmax over the rows of S does not see what is added to a whole column of it.
WITHOUT_EFFECT = {"affinity.left.bias"}

MakeNetwork = Callable[..., IMCNet]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _built(seed: int, config: IMCNetConfig) -> IMCNet:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build_network(config)


def _conv(x: Tensor, parameters: dict[str, Tensor], name: str) -> Tensor:
    weight = parameters[f"{name}.weight"]
    return functional.conv2d(x, weight, parameters[f"{name}.bias"], padding=weight.shape[-1] // 2)


# -- rows ------------------------------------------------------------------------------------------------


def test_the_rows_are_those_of_the_paper() -> None:
    assert set(ROWS) == {
        *("full", "multi_scale", "no_acm", "no_key_encoder", "fpn", "regular_conv", "no_tsc"),
        *("l1", "l2", "l3", "l5", "stage1_only", "no_joint"),
        *("frames5", "frames7", "stride1", "stride2", "stride6"),
    }


def test_every_row_but_full_changes_one_thing() -> None:
    full = ROWS["full"]
    for name, row in ROWS.items():
        differences = [row.quality != full.quality, row.training != full.training]
        differences += [value != vars(full.config)[field] for field, value in vars(row.config).items()]
        assert sum(differences) == (name != "full"), name


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.training == "both"])
def test_a_row_is_told_from_its_network_whatever_the_backbone(name: str) -> None:
    row = ROWS[name]
    assert row_of(row.config, row.quality) == name
    assert row_of(replace(row.config, backbone="resnet18"), row.quality) == name


@pytest.mark.parametrize(
    ("config", "quality"),
    [
        (IMCNetConfig(alignment_stages=1, num_frames=5), "exact"),
        (IMCNetConfig(variant="fpn", frame_stride=2), "exact"),
        (IMCNetConfig(variant="fpn"), "multi_scale"),
        (IMCNetConfig(frame_stride=3), "exact"),
    ],
)
def test_what_the_paper_did_not_try_has_no_row(config: IMCNetConfig, quality: Quality) -> None:
    with pytest.raises(ValueError, match=f"no row for IMCNetConfig.* with quality '{quality}'"):
        row_of(config, quality)


# -- networks --------------------------------------------------------------------------------------------


def test_the_full_network_is_imcnet_itself() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        expected = IMCNet(IMCNetConfig("resnet18"))
    built = _built(3, IMCNetConfig("resnet18"))
    assert str(built) == str(expected)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(built.state_dict()[name], tensor), name


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_imcnet_itself_is_no_variant(variant: Variant) -> None:
    with pytest.raises(ValueError, match=f"build_network builds '{variant}'"):
        IMCNet(IMCNetConfig("resnet18", variant=variant))


@pytest.mark.parametrize(
    ("variant", "exchanged"),
    [
        ("no_acm", ("key_encoder.", "affinity.")),
        ("no_key_encoder", ("key_encoder.", "affinity.")),
        ("fpn", ("propagation.",)),
        ("regular_conv", ("alignment.",)),
        ("no_tsc", ("compensation.",)),
    ],
)
def test_all_other_parts_start_as_in_the_full_network(variant: Variant, exchanged: tuple[str, ...]) -> None:
    full = _built(3, IMCNetConfig("resnet18")).state_dict()
    state = _built(3, IMCNetConfig("resnet18", variant=variant)).state_dict()
    kept = {name for name in full if not name.startswith(exchanged)}
    assert kept == {name for name in state if not name.startswith(exchanged)}
    assert all(torch.equal(full[name], state[name]) for name in kept)


KEY_ENCODER = 9 * 2048 * 64 + 64
AFFINITY = 2 * (192 * 192 + 192)
CONV3 = 9 * 64 * 64 + 64
CONV1 = 64 * 64 + 64
STAGE = (9 * 128 * 64 + 64) + (9 * 64 * 144 + 144) + CONV3
PROPAGATION_LEVELS = sum(9 * channels * 64 + 64 for channels in (256, 512, 1024, 2048))
PROPAGATION = PROPAGATION_LEVELS + 2 * CONV3 + 3 * (6 * CONV3 + 64 + 1)
FPN = sum(channels * 64 + 64 for channels in (256, 512, 1024, 2048)) + 4 * CONV3 + 4 * (2 * CONV3 + 64 + 1)
TEMPORAL = 2 * CONV3
SPATIAL = 2 * (192 * 64 + 64) + (128 * 64 + 64) + (9 * 128 * 64 + 64) + 3 * CONV3 + 4 * CONV1


@pytest.mark.parametrize(
    ("config", "difference"),
    [
        (IMCNetConfig(variant="no_acm"), -KEY_ENCODER - AFFINITY),
        (IMCNetConfig(variant="no_key_encoder"), -KEY_ENCODER - AFFINITY + 2 * (6144 * 6144 + 6144)),
        (IMCNetConfig(variant="fpn"), FPN - PROPAGATION),
        (IMCNetConfig(variant="regular_conv"), 4 * (CONV3 - STAGE)),
        (IMCNetConfig(variant="no_tsc"), 9 * 192 * 64 + 64 - TEMPORAL - SPATIAL),
        *((IMCNetConfig(alignment_stages=stages), (stages - 4) * STAGE) for stages in range(6)),
    ],
)
def test_a_variant_has_the_parameters_of_its_parts(config: IMCNetConfig, difference: int) -> None:
    with torch.device("meta"):
        network = build_network(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == 47_862_020 + difference


@pytest.mark.parametrize("num_frames", [3, 5])
@pytest.mark.parametrize(("variant", "stages"), ARCHITECTURES)
def test_windows_and_stills_give_logits_at_a_quarter_of_the_size_and_all_side_masks(
    variant: Variant, stages: int, num_frames: int
) -> None:
    with torch.device("meta"):
        network = build_network(
            IMCNetConfig("resnet18", num_frames, variant=variant, alignment_stages=stages)
        )
        prediction = network(torch.empty(2, num_frames, 3, 96, 160))
        still = network.segment_image(torch.empty(2, 3, 96, 160))
    assert prediction.logits.shape == still.logits.shape == (2, 1, 24, 40)
    assert prediction.side_masks.shape == (2, num_frames, 4, 96, 160)
    assert still.side_masks.shape == (2, 1, 4, 96, 160)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_is_encoding_then_decoding(make_network: MakeNetwork, variant: Variant) -> None:
    network = make_network(variant=variant)
    windows = _random(2, 3, 3, 32, 64)
    with torch.inference_mode():
        prediction = network(windows)
        frames = [network.encode_frame(images) for images in windows.unbind(1)]
        assert torch.equal(prediction.logits, network.decode_window(frames))
    assert prediction.logits.std() > 0.1
    assert prediction.side_masks.min() >= 0
    assert prediction.side_masks.max() <= 1


@pytest.mark.parametrize(("variant", "stages"), ARCHITECTURES)
def test_two_steps_of_training_move_every_parameter(variant: Variant, stages: int) -> None:
    # Two, as some parameters start at zero, which keeps gradients from those before them in the first.
    network = _built(0, IMCNetConfig("resnet18", variant=variant, alignment_stages=stages)).train()
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    windows, images = _random(2, 3, 3, 64, 64), _random(2, 3, 64, 64)
    for _ in range(2):
        loss = torch.zeros(())
        for prediction in (network(windows), network.segment_image(images)):
            target = torch.ones_like(prediction.logits)
            loss = loss + functional.binary_cross_entropy_with_logits(prediction.logits, target)
            loss = loss + (prediction.side_masks - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = dict(network.named_parameters())
    assert all(parameter.isfinite().all() for parameter in after.values())
    unmoved = {name for name in before if torch.equal(before[name], after[name])}
    assert unmoved <= WITHOUT_EFFECT


# -- weights ---------------------------------------------------------------------------------------------


def _save(path: Path, network: IMCNet) -> Path:
    save_weights(path, network, WeightsInfo("test", network.config, True, "made for a test", "MIT"))
    return path


@pytest.mark.parametrize(("variant", "stages"), [*ARCHITECTURES[1:7], ("fpn", 2)])
def test_weights_of_a_variant_come_back_bit_by_bit(
    tmp_path: Path, make_network: MakeNetwork, variant: Variant, stages: int
) -> None:
    network = make_network(variant=variant, alignment_stages=stages)
    loaded, info = load_weights(_save(tmp_path / "w", network))
    assert loaded.config == info.config == network.config
    expected = network.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    windows = _random(1, 3, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded(windows).logits, network(windows).logits)


@pytest.mark.parametrize(("variant", "stages"), ARCHITECTURES[1:])
def test_weights_of_one_variant_are_not_those_of_another(
    tmp_path: Path, variant: Variant, stages: int
) -> None:
    config = IMCNetConfig("resnet18", variant=variant, alignment_stages=stages)
    network = build_network(IMCNetConfig("resnet18"))
    network.config = config  # a file that says something else than it holds
    path = _save(tmp_path / "w", network)
    expected = f"resnet18, variant {variant}, with 3 frames a window and {stages} alignment stage(s): "
    with pytest.raises(WeightsError, match=re.escape(f"not the weights of {expected}")):
        load_weights(path)


# -- parts -----------------------------------------------------------------------------------------------


def test_without_acm_every_frame_is_decoded_like_a_still(make_network: MakeNetwork) -> None:
    network = make_network(variant="no_acm").double()
    windows = _random(2, 3, 3, 64, 64).double()
    with torch.inference_mode():
        together = network(windows).side_masks
        for index, images in enumerate(windows.unbind(1)):
            torch.testing.assert_close(together[:, index], network.segment_image(images).side_masks[:, 0])


def test_without_acm_a_window_is_made_of_decoded_frames(make_network: MakeNetwork) -> None:
    network = make_network(variant="no_acm").double()
    windows = _random(2, 3, 3, 64, 64).double()
    with torch.inference_mode():
        frames = [network.encode_frame(images) for images in windows.unbind(1)]
        assert all(isinstance(frame, DecodedFrame) and frame.v3 is None for frame in frames)
        torch.testing.assert_close(network.decode_window(frames), network(windows).logits)


def test_without_key_encoder_the_key_is_v5_itself(make_network: MakeNetwork) -> None:
    with torch.inference_mode():
        frame = make_network(variant="no_key_encoder").encode_frame(_random(1, 3, 64, 64))
    assert isinstance(frame, EncodedFrame)
    assert frame.key is frame.pyramid.v5


def test_without_key_encoder_the_affinity_is_that_of_v5(make_network: MakeNetwork) -> None:
    affinity = make_network(variant="no_key_encoder").double().affinity
    parameters = dict(affinity.named_parameters())
    v5 = _random(2, 3, 512, 2, 3).double()
    with torch.inference_mode():
        enhanced = affinity(v5, v5)
        stacked = v5.reshape(2, 3 * 512, 2, 3)
        left, right = (_conv(stacked, parameters, name).flatten(2) for name in ("left", "right"))
        shares = torch.einsum("bci,bcj->bij", left, right).softmax(dim=1)
        torch.testing.assert_close(enhanced.flatten(3), torch.einsum("btci,bij->btcj", v5.flatten(3), shares))


def test_the_pyramid_decoder_is_a_feature_pyramid_network_on_the_attended_top(
    make_network: MakeNetwork,
) -> None:
    network = make_network(variant="fpn").double()
    decoder = network.propagation
    assert isinstance(decoder, PyramidDecoder)
    parameters = dict(decoder.named_parameters())
    with torch.inference_mode():
        pyramid = network.backbone(_random(2, 3, 64, 96).double())
        z = _random(*pyramid.v5.shape).double()
        decoded = decoder(pyramid, z)
        side_masks = decoder.side_masks(decoded, (64, 96))

        top_down: Tensor | float = 0.0
        attended = pyramid.v5 * z * z.mean(dim=(2, 3), keepdim=True)
        for index, values in enumerate((attended, pyramid.v4, pyramid.v3, pyramid.v2)):
            if isinstance(top_down, Tensor):
                top_down = top_down.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            top_down = _conv(values, parameters, f"fpn.inner_blocks.{3 - index}.0") + top_down
            p = _conv(top_down, parameters, f"fpn.layer_blocks.{3 - index}.0")
            head = f"head{5 - index}"
            residual = _conv(p.relu(), parameters, f"{head}.0.conv1").relu()
            mask = _conv(
                p + _conv(residual, parameters, f"{head}.0.conv2"), parameters, f"{head}.1"
            ).sigmoid()
            mask = functional.interpolate(mask, (64, 96), mode="bilinear", align_corners=True)
            torch.testing.assert_close(side_masks[:, index : index + 1], mask)
        torch.testing.assert_close(decoded.features, p)


def test_regular_convolutions_are_deformable_ones_without_offsets(make_network: MakeNetwork) -> None:
    regular = make_network(variant="regular_conv", alignment_stages=3).double().alignment
    deformable = make_network(alignment_stages=3).double().alignment
    with torch.no_grad():
        for stage, other in zip(regular.stages, deformable.stages, strict=True):
            other.offsets.weight.zero_()
            other.offsets.bias.zero_()
            other.deform.weight.copy_(stage.conv.weight)
            other.deform.bias.copy_(stage.conv.bias)
        frames = _random(2, 5, 64, 6, 7).double()
        torch.testing.assert_close(regular(frames), deformable(frames))


def test_without_compensation_one_convolution_fuses_the_frames(make_network: MakeNetwork) -> None:
    compensation = make_network(5, variant="no_tsc").double().compensation
    parameters = dict(compensation.named_parameters())
    frames = _random(2, 5, 64, 6, 7).double()
    with torch.inference_mode():
        expected = _conv(torch.cat(frames.unbind(1), dim=1), parameters, "1")
        torch.testing.assert_close(compensation(frames), expected)
