import io
import zlib

import numpy as np
import pytest
from PIL import Image

from worker.png import encode_mask


@pytest.mark.parametrize("size", [(1, 1), (33, 47), (16, 64), (480, 854)])
def test_a_mask_is_a_one_bit_png_of_0_and_255(size: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).random(size) < 0.5
    image = Image.open(io.BytesIO(encode_mask(mask)))
    image.load()
    assert (image.format, image.mode, image.size) == ("PNG", "1", size[::-1])
    assert np.array_equal(np.asarray(image.convert("L")), np.where(mask, 255, 0))


def test_the_bits_beyond_a_row_are_zero() -> None:
    data = encode_mask(np.ones((2, 3), np.bool_))
    begin = data.index(b"IDAT") + 4
    length = int.from_bytes(data[begin - 8 : begin - 4], "big")
    assert zlib.decompress(data[begin : begin + length]) == b"\x00\xe0" * 2


def test_an_empty_mask_of_a_large_picture_is_small() -> None:
    assert len(encode_mask(np.zeros((2160, 3840), np.bool_))) < 8192
