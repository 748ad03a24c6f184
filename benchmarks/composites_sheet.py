"""Draw a contact sheet of motion composites, to inspect before training on them.

    python -m benchmarks.composites_sheet --data ../shared/data --out sheet.jpg

A row shows two windows of one kind: three frames, then the middle one with moving things in red
and salient things at rest in blue.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from model.training.motion_composites import Kind, MotionComposites, MotionMix
from model.training.packed import PackedData
from model.training.samples import Sample
from model.training.sources import motion_composites

_GAP = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Development data, as packed.")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/cache"), help="Picture cache. Default: runs/cache."
    )
    parser.add_argument("--side", type=int, default=416, help="Side of the cache's pictures. Default: 416.")
    parser.add_argument("--size", type=int, default=224, help="Side of a frame. Default: 224.")
    parser.add_argument("--rows", type=int, default=3, help="Rows of each kind. Default: 3.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=get_args(Kind), default=get_args(Kind))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    data = PackedData(arguments.data, arguments.cache, side=arguments.side)
    rows = []
    for number, kind in enumerate(arguments.kinds):
        composites = motion_composites(data, num_frames=3, mix=_only(kind))
        for row in range(arguments.rows):
            seeds = [(arguments.seed, number, row, half) for half in range(2)]
            rows.append(_row(kind, composites, seeds, arguments.size))
    Image.fromarray(np.concatenate(rows)).save(arguments.out, quality=88)


def _only(kind: Kind) -> MotionMix:
    weights = {name: float(name == kind) for name in get_args(Kind)}
    return replace(MotionMix(), **weights)


def _row(
    kind: Kind, composites: MotionComposites, seeds: list[tuple[int, ...]], size: int
) -> NDArray[np.uint8]:
    strips = [_strip(composites.sample(0, np.random.default_rng(seed), size)) for seed in seeds]
    gap = np.full((size, _GAP, 3), 255, np.uint8)
    picture = Image.fromarray(np.concatenate([strips[0], gap, strips[1]], axis=1))
    ImageDraw.Draw(picture).text((4, 2), kind, fill=(255, 255, 0))
    return np.concatenate([np.asarray(picture), np.full((_GAP, picture.width, 3), 255, np.uint8)])


def _strip(sample: Sample) -> NDArray[np.uint8]:
    middle = len(sample.frames) // 2
    frame, moving, salient = (
        pictures[middle] for pictures in (sample.frames, sample.masks, sample.side_masks)
    )
    tinted = _tint(_tint(frame, salient, (60, 90, 255)), moving, (255, 50, 50))
    strip = torch.cat([*sample.frames, tinted], dim=2)
    return strip.permute(1, 2, 0).numpy()


def _tint(frame: torch.Tensor, mask: torch.Tensor, colour: tuple[int, int, int]) -> torch.Tensor:
    mixed = (frame.float() + torch.tensor(colour).view(3, 1, 1)) / 2
    return torch.where(mask >= 128, mixed.to(torch.uint8), frame)


if __name__ == "__main__":
    main()
