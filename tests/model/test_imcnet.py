from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from model.backbone import BackboneName
from model.imcnet import Affinity, CascadedAlignment, IMCNet, IMCNetConfig, foreground_probability, guide_map


def _windows(size: tuple[int, int] = (64, 64), *, count: int = 1, num_frames: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, num_frames, 3, *size, generator=generator)


@pytest.mark.parametrize(("backbone", "expected"), [("resnet101", 47_862_020), ("resnet18", 13_994_756)])
def test_the_network_has_the_parameters_of_the_released_one(backbone: BackboneName, expected: int) -> None:
    with torch.device("meta"):
        network = IMCNet(IMCNetConfig(backbone))
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.parametrize(
    ("backbone", "num_frames"),
    [*((backbone, 3) for backbone in get_args(BackboneName)), ("resnet18", 5), ("resnet18", 7)],
)
def test_every_configuration_gives_logits_at_a_quarter_of_the_size_and_all_side_masks(
    backbone: BackboneName, num_frames: int
) -> None:
    with torch.device("meta"):
        network = IMCNet(IMCNetConfig(backbone, num_frames))
        prediction = network(torch.empty(2, num_frames, 3, 96, 160))
    assert prediction.logits.shape == (2, 1, 24, 40)
    assert prediction.side_masks.shape == (2, num_frames, 4, 96, 160)


@pytest.mark.parametrize("size", [(32, 32), (96, 160), (64, 96)])
def test_any_multiple_of_32_can_be_segmented(network: IMCNet, size: tuple[int, int]) -> None:
    with torch.inference_mode():
        prediction = network(_windows(size))
    assert foreground_probability(prediction.logits).shape == (1, 1, *size)
    assert prediction.side_masks.isfinite().all()
    assert prediction.side_masks.min() >= 0
    assert prediction.side_masks.max() <= 1


def test_forward_is_encoding_then_decoding(network: IMCNet) -> None:
    windows = _windows(count=2)
    with torch.inference_mode():
        frames = [network.encode_frame(images) for images in windows.unbind(1)]
        assert torch.equal(network(windows).logits, network.decode_window(frames))


def test_decoding_computes_neither_the_last_side_mask_nor_any_at_full_size(network: IMCNet) -> None:
    calls: list[str] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: calls.append(name))
        for name, module in network.named_modules()
        if name.endswith(".head")
    ]
    with torch.inference_mode():
        frames = [network.encode_frame(images) for images in _windows().unbind(1)]
        network.decode_window(frames)
    for hook in hooks:
        hook.remove()
    assert calls == ["propagation.level4.head", "propagation.level3.head"]


def test_a_mask_does_not_depend_on_its_batch_mates(network64: IMCNet) -> None:
    windows = _windows(count=3).double()
    # Wildly different ranges, which a guide map normalised over the batch would mix.
    windows = windows * torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64).view(3, 1, 1, 1, 1)
    with torch.inference_mode():
        together = network64(windows)
        for index in range(3):
            alone = network64(windows[index : index + 1])
            torch.testing.assert_close(together.logits[index], alone.logits[0])
            torch.testing.assert_close(together.side_masks[index], alone.side_masks[0])


def test_a_window_of_repeated_frames_can_share_their_features(network: IMCNet) -> None:
    images = _windows()[:, 0]
    with torch.inference_mode():
        frame = network.encode_frame(images)
        shared = network.decode_window([frame, frame, frame])
        assert torch.equal(shared, network(torch.stack([images] * 3, dim=1)).logits)


def test_neighbours_and_their_order_matter(network: IMCNet) -> None:
    before, center, after = _windows().unbind(1)
    with torch.inference_mode():
        forth = network(torch.stack([before, center, after], dim=1)).logits
        back = network(torch.stack([after, center, before], dim=1)).logits
    assert (forth - back).abs().max() > 1e-3


def test_a_still_image_passes_by_affinity_and_motion(network: IMCNet) -> None:
    images = _windows(count=3)[:, 0]
    unused = (network.key_encoder, network.affinity, network.alignment, network.compensation)

    def fail(module: nn.Module, inputs: object) -> None:
        raise AssertionError(f"{type(module).__name__} ran")

    hooks = [module.register_forward_pre_hook(fail) for module in unused]
    with torch.inference_mode():
        prediction = network.segment_image(images)
        decoded = network.propagation(pyramid := network.backbone(images), torch.ones_like(pyramid.v5))
    for hook in hooks:
        hook.remove()
    assert torch.equal(prediction.logits, network.segmentation(decoded.features))
    assert prediction.side_masks.shape == (3, 1, 4, 64, 64)


