import torch
from torch import Tensor
from torch.nn import functional

from model.deform import DeformableConv


def _layer(channels: int = 4, groups: int = 2) -> DeformableConv:
    torch.manual_seed(0)
    return DeformableConv(channels, groups).double()


def _offsets(layer: DeformableConv, features: Tensor) -> Tensor:
    count, _, height, width = features.shape
    return features.new_zeros(count, layer.offset_channels, height, width)


def test_with_zero_offsets_it_is_a_plain_convolution() -> None:
    layer = _layer()
    features = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    expected = functional.conv2d(features, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(features, _offsets(layer, features)), expected)


def test_offsets_are_y_then_x_for_every_group_and_tap() -> None:
    layer = _layer()
    features = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    offsets = _offsets(layer, features)
    # The second group, channels 2 and 3, looks one pixel further down and two further to the right.
    taps = offsets.view(1, 2, 9, 2, 9, 9)
    taps[:, 1, :, 0], taps[:, 1, :, 1] = 1, 2
    moved = features.clone()
    moved[:, 2:] = 0
    moved[:, 2:, :-1, :-2] = features[:, 2:, 1:, 2:]
    expected = functional.conv2d(moved, layer.weight, layer.bias, padding=1)
    inside = (slice(None), slice(None), slice(1, -2), slice(1, -3))
    torch.testing.assert_close(layer(features, offsets)[inside], expected[inside])


def test_half_precision_features_are_sampled_at_full_precision() -> None:
    layer = _layer().to(torch.bfloat16)
    features = torch.randn(1, 4, 8, 200).to(torch.bfloat16)
    offsets = _offsets(layer, features) + 0.3
    sampled = layer(features, offsets)
    assert sampled.dtype == torch.bfloat16
    reference = layer.float()(features.float(), offsets.float())
    torch.testing.assert_close(sampled, reference.to(torch.bfloat16))
