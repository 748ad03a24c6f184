import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import deform_conv2d

from model.deform import DeformableConv, deform_by_sampling


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


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (6, 1), (7, 9), (12, 12)])
def test_sampling_computes_torchvisions_operator_and_its_gradients(size: tuple[int, int]) -> None:
    layer = _layer(channels=8, groups=4)
    features = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    # From well inside to far outside of the map; nowhere on a pixel, where gradients are one-sided.
    offsets = 4 * torch.randn(2, layer.offset_channels, *size, dtype=torch.float64)
    offsets.requires_grad_()
    operands = (features, offsets, layer.weight, layer.bias)
    sampled = deform_by_sampling(*operands)
    expected = deform_conv2d(*operands, padding=(1, 1))
    torch.testing.assert_close(sampled, expected, rtol=0, atol=1e-12)

    towards = torch.randn_like(expected)
    gradients = torch.autograd.grad(sampled, operands, towards)
    references = torch.autograd.grad(expected, operands, towards)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-10)


def test_under_autocast_positions_keep_full_precision() -> None:
    layer = _layer().float()
    features = torch.randn(1, 4, 8, 200)
    offsets = _offsets(layer, features) + 0.3
    with torch.autocast("cpu", torch.bfloat16):
        sampled = layer(features, offsets)
    assert torch.equal(sampled, layer(features, offsets))
