"""The figures of the paper, to set ours beside: Xi et al., IEEE TCSVT 2022 (arXiv 2204.02791)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

BACKBONE = "resnet101"
INPUT_SIZES: Mapping[str, int] = MappingProxyType({"davis16": 480, "youtube-objects": 288})


class PaperRow(NamedTuple):
    """A row of the paper's tables: mean J and mean F on DAVIS-2016 val, in percent as printed."""

    j_mean: float
    f_mean: float
    what: str


DAVIS16_VAL: Mapping[str, PaperRow] = MappingProxyType(
    {
        "full": PaperRow(82.7, 81.1, "the whole network, single scale"),
        "multi_scale": PaperRow(83.5, 81.7, "the whole network, multi-scale test"),
        "no_acm": PaperRow(80.0, 78.0, "without affinity computing"),
        "no_key_encoder": PaperRow(80.6, 78.7, "affinity without key encoder"),
        "fpn": PaperRow(80.4, 80.1, "feature pyramid in place of attention propagation"),
        "regular_conv": PaperRow(81.5, 80.0, "regular 3x3 convolutions in place of deformable ones"),
        "l1": PaperRow(79.6, 78.4, "1 alignment stage"),
        "l2": PaperRow(80.7, 79.3, "2 alignment stages"),
        "l3": PaperRow(81.4, 80.1, "3 alignment stages"),
        "l5": PaperRow(82.0, 81.0, "5 alignment stages"),
        "no_tsc": PaperRow(80.6, 79.3, "a 3x3 convolution in place of temporal-spatial compensation"),
        "stage1_only": PaperRow(76.3, 75.0, "first training stage only"),
        "no_joint": PaperRow(79.3, 78.4, "without joint training on still images"),
        "frames5": PaperRow(80.2, 78.5, "5 frames a window"),
        "frames7": PaperRow(79.7, 78.0, "7 frames a window"),
        "stride1": PaperRow(82.6, 80.8, "frame stride 1"),
        "stride2": PaperRow(82.0, 80.2, "frame stride 2"),
        "stride6": PaperRow(81.9, 80.5, "frame stride 6"),
    }
)

# Mean J in percent; the paper gives no other row for this dataset.
YOUTUBE_OBJECTS: Mapping[str, float] = MappingProxyType({"full": 70.0, "multi_scale": 70.5})
