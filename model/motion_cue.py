"""Motion against the camera, measured from V3 before any side mask guides it. Not in the paper.

The paper's motion path sees P2, from which guided laterals have removed most of the background: it cannot
tell what moves against it. This cue correlates V3 of the centre with that of a frame before and one behind
it, fits the camera's motion to the flow, and hands what is left to the fusion.

``MotionCue`` is the learned part; ``measure`` and the functions below it have no parameters.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.layers import conv1x1, conv3x3

RADIUS = 4
"""Largest displacement in pixels of V3, which are 8 pixels of the input each."""

CUE_CHANNELS = 64
SHARPNESS = 25.0
_DIAMETER = 2 * RADIUS + 1
_EMBEDDED = 16
_WIDTH = 48
_FITS = 6
_RIDGE = 1e-2
_CORRELATION_GAIN = 3.0
_CONTEXT_GAIN = 0.1  # P2 is not normalised: trained weights give it a standard deviation of about 15
_REACH = 4  # dilation of the widest convolution, in pixels of V3


class Motion(NamedTuple):
    """Measured motion of one frame against another; float32 or float64.

    Args:
        flow: Displacement of what ``reference`` shows from the earlier to the later frame, in pixels of V3,
            x then y, ``(B, 2, h, w)``.
        residual: The flow minus the camera's, same shape.
        confidence: 1 / (1 + variance of the displacement), ``(B, 1, h, w)`` in (0, 1].
        correlation: Cosine similarities by displacement, smoothed, y then x from -R to R,
            ``(B, (2R + 1)^2, h, w)``; of the flow, so that both motions of a window have it in one order.
    """

    flow: Tensor
    residual: Tensor
    confidence: Tensor
    correlation: Tensor

    def maps(self) -> Tensor:
        """Residual x and y, |residual|, confidence, their product, the highest correlation, and half of the
        flow: ``(B, 8, h, w)``."""
        magnitude = self.residual.norm(dim=1, keepdim=True)
        highest = self.correlation.amax(1, keepdim=True)
        confidence = self.confidence
        parts = (self.residual, magnitude, confidence, magnitude * confidence, highest, self.flow / 2)
        return torch.cat(parts, dim=1)


class MotionCue(nn.Module):
    """Maps of motion against the camera, for the fusion of ``Compensation``.

    Motion is read beside the appearance of the centre frame. V3 shows where things end that move, also those
    that no side mask let through. P2 shows what is salient, which tells an object at rest from the water that
    moves around it.

    Measuring has no gradient and is float32 at least, whatever autocast says; float64 in a network of that.

    Args:
        v3_channels: Channels of V3.
        p2_channels: Channels of P2.
    """

    def __init__(self, v3_channels: int, p2_channels: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(conv1x1(_DIAMETER**2, _EMBEDDED), nn.ReLU())
        self.first = conv3x3(2 * (8 + _EMBEDDED), _WIDTH)
        self.second = conv3x3(2 * _WIDTH + p2_channels + v3_channels, _WIDTH)
        self.wide = nn.Conv2d(_WIDTH, _WIDTH, 3, padding=_REACH, dilation=_REACH)
        self.third = conv3x3(_WIDTH, CUE_CHANNELS)

    def forward(self, before: Tensor, reference: Tensor, after: Tensor, decoded: Tensor) -> Tensor:
        """Read the motion of the centre frame.

        Args:
            before, reference, after: V3 of the three frames, ``(B, C, h, w)``.
            decoded: P2 of the centre frame, ``(B, C, 2h, 2w)``.

        Returns:
            ``(B, 64, h, w)``, not negative.
        """
        features = self.first(torch.cat([*self._measured(before, reference, after)], dim=1)).relu()
        # What is common to the whole map tells a camera at rest from one that moves.
        common = features.mean(dim=(2, 3), keepdim=True).expand_as(features)
        context = functional.avg_pool2d(decoded, 2) * _CONTEXT_GAIN
        features = self.second(torch.cat([features, common, context, reference], dim=1)).relu()
        features = features + self.wide(features).relu()
        cue: Tensor = self.third(features).relu()
        return cue

    def _measured(self, before: Tensor, reference: Tensor, after: Tensor) -> Iterator[Tensor]:
        dtype = self.first.weight.dtype
        for motion in measure(before, reference, after):
            yield motion.maps().to(dtype)
            yield self.embed((motion.correlation * _CORRELATION_GAIN).to(dtype))


@torch.no_grad()
def measure(before: Tensor, reference: Tensor, after: Tensor) -> tuple[Motion, Motion]:
    """Measure motion from ``before`` to ``reference``, and from there to ``after``.

    Args:
        before, reference, after: V3 of three frames, ``(B, C, h, w)``.
    """
    with _without_autocast(reference.device):
        dtype = torch.promote_types(reference.dtype, torch.float32)
        frames = [functional.normalize(maps.to(dtype), dim=1) for maps in (before, reference, after)]
        products = correlate(torch.cat([frames[1], frames[1]]), torch.cat([frames[0], frames[2]]))
        # Zeros beyond the border count in the mean.
        backwards, forwards = functional.avg_pool2d(products, 3, stride=1, padding=1).chunk(2)
        # From the reference, what moves forwards is found backwards in the frame before.
        correlation = torch.cat([backwards.flip(1), forwards])
        flow, confidence = expected_flow(correlation)
        residual = flow - camera_flow(flow, confidence)
        parts = zip(*(part.chunk(2) for part in (flow, residual, confidence, correlation)), strict=True)
        first, second = (Motion(*part) for part in parts)
    return first, second


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def correlate(reference: Tensor, others: Tensor) -> Tensor:
    """Multiply every pixel with those up to R pixels away, zero outside of the map.

    One product of matrices a row gives its products with whole rows; the band up to R is cut out.

    Args:
        reference, others: ``(N, C, h, w)``.

    Returns:
        Sums over channels, ``(N, (2R + 1)^2, h, w)``: displacements from ``reference`` to ``others`` in y,
        then x, from -R to R.
    """
    count, _, height, width = reference.shape
    reach = width + 2 * RADIUS
    padded = functional.pad(others, (RADIUS,) * 4).permute(0, 2, 1, 3)
    rows = torch.stack([padded[:, shift : shift + height] for shift in range(_DIAMETER)], dim=3)
    products = reference.permute(0, 2, 3, 1) @ rows.flatten(3)  # (N, h, w, (2R + 1) (w + 2R))
    # Pixel x needs columns x to x + 2R: in lines that are one longer, they stand below each other.
    upright = functional.pad(products.flatten(2), (0, width)).view(count, height, width, -1)
    band = upright[..., :-1].view(count, height, width, _DIAMETER, reach)[..., :_DIAMETER]
    return band.permute(0, 3, 4, 1, 2).flatten(1, 2)


def expected_flow(correlation: Tensor) -> tuple[Tensor, Tensor]:
    """Mean displacement under softmax(25 correlation), and 1 / (1 + its variance)."""
    steps = torch.arange(-RADIUS, RADIUS + 1, dtype=correlation.dtype, device=correlation.device)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    displacements = torch.stack([x.flatten(), y.flatten()])  # (2, (2R + 1)^2)
    moments = torch.cat([displacements, displacements.square().sum(0, keepdim=True)])
    probability = torch.softmax(correlation * SHARPNESS, dim=1)
    means = (moments @ probability.flatten(2)).view(-1, 3, *correlation.shape[-2:])
    flow, squares = torch.split(means, [2, 1], dim=1)
    variance = (squares - flow.square().sum(1, keepdim=True)).clamp(min=0)
    return flow, 1 / (1 + variance)


def camera_flow(flow: Tensor, confidence: Tensor) -> Tensor:
    """Fit an affine motion to the flow, robustly: outliers lose their weight.

    Iteratively reweighted least squares with a ridge of 0.01: weights are the confidence first, then
    confidence * 0.1 / (0.3 + |residual|)^2.

    Args:
        flow: ``(N, 2, h, w)``.
        confidence: ``(N, 1, h, w)``.

    Returns:
        The affine motion at every pixel, same shape as ``flow``.
    """
    height, width = flow.shape[-2:]
    y = torch.linspace(-1, 1, height, dtype=flow.dtype, device=flow.device).view(-1, 1).expand(height, width)
    x = torch.linspace(-1, 1, width, dtype=flow.dtype, device=flow.device).expand(height, width)
    basis = torch.stack([torch.ones_like(x), x, y]).flatten(1)  # (3, hw)
    products = (basis.unsqueeze(0) * basis.unsqueeze(1)).flatten(0, 1)  # (9, hw)
    target, certainty = flow.flatten(2), confidence.flatten(2)
    weights, camera = certainty, torch.zeros_like(target)
    for _ in range(_FITS):
        normal = (weights @ products.mT).view(-1, 3, 3)
        camera = solve_symmetric(normal, (target * weights) @ basis.mT, ridge=_RIDGE) @ basis
        misfit = (target - camera).norm(dim=1, keepdim=True)
        weights = certainty * 0.1 / (0.3 + misfit).square()
    return camera.view_as(flow)


def solve_symmetric(matrices: Tensor, rows: Tensor, *, ridge: float) -> Tensor:
    """Solve ``(matrices + ridge I) X = rows`` by cofactors.

    ``torch.linalg.solve`` is neither converted by OpenVINO nor captured in a CUDA graph.

    Args:
        matrices: Symmetric and positive semi-definite, ``(N, 3, 3)``.
        rows: Right sides, ``(N, K, 3)``.

    Returns:
        The solutions, laid out as ``rows``.
    """
    a, b, c = (matrices[:, 0, place] for place in range(3))
    d, e, f = matrices[:, 1, 1], matrices[:, 1, 2], matrices[:, 2, 2]
    a, d, f = a + ridge, d + ridge, f + ridge
    cofactors = torch.stack(
        [
            *(d * f - e * e, c * e - b * f, b * e - c * d),
            *(c * e - b * f, a * f - c * c, b * c - a * e),
            *(b * e - c * d, b * c - a * e, a * d - b * b),
        ],
        dim=1,
    )
    determinant = a * cofactors[:, 0] + b * cofactors[:, 1] + c * cofactors[:, 2]
    return rows @ (cofactors / determinant.unsqueeze(1)).view(-1, 3, 3)
