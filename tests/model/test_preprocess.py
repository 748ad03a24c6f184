from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from model.preprocess import normalise, resize_frame, resize_probability


@pytest.mark.parametrize(
    ("height", "width", "size"), [(48, 85, 32), (96, 64, 96), (20, 30, 64), (37, 501, 96)]
)
def test_frames_are_resized_as_pillow_does(
    make_frames: Callable[..., list[NDArray[np.uint8]]], height: int, width: int, size: int
) -> None:
    frame = make_frames(1, height, width)[0]
    resized = resize_frame(frame, size)
    assert resized.dtype == torch.uint8
    assert resized.shape == (3, size, size)
    expected = np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR))
    difference = resized.permute(1, 2, 0).numpy().astype(int) - expected.astype(int)
    assert np.abs(difference).max() <= 1


def test_a_frame_of_the_input_size_stays_as_it_is(
    make_frames: Callable[..., list[NDArray[np.uint8]]],
) -> None:
    frame = make_frames(1, 64, 64)[0]
    assert np.array_equal(resize_frame(frame, 64).permute(1, 2, 0).numpy(), frame)


def test_read_only_and_flipped_frames_are_taken(make_frames: Callable[..., list[NDArray[np.uint8]]]) -> None:
    frame = make_frames(1)[0]
    expected = resize_frame(frame, 32)
    flipped = frame[:, ::-1].copy()[:, ::-1]
    frame.flags.writeable = False
    assert torch.equal(resize_frame(frame, 32), expected)
    assert torch.equal(resize_frame(flipped, 32), expected)


def test_a_resized_frame_does_not_change_with_its_source(
    make_frames: Callable[..., list[NDArray[np.uint8]]],
) -> None:
    frame = make_frames(1, 32, 32)[0]
    resized = resize_frame(frame, 32)
    before = resized.clone()
    frame[:] = 0
    assert torch.equal(resized, before)


def test_images_are_normalised_with_imagenets_statistics() -> None:
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1).expand(2, 3, 4, 5)
    normalised = normalise(images, "imagenet")
    assert normalised.dtype == torch.float32
    expected = torch.tensor(
        [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225], dtype=torch.float32
    )
    torch.testing.assert_close(normalised, expected.view(3, 1, 1).expand(2, 3, 4, 5))
    assert normalise(images, "imagenet", torch.float64).dtype == torch.float64


def test_probabilities_are_resized_bilinearly_with_corners_not_aligned() -> None:
    probability = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).expand(2, 1, 1, 2)
    resized = resize_probability(probability, (3, 8))
    assert resized.shape == (2, 1, 3, 8)
    assert resized[1, 0, 2].tolist() == [0, 0, 1 / 8, 3 / 8, 5 / 8, 7 / 8, 1, 1]


def test_centred_images_are_128ths_around_127() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    expected = (images.double() - 127) / 128
    torch.testing.assert_close(normalise(images, "centred", torch.float64), expected)
