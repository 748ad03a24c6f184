"""The authors' checkpoints: how they are read, their names, and what they say about their network."""

import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.backbone import BackboneName
from model.errors import WeightsError
from model.imcnet import KEY_CHANNELS

# Our module, their module. Parameters inside (weight, bias, conv1, ...) have the same names.
_MODULES = {
    "backbone": "feature_extractor.backbone",
    "key_encoder": "K_r3.Key",
    "affinity.left": "co_att_x3.left_transform",
    "affinity.right": "co_att_x3.right_transform",
    "propagation.top.0": "decoder.head",
    "propagation.top.1": "decoder.l3",
    "propagation.level4.lateral.0": "decoder.l2_head",
    "propagation.level4.lateral.1": "decoder.l2",
    "propagation.level4.merge": "decoder.e2",
    "propagation.level4.head": "decoder.pd2",
    "propagation.level3.lateral.0": "decoder.l1_head",
    "propagation.level3.lateral.1": "decoder.l1",
    "propagation.level3.merge": "decoder.e1",
    "propagation.level3.head": "decoder.pd1",
    "propagation.level2.lateral.0": "decoder.l0_head",
    "propagation.level2.lateral.1": "decoder.l0",
    "propagation.level2.merge": "decoder.e0",
    "propagation.level2.head": "decoder.pd0",
    "alignment.stages.0.reduce": "align.cr0",
    "alignment.stages.0.offsets": "align.off2d_0",
    "alignment.stages.0.deform": "align.dconv_0",
    "alignment.stages.1.reduce": "align.cr1",
    "alignment.stages.1.offsets": "align.off2d_1",
    "alignment.stages.1.deform": "align.dconv_1",
    "alignment.stages.2.reduce": "align.cr2",
    "alignment.stages.2.offsets": "align.off2d_2",
    "alignment.stages.2.deform": "align.dconv_2",
    "alignment.stages.3.reduce": "align.cr",
    "alignment.stages.3.offsets": "align.off2d",
    "alignment.stages.3.deform": "align.dconv",
    "compensation.temporal.reference": "fusion.temporal_attn1",
    "compensation.temporal.frame": "fusion.temporal_attn2",
    "compensation.spatial.features": "fusion.feat_fusion",
    "compensation.spatial.attention": "fusion.spatial_attn1",
    "compensation.spatial.pooled": "fusion.spatial_attn2",
    "compensation.spatial.refined": "fusion.spatial_attn3",
    "compensation.spatial.merged": "fusion.spatial_attn4",
    "compensation.spatial.scale": "fusion.spatial_attn5",
    "compensation.spatial.coarse": "fusion.spatial_attn_l1",
    "compensation.spatial.coarse_pooled": "fusion.spatial_attn_l2",
    "compensation.spatial.coarse_refined": "fusion.spatial_attn_l3",
    "compensation.spatial.shift.0": "fusion.spatial_attn_add1",
    "compensation.spatial.shift.2": "fusion.spatial_attn_add2",
    "segmentation.residual": "segmentation.reslayer",
    "segmentation.predict": "segmentation.predlayer",
}

# Blocks of layer3, and whether blocks are bottlenecks: enough to tell the five apart.
_BACKBONES: dict[tuple[int, bool], BackboneName] = {
    (2, False): "resnet18",
    (6, False): "resnet34",
    (6, True): "resnet50",
    (23, True): "resnet101",
    (36, True): "resnet152",
}

# Beside its weights a checkpoint may hold its best score as a NumPy scalar, which NumPy 1 pickled under the
# first of these names.
_NUMPY_SCALAR: Any = np.float64().__reduce__()[0]
_HARMLESS_GLOBALS: list[Any] = [
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    _NUMPY_SCALAR,
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
]
# What torch.load raises on damaged, foreign or hostile files, depending on where it gives up.
_UNREADABLE_CHECKPOINT = (
    pickle.UnpicklingError,
    OSError,
    EOFError,
    RuntimeError,
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint, under the authors' names. Nothing that it holds is executed.

    Raises:
        WeightsError: The file is missing, damaged, asks for code to be run, or holds no weights.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS_GLOBALS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE_CHECKPOINT as error:
        # torch's own message is left out: it recommends to read the file without protection.
        raise WeightsError(
            f"{path}: not a readable checkpoint: damaged, or it holds more than tensors and plain values"
        ) from error
    weights = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict):
        raise WeightsError(f"{path}: expected a dictionary with the weights under 'model'")
    if others := [str(name) for name, value in weights.items() if not isinstance(value, Tensor)]:
        raise WeightsError(f"{path}: expected tensors only, got something else under {', '.join(others)}")
    return _complete_counters(_without_prefix(weights))


def release_name(name: str) -> str:
    """Translate the name of a parameter or buffer of ``IMCNet`` to the authors' name.

    Raises:
        KeyError: No module of the network stands under that name.
    """
    module, dot, rest = name, "", ""
    while module not in _MODULES:
        module, dot, parameter = module.rpartition(".")
        if not dot:
            raise KeyError(name)
        rest = f".{parameter}{rest}"
    return _MODULES[module] + rest


def infer_backbone(names: Collection[str]) -> BackboneName:
    """Tell the backbone from the names in a checkpoint.

    Raises:
        ValueError: They are those of no backbone that the network can have.
    """
    layer3 = re.compile(re.escape(_MODULES["backbone"]) + r"\.layer3\.(\d{1,3})\.")
    blocks = {int(match[1]) for match in map(layer3.match, names) if match}
    bottleneck = f"{_MODULES['backbone']}.layer1.0.conv3.weight" in names
    found = (max(blocks, default=-1) + 1, bottleneck)
    if found not in _BACKBONES:
        kind = "bottleneck" if bottleneck else "basic"
        raise ValueError(f"no ResNet of 18, 34, 50, 101 or 152 layers has {found[0]} {kind} blocks in layer3")
    return _BACKBONES[found]


def infer_num_frames(tensors: Mapping[str, Tensor]) -> int:
    """Tell the frames a window from the size of the affinity's transform; 3 if it is missing."""
    transform = tensors.get(release_name("affinity.left.weight"))
    if transform is None or transform.dim() == 0:
        return 3
    return transform.shape[0] // KEY_CHANNELS


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take away the "module." that training on several GPUs puts before every name."""
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _complete_counters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the batch counters of batch norm, which old checkpoints lack and inference never reads."""
    norms = [name.removesuffix(".running_mean") for name in tensors if name.endswith(".running_mean")]
    counters = {f"{norm}.num_batches_tracked": torch.tensor(0) for norm in norms}
    return {**counters, **tensors}
