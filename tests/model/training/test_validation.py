from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.config import IMCNetConfig
from model.imcnet import FrameFeatures, IMCNet, Prediction
from model.training.samples import Sample
from model.training.validation import score


class Halves(nn.Module):
    """Stands in for a network: its windows are right where the left half is foreground, its stills never."""

    config = IMCNetConfig("resnet18")

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((1, 1, 8, 8), -9.0))
        self.logits.data[..., :4] = 9

    def encode_frame(self, images: Tensor) -> FrameFeatures:
        return cast("FrameFeatures", images)

    def decode_window(self, window: list[Tensor]) -> Tensor:
        assert len(window) == 3
        return self.logits

    def segment_image(self, images: Tensor) -> Prediction:
        assert images.shape == (1, 3, 32, 32)
        return Prediction(-self.logits, torch.empty(0))


class HalfMasks:
    """A window for each name; those of ``left`` have the left half as foreground, others the right."""

    names = ("left", "right", "left")

    def __len__(self) -> int:
        return len(self.names)

    def sample(self, index: int, rng: np.random.Generator, size: int) -> Sample:
        masks = torch.zeros(3, size, size, dtype=torch.uint8)
        half = slice(None, size // 2) if self.names[index] == "left" else slice(size // 2, None)
        masks[1, :, half] = 255  # the centre's alone
        return Sample(torch.zeros(3, 3, size, size, dtype=torch.uint8), masks, masks)


def test_j_is_the_mean_over_sequences_of_means_over_their_windows() -> None:
    scores = score(cast("IMCNet", Halves()), HalfMasks(), 32)
    assert scores.windows == {"left": pytest.approx(1, abs=0.1), "right": pytest.approx(0, abs=0.1)}
    assert scores.stills == {"left": pytest.approx(0, abs=0.1), "right": pytest.approx(1, abs=0.1)}
    assert scores.j == pytest.approx(np.mean(list(scores.windows.values())))
    assert scores.still_j == pytest.approx(np.mean(list(scores.stills.values())))
