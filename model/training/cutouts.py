"""Objects cut out of pictures by their masks, to paste onto other pictures.

A cut-out is float, ``(4, height, width)``: colours in [0, 255] times opacity, and opacity in [0, 1].
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model.training.motion import Floats, View
from model.training.pictures import Picture

_EXTENT = (0.2, 0.8)  # of cut-outs: root of their area, in sides of the frame
_MAX_SIDE = 1.1  # in sides of the frame
_MAX_MAGNIFICATION = 1.3  # a higher one would be visible


def cut_out(picture: Picture, rng: np.random.Generator, view: View) -> Tensor:
    """Cut out an object at a random size, recoloured, perhaps mirrored, with soft edges.

    A picture without foreground gives a fully transparent cut-out.

    Returns:
        A cut-out in the frame's pixels.
    """
    top, bottom, left, right = _bounds(picture.pixels[3])
    cropped = picture.pixels[:, top:bottom, left:right].float()
    if rng.random() < 0.5:
        cropped = cropped.flip(2)
    extent = float(np.exp(rng.uniform(*np.log(_EXTENT))))
    sides = _target(bottom - top, (right - left) * picture.aspect / view.aspect, view, extent)
    resized = functional.interpolate(cropped.unsqueeze(0), sides, mode="bilinear", antialias=True)
    resized = functional.pad(resized, (1, 1, 1, 1)).squeeze(0)

    feather = int(rng.choice([3, 5]))
    opacity = functional.avg_pool2d(resized[3:] / 255, feather, stride=1, padding=feather // 2)
    opacity = ((opacity - 0.4) / 0.5).clamp(0, 1)  # soft towards the inside, so that no background is cut out
    tint = rng.uniform(0.75, 1.25) * rng.uniform(0.9, 1.1, size=(3, 1, 1)).astype(np.float32)
    colours = (resized[:3] * torch.from_numpy(tint.astype(np.float32))).clamp(0, 255)
    return torch.cat([colours * opacity, opacity])


def cut_by_mask(picture: Picture, rng: np.random.Generator, view: View, extent: float) -> Tensor:
    """Cut out an object as ``cut_out`` does, but at a given size and with all soft edges inside the object.

    Args:
        extent: Square root of the cut-out's area, in sides of the frame; less if the picture is too small.
    """
    resized = _resized(picture.pixels.float(), picture, rng, view, extent)
    feather = int(rng.choice([3, 5]))
    opacity = functional.avg_pool2d(resized[3:] / 255, feather, stride=1, padding=feather // 2)
    opacity = ((opacity - 0.5) / 0.4).clamp(0, 1)
    return _tinted(resized[:3] * opacity, opacity, rng)


def cut_by_alpha(picture: Picture, rng: np.random.Generator, view: View, extent: float) -> Tensor:
    """Cut out an object whose mask is its true alpha, at a given size; ``extent`` as in ``cut_by_mask``.

    Even where the object is half transparent, the picture's colours must be those of the object alone.
    """
    opacity = picture.pixels[3:].float() / 255
    resized = _resized(torch.cat([picture.pixels[:3] * opacity, opacity]), picture, rng, view, extent)
    return _tinted(resized[:3], resized[3:].clamp(0, 1), rng)


def fill(cut: Tensor, texture: Tensor) -> Tensor:
    """Replace the colours of a cut-out by a texture.

    Args:
        texture: ``(3, h, w)`` in [0, 255]; stretched to the cut-out.
    """
    stretched = functional.interpolate(
        texture.unsqueeze(0), cut.shape[1:], mode="bilinear", antialias=True
    ).squeeze(0)
    return torch.cat([stretched.clamp(0, 255) * cut[3:], cut[3:]])


def is_cut_off(picture: Picture) -> bool:
    """Whether the picture's edges cut off much of the object: a tenth of its outline or more."""
    mask = picture.pixels[3] >= 128
    at_edges = sum(int(edge.sum()) for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
    top, bottom, left, right = _bounds(picture.pixels[3])
    return 10 * at_edges >= 2 * (bottom - top + right - left)


def _resized(layers: Tensor, picture: Picture, rng: np.random.Generator, view: View, extent: float) -> Tensor:
    """Crop layers, ``(4, h, w)``, to the object and resize them to frame pixels; adds a border of zeros."""
    top, bottom, left, right = _bounds(picture.pixels[3])
    cropped = layers[:, top:bottom, left:right]
    if rng.random() < 0.5:
        cropped = cropped.flip(2)
    sides = _target(bottom - top, (right - left) * picture.aspect / view.aspect, view, extent)
    resized = functional.interpolate(cropped.unsqueeze(0), sides, mode="bilinear", antialias=True)
    return functional.pad(resized, (1, 1, 1, 1)).squeeze(0)


def _tinted(colours: Tensor, opacity: Tensor, rng: np.random.Generator) -> Tensor:
    """A recoloured cut-out, from colours already multiplied by opacity."""
    tint = rng.uniform(0.75, 1.25) * rng.uniform(0.9, 1.1, size=(3, 1, 1))
    tinted = colours * torch.from_numpy(tint.astype(np.float32))
    return torch.cat([torch.minimum(tinted, 255 * opacity), opacity])


def limit_side(cut: Tensor, pixels: float) -> Tensor:
    """Shrink a cut-out whose longer side exceeds ``pixels``."""
    shrink = pixels / max(cut.shape[1:])
    if shrink >= 1:
        return cut
    smaller = [max(1, round(side * shrink)) for side in cut.shape[1:]]
    return functional.interpolate(cut.unsqueeze(0), smaller, mode="bilinear", antialias=True).squeeze(0)


def paste(canvas: Tensor, cut: Tensor, middle: Floats) -> None:
    """Paste a cut-out onto a canvas, in place; parts beyond the canvas are lost.

    Args:
        canvas: Colours, ``(3, H, W)``, or a cut-out, ``(4, H, W)``.
        middle: Position of the cut-out's middle, x and y from -1 to 1.
    """
    height, width = cut.shape[1:]
    left, top = (
        round(float((place + 1) / 2 * length - extent / 2))
        for place, length, extent in zip(
            middle, (canvas.shape[2], canvas.shape[1]), (width, height), strict=True
        )
    )
    target = canvas[:, max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)]
    piece = cut[:, max(0, -top) :, max(0, -left) :][:, : target.shape[1], : target.shape[2]]
    target.mul_(1 - piece[3:]).add_(piece[: canvas.shape[0]])


def _target(height: float, width: float, view: View, extent: float) -> tuple[int, int]:
    """Sides in the frame of an object whose sides in the picture are given, in the frame's proportions."""
    scale = min(
        extent * view.size / np.sqrt(height * width),
        _MAX_SIDE * view.size / max(height, width),
        _MAX_MAGNIFICATION,
    )
    return max(4, round(height * scale)), max(4, round(width * scale))


def _bounds(coverage: Tensor) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the foreground; of the whole picture if it has none."""
    foreground = (coverage > 0).numpy()
    rows, columns = np.flatnonzero(foreground.any(axis=1)), np.flatnonzero(foreground.any(axis=0))
    if len(rows) == 0:
        return 0, coverage.shape[0], 0, coverage.shape[1]
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
