"""How the network is trained: every number of the paper's stages and of the recipes, in this one place."""

import math
import re
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from model.config import IMCNetConfig, usual_config

Precision = Literal["float32", "bfloat16", "float16"]
Schedule = Literal["halving", "cosine"]
Source = Literal["davis16", "youtube_vos", "youtube_objects", "duts"]
WindowSource = Literal["davis16", "further", "still_windows", "composites"]
ImageSource = Literal[
    "hand_stills", "teacher_stills", "clothing_stills", "other_stills", "davis16_frames", "further_frames"
]


class ModuleRates(Protocol):
    """Peak learning rates by parameter name."""

    def of(self, parameter: str, *, last_block: int) -> float:
        """Peak learning rate; 0 freezes the parameter.

        Args:
            parameter: Name as in ``named_parameters``.
            last_block: Index of the last block of an EfficientNet backbone; -1 for another backbone.
        """
        ...


@dataclass(frozen=True)
class Rates:
    """Learning rates of the paper's stages.

    Args:
        motion: Motion compensation and the head.
        attention: Affinity and attention propagation.
        backbone: Backbone and key encoder.
    """

    motion: float
    attention: float
    backbone: float

    def of(self, parameter: str, *, last_block: int) -> float:
        match parameter.partition(".")[0]:
            case "backbone" | "key_encoder":
                return self.backbone
            case "affinity" | "propagation":
                return self.attention
        return self.motion


@dataclass(frozen=True)
class GroupRates:
    """Learning rates of a recipe's phase, for an EfficientNet backbone; 0 freezes a group.

    Depthwise convolutions never train: their weight gradients cost more than those of all other weights.

    Args:
        decoder: Attention propagation.
        motion: Alignment except its offsets, compensation except its gate, motion cue and head.
        gate: Trust of the fusion in the motion cue: 65 numbers, which would hardly move at ``motion``'s rate.
        slow: Alignment offsets, and key encoder and affinity of a network that has them. At the decoder's
            rate, the offsets leave the map and the affinity becomes one-hot.
        top: Last block of the backbone.
        blocks: Other blocks of the backbone, from ``first_block``.
        first_block: Index of the lowest block that trains; those below are frozen.
    """

    decoder: float = 0
    motion: float = 0
    gate: float = 0
    slow: float = 0
    top: float = 0
    blocks: float = 0
    first_block: int = 0

    def of(self, parameter: str, *, last_block: int) -> float:
        first, _, rest = parameter.partition(".")
        if parameter.startswith("compensation.trust."):
            return self.gate
        if first == "backbone":
            return self._of_block(rest, last_block)
        if first in ("key_encoder", "affinity") or re.match(r"alignment\.stages\.\d+\.offsets\.", parameter):
            return self.slow
        return self.decoder if first == "propagation" else self.motion

    def _of_block(self, parameter: str, last_block: int) -> float:
        match = re.match(r"blocks\.(\d+)\.(.*)", parameter)
        # Batch norm is folded into the convolution, so that its scale needs the same gradients.
        if match is None or int(match[1]) < self.first_block or match[2] in _DEPTHWISE_WEIGHTS:
            return 0
        return self.top if int(match[1]) == last_block else self.blocks


