from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from model.agreement import EXACT_GATE, FAST_GATE, Agreement, Gate, measure_agreement
from model.engine import TorchEngine
from model.errors import EngineUnavailable
from model.imcnet import FrameFeatures, IMCNet
from model.segmenter import Segmenter


class Batched(TorchEngine):
    """Takes batches as on CUDA, on the CPU, and counts what is in them."""

    def __init__(self, network: IMCNet, batch: int) -> None:
        super().__init__(network, device=torch.device("cpu"))
        self.batch, self.lag = batch, 1
        self.encoded: list[int] = []
        self.decoded: list[int] = []

    def encode(self, images: Tensor) -> list[FrameFeatures]:
        self.encoded.append(len(images))
        return super().encode(images)

    def decode(self, windows: Sequence[Sequence[FrameFeatures]]) -> Tensor:
        self.decoded.append(len(windows))
        return super().decode(windows)


@pytest.mark.parametrize(("batch", "frames"), [(1, 4), (8, 12)])
def test_masks_of_whole_batches_are_compared(
    make_network: Callable[..., IMCNet], batch: int, frames: int
) -> None:
    network = make_network().double()
    engine = Batched(network, batch)
    (agreement,) = measure_agreement(Segmenter(network, device="cpu", input_size=32), engine)
    assert max(engine.encoded) == max(engine.decoded) == batch
    assert sum(engine.encoded) == sum(engine.decoded) == 3 * frames
    assert (agreement.flipped, agreement.iou) == (0, 1)
    assert EXACT_GATE.allows(agreement)


@pytest.mark.parametrize(
    ("gate", "agreement", "message"),
    [
        (EXACT_GATE, Agreement(flipped=2e-4, iou=1.0, foreground=0.5), "0.020% of the pixels"),
        (FAST_GATE, Agreement(flipped=0.01, iou=0.98, foreground=0.5), "IoU 0.9800"),
        (FAST_GATE, Agreement(flipped=0.0, iou=1.0, foreground=0.0), "nothing or all"),
        (FAST_GATE, Agreement(flipped=0.0, iou=1.0, foreground=1.0), "nothing or all"),
    ],
)
def test_a_gate_says_why_it_is_shut(gate: Gate, agreement: Agreement, message: str) -> None:
    assert not gate.allows(agreement)
    with pytest.raises(EngineUnavailable, match=message):
        gate.check(agreement)
