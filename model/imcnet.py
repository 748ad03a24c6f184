"""IMCNet: Implicit Motion-Compensated Network for Unsupervised Video Object Segmentation.

Xi, Chen, Wu, Liu and Li, IEEE TCSVT 2022 (arXiv 2204.02791), in the variant that the authors released.
Equation numbers are the paper's. Shapes: B windows or images, T frames a window, H x W the
input size, C = 64 decoder channels; h x w is the size of the map at hand.

Read from the top: the network, then its parts in the order in which a window runs through them. The
networks of the paper's ablations differ in single parts, which stand in ``model.variants``. What is not the
paper's is an option of ``model.config``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.backbone import build_backbone
from model.config import IMCNetConfig as IMCNetConfig
from model.config import Variant as Variant
from model.deform import DeformableConv
from model.layers import Residual, conv1x1, conv3x3, enlarge, pool, resize, widen
from model.motion_cue import CUE_CHANNELS, MotionCue
from model.pyramid import Pyramid, PyramidWhitening

CHANNELS = 64
KEY_CHANNELS = 64
OFFSET_GROUPS = 8
SIZE_MULTIPLE = 32


@dataclass(frozen=True)
class EncodedFrame:
    """Features of a frame for a network with ACM, which enhances each frame by the others.

    Args:
        pyramid: Backbone maps V2 to V5.
        key: Key of the affinity, ``(B, 64, H/32, W/32)``; V5 itself in a variant without key encoder.
    """

    pyramid: Pyramid
    key: Tensor


@dataclass(frozen=True)
class DecodedFrame:
    """Features of a frame for a network without ACM, whose APM depends on that frame alone.

    Args:
        features: P2, ``(B, C, H/4, W/4)``.
        v3: Backbone map V3; None unless the network has the motion cue.
    """

    features: Tensor
    v3: Tensor | None


FrameFeatures = EncodedFrame | DecodedFrame


class Prediction(NamedTuple):
    """What training needs.

    Args:
        logits: Foreground of the centre frame, ``(B, 1, H/4, W/4)``; see ``foreground_probability``.
        side_masks: Probabilities M5, M4, M3 and M2 of every frame, ``(B, T, 4, H, W)`` in [0, 1].
    """

    logits: Tensor
    side_masks: Tensor


class IMCNet(nn.Module):
    """Segments the primary object of the middle frame of a window.

    A window takes two steps. ``encode_frame`` depends on a single frame, so that a stream encodes each
    frame once for all of its windows; without ACM it includes APM. ``decode_window`` is the rest. ``forward``
    is both, for training.

    The parts stand in the order of the paper: feature extraction (FEM), affinity computing (ACM),
    attention propagation (APM), and motion compensation (MCM) with alignment, compensation and head. Options
    of the configuration add parts; all others start as without them from the same random state.

    Raises:
        ValueError: ``config`` is that of a variant, which ``model.variants.build_network`` builds.
    """

    def __init__(self, config: IMCNetConfig | None = None) -> None:
        super().__init__()
        self.config = config or IMCNetConfig()
        if self.config.variant != "full":
            raise ValueError(f"IMCNet is the full network; build_network builds {self.config.variant!r}")
        num_frames = self.config.num_frames
        self.backbone = build_backbone(self.config.backbone)
        # The variant without ACM has neither.
        self.key_encoder: nn.Module | None = conv3x3(self.backbone.channels[-1], KEY_CHANNELS)
        self.affinity: Affinity | None = Affinity(num_frames * KEY_CHANNELS)
        self.propagation = AttentionPropagation(self.backbone.channels)
        self.alignment = CascadedAlignment(self.config.alignment_stages)
        self.compensation = Compensation(num_frames)
        self.segmentation = SegmentationHead()
        self.whitening = PyramidWhitening(self.backbone.channels) if self.config.whitening else None
        self.cue = MotionCue(self.backbone.channels[1], CHANNELS) if self.config.motion_cue else None
        if self.cue is not None:
            self.compensation.take_cue()

    def encode_frame(self, images: Tensor) -> FrameFeatures:
        """Compute what does not depend on a frame's neighbours.

        Args:
            images: RGB, normalised as the configuration says, ``(B, 3, H, W)``, H and W multiples of 32.

        Raises:
            ValueError: ``images`` has another shape.
        """
        pyramid = self._pyramid(images)
        if self.key_encoder is None:
            v3 = None if self.cue is None else pyramid.v3
            return DecodedFrame(self._decode_alone(pyramid).features, v3)
        return EncodedFrame(pyramid, self.key_encoder(pyramid.v5))

    def decode_window(self, window: Sequence[FrameFeatures]) -> Tensor:
        """Segment the middle frame of a window; computes nothing but what its mask needs.

        Args:
            window: The frames in temporal order; an entry may stand several times.

        Returns:
            Foreground logits, ``(B, 1, H/4, W/4)``.

        Raises:
            ValueError: The window does not hold exactly ``num_frames`` entries.
        """
        if len(window) != self.config.num_frames:
            raise ValueError(f"a window holds {self.config.num_frames} frames, got {len(window)}")
        if self.affinity is None:
            alone = cast("Sequence[DecodedFrame]", window)
            features = torch.stack([frame.features for frame in alone], dim=1)
            return self._compensate(features, [frame.v3 for frame in alone])
        encoded = cast("Sequence[EncodedFrame]", window)
        pyramids = [frame.pyramid for frame in encoded]
        decoded = self._propagate(pyramids, [frame.key for frame in encoded])
        return self._compensate(self._by_frame(decoded.features), [pyramid.v3 for pyramid in pyramids])

    def forward(self, windows: Tensor) -> Prediction:
        """Segment windows and keep the side masks.

        Args:
            windows: Normalised RGB in temporal order, ``(B, T, 3, H, W)``, H and W multiples of 32.

        Raises:
            ValueError: ``windows`` has another shape.
        """
        num_frames = self.config.num_frames
        if windows.dim() != 5 or windows.shape[1] != num_frames:
            raise ValueError(f"expected windows (B, {num_frames}, 3, H, W), got {tuple(windows.shape)}")
        # One frame at a time, not T x B at once: in training, batch norm takes its statistics per frame.
        pyramids = [self._pyramid(images) for images in windows.unbind(1)]
        keys = None if self.key_encoder is None else [self.key_encoder(pyramid.v5) for pyramid in pyramids]
        decoded = self._propagate(pyramids, keys)
        side_masks = self.propagation.side_masks(decoded, windows.shape[-2:])
        logits = self._compensate(self._by_frame(decoded.features), [pyramid.v3 for pyramid in pyramids])
        return Prediction(logits, self._by_frame(side_masks))

    def segment_image(self, images: Tensor) -> Prediction:
        """Segment still images, which know no motion: both ACM and MCM are passed by.

        Args:
            images: Normalised RGB, ``(B, 3, H, W)``, H and W multiples of 32.

        Returns:
            Logits of the images and their side masks, with T = 1.

        Raises:
            ValueError: ``images`` has another shape.
        """
        decoded = self._decode_alone(self._pyramid(images))
        logits = self.segmentation(decoded.features)
        return Prediction(logits, self.propagation.side_masks(decoded, images.shape[-2:]).unsqueeze(1))

    def decode_image(self, frame: FrameFeatures) -> Tensor:
        """Segment a frame by itself, as ``segment_image`` does; computes nothing but what its mask needs.

        Args:
            frame: As ``encode_frame`` returns it.

        Returns:
            Foreground logits, ``(B, 1, H/4, W/4)``.
        """
        decoded = frame if isinstance(frame, DecodedFrame) else self._decode_alone(frame.pyramid)
        logits: Tensor = self.segmentation(decoded.features)
        return logits

    def _pyramid(self, images: Tensor) -> Pyramid:
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images (B, 3, H, W), got {tuple(images.shape)}")
        height, width = images.shape[-2:]
        if not height or not width or height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
            raise ValueError(f"height and width must be multiples of {SIZE_MULTIPLE}, got {height} x {width}")
        pyramid: Pyramid = self.backbone(images)
        return pyramid if self.whitening is None else self.whitening(pyramid)

    def _decode_alone(self, pyramid: Pyramid) -> "Propagated":
        """Run APM on images by themselves: Z is 1."""
        decoded: Propagated = self.propagation(pyramid, torch.ones_like(pyramid.v5))
        return decoded

    def _propagate(self, pyramids: Sequence[Pyramid], keys: Sequence[Tensor] | None) -> "Propagated":
        """Run ACM, if any, and APM; the frames of all windows leave as one batch, ``(B * T, ...)``."""
        v2, v3, v4, v5 = (torch.stack(frames, dim=1) for frames in zip(*pyramids, strict=True))
        pyramid = Pyramid(*(level.flatten(0, 1) for level in (v2, v3, v4, v5)))
        if self.affinity is None or keys is None:
            return self._decode_alone(pyramid)
        enhanced = self.affinity(torch.stack(tuple(keys), dim=1), v5)
        decoded: Propagated = self.propagation(pyramid, enhanced.flatten(0, 1))
        return decoded

    def _by_frame(self, maps: Tensor) -> Tensor:
        return _split_frames(maps, self.config.num_frames)

    def _compensate(self, frames: Tensor, v3: Sequence[Tensor | None]) -> Tensor:
        """Run MCM on P2 of all frames, ``(B, T, C, h, w)``; returns the logits of the centre frames."""
        aligned = self.alignment(frames)
        if self.cue is None:
            fused = self.compensation(aligned)
        else:
            centre = len(v3) // 2
            cue = self.cue(v3[0], v3[centre], v3[-1], frames[:, centre])
            fused = self.compensation(aligned, cue)
        logits: Tensor = self.segmentation(fused)
        return logits


def _split_frames(maps: Tensor, num_frames: int) -> Tensor:
    """Undo the merging of windows and frames: ``(B * T, ...)`` to ``(B, T, ...)``."""
    return maps.reshape(-1, num_frames, *maps.shape[1:])


def foreground_probability(logits: Tensor) -> Tensor:
    """Turn logits at stride 4, ``(B, 1, H/4, W/4)``, into probabilities at input size, ``(B, 1, H, W)``.

    The sigmoid comes before the upsampling; the other way round gives slightly other masks.
    """
    return enlarge(logits.sigmoid(), 4)


# ---- ACM: affinity computing --------------------------------------------------------------------------


class Affinity(nn.Module):
    """Enhance V5 of every frame by what the frames of a window share (Eq. 1-5).

    One factorised affinity matrix serves the whole window: W of Eq. 2 is the product of ``left`` (P)
    and ``right`` (Q).

    Args:
        channels: Of the keys of all frames of a window together, T * C_k.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.left = conv1x1(channels, channels)
        self.right = conv1x1(channels, channels)

    def weights(self, keys: Tensor) -> Tensor:
        """Compute the normalised affinity S^r (Eq. 1-4).

        Args:
            keys: Keys of the frames, ``(B, T, C_k, h, w)``.

        Returns:
            ``(B, hw, hw)`` in [0, 1]; every column sums to 1.
        """
        stacked = keys.flatten(1, 2)
        left = self.left(stacked).flatten(2)
        right = self.right(stacked).flatten(2)
        return torch.softmax(left.transpose(1, 2) @ right, dim=1)

    def forward(self, keys: Tensor, v5: Tensor) -> Tensor:
        """Spread V5 along the affinity (Eq. 5).

        Args:
            keys: Keys of the frames, ``(B, T, C_k, h, w)``.
            v5: Coarsest backbone maps, ``(B, T, C_v, h, w)``.

        Returns:
            Attention-enhanced Z, ``(B, T, C_v, h, w)``.
        """
        return (v5.flatten(1, 2).flatten(2) @ self.weights(keys)).reshape(v5.shape)