_DEPTHWISE_WEIGHTS = ("depthwise.conv.weight", "depthwise.norm.weight")


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """What every training has, whatever it learns from.

    Args:
        steps: Optimizer steps.
        betas: Decay rates of Adam's moments.
        schedule: ``halving``: the rates are halved at 35 % and at 75 % of the steps; ``cosine``: they rise
            over the first 2 %, then fall to 0 along a cosine.
        clip_norm: Longest gradient; longer ones are scaled down to it.
        ema_decay: Highest decay of the averaged weights, which are those evaluated and kept. After n steps,
            it is (1 + n) / (10 + n) if that is lower.
        side_stride: Side masks are compared at the input size divided by this.
        precision: Precision of the matrix products; float16 scales the loss.
        save_every: Steps from one checkpoint to the next.
        validate_every: Steps from one validation to the next.
        seed: Random seed of order and augmentation, and of new weights.

    Raises:
        ValueError: A value is not one of those allowed.
    """

    steps: int
    betas: tuple[float, float] = (0.9, 0.99)
    schedule: Schedule = "halving"
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    side_stride: int = 1
    precision: Precision = "bfloat16"
    save_every: int = 500
    validate_every: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "steps", "side_stride", "save_every", "validate_every")
        _require_at_least(self, 0, "seed")
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Optimisation):
    """One stage of the paper's training: batches of windows with batches of stills between them.

    Args:
        rates: Peak learning rates.
        videos: Data sets that windows are taken from, and how often each counts.
        images: Data sets that stills are taken from, and how often each counts.
        size: Side of the network's input in pixels, a multiple of 32.
        batch_size: Windows or stills in a batch, of all devices together.
        image_batches: Batches of stills after each batch of windows; None: as many as it takes for all
            stills to be seen while all windows are.

    Raises:
        ValueError: A value is not one of those allowed.
    """

    rates: Rates
    videos: tuple[tuple[Source, int], ...]
    images: tuple[tuple[Source, int], ...]
    size: int = 480
    batch_size: int = 8
    image_batches: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least(self, 1, "batch_size")
        _require_size("size", self.size)


@dataclass(frozen=True, kw_only=True)
class Phase(Optimisation):
    """One phase of a recipe: every step learns from windows and stills together.

    Args:
        name: Name of the phase's folder.
        rates: Peak learning rates by group.
        sizes: Sides of the network's input in pixels, multiples of 32; every step draws one.
        windows_per_step: Windows in a step; 0 for stills only.
        stills_per_step: Stills in a step; 0 for windows only.
        windows: Sources of windows and their weights; each window's source is drawn.
        images: Sources of stills and their weights.
        trained: Prefixes of the parameters that train; empty for all that have a rate.
        cue_dropout: Probability that a window's motion cue is set to zero.
        validation_size: Side of the network's input in validation.

    Raises:
        ValueError: A value is not one of those allowed.
    """

    name: str
    rates: GroupRates
    sizes: tuple[int, ...]
    windows_per_step: int = 0
    stills_per_step: int = 0
    windows: tuple[tuple[WindowSource, float], ...] = ()
    images: tuple[tuple[ImageSource, float], ...] = ()
    trained: tuple[str, ...] = ()
    cue_dropout: float = 0.0
    validation_size: int = 352
    schedule: Schedule = "cosine"
    side_stride: int = 2
    precision: Precision = "float32"
    save_every: int = 50
    validate_every: int = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least(self, 0, "windows_per_step", "stills_per_step")
        for size in (*self.sizes, self.validation_size):
            _require_size("sizes and validation_size", size)
        if not self.sizes or self.windows_per_step + self.stills_per_step < 1:
            raise ValueError(f"phase {self.name} needs a size, and windows or stills in every step")
        for what, count, sources in (
            ("windows", self.windows_per_step, self.windows),
            ("images", self.stills_per_step, self.images),
        ):
            if bool(count) != bool(sources):
                raise ValueError(f"phase {self.name} takes {count} {what} a step from {len(sources)} sources")
        if not 0 <= self.cue_dropout <= 1:
            raise ValueError(f"cue_dropout must be within [0, 1], got {self.cue_dropout}")