def test_batch_norm_takes_its_statistics_frame_by_frame_in_training(
    make_network: Callable[..., IMCNet],
) -> None:
    network = make_network().train()
    network(_windows(count=2))
    assert network.backbone.bn1.num_batches_tracked == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone": "vgg16"}, "backbone must be one of resnet18.* got 'vgg16'"),
        ({"num_frames": 4}, "num_frames must be 3, 5 or 7, got 4"),
        ({"frame_stride": 0}, "frame_stride must be an integer of at least 1, got 0"),
        ({"frame_stride": 1.5}, "frame_stride must be an integer of at least 1, got 1.5"),
        ({"variant": "tiny"}, "variant must be one of full.* got 'tiny'"),
        ({"variant": ["fpn"]}, r"variant must be one of full.* got \['fpn'\]"),
        ({"alignment_stages": -1}, "alignment_stages must be an integer from 0 to 5, got -1"),
        ({"alignment_stages": 6}, "alignment_stages must be an integer from 0 to 5, got 6"),
        ({"alignment_stages": 4.0}, "alignment_stages must be an integer from 0 to 5, got 4.0"),
    ],
)
def test_impossible_configurations_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IMCNetConfig(**values)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 60, 64), "multiples of 32, got 60 x 64"),
        ((1, 3, 64, 33), "multiples of 32, got 64 x 33"),
        ((1, 3, 0, 64), "multiples of 32, got 0 x 64"),
        ((1, 1, 64, 64), r"expected images \(B, 3, H, W\), got \(1, 1, 64, 64\)"),
        ((3, 64, 64), r"expected images \(B, 3, H, W\), got \(3, 64, 64\)"),
    ],
)
def test_images_of_another_shape_are_refused(network: IMCNet, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network.encode_frame(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 5, 3, 64, 64), (3, 3, 64, 64)])
def test_windows_of_another_length_are_refused(network: IMCNet, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected windows \(B, 3, 3, H, W\)"):
        network(torch.zeros(shape))


def test_decoding_another_number_of_frames_is_refused(network: IMCNet) -> None:
    with torch.inference_mode():
        frame = network.encode_frame(_windows()[:, 0])
    with pytest.raises(ValueError, match="a window holds 3 frames, got 2"):
        network.decode_window([frame, frame])


def test_columns_of_the_affinity_sum_to_one() -> None:
    torch.manual_seed(0)
    weights = Affinity(3 * 64).weights(torch.randn(2, 3, 64, 3, 5))
    assert weights.shape == (2, 15, 15)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2, 15))


def test_the_affinity_follows_its_equations() -> None:
    torch.manual_seed(0)
    affinity = Affinity(3 * 64).double()
    keys = torch.randn(2, 3, 64, 2, 3, dtype=torch.float64)
    v5 = torch.randn(2, 3, 8, 2, 3, dtype=torch.float64)
    enhanced = affinity(keys, v5)
    left, right = affinity.left, affinity.right
    for batch in range(2):
        k = keys[batch].reshape(3 * 64, 6)
        pk = left.weight.view(192, 192) @ k + left.bias.view(-1, 1)
        qk = right.weight.view(192, 192) @ k + right.bias.view(-1, 1)
        scores = torch.einsum("ci,cj->ij", pk, qk)
        weights = scores.exp() / scores.exp().sum(dim=0, keepdim=True)
        for frame in range(3):
            expected = torch.einsum("ci,ij->cj", v5[batch, frame].reshape(8, 6), weights)
            torch.testing.assert_close(enhanced[batch, frame].reshape(8, 6), expected)


def test_the_guide_map_is_normalised_frame_by_frame() -> None:
    torch.manual_seed(0)
    attended = torch.randn(4, 5, 3, 6) * torch.tensor([1.0, 10.0, 1e-3, 0.0]).view(4, 1, 1, 1)
    guides = guide_map(attended)
    for frame, guide in zip(attended, guides, strict=True):
        mean = frame.mean(dim=0).clamp(min=0)
        expected = (mean - mean.min()) / ((mean - mean.min()).max() + 1e-6)
        torch.testing.assert_close(guide[0], expected)
    assert guides[3].eq(0).all()


def test_an_untrained_alignment_is_a_cascade_of_plain_convolutions() -> None:
    torch.manual_seed(0)
    alignment = CascadedAlignment(4).double()
    frames = torch.randn(2, 3, 64, 6, 7, dtype=torch.float64)
    aligned = alignment(frames)
    assert torch.equal(aligned[:, 1], frames[:, 1])
    for neighbour in (0, 2):
        expected = frames[:, neighbour]
        for stage in alignment.stages:
            expected = nn.functional.conv2d(expected, stage.deform.weight, stage.deform.bias, padding=1)
        torch.testing.assert_close(aligned[:, neighbour], expected)


def test_the_sigmoid_comes_before_the_upsampling() -> None:
    logits = torch.tensor([[-20.0, 20.0]]).view(1, 1, 1, 2).expand(1, 1, 2, 2)
    expected = torch.linspace(0, 1, 8).expand(8, 8)
    torch.testing.assert_close(foreground_probability(logits)[0, 0], expected)
