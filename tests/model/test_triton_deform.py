"""The kernel is computed by Triton's interpreter, in a process of its own: Triton decides at its import."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torchvision.ops import deform_conv2d
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model import triton_deform
from model.deform import DeformableConv
from model.errors import EngineUnavailable
from model.imcnet import IMCNet
from model.triton_deform import FusedDeformableConv, compiling, fuse_deformable_convs, fused_deform_conv2d

Operands = tuple[Tensor, Tensor, Tensor, Tensor]

REPOSITORY = Path(__file__).resolve().parents[2]
SIZES = [(1, 1), (1, 5), (6, 1), (8, 8), (7, 13), (16, 12)]  # a block is 64 pixels
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
PROGRAM = """
import sys, torch
from model.triton_deform import INTERPRETED, fused_deform_conv2d
assert INTERPRETED
cases = torch.load(sys.argv[1])
torch.save({name: fused_deform_conv2d(*operands) for name, operands in cases.items()}, sys.argv[2])
"""
NETWORK_PROGRAM = """
import sys, torch
from model.triton_deform import fuse_deformable_convs
network, windows = torch.load(sys.argv[1], weights_only=False)
fuse_deformable_convs(network)
with torch.inference_mode():
    torch.save(network(windows).logits, sys.argv[2])
"""


def _operands(
    size: tuple[int, int] = (7, 13), *, count: int = 2, channels: int = 64, groups: int = 8, out: int = 64
) -> Operands:
    """Random operands; the offsets reach from well inside to far outside of the map."""
    generator = torch.Generator().manual_seed(sum(size) + groups)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    features, offsets = random(count, channels, *size), 4 * random(count, 18 * groups, *size)
    return features, offsets, random(out, channels, 3, 3) / (9 * channels) ** 0.5, random(out)


def _looking_at(*positions: float, size: tuple[int, int] = (7, 13)) -> Operands:
    """Every tap looks at random ``positions``, row and column in pixels."""
    features, offsets, weight, bias = _operands(size)
    count, _, height, width = offsets.shape
    choice = torch.randint(
        len(positions), (count, 8, 3, 3, 2, height, width), generator=torch.Generator().manual_seed(0)
    )
    looked_at = torch.tensor(positions)[choice]
    rows = torch.arange(height).view(-1, 1) + torch.arange(-1, 2).view(3, 1, 1, 1)
    columns = torch.arange(width) + torch.arange(-1, 2).view(3, 1, 1)
    offsets = looked_at.clone()
    offsets[:, :, :, :, 0] -= rows
    offsets[:, :, :, :, 1] -= columns
    return features, offsets.view(count, -1, height, width), weight, bias


def _cases() -> dict[str, Operands]:
    features, offsets, weight, bias = _operands()
    cases = {f"{height}x{width}": _operands((height, width)) for height, width in SIZES}
    cases["one image"] = _operands(count=1)
    cases["one group"] = _operands(groups=1)
    cases["a group for each channel"] = _operands(channels=16, groups=16)
    cases["more channels out"] = _operands(channels=16, groups=2, out=32)
    cases["on pixels and between two"] = (features, (2 * offsets).round() / 2, weight, bias)
    # 7 and 13 are the sizes: the first positions that see nothing, as -1 is on the other side.
    cases["at the borders"] = _looking_at(-1, -0.999, -0.5, -1e-6, 0, 6, 6.25, 7, 6.999, 12, 12.5, 12.999, 13)
    cases["far outside"] = _looking_at(-1e20, -1e6, -30, 2, 5.5, 30, 1e6, 1e20, float("inf"))
    nhwc = features.contiguous(memory_format=torch.channels_last)
    cases["channels_last"] = (nhwc, offsets.contiguous(memory_format=torch.channels_last), weight, bias)
    cases["slices"] = (features.repeat(1, 2, 1, 1)[:, ::2], offsets.mT.contiguous().mT, weight, bias.flip(0))
    for dtype in (torch.float16, torch.bfloat16):
        # Wide: in 16 bits, a position at the far end would be off by half a pixel.
        wide = tuple(operand.to(dtype) for operand in _operands((2, 200)))
        name = str(dtype).removeprefix("torch.")
        cases[f"{name}, wide"] = (wide[0], wide[1].float() + 0.3, *wide[2:])
        cases[f"{name}, float32 offsets"] = (wide[0], wide[1].float(), *wide[2:])
        cases[f"{name}, its own offsets"] = wide
    return cases


def _not_a_number() -> Operands:
    features, offsets, weight, bias = _operands()
    return features, offsets * float("nan"), weight, bias


CASES = _cases()
NOT_A_NUMBER = _not_a_number()  # torchvision may read anything for it


def _interpret(program: str, operands: object, directory: Path) -> Any:
    torch.save(operands, directory / "operands.pt")
    subprocess.run(
        [sys.executable, "-c", program, directory / "operands.pt", directory / "result.pt"],
        cwd=REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
    )
    return torch.load(directory / "result.pt")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the kernel computes of the cases, on the CPU."""
    cases = {**CASES, "not a number": NOT_A_NUMBER}
    return _interpret(PROGRAM, cases, tmp_path_factory.mktemp("interpreted"))