@dataclass(frozen=True)
class Recipe:
    """Phases that follow each other, each from the averaged weights of the one before.

    Args:
        network: What is trained.
        phases: In their order; their names differ.
        strides: Distances between neighbouring frames of a training window, of which each window draws one;
            what stands twice is drawn twice as often.

    Raises:
        ValueError: Two phases have the same name, or there is none.
    """

    network: IMCNetConfig
    phases: tuple[Phase, ...]
    strides: tuple[int, ...] = (1, 1, 2, 3, 4, 5, 6)

    def __post_init__(self) -> None:
        names = [phase.name for phase in self.phases]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a recipe needs phases of different names, got {', '.join(names) or 'none'}")

    @property
    def largest_size(self) -> int:
        """Largest side of samples, in pixels."""
        return max(size for phase in self.phases for size in (*phase.sizes, phase.validation_size))


def _require_at_least(config: Optimisation, lowest: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {getattr(config, name)}")


def _require_size(name: str, size: int) -> None:
    if size < 32 or size % 32:
        raise ValueError(f"{name} must be a positive multiple of 32, got {size}")


# The paper trains in two stages (section IV-A); where it is silent, as its released code does.
PRESETS: dict[str, TrainConfig] = {
    "stage1": TrainConfig(
        steps=200_000,
        rates=Rates(motion=1e-4, attention=1e-5, backbone=1e-6),
        videos=(("youtube_vos", 1), ("davis16", 1)),
        images=(),
    ),
    "stage2": TrainConfig(
        steps=155_000,
        rates=Rates(motion=1e-5, attention=1e-6, backbone=1e-7),
        videos=(("davis16", 1),),
        images=(("duts", 1),),
    ),
}


_IMAGES: tuple[tuple[ImageSource, float], ...] = (
    ("hand_stills", 0.40),
    ("teacher_stills", 0.15),
    ("clothing_stills", 0.05),
    ("other_stills", 0.10),
    ("davis16_frames", 0.18),
    ("further_frames", 0.12),
)
# A fifth without motion: with a tenth, the fusion drops what rests, however salient.
_WINDOWS: tuple[tuple[WindowSource, float], ...] = (
    ("davis16", 0.26),
    ("further", 0.18),
    ("composites", 0.36),
    ("still_windows", 0.20),
)
_STILL_PATH = ("backbone.", "propagation.", "segmentation.")
_WINDOW_PATH = ("compensation.", "cue.")

RECIPES: dict[str, Recipe] = {
    # Objects first, from stills and single frames: short at small sizes, then long at those that boundaries
    # need. Then what moves, with all that stills have taught frozen. Last, everything at low rates.
    "shipped": Recipe(
        network=usual_config("efficientnet_lite0"),
        phases=(
            Phase(
                name="stills",
                steps=1500,
                rates=GroupRates(decoder=5e-4, motion=5e-4, top=2.5e-4, blocks=5e-5, first_block=11),
                sizes=(160, 192, 224, 256),
                stills_per_step=8,
                images=_IMAGES,
                trained=_STILL_PATH,
                ema_decay=0.995,
                seed=1,
            ),
            Phase(
                name="trunk",
                steps=1600,
                rates=GroupRates(decoder=2e-4, motion=2e-4, top=1e-4, blocks=3e-5, first_block=8),
                sizes=(288, 320, 352, 384),
                stills_per_step=6,
                images=_IMAGES,
                trained=_STILL_PATH,
                ema_decay=0.998,
                seed=2,
            ),
            Phase(
                name="motion",
                steps=1000,
                rates=GroupRates(motion=2e-4, gate=6e-3),
                sizes=(288, 320, 352),
                windows_per_step=4,
                windows=_WINDOWS,
                trained=_WINDOW_PATH,
                cue_dropout=0.1,
                ema_decay=0.99,
                seed=3,
            ),
            Phase(
                name="joint",
                steps=1000,
                rates=GroupRates(
                    decoder=5e-5, motion=1e-4, gate=3e-3, top=2.5e-5, blocks=1e-5, first_block=8
                ),
                sizes=(320, 352, 384),
                windows_per_step=2,
                stills_per_step=3,
                windows=_WINDOWS,
                images=_IMAGES,
                cue_dropout=0.1,
                ema_decay=0.998,
                seed=4,
            ),
        ),
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
