"""Deformable convolution (v1) for inference on CUDA, in one Triton kernel.

torchvision's operator writes all sampled patches to memory, 9 * C values a pixel, and multiplies them with
the weight after that. Here a program samples a block of pixels tap by tap and multiplies at once: nothing
but the result is written.

The kernel has not been measured on a GPU yet. Triton's interpreter computes with it what torchvision does on
the CPU, and it compiles for compute capabilities 8.0 and 9.0. ``BLOCK_PIXELS``, ``NUM_WARPS`` and
``NUM_STAGES`` are reckoned for the H100 and H200, from what the compiler reports for 64 channels in 16 bit: a
block of 64 pixels is one warp-group product, and takes 128 registers a thread and 16 KB of shared memory, so
that four blocks fit on a processor; two maps of 120 x 120 are 450 blocks. With loads ahead of the loop (two
stages), it would take 64 KB. They are fixed, not tuned at the first call: tuning measures times, which has no
place in a graph capture.

Only an engine on CUDA imports this module: it needs Triton, which torch brings along on Linux. With
``TRITON_INTERPRET=1`` in the environment before the import, the kernel runs on the CPU, in NumPy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import SubprocessError

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor, nn
from triton.errors import TritonError  # type: ignore[import-untyped]

from model.deform import DeformableConv
from model.errors import EngineUnavailable

BLOCK_PIXELS = 64
NUM_WARPS = 4
NUM_STAGES = 1

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_MAX_IMAGES = 65535  # CUDA's limit of the second dimension of a grid
_MAX_EXTENT = 2**31  # positions within an image are 32 bit


class FusedDeformableConv(nn.Module):
    """Stands in for a ``DeformableConv`` at inference: same operands, same map, no gradient.

    Its weight is a copy, ordered as the kernel reads it, in the type and on the device of the original.
    """

    def __init__(self, conv: DeformableConv) -> None:
        super().__init__()
        self.taps: Tensor
        self.bias: Tensor
        # (9, C, C_out); three dimensions, or `network.to(memory_format=...)` would order it anew.
        taps = conv.weight.detach().permute(2, 3, 1, 0).flatten(0, 1)
        self.register_buffer("taps", taps.clone(memory_format=torch.contiguous_format))
        self.register_buffer("bias", conv.bias.detach().clone())

    def forward(self, features: Tensor, offsets: Tensor) -> Tensor:
        """Args and result: those of ``DeformableConv.forward``; the result is channels_last."""
        weight = self.taps.view(3, 3, *self.taps.shape[1:]).permute(3, 2, 0, 1)
        nhwc = features.contiguous(memory_format=torch.channels_last)
        return fused_deform_conv2d(nhwc, offsets, weight, self.bias)


def fuse_deformable_convs(network: nn.Module) -> None:
    """Replace every ``DeformableConv`` within ``network``, in place."""
    for name, module in list(network.named_modules()):
        if isinstance(module, DeformableConv):
            network.set_submodule(name, FusedDeformableConv(module))


def fused_deform_conv2d(features: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute ``torchvision.ops.deform_conv2d`` with padding 1, without a mask.

    Positions and the shares of the four neighbours are float32, whatever the operands are. Patches are
    rounded to the type of the features before the product, whose sums are float32. An offset that is not a
    number samples zero.

    Any strides will do. Fast are features that are channels_last, which a thread reads in one piece a group,
    and a weight whose last dimension in memory is C_out.

    Args:
        features: ``(N, C, h, w)``, float32, float16 or bfloat16; C a power of two from 16 to 256.
        offsets: ``(N, 2 * 9 * G, h, w)`` in pixels, for every group and tap y then x, G a power of two and
            at most C; float32, or of the features' type, as a 16-bit network predicts them.
        weight: ``(C_out, C, 3, 3)`` in the features' type, C_out a power of two from 16 to 256.
        bias: ``(C_out,)`` in the features' type.

    Returns:
        ``(N, C_out, h, w)`` in the features' type, channels_last.

    Raises:
        ValueError: An operand has another shape, type or device; or is on the CPU, outside of the
            interpreter.
        RuntimeError: A gradient is asked for.
        EngineUnavailable: The kernel cannot be compiled, which Triton does when it is first called.
    """
    operands = {"features": features, "offsets": offsets, "weight": weight, "bias": bias}
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands.values()):
        raise RuntimeError("the fused deformable convolution has no gradient: call it under no_grad")
    _check_types(operands)
    _check_shapes(features, offsets, weight, bias)
    count, channels, height, width = features.shape
    groups = offsets.shape[1] // 18
    output = torch.empty(
        (count, weight.shape[0], height, width),
        dtype=features.dtype,
        device=features.device,
        memory_format=torch.channels_last,
    )
    product_type = _TYPES[features.dtype]
    if INTERPRETED and product_type == tl.bfloat16:
        product_type = tl.float32  # the interpreter multiplies the bits of bfloat16 as if they were integers
    grid = (triton.cdiv(height * width, BLOCK_PIXELS), count)
    # Triton launches on the current device, not on that of the operands.
    with torch.cuda.device_of(features), compiling():  # type: ignore[no-untyped-call]
        _deform_kernel[grid](
            *(features, offsets, weight, bias, output),
            *(height, width),
            *(*features.stride(), *offsets.stride(), *weight.stride(), bias.stride(0), *output.stride()),
            GROUPS=groups,
            GROUP_CHANNELS=channels // groups,
            OUT_CHANNELS=weight.shape[0],
            BLOCK=BLOCK_PIXELS,
            PRODUCT_TYPE=product_type,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return output


@contextmanager
def compiling() -> Iterator[None]:
    """Raises: EngineUnavailable: Within the block, Triton, or the compiler that it calls, has failed."""
    try:
        yield
    except (TritonError, SubprocessError, ImportError) as error:  # its own, a compiler's, of what came out
        raise EngineUnavailable(f"Triton cannot compile its kernel: {error}") from error


def _check_types(operands: dict[str, Tensor]) -> None:
    features = operands["features"]
    if features.dtype not in _TYPES:
        raise ValueError(f"features must be float32, float16 or bfloat16, got {features.dtype}")
    if features.device.type != "cuda" and not (INTERPRETED and features.is_cpu):
        raise ValueError(f"the fused deformable convolution runs on CUDA, got features on {features.device}")
    for name, operand in operands.items():
        if operand.dtype != features.dtype and not (name == "offsets" and operand.dtype == torch.float32):
            raise ValueError(f"{name} must be {features.dtype} like the features, got {operand.dtype}")
        if operand.device != features.device:
            raise ValueError(f"{name} must be on {features.device} like the features, got {operand.device}")


def _check_shapes(features: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor) -> None:
    if features.dim() != 4 or 0 in features.shape or len(features) > _MAX_IMAGES:
        raise ValueError(
            f"features must be (N, C, h, w), not empty, N at most {_MAX_IMAGES}, got {tuple(features.shape)}"
        )
    count, channels, height, width = features.shape
    if not _is_power_of_two(channels) or not 16 <= channels <= 256:
        raise ValueError(f"features must have 16, 32, 64, 128 or 256 channels, got {channels}")
    groups = offsets.shape[1] // 18 if offsets.dim() == 4 else 0
    if offsets.shape != (count, 18 * groups, height, width):
        raise ValueError(
            f"offsets must be ({count}, 18 * groups, {height}, {width}), got {tuple(offsets.shape)}"
        )
    if not _is_power_of_two(groups) or groups > channels:
        raise ValueError(f"groups must be a power of two and at most {channels}, got {groups}")
    if weight.dim() != 4 or weight.shape[1:] != (channels, 3, 3):
        raise ValueError(f"weight must be (C_out, {channels}, 3, 3), got {tuple(weight.shape)}")
    if not _is_power_of_two(len(weight)) or not 16 <= len(weight) <= 256:
        raise ValueError(f"weight must have 16, 32, 64, 128 or 256 channels out, got {len(weight)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}")
    if max(_extent(features), _extent(offsets), height * width * len(weight)) >= _MAX_EXTENT:
        raise ValueError(f"an image must span fewer than {_MAX_EXTENT} values, got {height} x {width} pixels")


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _extent(maps: Tensor) -> int:
    """How many values lie between the first and the last of an image, ``(N, C, h, w)``, in memory."""
    steps = zip(maps.shape[1:], maps.stride()[1:], strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)


# ---- The kernel: P pixels of a block, G groups, K channels a group ----------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _deform_kernel(
    features: tl.tensor,
    offsets: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    output: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    feature_n: tl.tensor,
    feature_c: tl.tensor,
    feature_y: tl.tensor,
    feature_x: tl.tensor,
    offset_n: tl.tensor,
    offset_c: tl.tensor,
    offset_y: tl.tensor,
    offset_x: tl.tensor,
    weight_o: tl.tensor,
    weight_c: tl.tensor,
    weight_y: tl.tensor,
    weight_x: tl.tensor,
    bias_o: tl.tensor,
    output_n: tl.tensor,
    output_c: tl.tensor,
    output_y: tl.tensor,
    output_x: tl.tensor,
    GROUPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRODUCT_TYPE: tl.constexpr,
) -> None:
    """Compute ``BLOCK`` pixels, all channels out, of one image. After each pointer's name: its strides."""
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = pixel < height * width  # the last block of an image is seldom full
    row = pixel // width
    column = pixel % width
    group = tl.arange(0, GROUPS)
    channel = tl.arange(0, GROUPS * GROUP_CHANNELS)
    out_channel = tl.arange(0, OUT_CHANNELS)

    # (1, G, K): where each channel's map starts.
    channel_of_group = group[:, None] * GROUP_CHANNELS + tl.arange(0, GROUP_CHANNELS)[None, :]
    maps = features + image * feature_n + channel_of_group[None, :, :] * feature_c
    # (P, G): where each group's offsets for this pixel start.
    moves = offsets + image * offset_n + group[None, :] * 18 * offset_c
    moves += row[:, None] * offset_y + column[:, None] * offset_x

    sums = tl.zeros((BLOCK, OUT_CHANNELS), tl.float32)
    for tap in range(9):
        tap_y = tap // 3
        tap_x = tap % 3
        move_y = tl.load(moves + 2 * tap * offset_c, mask=exists[:, None], other=0.0).to(tl.float32)
        move_x = tl.load(moves + (2 * tap + 1) * offset_c, mask=exists[:, None], other=0.0).to(tl.float32)
        y = (row + (tap_y - 1))[:, None].to(tl.float32) + move_y
        x = (column + (tap_x - 1))[:, None].to(tl.float32) + move_x
        sampled = _sample(maps, y, x, exists, height, width, feature_y, feature_x)
        patches = tl.reshape(sampled, (BLOCK, GROUPS * GROUP_CHANNELS)).to(features.dtype.element_ty)
        kernel = weight + tap_y * weight_y + tap_x * weight_x
        kernel = tl.load(kernel + channel[:, None] * weight_c + out_channel[None, :] * weight_o)
        # "ieee": float32 stays float32; by default it would be multiplied in TF32.
        sums = tl.dot(patches.to(PRODUCT_TYPE), kernel.to(PRODUCT_TYPE), sums, input_precision="ieee")

    sums += tl.load(bias + out_channel * bias_o).to(tl.float32)[None, :]
    target = output + image * output_n + out_channel[None, :] * output_c
    target += row[:, None] * output_y + column[:, None] * output_x
    tl.store(target, sums.to(output.dtype.element_ty), mask=exists[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _sample(
    maps: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
    exists: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    feature_y: tl.tensor,
    feature_x: tl.tensor,
) -> tl.tensor:
    """Read maps, ``(1, G, K)`` pointers, bilinearly at y and x, ``(P, G)``; ``(P, G, K)`` float32."""
    # Positions from -1 and up to the size, both excluded, have a neighbour inside. All others are set to
    # 0 first, unread: far out, they would not fit into 32-bit integers. So is what is not a number.
    reads = (y > -1) & (y < height) & (x > -1) & (x < width) & exists[:, None]
    y = tl.where(reads, y, 0.0)
    x = tl.where(reads, x, 0.0)
    above = tl.floor(y)
    left = tl.floor(x)
    low = y - above
    right = x - left
    y0 = above.to(tl.int32)
    x0 = left.to(tl.int32)
    y1 = y0 + 1
    x1 = x0 + 1
    steps_y0 = y0 * feature_y
    steps_y1 = y1 * feature_y
    steps_x0 = x0 * feature_x
    steps_x1 = x1 * feature_x
    has_y0 = reads & (y0 >= 0)
    has_y1 = reads & (y1 < height)
    has_x0 = x0 >= 0
    has_x1 = x1 < width
    sampled = _read(maps, steps_y0 + steps_x0, has_y0 & has_x0, (1 - low) * (1 - right))
    sampled += _read(maps, steps_y0 + steps_x1, has_y0 & has_x1, (1 - low) * right)
    sampled += _read(maps, steps_y1 + steps_x0, has_y1 & has_x0, low * (1 - right))
    sampled += _read(maps, steps_y1 + steps_x1, has_y1 & has_x1, low * right)
    return sampled


@triton.jit  # type: ignore[untyped-decorator]
def _read(maps: tl.tensor, steps: tl.tensor, inside: tl.tensor, share: tl.tensor) -> tl.tensor:
    """One neighbour's part: ``share`` times the maps ``steps`` further, zero where not ``inside``."""
    values = tl.load(maps + steps[:, :, None], mask=inside[:, :, None], other=0.0)
    return share[:, :, None] * values.to(tl.float32)


# Known once the kernel is decorated: TRITON_INTERPRET has done its work by then.
INTERPRETED = not isinstance(_deform_kernel, triton.JITFunction)
