from typing import cast

import pytest

from model.views import Quality, View, views_of

MIRRORED = ((), (-2,), (-1,))


@pytest.mark.parametrize("input_size", [32, 64, 288, 480, 736])
def test_exact_is_the_frame_as_it_is(input_size: int) -> None:
    assert views_of("exact", input_size) == (View(input_size, ()),)


@pytest.mark.parametrize(
    ("input_size", "sizes"),
    [
        (480, (352, 480, 736)),  # the paper's on DAVIS
        (288, (224, 288, 448)),  # and on YouTube-Objects
        (64, (32, 64, 96)),
        (32, (32, 32, 64)),
    ],
)
def test_multi_scale_is_three_sizes_each_mirrored_both_ways(input_size: int, sizes: tuple[int, ...]) -> None:
    expected = tuple(View(size, mirrored) for size in sizes for mirrored in MIRRORED)
    assert views_of("multi_scale", input_size) == expected


@pytest.mark.parametrize("input_size", range(32, 1025, 32))
def test_every_size_is_one_that_the_network_takes(input_size: int) -> None:
    small, base, large = sorted({view.size for view in views_of("multi_scale", 2 * input_size)})
    assert base == 2 * input_size
    assert small % 32 == large % 32 == 0
    assert abs(small - base * 352 / 480) <= 16
    assert abs(large - base * 736 / 480) <= 16


def test_another_quality_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="quality must be one of fast, exact, multi_scale, got 'best'"):
        views_of(cast("Quality", "best"), 480)