# ---- APM: attention propagation -----------------------------------------------------------------------


class Propagated(NamedTuple):
    """What attention propagation leaves of N frames.

    Args:
        features: P2, ``(N, C, H/4, W/4)``.
        guides: Side masks M5, M4 and M3 at their own strides, ``(N, 1, h, w)`` in [0, 1].
    """

    features: Tensor
    guides: tuple[Tensor, Tensor, Tensor]


class AttentionPropagation(nn.Module):
    """Carry the attention of the top level down the pyramid, guided by side masks (Eq. 6-7)."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        level2, level3, level4, top = channels
        self.top = nn.Sequential(conv3x3(top, CHANNELS), Residual(CHANNELS))
        self.level4 = PropagationLevel(level4)
        self.level3 = PropagationLevel(level3)
        self.level2 = PropagationLevel(level2)

    def forward(self, pyramid: Pyramid, enhanced: Tensor) -> Propagated:
        """Decode N frames, each on its own, from their maps and Z, which has the shape of V5."""
        attended = pyramid.v5 * enhanced * enhanced.mean(dim=(2, 3), keepdim=True)
        m5 = guide_map(attended)
        p5 = self.top(attended)
        p4 = self.level4(pyramid.v4, m5, p5)
        m4 = self.level4.mask(p4)
        p3 = self.level3(pyramid.v3, m4, p4)
        m3 = self.level3.mask(p3)
        return Propagated(self.level2(pyramid.v2, m3, p3), (m5, m4, m3))

    def side_masks(self, decoded: Propagated, size: Sequence[int]) -> Tensor:
        """Bring M5, M4, M3 and M2 to ``size``: ``(N, 4, H, W)`` in [0, 1]. M2 is computed here only."""
        masks = (*decoded.guides, self.level2.mask(decoded.features))
        return torch.cat([resize(mask, size) for mask in masks], dim=1)


def guide_map(attended: Tensor) -> Tensor:
    """Condense P5, ``(N, C, h, w)``, to the guide map M5, ``(N, 1, h, w)`` in [0, 1).

    Lowest and highest value are those of each frame, never of the batch: a mask must not depend on what
    else happens to be segmented beside it.
    """
    response = attended.mean(dim=1, keepdim=True).relu()
    response = response - response.amin(dim=(2, 3), keepdim=True)
    return response / (response.amax(dim=(2, 3), keepdim=True) + 1e-6)


class PropagationLevel(nn.Module):
    """One step down the pyramid, and the head of the level's side mask (Eq. 6-7)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lateral = nn.Sequential(conv3x3(channels, CHANNELS), Residual(CHANNELS))
        self.merge = Residual(CHANNELS)
        self.head = nn.Sequential(Residual(CHANNELS), conv1x1(CHANNELS, 1))

    def forward(self, values: Tensor, guide: Tensor, coarser: Tensor) -> Tensor:
        """Merge a level with the one above.

        Args:
            values: Backbone map of this level, ``(N, C_v, h, w)``.
            guide: Side mask of the level above, ``(N, 1, h/2, w/2)``, or M5.
            coarser: Features of the level above, ``(N, C, h/2, w/2)``.

        Returns:
            Features, ``(N, C, h, w)``.
        """
        size = values.shape[-2:]
        lateral = self.lateral(values * resize(guide, size))
        merged: Tensor = self.merge(resize(coarser, size) + lateral)
        return merged

    def mask(self, features: Tensor) -> Tensor:
        """Predict the side mask, ``(N, 1, h, w)`` in [0, 1], from the level's own features."""
        logits: Tensor = self.head(features)
        return logits.sigmoid()


