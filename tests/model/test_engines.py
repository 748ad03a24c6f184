from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.engines import load_still_segmenter, trying_out
from model.errors import DeviceError, EngineUnavailable
from model.imcnet import IMCNet
from model.weights import WeightsInfo, save_weights


def test_masks_of_the_still_path_do_not_depend_on_other_frames(
    make_network: Callable[..., IMCNet],
    make_frames: Callable[..., list[NDArray[np.uint8]]],
    tmp_path: Path,
) -> None:
    network = make_network()
    info = WeightsInfo("test", network.config, trained=False, provenance="made for a test", licence="MIT")
    save_weights(tmp_path / "w.safetensors", network, info)
    segmenter = load_still_segmenter(tmp_path / "w.safetensors", device="cpu", input_size=64)
    frames = make_frames(3)
    together = list(segmenter.segment(frames))
    alone = [mask for frame in frames for mask in segmenter.segment([frame])]
    assert all(map(np.array_equal, together, alone))
    assert 0 < np.mean(together) < 1  # there is something to see
    assert len(list(segmenter.segment(frames[:1], quality="multi_scale"))) == 1
    with pytest.raises(EngineUnavailable, match="fast"):
        segmenter.segment(frames, quality="fast")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "does not work here: CUDA out of memory"),
        (RuntimeError("Failed to find C compiler"), "does not work here: Failed to find C compiler"),
        (PermissionError("no room for what is compiled"), "does not work here: no room"),
        (DeviceError("device 'cuda:9' is not there"), "device 'cuda:9'"),
        (ValueError("a weight is too large"), "a weight is too large"),
    ],
)
def test_an_engine_that_cannot_run_is_an_engine_that_is_not_there(error: Exception, message: str) -> None:
    with pytest.raises(EngineUnavailable, match=message), trying_out():
        raise error


def test_a_device_that_failed_is_not_taken_for_an_engine_that_is_not_there() -> None:
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"), trying_out():
        raise torch.AcceleratorError("an illegal memory access was encountered")
