"""Made-up scenes with exact ground truth: textured objects that move over a textured, panning background."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]

_TEXTURE_SIDE = 512  # texels; textures repeat beyond
_GREY_NOISE = 2.0  # standard deviation of the camera's noise, in grey levels


def render_scene(
    *, frames: int, height: int, width: int, objects: int = 1, seed: int = 0
) -> Iterator[tuple[Image, Mask]]:
    """Render a scene, frame by frame; equal arguments make equal scenes.

    Each object is a smooth blob with a texture of its own. It wanders about the picture,
    turns, grows and shrinks and changes its outline a little, at a pace that does not depend on ``frames``.
    The camera pans and sways. Edges are anti-aliased; the mask holds the pixels that lie in an object by half
    or more, of all objects together.

    Yields:
        Image, RGB ``(height, width, 3)``, and mask, ``(height, width)``.

    Raises:
        ValueError: A count is below 1, or the picture is smaller than 16 pixels.
    """
    if frames < 1 or objects < 1 or min(height, width) < 16:
        raise ValueError(
            f"frames and objects must be at least 1 and sides at least 16, "
            f"got {frames}, {objects} and {height}x{width}"
        )
    return _render(frames, height, width, objects, np.random.default_rng(seed))


def _render(
    frames: int, height: int, width: int, objects: int, rng: np.random.Generator
) -> Iterator[tuple[Image, Mask]]:
    background = _Background.random(rng, min(height, width))
    blobs = [_Blob.random(rng, height, width) for _ in range(objects)]
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    for time in range(frames):
        picture = background.at(time, columns, rows)
        mask = np.zeros((height, width), dtype=np.bool_)
        for blob in blobs:
            colours, coverage = blob.at(time, columns, rows)
            picture += coverage[..., None] * (colours - picture)
            mask |= coverage >= 0.5
        picture += rng.normal(0, _GREY_NOISE, picture.shape).astype(np.float32)
        yield np.clip(picture + 0.5, 0, 255).astype(np.uint8), mask


@dataclass(frozen=True)
class _Wave:
    """A quantity that swings around ``centre``; the phase advances by ``rate`` radians a frame."""

    centre: float
    swing: float
    rate: float
    phase: float

    @classmethod
    def random(cls, rng: np.random.Generator, centre: float, swing: float, period_frames: float) -> Self:
        return cls(
            centre, swing, 2 * np.pi / (period_frames * rng.uniform(0.8, 1.25)), rng.uniform(0, 2 * np.pi)
        )

    def at(self, time: int) -> float:
        return self.centre + self.swing * float(np.sin(self.phase + self.rate * time))


class _Texture:
    """A pattern of soft patches of three colours with fine grain, repeating without a seam."""

    def __init__(self, rng: np.random.Generator, colours: Floats) -> None:
        patches = [_smoothstep(1.5 * _fractal_noise(rng, exponent=2.2)) for _ in range(2)]
        texels = colours[0] + patches[0][..., None] * (colours[1] - colours[0])
        texels += patches[1][..., None] * (colours[2] - texels)
        self._texels = texels + 14 * _fractal_noise(rng, exponent=0.9)[..., None]

    def sample(self, x: Floats, y: Floats) -> Floats:
        """Colours at real-valued texel coordinates, bilinear: ``(H, W)`` twice to ``(H, W, 3)``."""
        left, top = np.floor(x), np.floor(y)
        right_share, bottom_share = (x - left)[..., None], (y - top)[..., None]
        columns = [(left.astype(np.int64) + step) % _TEXTURE_SIDE for step in (0, 1)]
        rows = [(top.astype(np.int64) + step) % _TEXTURE_SIDE for step in (0, 1)]
        upper, lower = (
            self._texels[row, columns[0]] * (1 - right_share) + self._texels[row, columns[1]] * right_share
            for row in rows
        )
        sampled: Floats = upper + bottom_share * (lower - upper)
        return sampled


@dataclass(frozen=True)
class _Background:
    texture: _Texture
    texels_per_pixel: float
    pan: tuple[float, float]  # pixels a frame
    sway: _Wave  # pixels

    @classmethod
    def random(cls, rng: np.random.Generator, side: int) -> Self:
        colours = _palette(rng, brightness=(60, 190), saturation=0.35)
        direction = rng.uniform(0, 2 * np.pi)
        speed = side * rng.uniform(0.004, 0.010)
        return cls(
            texture=_Texture(rng, colours),
            texels_per_pixel=_TEXTURE_SIDE / (1.6 * side),
            pan=(speed * np.cos(direction), 0.4 * speed * np.sin(direction)),
            sway=_Wave.random(rng, 0, 0.01 * side, period_frames=30),
        )

    def at(self, time: int, columns: Floats, rows: Floats) -> Floats:
        x = columns + self.pan[0] * time
        y = rows + self.pan[1] * time + self.sway.at(time)
        return self.texture.sample(x * self.texels_per_pixel, y * self.texels_per_pixel)


@dataclass(frozen=True)
class _Blob:
    """An outline in polar coordinates around a wandering centre; lengths in pixels, angles in radians."""

    texture: _Texture
    x: _Wave
    y: _Wave
    radius: _Wave
    turn: float  # a frame
    lobes: tuple[_Wave, ...]  # of the k-th harmonic of the outline, k = 2, 3, …; relative to the radius
    lobe_angles: tuple[float, ...]

    @classmethod
    def random(cls, rng: np.random.Generator, height: int, width: int) -> Self:
        radius = min(height, width) * rng.uniform(0.17, 0.23)
        strengths = rng.uniform(0.5, 1, size=4) * (0.22, 0.12, 0.08, 0.04)
        return cls(
            texture=_Texture(rng, _palette(rng, brightness=(40, 230), saturation=0.8)),
            x=_Wave.random(rng, width / 2, width / 2 - 1.4 * radius, period_frames=80),
            y=_Wave.random(rng, height / 2, height / 2 - 1.4 * radius, period_frames=110),
            radius=_Wave.random(rng, radius, 0.15 * radius, period_frames=60),
            turn=rng.choice([-1, 1]) * rng.uniform(0.01, 0.04),
            lobes=tuple(_Wave.random(rng, s, 0.3 * s, period_frames=40) for s in strengths),
            lobe_angles=tuple(rng.uniform(0, 2 * np.pi, size=len(strengths))),
        )

    def at(self, time: int, columns: Floats, rows: Floats) -> tuple[Floats, Floats]:
        """Colours ``(H, W, 3)`` and share of each pixel that is covered ``(H, W)``, 0 to 1."""
        x, y = columns - np.float32(self.x.at(time)), rows - np.float32(self.y.at(time))
        radius = np.float32(self.radius.at(time))
        distance = np.hypot(x, y)
        angle = np.arctan2(y, x) - np.float32(self.turn * time)
        outline = np.ones_like(distance)
        for harmonic, (lobe, offset) in enumerate(zip(self.lobes, self.lobe_angles, strict=True), start=2):
            outline += np.float32(lobe.at(time)) * np.cos(harmonic * angle + np.float32(offset))
        depth = distance / (radius * outline)  # 0 in the middle, 1 at the edge
        coverage = np.clip(radius * outline - distance + 0.5, 0, 1)
        texels_per_pixel = _TEXTURE_SIDE / (3 * radius)
        colours = self.texture.sample(
            distance * np.cos(angle) * texels_per_pixel, distance * np.sin(angle) * texels_per_pixel
        )
        shading = 1.1 - 0.45 * np.minimum(depth, 1) ** 3  # darker towards the edge, as a round body is
        return colours * shading[..., None], coverage


def _fractal_noise(rng: np.random.Generator, *, exponent: float) -> Floats:
    """Periodic noise of mean 0 and deviation 1 whose amplitude falls with frequency to the ``exponent``."""
    spectrum = np.fft.rfft2(rng.normal(size=(_TEXTURE_SIDE, _TEXTURE_SIDE)))
    frequencies = np.hypot(np.fft.fftfreq(_TEXTURE_SIDE)[:, None], np.fft.rfftfreq(_TEXTURE_SIDE)[None, :])
    frequencies[0, 0] = np.inf  # no constant part
    noise = np.fft.irfft2(spectrum / frequencies**exponent)
    scaled: Floats = (noise / noise.std()).astype(np.float32)
    return scaled


def _smoothstep(values: Floats) -> Floats:
    """Map -1…1 to 0…1 with flat ends, which makes patches with soft edges of noise."""
    share: Floats = np.clip((values + 1) / 2, 0, 1, dtype=np.float32)
    return share * share * (3 - 2 * share)


def _palette(rng: np.random.Generator, *, brightness: tuple[float, float], saturation: float) -> Floats:
    """Three colours, ``(3, 3)`` in grey levels: neighbouring hues, brightness spread over the range."""
    hues = rng.uniform(0, 2 * np.pi) + np.array([0, 0.5, 1.4])[:, None]
    tints = np.cos(hues + np.array([0, 2, 4]) * np.pi / 3)
    low, high = brightness
    levels = rng.permutation(np.linspace(low, high, 3))[:, None]
    return (levels * (1 + saturation * 0.5 * tints)).astype(np.float32)