def _assert_is_torchvisions(sampled: Tensor, operands: Operands) -> None:
    expected = deform_conv2d(*(operand.float() for operand in operands), padding=(1, 1))
    assert sampled.dtype == operands[0].dtype
    assert sampled.is_contiguous(memory_format=torch.channels_last)
    tolerance = TOLERANCE[sampled.dtype]
    torch.testing.assert_close(sampled.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_it_computes_torchvisions_operator(interpreted: dict[str, Tensor], name: str) -> None:
    _assert_is_torchvisions(interpreted[name], CASES[name])


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_16_bit_offsets_are_added_in_float32(interpreted: dict[str, Tensor], name: str) -> None:
    assert torch.equal(interpreted[f"{name}, its own offsets"], interpreted[f"{name}, float32 offsets"])


def test_an_offset_that_is_not_a_number_samples_zero(interpreted: dict[str, Tensor]) -> None:
    sampled, (_, _, _, bias) = interpreted["not a number"], NOT_A_NUMBER
    assert torch.equal(sampled, bias.view(-1, 1, 1).expand_as(sampled))


def test_a_network_whose_convolutions_are_fused_computes_the_same(network: IMCNet, tmp_path: Path) -> None:
    windows = torch.randn(1, 3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    fused = _interpret(NETWORK_PROGRAM, (network, windows), tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(fused, network(windows).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "error",
    [
        triton.compiler.errors.CompilationError(None, None, "no such type"),
        subprocess.CalledProcessError(1, ["gcc"]),
        ImportError("failed to map segment from shared object"),
    ],
)
def test_a_kernel_that_cannot_be_compiled_is_an_engine_that_is_not_there(error: Exception) -> None:
    with pytest.raises(EngineUnavailable, match="cannot compile its kernel"), compiling():
        raise error


def test_every_deformable_convolution_of_a_network_is_replaced(make_network: Callable[..., IMCNet]) -> None:
    network = make_network()
    fuse_deformable_convs(network)
    modules = list(network.modules())
    assert sum(isinstance(module, FusedDeformableConv) for module in modules) == 4
    assert not any(isinstance(module, DeformableConv) for module in modules)
    # The original's are parameters: what is left of them would be converted, moved and saved.
    assert not [name for name, _ in network.named_parameters() if ".deform." in name]


def test_the_weight_is_ordered_as_the_kernel_reads_it_and_stays_so() -> None:
    conv = DeformableConv(64, 8)
    fused = FusedDeformableConv(conv).to(torch.float16).to(memory_format=torch.channels_last)
    assert fused.taps.is_contiguous()
    assert torch.equal(fused.taps[5], conv.weight[:, :, 1, 2].T.half())
    assert fused.taps.untyped_storage().data_ptr() != conv.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("name", "operand", "message"),
    [
        ("features", torch.zeros(2, 64, 7), r"features must be \(N, C, h, w\)"),
        ("features", torch.zeros(0, 64, 7, 13), "not empty"),
        ("features", torch.zeros(65536, 1, 1, 1).expand(-1, 64, -1, -1), "N at most 65535"),
        ("features", torch.zeros(2, 48, 7, 13), "channels, got 48"),
        ("features", torch.zeros(2, 8, 7, 13), "channels, got 8"),
        ("features", torch.zeros(2, 64, 7, 13, dtype=torch.float64), "got torch.float64"),
        ("features", torch.zeros(2, 64, 7, 13, dtype=torch.float16), "weight must be torch.float16"),
        ("offsets", torch.zeros(2, 144, 7, 12), r"offsets must be \(2, 18 \* groups, 7, 13\)"),
        ("offsets", torch.zeros(2, 143, 7, 13), r"got \(2, 143, 7, 13\)"),
        ("offsets", torch.zeros(2, 144), r"got \(2, 144\)"),
        ("offsets", torch.zeros(2, 54, 7, 13), "groups must be a power of two and at most 64, got 3"),
        ("offsets", torch.zeros(2, 0, 7, 13), "got 0"),
        ("offsets", torch.zeros(2, 144, 7, 13, dtype=torch.float16), "offsets must be torch.float32"),
        ("offsets", torch.zeros(2, 144, 7, 13, device="meta"), "offsets must be on cpu"),
        ("weight", torch.zeros(64, 32, 3, 3), r"weight must be \(C_out, 64, 3, 3\)"),
        ("weight", torch.zeros(64, 64, 5, 5), r"weight must be \(C_out, 64, 3, 3\)"),
        ("weight", torch.zeros(1, 64, 3, 3), "channels out, got 1"),
        ("bias", torch.zeros(32), r"bias must be \(64,\)"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, operand: Tensor, message: str
) -> None:
    monkeypatch.setattr(triton_deform, "INTERPRETED", True)  # so that the CPU is not what is refused
    names = ("features", "offsets", "weight", "bias")
    operands = {**dict(zip(names, _operands(), strict=True)), name: operand}
    with pytest.raises(ValueError, match=message):
        fused_deform_conv2d(**operands)


def test_an_image_beyond_32_bit_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_deform, "INTERPRETED", True)
    _, _, weight, bias = _operands()
    features = torch.zeros(1).expand(1, 64, 2**13, 2**13)
    with pytest.raises(ValueError, match="fewer than 2147483648 values"):
        fused_deform_conv2d(features, features[:, :18], weight, bias)


def test_on_the_cpu_it_is_refused() -> None:
    with pytest.raises(ValueError, match="runs on CUDA, got features on cpu"):
        fused_deform_conv2d(*_operands())


def test_a_gradient_is_refused() -> None:
    features, *others = _operands()
    with pytest.raises(RuntimeError, match="has no gradient"):
        fused_deform_conv2d(features.requires_grad_(), *others)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_it_compiles_for_the_network_without_a_gpu(
    capability: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter takes what the compiler does not, and says nothing of how the memory is read."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = triton_deform._deform_kernel
    constants = {
        "GROUPS": 8,
        "GROUP_CHANNELS": 8,
        "OUT_CHANNELS": 64,
        "BLOCK": triton_deform.BLOCK_PIXELS,
        "PRODUCT_TYPE": tl.float16 if dtype == "fp16" else tl.bfloat16,
        # The strides that are 1 for channels_last maps and the module's weight.
        **dict.fromkeys(("feature_c", "offset_c", "weight_o", "bias_o", "output_c"), 1),
    }
    pointers = ("features", "offsets", "weight", "bias", "output")
    signature = {
        name: "constexpr" if name in constants else f"*{dtype}" if name in pointers else "i32"
        for name in kernel.arg_names
    }
    # As a launch tells of addresses and of strides that are multiples of 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name not in constants and name not in ("height", "width")
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": triton_deform.NUM_WARPS, "num_stages": triton_deform.NUM_STAGES},
    )
    assert compiled.metadata.shared <= 16 * 1024
    assert "ld.global.v4.b32" in compiled.asm["ptx"]  # the eight channels of a group in one piece
    assert ("wgmma" if capability == 90 else "mma.sync") in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_it_computes_torchvisions_operator(cuda_device: str, name: str) -> None:
    features, offsets, weight, bias = (operand.to(cuda_device) for operand in CASES[name])
    sampled = fused_deform_conv2d(features, offsets, weight, bias)
    _assert_is_torchvisions(sampled.cpu(), CASES[name])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_the_module_stands_in_for_the_plain_one(cuda_device: str, dtype: torch.dtype) -> None:
    features, offsets, weight, bias = (operand.to(cuda_device, dtype) for operand in _operands((120, 120)))
    plain = DeformableConv(64, 8).to(cuda_device, dtype).requires_grad_(False)
    plain.weight.copy_(weight)
    plain.bias.copy_(bias)
    expected = plain(features, offsets).float()
    tolerance = TOLERANCE[dtype]
    sampled = FusedDeformableConv(plain)(features, offsets).float()
    torch.testing.assert_close(sampled, expected, rtol=tolerance, atol=tolerance)
