from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from model.datasets import Still, VideoSequence
from model.errors import DatasetError
from model.training.augmentation import Augmentation, SequenceWindows, Stills, StillWindows, Windows
from model.training.pictures import Picture, Pictures
from model.training.samples import Sample

SIZE = 64
UNCHANGED = Augmentation(flip=0, rotation=0, zoom=(1, 1), colour=0)


def write_still(folder: Path, foreground: NDArray[np.bool_], name: str = "still") -> Still:
    """A photo that is red in the foreground and blue elsewhere, with its mask."""
    folder.mkdir(parents=True, exist_ok=True)
    image, mask = folder / f"{name}.jpg", folder / f"{name}.png"
    colours = np.where(foreground[..., None], (200, 50, 50), (50, 50, 200)).astype(np.uint8)
    Image.fromarray(colours).save(image, quality=95, subsampling=0)
    Image.fromarray(foreground).save(mask)
    return Still(image, mask)


def write_grey_video(
    folder: Path, frames: int, annotated: Callable[[int], bool] = lambda _: True
) -> Pictures:
    """Frame ``n`` is of the grey level ``10 * n``."""
    images, masks = [folder / f"{n:05d}.png" for n in range(frames)], []
    mask = folder / "mask.png"
    Image.new("1", (8, 8), 1).save(mask)
    for number, path in enumerate(images):
        Image.new("RGB", (8, 8), (10 * number,) * 3).save(path)
        masks.append(mask if annotated(number) else None)
    return Pictures.of_videos([VideoSequence("grey", tuple(images), tuple(masks))])


