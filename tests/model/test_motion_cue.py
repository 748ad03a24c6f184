import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.imcnet import Compensation, DecodedFrame, IMCNet
from model.layers import widen
from model.motion_cue import (
    CUE_CHANNELS,
    RADIUS,
    MotionCue,
    camera_flow,
    correlate,
    expected_flow,
    measure,
    solve_symmetric,
)

HEIGHT, WIDTH = 20, 26
INNER = (..., slice(RADIUS + 1, -RADIUS - 1), slice(RADIUS + 1, -RADIUS - 1))


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _moved(maps: Tensor, x: int, y: int) -> Tensor:
    return maps.roll((y, x), dims=(2, 3))


# -- measuring -------------------------------------------------------------------------------------------


def test_correlations_are_products_with_every_displaced_pixel() -> None:
    reference, others = _random(2, 5, 6, 9), _random(2, 5, 6, 9) + 1
    found = correlate(reference, others).unflatten(1, (2 * RADIUS + 1, 2 * RADIUS + 1))
    padded = functional.pad(others, (RADIUS,) * 4)
    for y in range(2 * RADIUS + 1):
        for x in range(2 * RADIUS + 1):
            expected = (reference * padded[:, :, y : y + 6, x : x + 9]).sum(1)
            torch.testing.assert_close(found[:, y, x], expected)


def test_the_flow_is_the_softmax_mean_of_the_displacements() -> None:
    correlation = _random(2, (2 * RADIUS + 1) ** 2, 3, 4) / 5
    flow, confidence = expected_flow(correlation)
    for place in [(0, 1, 2), (1, 2, 3)]:
        batch, row, column = place
        shares = (25 * correlation[batch, :, row, column]).softmax(0).view(2 * RADIUS + 1, -1).double()
        steps = torch.arange(-RADIUS, RADIUS + 1).double()
        x, y = (shares.sum(0) * steps).sum(), (shares.sum(1) * steps).sum()
        variance = (shares.sum(0) * (steps - x) ** 2).sum() + (shares.sum(1) * (steps - y) ** 2).sum()
        expected = torch.stack([x, y, 1 / (1 + variance)])
        found = torch.cat([flow, confidence], dim=1)[batch, :, row, column]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("x", "y"), [(3, -2), (0, 0), (-4, 1)])
def test_the_flow_of_a_shifted_map_is_the_shift_in_pixels_both_times(x: int, y: int) -> None:
    reference = _random(1, 32, HEIGHT, WIDTH)
    motions = measure(_moved(reference, -x, -y), reference, _moved(reference, x, y))
    for motion in motions:
        expected = torch.tensor([x, y]).view(1, 2, 1, 1).expand(1, 2, HEIGHT, WIDTH).float()
        torch.testing.assert_close(motion.flow[INNER], expected[INNER], rtol=0, atol=0.05)
        assert motion.confidence[INNER].min() > 0.9
        torch.testing.assert_close(
            motion.residual[INNER], torch.zeros_like(expected[INNER]), rtol=0, atol=0.1
        )
        best = motion.correlation[INNER].argmax(1)
        assert (best == (y + RADIUS) * (2 * RADIUS + 1) + x + RADIUS).all()


def test_what_moves_against_the_camera_is_left() -> None:
    background, thing = _random(2, 32, HEIGHT, WIDTH).split(1)
    frames = []
    for time in (-1, 0, 1):  # the camera's motion is (2, -1), the thing's own comes to (-1, 1)
        frame = _moved(background, 2 * time, -time)
        inside = torch.zeros(1, 1, HEIGHT, WIDTH)
        inside[..., 7:14, 9:17] = 1
        frames.append(torch.where(_moved(inside, -time, time) > 0, _moved(thing, -time, time), frame))
    for motion in measure(*frames):
        still = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
        still[5:16, 7:19] = False
        still[: RADIUS + 1] = still[-RADIUS - 1 :] = False
        still[:, : RADIUS + 1] = still[:, -RADIUS - 1 :] = False
        assert motion.residual[0, :, still].abs().mean() < 0.1
        centre = motion.residual[0, :, 9:12, 11:15].mean((1, 2))
        torch.testing.assert_close(centre, torch.tensor([-3.0, 2.0]), rtol=0, atol=0.3)


def test_the_camera_is_an_affine_motion_that_outliers_do_not_change() -> None:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 24), indexing="ij")
    camera = torch.stack([0.5 + x - 0.3 * y, -1 + 0.2 * x + 0.8 * y]).unsqueeze(0)
    flow = camera.clone()
    flow[..., 4:9, 6:14] += 2.5
    found = camera_flow(flow, torch.ones(1, 1, 16, 24))
    torch.testing.assert_close(found, camera, rtol=0, atol=0.1)
    # The ridge alone, without outliers.
    torch.testing.assert_close(camera_flow(camera, torch.ones(1, 1, 16, 24)), camera, rtol=0, atol=1e-3)