# ---- MCM: motion compensation -------------------------------------------------------------------------


class CascadedAlignment(nn.Module):
    """Align the neighbours to the centre frame, stage by stage (Eq. 8-10)."""

    def __init__(self, num_stages: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(AlignmentStage() for _ in range(num_stages))

    def forward(self, frames: Tensor) -> Tensor:
        """Replace every frame but the centre of ``frames``, ``(B, T, C, h, w)``, by its aligned self."""
        num_frames = frames.shape[1]
        before, reference, after = frames.tensor_split((num_frames // 2, num_frames // 2 + 1), dim=1)
        neighbours = torch.cat([before, after], dim=1)
        aligned = neighbours.flatten(0, 1)
        for stage in self.stages:
            aligned = stage(reference[:, 0], aligned)
        before, after = aligned.view_as(neighbours).chunk(2, dim=1)
        return torch.cat([before, reference, after], dim=1)


class AlignmentStage(nn.Module):
    """Bring features one step closer to the reference, by one deformable convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce = conv3x3(2 * CHANNELS, CHANNELS)
        self.deform = DeformableConv(CHANNELS, OFFSET_GROUPS)
        self.offsets = conv3x3(CHANNELS, self.deform.offset_channels)
        # Random offsets would sample far off, amplified by every further stage. Starting from zero, an
        # untrained stage is a plain convolution.
        for parameter in self.offsets.parameters():
            nn.init.zeros_(parameter)

    def forward(self, reference: Tensor, features: Tensor) -> Tensor:
        """Move features towards the reference.

        Args:
            reference: ``(B, C, h, w)``.
            features: Of the B * N neighbours, ``(B * N, C, h, w)``.

        Returns:
            The features moved, same shape.
        """
        # The convolution of [reference, features] is the sum of two; that of the reference serves all N.
        weight = self.reduce.weight
        shared = functional.conv2d(reference, weight[:, :CHANNELS], self.reduce.bias, padding=1)
        own = functional.conv2d(features, weight[:, CHANNELS:], padding=1)
        reduced = own.view(len(reference), -1, *own.shape[1:]) + shared.unsqueeze(1)
        aligned: Tensor = self.deform(features, self.offsets(reduced.flatten(0, 1)))
        return aligned


class Compensation(nn.Module):
    """Fuse the aligned frames into features of the centre frame (temporal-spatial, Eq. 11-13)."""

    def __init__(self, num_frames: int) -> None:
        super().__init__()
        self.temporal = TemporalAttention()
        self.spatial = SpatialAttention(num_frames * CHANNELS)
        self.trust: nn.Conv2d | None = None

    def take_cue(self) -> None:
        """Let the fusion read the motion cue, and decide by it where motion counts.

        With t = sigmoid(conv1x1(cue)) at every pixel, the result is P2 + t (fused - P2): between what the
        centre frame shows by itself and what the window shows. t starts at one half everywhere.
        """
        self.spatial.take_cue()
        self.trust = conv1x1(CUE_CHANNELS, 1)
        for parameter in self.trust.parameters():
            nn.init.zeros_(parameter)

    def forward(self, frames: Tensor, cue: Tensor | None = None) -> Tensor:
        """Fuse frames.

        Args:
            frames: Aligned, ``(B, T, C, h, w)``.
            cue: Of a network with the motion cue, ``(B, C, h/2, w/2)``.

        Returns:
            Features of the centre frame, ``(B, C, h, w)``.
        """
        inputs = (frames * self.temporal(frames)).flatten(1, 2)
        if cue is None or self.trust is None:
            return cast("Tensor", self.spatial(inputs))
        cue = resize(cue, inputs.shape[-2:])
        fused = self.spatial(torch.cat([inputs, cue], dim=1))
        return torch.lerp(frames[:, frames.shape[1] // 2], fused, self.trust(cue).sigmoid())


class TemporalAttention(nn.Module):
    """Weigh frames pixel by pixel by how well they agree with the centre frame."""

    def __init__(self) -> None:
        super().__init__()
        self.reference = conv3x3(CHANNELS, CHANNELS)
        self.frame = conv3x3(CHANNELS, CHANNELS)

    def forward(self, frames: Tensor) -> Tensor:
        """Args: ``(B, T, C, h, w)``. Returns weights in [0, 1], ``(B, T, 1, h, w)``, the centre's too."""
        num_frames = frames.shape[1]
        reference = self.reference(frames[:, num_frames // 2]).unsqueeze(1)
        embedded = _split_frames(self.frame(frames.flatten(0, 1)), num_frames)
        agreement: Tensor = (embedded * reference).sum(dim=2, keepdim=True)
        return agreement.sigmoid()


class SpatialAttention(nn.Module):
    """Fuse the weighted frames, and modulate the result by a two-level pyramid of pooled attention."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.features = conv1x1(in_channels, CHANNELS)
        self.attention = conv1x1(in_channels, CHANNELS)
        self.pooled = conv1x1(2 * CHANNELS, CHANNELS)
        self.coarse = conv1x1(CHANNELS, CHANNELS)
        self.coarse_pooled = conv3x3(2 * CHANNELS, CHANNELS)
        self.coarse_refined = conv3x3(CHANNELS, CHANNELS)
        self.refined = conv3x3(CHANNELS, CHANNELS)
        self.merged = conv1x1(CHANNELS, CHANNELS)
        self.scale = conv3x3(CHANNELS, CHANNELS)
        self.shift = nn.Sequential(conv1x1(CHANNELS, CHANNELS), nn.ReLU(), conv1x1(CHANNELS, CHANNELS))

    def take_cue(self) -> None:
        """Let ``features`` and ``attention`` take the cue's channels too, without effect at first."""
        widen(self.features, CUE_CHANNELS)
        widen(self.attention, CUE_CHANNELS)

    def forward(self, frames: Tensor) -> Tensor:
        """Args: weighted frames, ``(B, T * C, h, w)``, h and w multiples of 4. Returns ``(B, C, h, w)``."""
        features = self.features(frames).relu()
        attention = self.pooled(pool(self.attention(frames).relu())).relu()
        level = self.refined(attention).relu() + self._coarse_level(attention)
        scale = self.scale(enlarge(self.merged(level).relu(), 2))
        fused: Tensor = features * scale.sigmoid() * 2 + self.shift(scale)
        return fused

    def _coarse_level(self, attention: Tensor) -> Tensor:
        coarse = self.coarse_pooled(pool(self.coarse(attention).relu())).relu()
        return enlarge(self.coarse_refined(coarse).relu(), 2)


class SegmentationHead(nn.Module):
    """From features of a frame, ``(B, C, h, w)``, to its logits, ``(B, 1, h, w)``."""

    def __init__(self) -> None:
        super().__init__()
        self.residual = Residual(CHANNELS)
        self.predict = conv1x1(CHANNELS, 1)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.predict(self.residual(features))
        return logits
