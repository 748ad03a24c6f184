"""The whole network once more, written out plainly, frame by frame, on the authors' parameter names."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models import resnet18
from torchvision.ops import deform_conv2d

from model.checkpoints import release_name
from model.imcnet import IMCNet


class Written:
    """Computes with the parameters of a checkpoint, under the names that they have there."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self.parameters = parameters

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight = self.parameters[f"{name}.weight"]
        return functional.conv2d(x, weight, self.parameters[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def res(self, name: str, x: Tensor) -> Tensor:
        return x + self.conv(f"{name}.conv2", self.conv(f"{name}.conv1", x.relu()).relu())

    def maps(self, image: Tensor) -> list[Tensor]:
        prefix = "feature_extractor.backbone."
        resnet = resnet18(weights=None).double().eval()
        stored = {n.removeprefix(prefix): p for n, p in self.parameters.items() if n.startswith(prefix)}
        missing, unexpected = resnet.load_state_dict(stored, strict=False)
        assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
        x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(image))))
        levels = []
        for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
            levels.append(x := layer(x))
        return levels

    def enhanced(self, tops: list[Tensor]) -> list[Tensor]:
        k = torch.cat([self.conv("K_r3.Key", v5) for v5 in tops], dim=1)
        left = self.conv("co_att_x3.left_transform", k).flatten(2)[0]
        right = self.conv("co_att_x3.right_transform", k).flatten(2)[0]
        s = (left.T @ right).softmax(dim=0)
        return [(v5.flatten(2)[0] @ s).view_as(v5) for v5 in tops]

    def decoded(self, levels: list[Tensor], z: Tensor) -> tuple[Tensor, list[Tensor]]:
        v5 = levels[3]
        p5 = v5 * z * z.mean(dim=(2, 3), keepdim=True)
        m = p5.mean(dim=1, keepdim=True).relu()
        m = (m - m.min()) / ((m - m.min()).max() + 1e-6)
        p = self.res("decoder.l3", self.conv("decoder.head", p5))
        masks = [m]
        for number in (2, 1, 0):
            v = levels[number]
            lateral = self.res(
                f"decoder.l{number}", self.conv(f"decoder.l{number}_head", v * _up(m, v.shape[-2:]))
            )
            p = self.res(f"decoder.e{number}", _up(p, v.shape[-2:]) + lateral)
            name = f"decoder.pd{number}"
            m = self.conv(f"{name}.1", self.res(f"{name}.0", p)).sigmoid()
            masks.append(m)
        return p, masks

    def aligned(self, reference: Tensor, f: Tensor) -> Tensor:
        for reduce, offsets, deform in (
            ("align.cr0", "align.off2d_0", "align.dconv_0"),
            ("align.cr1", "align.off2d_1", "align.dconv_1"),
            ("align.cr2", "align.off2d_2", "align.dconv_2"),
            ("align.cr", "align.off2d", "align.dconv"),
        ):
            moves = self.conv(offsets, self.conv(reduce, torch.cat([reference, f], dim=1)))
            weight, bias = self.parameters[f"{deform}.weight"], self.parameters[f"{deform}.bias"]
            f = deform_conv2d(f, moves, weight, bias, padding=1)
        return f

    def compensated(self, frames: list[Tensor], reference: Tensor) -> Tensor:
        psi = self.conv("fusion.temporal_attn1", reference)
        weighted = []
        for f in frames:
            phi = self.conv("fusion.temporal_attn2", f)
            weighted.append(f * (phi * psi).sum(dim=1, keepdim=True).sigmoid())
        f = torch.cat(weighted, dim=1)
        feat = self.conv("fusion.feat_fusion", f).relu()
        a = self.conv("fusion.spatial_attn1", f).relu()
        a = self.conv("fusion.spatial_attn2", _pools(a)).relu()
        level = self.conv("fusion.spatial_attn_l1", a).relu()
        level = self.conv("fusion.spatial_attn_l2", _pools(level)).relu()
        level = self.conv("fusion.spatial_attn_l3", level).relu()
        a = self.conv("fusion.spatial_attn3", a).relu() + _up(level, a.shape[-2:])
        a = self.conv("fusion.spatial_attn4", a).relu()
        a = self.conv("fusion.spatial_attn5", _up(a, feat.shape[-2:]))
        add = self.conv("fusion.spatial_attn_add2", self.conv("fusion.spatial_attn_add1", a).relu())
        return feat * a.sigmoid() * 2 + add

    def segment(self, images: list[Tensor]) -> tuple[Tensor, list[list[Tensor]]]:
        pyramids = [self.maps(image) for image in images]
        zs = self.enhanced([levels[3] for levels in pyramids])
        decoded = [self.decoded(levels, z) for levels, z in zip(pyramids, zs, strict=True)]
        center = len(images) // 2
        reference = decoded[center][0]
        frames = [
            p if index == center else self.aligned(reference, p) for index, (p, _) in enumerate(decoded)
        ]
        fused = self.compensated(frames, reference)
        logits = self.conv("segmentation.predlayer", self.res("segmentation.reslayer", fused))
        return logits, [masks for _, masks in decoded]


def _up(x: Tensor, size: torch.Size) -> Tensor:
    return functional.interpolate(x, size=size, mode="bilinear", align_corners=True)


def _pools(x: Tensor) -> Tensor:
    padded = functional.pad(x, (1, 1, 1, 1))
    patches = padded.unfold(2, 3, 2).unfold(3, 3, 2).flatten(4)
    # Zeros for padding do for the maximum too: what is pooled is never negative.
    return torch.cat([patches.amax(dim=-1), patches.mean(dim=-1)], dim=1)


@pytest.mark.parametrize("num_frames", [3, 5])
def test_the_network_computes_what_the_equations_say(
    make_network: Callable[..., IMCNet], num_frames: int
) -> None:
    network = make_network(num_frames).double()
    parameters = {release_name(name): tensor for name, tensor in network.state_dict().items()}
    generator = torch.Generator().manual_seed(2)
    windows = torch.randn(1, num_frames, 3, 64, 96, generator=generator, dtype=torch.float64)
    with torch.inference_mode():
        prediction = network(windows)
        logits, masks = Written(parameters).segment(list(windows.unbind(1)))
    torch.testing.assert_close(prediction.logits, logits, rtol=1e-9, atol=1e-9)
    for frame in range(num_frames):
        expected = torch.cat([_up(mask, windows.shape[-2:]) for mask in masks[frame]], dim=1)
        torch.testing.assert_close(prediction.side_masks[:, frame], expected, rtol=1e-9, atol=1e-9)
