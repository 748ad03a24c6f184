"""How the network is trained: every number of the paper's schedule and of ours, in this one place."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["float32", "bfloat16", "float16"]
Schedule = Literal["halving", "cosine"]
Source = Literal["davis16", "youtube_vos", "youtube_objects", "duts", "composites"]


@dataclass(frozen=True)
class Rates:
    """Learning rates by module.

    Args:
        motion: Of motion compensation and of the head.
        attention: Of the affinity and of attention propagation.
        backbone: Of the backbone and of the key encoder.
    """

    motion: float
    attention: float
    backbone: float


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training.

    Args:
        steps: Batches, of windows and of stills together.
        size: Side of the network's input in pixels, a multiple of 32.
        batch_size: Windows or stills in a batch, of all devices together.
        videos: Data sets that windows are taken from, and how often each counts.
        images: Data sets that stills are taken from, and how often each counts.
        image_batches: Batches of stills after each batch of windows; None: as many as it takes for all
            stills to be seen while all windows are.
        betas: Of Adam.
        schedule: ``halving``: the rates are halved at 35 % and at 75 % of the steps; ``cosine``: they rise
            over the first 2 %, then fall to 0 along a cosine.
        stride_jitter: The window's stride varies by up to this much.
        reversal: Probability that a window runs backwards.
        clip_norm: Longest gradient; longer ones are scaled down to it.
        ema_decay: What a step leaves of the averaged weights, which are those evaluated and kept.
        precision: Of the matrix products; float16 scales the loss.
        save_every: Steps from one checkpoint to the next.
        validate_every: Steps from one validation to the next.

    Raises:
        ValueError: A value is not one of those allowed.
    """

    steps: int
    rates: Rates
    videos: tuple[tuple[Source, int], ...]
    images: tuple[tuple[Source, int], ...]
    size: int = 480
    batch_size: int = 8
    image_batches: int | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    schedule: Schedule = "halving"
    stride_jitter: int = 0
    reversal: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    precision: Precision = "bfloat16"
    save_every: int = 500
    validate_every: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.size < 32 or self.size % 32:
            raise ValueError(f"size must be a positive multiple of 32, got {self.size}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}"
            )


# The paper trains in two stages (section IV-A); where it is silent, as its released code does.
_STAGE1_RATES = Rates(motion=1e-4, attention=1e-5, backbone=1e-6)
_STAGE2_RATES = Rates(motion=1e-5, attention=1e-6, backbone=1e-7)

PRESETS: dict[str, TrainConfig] = {
    "stage1": TrainConfig(
        steps=200_000, rates=_STAGE1_RATES, videos=(("youtube_vos", 1), ("davis16", 1)), images=()
    ),
    "stage2": TrainConfig(
        steps=155_000, rates=_STAGE2_RATES, videos=(("davis16", 1),), images=(("duts", 1),)
    ),
    # Ours, for little data and compute, after `imcnet pretrain`: first what objects look like, from stills
    # and single frames; then windows, of which a third are made of stills; then both at a larger size, with a
    # backbone that hardly changes any more, for there are few videos to learn by heart.
    "small1": TrainConfig(
        steps=1300,
        rates=Rates(motion=5e-4, attention=5e-4, backbone=2.5e-4),
        videos=(),
        images=(("duts", 1), ("davis16", 1)),
        size=128,
        batch_size=16,
        schedule="cosine",
        ema_decay=0.998,
        save_every=100,
        validate_every=325,
    ),
    "small2": TrainConfig(
        steps=1000,
        rates=Rates(motion=4e-4, attention=4e-4, backbone=2e-4),
        videos=(("davis16", 2), ("composites", 1)),
        images=(("duts", 1),),
        size=128,
        image_batches=1,
        schedule="cosine",
        stride_jitter=2,
        reversal=0.5,
        ema_decay=0.998,
        save_every=100,
        validate_every=250,
    ),
    "small3": TrainConfig(
        steps=540,
        rates=Rates(motion=3e-4, attention=3e-4, backbone=3e-5),
        videos=(("davis16", 1), ("composites", 1)),
        images=(("duts", 1),),
        size=224,
        image_batches=2,
        schedule="cosine",
        stride_jitter=2,
        reversal=0.5,
        ema_decay=0.995,
        save_every=45,
        validate_every=90,
    ),
}


def rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """Share of the learning rates at a step, counted from 0."""
    progress = step / steps
    if schedule == "halving":
        return 0.5 ** ((progress >= 0.35) + (progress >= 0.75))
    warm_up = 0.02
    if progress < warm_up:
        return (step + 1) / (warm_up * steps + 1)
    return (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up))) / 2
