from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.agreement import EXACT_GATE, Agreement
from model.benchmark import PublishedLoop, Result, compare, untrained_network
from model.config import usual_config
from model.imcnet import IMCNet, foreground_probability
from model.preprocess import normalise, resize_frame, resize_probability
from model.scenes import render_scene

CPU = torch.device("cpu")
SIZE = 64
MakeFrames = Callable[..., list[NDArray[np.uint8]]]


def test_the_published_loop_is_the_plain_forward_window_by_window(
    network64: IMCNet, make_frames: MakeFrames
) -> None:
    frames = make_frames(6)
    masks, work = PublishedLoop(network64, device=CPU, input_size=SIZE).run(frames)
    assert work.encoded == 3 * len(frames)
    for center, mask in enumerate(masks):
        window = [frames[max(0, center - 4)], frames[center], frames[min(5, center + 4)]]
        images = torch.stack(
            [normalise(resize_frame(frame, SIZE), "imagenet", torch.float64) for frame in window]
        )
        with torch.inference_mode():
            probability = foreground_probability(network64(images.unsqueeze(0)).logits)
        expected = resize_probability(probability, frames[0].shape[:2])[0, 0] >= 0.5
        assert np.array_equal(mask, expected.numpy())


def test_all_candidates_run_each_round_and_agree_in_float64(
    network64: IMCNet, make_frames: MakeFrames
) -> None:
    frames = make_frames(14)
    *_, (published, sampled, exact) = compare(network64, frames, device=CPU, input_size=SIZE, rounds=2)
    for result in (published, sampled, exact):
        assert len(result.runs) == len(result.ratios) == 2
        assert result.agreement is not None
        assert (result.agreement.flipped, result.agreement.iou) == (0, 1)
        assert all(work.seconds >= work.encode_s + work.window_s > work.encode_s > 0 for work in result.runs)
    assert published.ratios == [1, 1]
    assert [work.encoded for work in published.runs + sampled.runs] == 4 * [3 * 14]
    assert [work.encoded for work in exact.runs] == [14, 14]
    assert [work.cached for work in exact.runs] == [9, 9]
    assert exact.passes
    assert not published.passes
    assert exact.name == "torch-float64"


def test_a_network_that_decodes_frames_once_agrees_with_the_published_loop(make_frames: MakeFrames) -> None:
    frames = make_frames(6)
    network = untrained_network(usual_config("efficientnet_lite0"), frames, SIZE).double()
    (results,) = compare(network, frames, device=CPU, input_size=SIZE, rounds=1)
    assert [result.runs[0].encoded for result in results] == [18, 6]
    published, exact = results
    assert exact.agreement is not None
    assert (exact.agreement.flipped, exact.agreement.iou) == (0, 1)
    assert exact.passes
    assert published.runs[0].encode_s > 0


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "efficientnet_lite0"])
def test_an_untrained_network_sees_something_and_the_same_in_every_run(backbone: str) -> None:
    frames = [image for image, _ in render_scene(frames=5, height=48, width=64)]
    config = usual_config(backbone)  # type: ignore[arg-type]
    networks = [untrained_network(config, frames, SIZE) for _ in range(2)]
    masks = [PublishedLoop(network, device=CPU, input_size=SIZE).run(frames)[0] for network in networks]
    assert np.array_equal(*masks)
    assert 0.2 < np.mean(masks) < 0.8


def test_an_engine_does_not_pass_by_masks_that_show_nothing() -> None:
    agreement = Agreement(flipped=0.0, iou=1.0, foreground=0.0)
    assert not Result(name="blank", frames=1, gate=EXACT_GATE, agreement=agreement).passes


@pytest.mark.gpu
def test_on_a_gpu_stages_are_timed_there(cuda_device: str, network: IMCNet, make_frames: MakeFrames) -> None:
    *_, (published, _, exact) = compare(
        network, make_frames(14), device=torch.device(cuda_device), input_size=SIZE, rounds=1
    )
    for result in (published, exact):
        (work,) = result.runs
        assert work.seconds > work.encode_s > 0
        assert work.window_s > 0
        assert work.device_mib > 0