def numbers(sample: Sample) -> list[int]:
    """Which frames of a grey video a sample holds."""
    return [int(frame.float().mean().round()) // 10 for frame in sample.frames]


def disk(height: int, width: int, x: float, y: float, radius: float) -> NDArray[np.bool_]:
    rows, columns = np.mgrid[:height, :width]
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.fixture
def still(tmp_path: Path) -> Stills:
    return Stills(Pictures.of_stills([write_still(tmp_path, disk(150, 300, x=170, y=60, radius=40))]))


@pytest.fixture
def film(tmp_path: Path) -> Pictures:
    """A disk that goes to the right."""
    entries = [
        write_still(tmp_path, disk(150, 300, x=60 + 15 * n, y=75, radius=40), f"{n:05d}") for n in range(12)
    ]
    sequence = VideoSequence("disk", tuple(e.image for e in entries), tuple(e.mask for e in entries))
    return Pictures.of_videos([sequence])


def test_a_sample_is_a_window_of_frames_with_masks(film: Pictures) -> None:
    sample = Windows(film, num_frames=5).sample(6, np.random.default_rng(0), SIZE)
    assert (sample.frames.shape, sample.frames.dtype) == ((5, 3, SIZE, SIZE), torch.uint8)
    assert (sample.masks.shape, sample.masks.dtype) == ((5, SIZE, SIZE), torch.uint8)


def test_a_still_is_a_window_of_one(still: Stills) -> None:
    sample = still.sample(0, np.random.default_rng(0), SIZE)
    assert (sample.frames.shape, sample.masks.shape) == ((1, 3, SIZE, SIZE), (1, SIZE, SIZE))


def test_masks_follow_the_picture_through_every_change(film: Pictures) -> None:
    windows = Windows(film, augmentation=Augmentation(rotation=1))
    for seed in range(24):
        sample = windows.sample(seed % len(windows), np.random.default_rng(seed), SIZE)
        red = sample.frames[:, 0] > sample.frames[:, 2]
        assert sample.masks.any()
        assert overlap(red, sample.masks == 255) > 0.97


def test_all_frames_of_a_window_are_changed_alike(tmp_path: Path) -> None:
    entry = write_still(tmp_path, disk(150, 300, x=170, y=60, radius=40))
    video = VideoSequence("frozen", (entry.image,) * 9, (entry.mask,) * 9)
    sample = Windows(Pictures.of_videos([video])).sample(4, np.random.default_rng(1), SIZE)
    assert (sample.frames == sample.frames[:1]).all()
    assert (sample.masks == sample.masks[:1]).all()


def test_one_seed_makes_one_sample(film: Pictures) -> None:
    windows = Windows(film)
    first, again, other = (windows.sample(5, np.random.default_rng(seed), SIZE) for seed in (1, 1, 2))
    assert torch.equal(first.frames, again.frames)
    assert torch.equal(first.masks, again.masks)
    assert not torch.equal(first.frames, other.frames)


def test_a_flip_mirrors_left_and_right(still: Stills, tmp_path: Path) -> None:
    pictures = Pictures.of_stills([write_still(tmp_path, disk(150, 300, x=170, y=60, radius=40))])
    plain, flipped = (
        Stills(pictures, augmentation=Augmentation(flip, 0, zoom=(1, 1), colour=0)).sample(
            0, np.random.default_rng(0), SIZE
        )
        for flip in (0, 1)
    )
    assert torch.equal(flipped.masks, plain.masks.flip(-1))
    difference = flipped.frames.int() - plain.frames.flip(-1).int()
    assert difference.abs().max() <= 1


def test_pictures_are_turned_in_their_own_proportions(tmp_path: Path) -> None:
    """A disk in the middle of a wide picture is an ellipse in the sample, and must stay the same ellipse."""
    pictures = Pictures.of_stills([write_still(tmp_path, disk(150, 300, x=149.5, y=74.5, radius=50))])
    turning = Augmentation(flip=0, rotation=1, zoom=(1, 1), colour=0)
    plain = Stills(pictures, augmentation=UNCHANGED).sample(0, np.random.default_rng(0), SIZE)
    for seed in range(5):
        turned = Stills(pictures, augmentation=turning).sample(0, np.random.default_rng(seed), SIZE)
        assert overlap(turned.masks == 255, plain.masks == 255) > 0.95


def test_zooming_in_magnifies_and_zooming_out_shows_all(tmp_path: Path) -> None:
    pictures = Pictures.of_stills([write_still(tmp_path, disk(150, 150, x=74.5, y=74.5, radius=30))])
    shares = {}
    for zoom in (0.75, 1, 4 / 3):
        exactly = Augmentation(flip=0, rotation=0, zoom=(zoom, zoom), colour=0)
        sample = Stills(pictures, augmentation=exactly).sample(0, np.random.default_rng(3), SIZE)
        shares[zoom] = float(sample.masks.float().mean())
    assert shares[4 / 3] / shares[1] == pytest.approx((4 / 3) ** 2, rel=0.05)
    assert shares[0.75] / shares[1] == pytest.approx(0.75**2, rel=0.05)


def test_colours_change_within_their_range(still: Stills, tmp_path: Path) -> None:
    pictures = Pictures.of_stills([write_still(tmp_path, np.zeros((32, 32), dtype=np.bool_))])
    recoloured = Stills(pictures, augmentation=Augmentation(colour=0.2))
    blues = {
        int(recoloured.sample(0, np.random.default_rng(seed), 32).frames[0, 2].float().mean())
        for seed in range(20)
    }
    assert len(blues) > 10
    assert 200 * 0.8**3 - 5 < min(blues) < max(blues) <= 255


def test_windows_repeat_the_ends_of_a_video(tmp_path: Path) -> None:
    windows = Windows(write_grey_video(tmp_path, 12), augmentation=UNCHANGED)
    rng = np.random.default_rng(0)
    assert len(windows) == 12
    assert [numbers(windows.sample(centre, rng, 16)) for centre in (0, 5, 11)] == [
        [0, 0, 4],
        [1, 5, 9],
        [7, 11, 11],
    ]


def test_windows_step_over_annotated_frames(tmp_path: Path) -> None:
    pictures = write_grey_video(tmp_path, 21, annotated=lambda number: number % 5 == 0)
    windows = Windows(pictures, frame_stride=1, augmentation=UNCHANGED)
    assert len(windows) == 5
    assert numbers(windows.sample(1, np.random.default_rng(0), 16)) == [0, 5, 10]


def test_windows_stay_within_their_video(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    sequences = [VideoSequence(name, (), ()) for name in "ab"]
    for place, (name, shade) in enumerate([("a", 100), ("b", 200)]):
        image, mask = tmp_path / f"{name}.png", tmp_path / f"{name}_mask.png"
        Image.new("RGB", (8, 8), (shade,) * 3).save(image)
        Image.new("1", (8, 8), 1).save(mask)
        sequences[place] = VideoSequence(name, (image,) * 3, (mask,) * 3)
    windows = Windows(Pictures.of_videos(sequences), augmentation=UNCHANGED)
    shades = [set(windows.sample(i, np.random.default_rng(0), 16).frames.unique().tolist()) for i in range(6)]
    assert shades == [{100}] * 3 + [{200}] * 3


def test_preloaded_pictures_make_the_same_samples(film: Pictures) -> None:
    windows = Windows(film)
    read = windows.sample(6, np.random.default_rng(0), SIZE)
    film.preload(SIZE)
    kept = windows.sample(6, np.random.default_rng(0), SIZE)
    assert torch.equal(read.frames, kept.frames)
    assert torch.equal(read.masks, kept.masks)


def test_preloaded_pictures_do_not_do_for_larger_samples(film: Pictures) -> None:
    film.preload(SIZE)
    with pytest.raises(ValueError, match="samples of up to 64, not 65 pixels"):
        film.read(0, SIZE + 1)


def test_small_samples_of_large_pictures_do_not_alias(tmp_path: Path) -> None:
    image, mask = tmp_path / "fine.png", tmp_path / "mask.png"
    checks = (np.indices((128, 128)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(image)
    Image.fromarray(checks > 0).save(mask)
    pictures = Pictures.of_stills([Still(image, mask)])
    pictures.preload(96)  # 128 a side
    frames = Stills(pictures, augmentation=UNCHANGED).sample(0, np.random.default_rng(0), 30).frames
    assert frames.float().std() < 40  # of 127


def test_a_mask_of_another_size_is_an_error(tmp_path: Path) -> None:
    entry = write_still(tmp_path, np.ones((20, 30), dtype=np.bool_))
    Image.new("1", (15, 10)).save(entry.mask)
    with pytest.raises(DatasetError, match=r"still\.png must be of its image's size, 30x20, is 15x10"):
        Pictures.of_stills([entry]).read(0, SIZE)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    entry = write_still(tmp_path, np.ones((20, 30), dtype=np.bool_))
    entry.image.write_bytes(entry.image.read_bytes()[:300])
    with pytest.raises(DatasetError, match=r"cannot read the image .*still\.jpg"):
        Pictures.of_stills([entry]).preload(SIZE)


def picture(coverage: NDArray[np.uint8], *, soft: bool = False) -> Picture:
    """A grey picture with a mask."""
    grey = np.full((3, *coverage.shape), 128, np.uint8)
    return Picture(torch.from_numpy(np.concatenate([grey, coverage[None]])), aspect=1, soft=soft)


def test_soft_masks_stay_soft_and_hard_ones_hard() -> None:
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (SIZE, 1))
    soft, hard = (
        UNCHANGED.apply([picture(ramp, soft=is_soft)], np.random.default_rng(0), SIZE)
        for is_soft in (True, False)
    )
    assert np.abs(soft.masks[0].numpy().astype(int) - ramp).max() <= 1
    assert set(hard.masks.unique().tolist()) == {0, 255}
    assert torch.equal(hard.masks[0] == 255, torch.from_numpy(ramp >= 128))
    for sample in (soft, hard):
        assert torch.equal(sample.masks, sample.side_masks)


def test_a_window_may_hold_both_soft_and_hard_masks() -> None:
    half = np.full((SIZE, SIZE), 140, np.uint8)
    pictures = [picture(half, soft=True), picture(half)]
    sample = UNCHANGED.apply(pictures, np.random.default_rng(0), SIZE)
    assert [mask.unique().tolist() for mask in sample.masks] == [[140], [255]]


@pytest.fixture
def mosaic() -> Picture:
    """Coloured noise with a square in the middle."""
    pixels = np.random.default_rng(0).integers(60, 196, size=(4, SIZE, SIZE), dtype=np.uint8)
    pixels[3] = 0
    pixels[3, 20:44, 20:44] = 255
    return Picture(torch.from_numpy(pixels), aspect=1)


def test_frames_can_lose_their_colour(mosaic: Picture) -> None:
    frames = replace(UNCHANGED, grey=1).apply([mosaic], np.random.default_rng(0), SIZE).frames
    assert (frames == frames[:, :1]).all()


def test_frames_can_lose_detail_and_keep_their_masks(mosaic: Picture) -> None:
    plain, blurred = (
        replace(UNCHANGED, blur=share).apply([mosaic], np.random.default_rng(0), SIZE) for share in (0, 1)
    )
    assert blurred.frames.float().std() < 0.7 * plain.frames.float().std()
    assert torch.equal(blurred.masks, plain.masks)


def test_noise_differs_from_frame_to_frame(mosaic: Picture) -> None:
    frames = replace(UNCHANGED, noise=1).apply([mosaic] * 3, np.random.default_rng(0), SIZE).frames.float()
    differences = [float((frames[a] - frames[b]).std()) for a, b in ((0, 1), (1, 2))]
    assert all(2 < difference < 15 for difference in differences)


def test_what_is_covered_is_no_foreground(mosaic: Picture) -> None:
    plain = UNCHANGED.apply([mosaic] * 2, np.random.default_rng(0), SIZE)
    shares = []
    for seed in range(40):
        sample = replace(UNCHANGED, occlusion=1).apply([mosaic] * 2, np.random.default_rng(seed), SIZE)
        covered = (sample.frames != plain.frames).any(dim=1)
        assert torch.equal(covered[0], covered[1])
        assert torch.equal(sample.masks, torch.where(covered, 0, plain.masks))
        shares.append(float(sample.masks.float().mean() / plain.masks.float().mean()))
    assert min(shares) >= 0.5
    assert np.mean(np.array(shares) < 1) > 0.3


def test_each_sequence_is_equally_likely(tmp_path: Path) -> None:
    """A long black video and a short white one."""
    entries = []
    for shade, frames in ((0, 12), (255, 2)):
        image, mask = tmp_path / f"{shade}.png", tmp_path / f"{shade}_mask.png"
        Image.new("RGB", (8, 8), (shade,) * 3).save(image)
        Image.new("1", (8, 8), 1).save(mask)
        entries.append(VideoSequence(str(shade), (image,) * frames, (mask,) * frames))
    windows = SequenceWindows(Pictures.of_videos(entries), num_frames=3, strides=[2], augmentation=UNCHANGED)
    assert len(windows) == 14
    shades = [int(windows.sample(0, np.random.default_rng(seed), 8).frames.max()) for seed in range(300)]
    assert np.mean(shades) == pytest.approx(127, abs=25)


def test_strides_are_those_of_the_original_video(tmp_path: Path) -> None:
    pictures = write_grey_video(tmp_path, 20)
    windows = SequenceWindows(pictures, num_frames=3, strides=[2, 6], frame_step=2, augmentation=UNCHANGED)
    samples = [numbers(windows.sample(0, np.random.default_rng(seed), 8)) for seed in range(200)]
    inner = [places for places in samples if 3 <= places[1] <= 16]
    assert {places[1] - places[0] for places in inner} == {-3, -1, 1, 3}


def test_the_frames_of_a_still_window_are_one_picture(tmp_path: Path) -> None:
    pictures = Pictures.of_stills([write_still(tmp_path, disk(150, 150, x=74.5, y=74.5, radius=30))])
    windows = StillWindows(pictures, num_frames=3, augmentation=UNCHANGED)
    frozen = 0
    for seed in range(40):
        sample = windows.sample(0, np.random.default_rng(seed), SIZE)
        red = sample.frames[:, 0] > sample.frames[:, 2]
        assert overlap(red, sample.masks == 255) > 0.95
        frozen += torch.equal(sample.frames[0], sample.frames[2])
    assert 3 <= frozen <= 20


def test_sequence_windows_need_strides(film: Pictures) -> None:
    with pytest.raises(ValueError, match=r"1 videos and strides \[2, 0\]"):
        SequenceWindows(film, num_frames=3, strides=[2, 0])
