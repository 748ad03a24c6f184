"""Weights files: safetensors that carry the network's configuration and where the weights come from.

Everything here is strict. A file that is not exactly what it should be is a ``WeightsError``; nothing is
skipped, guessed or replaced by random weights.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from model.checkpoints import infer_backbone, infer_num_frames, read_checkpoint, release_name
from model.errors import WeightsError
from model.imcnet import SIZE_MULTIPLE, IMCNet, IMCNetConfig
from model.variants import build_network

FORMAT_VERSION = 1
# One key: safetensors writes several in random order, and equal weights should make equal files.
_METADATA_KEY = "imcnet"
_OPTIONS = ("normalisation", "whitening", "motion_cue")  # of the configuration, beyond the paper


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file says of itself.

    Args:
        name: Short name, shown beside results.
        trained: False for random weights, whose masks mean nothing.
        provenance: How and on what the weights were trained, or where they come from.
        licence: Terms of the weights, as an SPDX identifier where there is one.
        input_size: Height and width that frames are to be resized to, as in training.
        format_version: Version of the file format.
    """

    name: str
    config: IMCNetConfig
    trained: bool
    provenance: str
    licence: str
    input_size: int = 480
    format_version: int = FORMAT_VERSION


def load_weights(path: Path | str, *, sha256: str | None = None) -> tuple[IMCNet, WeightsInfo]:
    """Read a weights file into a network on the CPU, in float32 and evaluation mode.

    Args:
        sha256: Checksum that the file must have, in hexadecimal.

    Raises:
        WeightsError: The file is missing, damaged, of an unknown version, or not ``sha256``; or its tensors
            are not exactly those of the network that it describes.
    """
    path = Path(path)
    if sha256 is not None and (found := file_sha256(path)) != sha256.lower():
        raise WeightsError(f"{path}: expected SHA-256 {sha256.lower()}, got {found}")
    info = read_info(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: cannot be read: {error}") from error
    return _assemble(path, info.config, tensors), info


def read_info(path: Path | str) -> WeightsInfo:
    """Read what a weights file says of itself, without its tensors.

    Raises:
        WeightsError: The file is missing, damaged or of an unknown version.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file: {error}") from error
    if _METADATA_KEY not in metadata:
        raise WeightsError(
            f"{path}: not a weights file of this network: no {_METADATA_KEY!r} in its metadata"
        )
    try:
        return _parse_info(metadata[_METADATA_KEY])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: metadata cannot be used: {error}") from error


def _parse_info(text: str) -> WeightsInfo:
    fields: dict[str, Any] = json.loads(text)
    version = fields["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(f"expected format version {FORMAT_VERSION}, got {version!r}")
    if not isinstance(fields["trained"], bool):
        raise ValueError(f"trained must be true or false, got {fields['trained']!r}")
    size = fields.get("input_size", WeightsInfo.input_size)
    if not isinstance(size, int) or size < SIZE_MULTIPLE or size % SIZE_MULTIPLE:
        raise ValueError(f"input_size must be a multiple of {SIZE_MULTIPLE}, got {size!r}")
    return WeightsInfo(**{**fields, "config": IMCNetConfig(**fields["config"])})


def save_weights(
    path: Path | str, network: IMCNet, info: WeightsInfo, *, dtype: torch.dtype | None = None
) -> None:
    """Write a weights file, whole or not at all.

    The same weights and information make the same bytes.

    Args:
        dtype: Type that parameters are rounded to; by default each keeps its own. Buffers always do: some
            variances are below the normal range of float16.

    Raises:
        ValueError: ``info`` describes another network, or ``dtype`` is not a floating type.
        WeightsError: A value is too large for ``dtype``, or the file cannot be written.
    """
    if info.config != network.config:
        raise ValueError(f"info describes {info.config}, but the network is {network.config}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating type, got {dtype}")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    if dtype is not None:
        for name, _ in network.named_parameters():
            tensors[name] = _rounded(path, name, tensors[name], dtype)
    metadata = {_METADATA_KEY: json.dumps(_fields_of(info), sort_keys=True)}
    try:
        # Not safetensors' own writer: its files can be read by their owner only, whatever the umask.
        _replace(Path(path), save(tensors, metadata))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written: {error}") from error


def _fields_of(info: WeightsInfo) -> dict[str, Any]:
    """What a file stores. Options beyond the paper are left out where they are off: releases from before
    them read the file, too."""
    fields = asdict(info)
    for name in _OPTIONS:
        if fields["config"][name] == getattr(IMCNetConfig, name):
            del fields["config"][name]
    return fields


def _rounded(path: Path | str, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = tensor.to(dtype)
    if (lost := tensor.isfinite() & ~rounded.isfinite()).any():
        raise WeightsError(f"{path}: {name} holds {tensor[lost][0]:g}, too large for {dtype}")
    return rounded


def _replace(path: Path, data: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def init_weights(path: Path | str, config: IMCNetConfig, seed: int) -> WeightsInfo:
    """Write random weights, marked as untrained; the same seed makes the same file.

    Raises:
        WeightsError: The file cannot be written.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = build_network(config)
    info = WeightsInfo(
        name=f"imcnet-{config.backbone}-untrained",
        config=config,
        trained=False,
        provenance=f"random, seed {seed}",
        licence="CC0-1.0",
    )
    save_weights(path, network, info)
    return info


def import_checkpoint(
    source: Path | str, path: Path | str, *, name: str, licence: str, frame_stride: int = 4
) -> WeightsInfo:
    """Translate one of the authors' checkpoints to a weights file.

    Backbone and frames a window are told from the tensors. Nothing that the checkpoint holds is executed.

    Raises:
        WeightsError: ``source`` cannot be read or asks for code to be run, or its tensors are not exactly
            those of such a network; or ``path`` cannot be written.
    """
    source = Path(source)
    tensors = read_checkpoint(source)
    try:
        config = IMCNetConfig(infer_backbone(tensors), infer_num_frames(tensors), frame_stride)
    except ValueError as error:
        raise WeightsError(f"{source}: not a checkpoint of this network: {error}") from error
    network = _assemble(source, config, tensors, stored_name=release_name)
    info = WeightsInfo(
        name=name,
        config=config,
        trained=True,
        provenance=f"the authors' checkpoint {source.name}, SHA-256 {file_sha256(source)}",
        licence=licence,
    )
    save_weights(path, network, info)
    return info


def file_sha256(path: Path | str) -> str:
    """Checksum of a file, in lower-case hexadecimal.

    Raises:
        WeightsError: The file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error}") from error


def _assemble(
    path: Path, config: IMCNetConfig, stored: Mapping[str, Tensor], stored_name: Callable[[str], str] = str
) -> IMCNet:
    """Build the network from exactly the tensors in ``stored``, copied to the types that it has itself."""
    with torch.device("meta"):
        network = build_network(config)
    expected = {stored_name(name): tensor for name, tensor in network.state_dict().items()}
    if problems := _differences(expected, stored):
        raise WeightsError(
            f"{path}: not the weights of {config.backbone}, variant {config.variant}, with "
            f"{config.num_frames} frames a window and {config.alignment_stages} alignment stage(s)"
            f"{_options(config)}: " + "; ".join(problems)
        )
    state = {
        name: stored[stored_name(name)].to(tensor.dtype, copy=True)
        for name, tensor in network.state_dict().items()
    }
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval()


def _options(config: IMCNetConfig) -> str:
    return "".join(f", {name}" for name in ("whitening", "motion_cue") if getattr(config, name))


def _differences(expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> list[str]:
    problems = []
    if missing := sorted(expected.keys() - stored.keys()):
        problems.append(f"missing: {', '.join(missing)}")
    if left_over := sorted(stored.keys() - expected.keys()):
        problems.append(f"left over: {', '.join(left_over)}")
    for name in sorted(expected.keys() & stored.keys()):
        want, got = expected[name], stored[name]
        # Any floating type will do, half precision too.
        if want.shape != got.shape or want.is_floating_point() != got.is_floating_point():
            problems.append(f"{name}: expected {_describe(want)}, got {_describe(got)}")
    return problems


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
