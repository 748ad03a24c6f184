from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from model.backbone import BackboneName
from model.engine import (
    StillEngine,
    TorchEngine,
    convolutions,
    fold_batch_norms,
    maps_of,
    merge_frames,
    split_frames,
)
from model.imcnet import IMCNet, Variant, foreground_probability
from model.preprocess import normalise

CPU = torch.device("cpu")


def images_of(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 64, 96), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("backbone", "num_frames", "variant"),
    [
        *(
            ("resnet18", num_frames, variant)
            for num_frames in (3, 5)
            for variant in ("full", "regular_conv", "no_tsc")
        ),
        ("efficientnet_lite0", 3, "full"),
        ("efficientnet_lite0", 5, "regular_conv"),
        ("efficientnet_lite0", 3, "no_acm"),
    ],
)
def test_in_float64_the_engine_computes_the_plain_forward(
    make_network: Callable[..., IMCNet], backbone: BackboneName, num_frames: int, variant: Variant
) -> None:
    network = make_network(num_frames=num_frames, variant=variant, backbone=backbone).double()
    images = images_of(num_frames)
    engine = TorchEngine(network, device=CPU)
    probability = engine.decode([[frame for image in images for frame in engine.encode(image.unsqueeze(0))]])
    with torch.inference_mode():
        logits = network(normalise(images, network.config.normalisation, torch.float64).unsqueeze(0)).logits
    expected = foreground_probability(logits)
    assert torch.equal(probability >= 0.5, expected >= 0.5)
    assert (probability - expected).abs().max() <= 1e-7
    assert expected.std() > 0.05  # there is something to see


@pytest.mark.parametrize(
    ("backbone", "variant"),
    [
        ("resnet18", "full"),
        ("resnet18", "no_key_encoder"),
        ("resnet18", "fpn"),
        ("resnet18", "no_acm"),
        ("efficientnet_lite0", "no_acm"),
    ],
)
def test_the_still_engine_segments_each_middle_frame_by_itself(
    make_network: Callable[..., IMCNet], backbone: BackboneName, variant: Variant
) -> None:
    network = make_network(variant=variant, backbone=backbone).double()
    engine = StillEngine(network, device=CPU)
    images = images_of(4)
    frames = [frame for image in images for frame in engine.encode(image.unsqueeze(0))]
    probabilities = engine.decode([frames[:3], [frames[3]]])
    with torch.inference_mode():
        logits = network.segment_image(
            normalise(images[[1, 3]], network.config.normalisation, torch.float64)
        ).logits
    torch.testing.assert_close(probabilities, foreground_probability(logits), rtol=0, atol=1e-7)
    assert probabilities.std() > 0.01  # there is something to see


def test_a_batch_computes_what_its_entries_do(network64: IMCNet) -> None:
    engine = TorchEngine(network64, device=CPU)
    frames = [frame for image in images_of(4) for frame in engine.encode(image.unsqueeze(0))]
    at_once = engine.encode(images_of(4))
    for frame, other in zip(frames, at_once, strict=True):
        torch.testing.assert_close(frame.key, other.key)
        torch.testing.assert_close(tuple(frame.pyramid), tuple(other.pyramid))
    windows = [frames[:3], frames[1:], [frames[3], frames[0], frames[2]]]
    alone = torch.cat([engine.decode([window]) for window in windows])
    torch.testing.assert_close(engine.decode(windows), alone)


def test_parted_frames_can_be_put_together_again(network64: IMCNet) -> None:
    with torch.inference_mode():
        features = network64.encode_frame(normalise(images_of(3), "imagenet", torch.float64))
    frames = split_frames(features)
    assert [len(frame.key) for frame in frames] == [1, 1, 1]
    merged = merge_frames(frames)
    assert torch.equal(merged.key, features.key)
    assert all(map(torch.equal, merged.pyramid, features.pyramid))
    assert merge_frames(frames[:1]) is frames[0]


def test_no_batch_norm_is_left_and_the_original_keeps_its_own(network: IMCNet) -> None:
    def norms(module: nn.Module) -> int:
        return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())

    before = norms(network)
    assert norms(fold_batch_norms(network)) == 0
    assert norms(network) == before > 0


def test_a_norm_that_is_still_learning_is_folded_as_it_stands(make_network: Callable[..., IMCNet]) -> None:
    network = make_network().double()
    expected = TorchEngine(network, device=CPU).encode(images_of(1))[0]
    found = TorchEngine(network.train(), device=CPU).encode(images_of(1))[0]
    assert torch.equal(found.key, expected.key)


def test_folding_leaves_no_statistics_and_the_same_maps(lite_network: IMCNet) -> None:
    network = deepcopy(lite_network).double()
    folded = fold_batch_norms(network)
    names = {name.rpartition(".")[2] for name, _ in folded.named_buffers()}
    assert names == {"scale", "shift"}  # of the whitening
    images = normalise(images_of(2), "centred", torch.float64)
    with torch.inference_mode():
        pairs = zip(maps_of(folded.encode_frame(images)), maps_of(network.encode_frame(images)), strict=True)
        for found, expected in pairs:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_on_cuda_convolutions_are_told_to_be_in_float32(device: str) -> None:
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    with convolutions(torch.device(device)):
        assert cudnn.allow_tf32 == (before and device == "cpu")
    assert cudnn.allow_tf32 == before


@pytest.mark.gpu
def test_on_a_gpu_float32_is_no_tf32(cuda_device: str, network: IMCNet) -> None:
    """TF32 keeps ten bits: a thousandth of each product, which is much beside float32's rounding."""
    (expected,), (found,) = (
        TorchEngine(network, device=torch.device(device)).encode(images_of(1))
        for device in ("cpu", cuda_device)
    )
    for left, right in zip(maps_of(found), maps_of(expected), strict=True):
        torch.testing.assert_close(left.cpu(), right, atol=1e-4 * float(right.abs().max()), rtol=0)
