"""A training pass of a batch through the network: its path, dropped cues and measurements."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.imcnet import Affinity, AlignmentStage, IMCNet
from model.training.sampling import Kind

_AFTER_SIDE_MASKS = ("alignment.", "compensation.", "cue.", "segmentation.")


class Maps(NamedTuple):
    """Inputs of the loss.

    Args:
        logits: Foreground of the centre frames, ``(B, 1, H/4, W/4)``.
        side_masks: ``(B, T, 4, H, W)`` in [0, 1]; None if no parameter that trains affects them.
    """

    logits: Tensor
    side_masks: Tensor | None


class ForwardPass(nn.Module):
    """Both paths through the network in one ``forward``, as DistributedDataParallel requires."""

    def __init__(self, network: IMCNet) -> None:
        super().__init__()
        self.network = network
        self._with_side_masks = any(
            parameter.requires_grad and not name.startswith(_AFTER_SIDE_MASKS)
            for name, parameter in network.named_parameters()
        )

    def forward(self, kind: Kind, frames: Tensor) -> Maps:
        """Args: normalised ``(B, T, 3, H, W)``, with T = 1 for stills."""
        if kind == "image":
            return Maps(*self.network.segment_image(frames[:, 0]))
        if self._with_side_masks:
            return Maps(*self.network(frames))
        window = [self.network.encode_frame(images) for images in frames.unbind(1)]
        return Maps(self.network.decode_window(window), None)


@contextmanager
def cue_dropped(cue: nn.Module, dropped: Sequence[bool]) -> Iterator[None]:
    """Set the features of the motion cue to zero for whole windows of the next pass.

    Args:
        dropped: Which windows of the batch.
    """

    def drop(_: nn.Module, __: Any, features: Tensor) -> Tensor:
        kept = torch.tensor([not one for one in dropped], device=features.device)
        return features * kept.view(-1, 1, 1, 1)

    hook = cue.register_forward_hook(drop)
    try:
        yield
    finally:
        hook.remove()


class Measurements:
    """Early signs that the window path diverges, measured in passes of windows.

    Attributes:
        offsets: Mean |offset| of each alignment stage, in pixels at stride 4.
        affinity: Largest weight of the affinity: mean over columns of their maximum; 1 is one-hot. None for
            a network without affinity.
    """

    def __init__(self) -> None:
        self.offsets: list[float] = []
        self.affinity: float | None = None

    @contextmanager
    def of(self, network: IMCNet) -> Iterator[None]:
        """Measure the next pass of windows through ``network``."""
        self.offsets.clear()
        with ExitStack() as hooks:
            for stage in network.alignment.modules():
                if isinstance(stage, AlignmentStage):
                    hooks.callback(stage.offsets.register_forward_hook(self._see_offsets).remove)
            if isinstance(network.affinity, Affinity):
                hooks.callback(network.affinity.register_forward_hook(self._see_keys).remove)
            yield

    def _see_offsets(self, _: nn.Module, __: Any, offsets: Tensor) -> None:
        self.offsets.append(float(offsets.detach().abs().mean()))

    def _see_keys(self, affinity: nn.Module, inputs: tuple[Tensor, Tensor], _: Tensor) -> None:
        weights: Callable[[Tensor], Tensor] = affinity.weights  # type: ignore[assignment]
        with torch.no_grad():
            self.affinity = float(weights(inputs[0].detach()).amax(dim=1).float().mean())