def test_cofactors_solve_what_linalg_solves() -> None:
    basis = _random(50, 3, 30)
    matrices, rows = basis @ basis.mT, _random(50, 2, 3)
    expected = torch.linalg.solve(matrices + 0.01 * torch.eye(3), rows.mT).mT
    torch.testing.assert_close(solve_symmetric(matrices, rows, ridge=0.01), expected, rtol=1e-5, atol=1e-5)


# -- precision and gradients -----------------------------------------------------------------------------


def test_measuring_is_in_float32_whatever_autocast_says_and_in_float64_with_such_a_network() -> None:
    frames = _random(3, 1, 16, 12, 12).unbind()
    expected = [motion.maps() for motion in measure(*frames)]
    with torch.autocast("cpu", torch.bfloat16):
        found = [motion.maps() for motion in measure(*frames)]
    assert all(map(torch.equal, found, expected))
    halves = measure(*(maps.bfloat16() for maps in frames))
    doubles = measure(*(maps.double() for maps in frames))
    assert {part.dtype for motion in halves for part in motion} == {torch.float32}
    assert {part.dtype for motion in doubles for part in motion} == {torch.float64}
    torch.testing.assert_close([motion.maps().float() for motion in doubles], expected, rtol=1e-3, atol=1e-3)


def test_the_cue_learns_and_its_input_does_not() -> None:
    torch.manual_seed(0)
    cue = MotionCue(16, 64)
    frames = _random(2, 1, 16, 12, 12).requires_grad_()
    cue(frames[0], frames[1].detach(), frames[0], _random(1, 64, 24, 24)).sum().backward()
    assert frames.grad is None
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in cue.parameters())


# -- within the network ----------------------------------------------------------------------------------


def test_a_widened_convolution_ignores_what_it_takes_in_addition() -> None:
    conv = torch.nn.Conv2d(5, 7, 1)
    maps = _random(2, 8, 4, 4)
    expected = conv(maps[:, :5])
    widen(conv, 3)
    torch.testing.assert_close(conv(maps), expected)
    conv(maps).sum().backward()
    assert conv.weight.grad is not None
    assert conv.weight.grad[:, 5:].any()


@pytest.mark.parametrize(("bias", "trust"), [(0.0, 0.5), (1.5, 1 / (1 + math.exp(-1.5)))])
def test_the_fusion_counts_as_much_as_the_cue_trusts_it(bias: float, trust: float) -> None:
    torch.manual_seed(2)
    with_cue, without = (Compensation(3).double() for _ in range(2))
    with_cue.load_state_dict(without.state_dict())
    with_cue.take_cue()
    assert with_cue.trust is not None
    with_cue.double()
    with torch.inference_mode():
        with_cue.trust.bias.fill_(bias)
        frames, cue = _random(1, 3, 64, 8, 8).double(), _random(1, CUE_CHANNELS, 4, 4).double()
        centre = frames[:, 1]
        expected = centre + trust * (without(frames) - centre)
        torch.testing.assert_close(with_cue(frames, cue), expected)


def test_in_a_wide_window_the_cue_sees_first_centre_and_last(make_network: Callable[..., IMCNet]) -> None:
    network = make_network(num_frames=5, backbone="efficientnet_lite0")
    assert network.cue is not None
    with torch.inference_mode():
        frames = [network.encode_frame(images) for images in _random(5, 1, 3, 64, 64)]
        decoded = [frame for frame in frames if isinstance(frame, DecodedFrame)]
        expected = network.cue(*(decoded[place].v3 for place in (0, 2, 4)), decoded[2].features)
        taken: list[Tensor] = []
        hook = network.cue.register_forward_hook(lambda module, inputs, output: taken.append(output))
        network.decode_window(frames)
        hook.remove()
    assert torch.equal(taken[0], expected)
    assert expected.shape == (1, CUE_CHANNELS, 8, 8)


def test_windows_compute_the_cue_once_and_stills_never(lite_network: IMCNet) -> None:
    taken: list[object] = []
    assert lite_network.cue is not None
    hook = lite_network.cue.register_forward_pre_hook(lambda module, inputs: taken.append(inputs))
    with torch.inference_mode():
        lite_network.segment_image(_random(1, 3, 32, 32))
        assert len(taken) == 0
        lite_network(_random(1, 3, 3, 32, 32))
    hook.remove()
    assert len(taken) == 1
