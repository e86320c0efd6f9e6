"""The pruned UNet against diffusers' modules, with the parts that pruning removes set to do nothing."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.reference.pruned_unet import PrunedUNet, Resnet, Sampler, SeparableConv, Transformer, convolution
from model.reference.unet_shapes import (
    convolution_shapes,
    decoder_shapes,
    resnet_shapes,
    transformer_shapes,
    unet_shapes,
)
from model.reference.unet_sr import UNetSR
from tinysr_kernels.families import UNetConfig

pytestmark = pytest.mark.numeric
resnet = pytest.importorskip("diffusers.models.resnet")

CONFIG = UNetConfig(head_dim=8, groups=(4, 2, 1))
HEAD = 8


def without(shapes: dict[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix + "."): shape for name, shape in shapes.items()}


def randomize(module: nn.Module) -> nn.Module:
    """Weights of the size that keeps activations near one; norms are no longer the identity."""
    for name, value in module.named_parameters():
        scale = 0.5 if value.ndim == 1 else (value[0].numel()) ** -0.5
        nn.init.normal_(value, 1.0 if value.ndim == 1 and "norm" in name and "weight" in name else 0.0, scale)
    return module.eval()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------- pieces
@pytest.mark.parametrize("outputs", [12, 20])
def test_resnet(outputs: int) -> None:
    theirs = randomize(
        resnet.ResnetBlock2D(in_channels=12, out_channels=outputs, temb_channels=None, groups=4, eps=1e-5)
    )
    ours = Resnet(without(resnet_shapes("r", 12, outputs, separable=False), "r"), CONFIG.groups, 1e-5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 12, 7, 5)
    assert relative(ours(x), theirs(x, None)) < 1e-5


def test_resnet_time_bias() -> None:
    theirs = randomize(resnet.ResnetBlock2D(in_channels=12, out_channels=8, temb_channels=6, groups=4, eps=1e-5))
    temb = torch.randn(1, 6)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("time_emb_proj")}
    state["time_bias"] = theirs.time_emb_proj(F.silu(temb))[0].detach()
    ours = Resnet(without(resnet_shapes("r", 12, 8, separable=False, time_bias=True), "r"), CONFIG.groups, 1e-5)
    ours.load_state_dict(state)
    x = torch.randn(2, 12, 5, 6)
    assert relative(ours(x), theirs(x, temb)) < 1e-5


def test_transformer() -> None:
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    theirs = randomize(
        Transformer2DModel(
            num_attention_heads=3,
            attention_head_dim=HEAD,
            in_channels=24,
            norm_num_groups=4,
            use_linear_projection=True,
        )
    )
    state = theirs.state_dict()
    assert not any(".attn2." in name for name in state)
    ours = Transformer(without(transformer_shapes("t", 24), "t"), CONFIG)
    ours.load_state_dict({k: v for k, v in state.items() if ".norm2." not in k})
    x = torch.randn(2, 24, 4, 5)
    assert relative(ours(x), theirs(x).sample) < 1e-5


@pytest.mark.parametrize("up", [False, True])
def test_samplers(up: bool) -> None:
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.upsampling import Upsample2D

    kind = Upsample2D if up else Downsample2D
    theirs = randomize(kind(6, use_conv=True, out_channels=10))
    ours = Sampler(convolution_shapes("conv", 6, 10, separable=False), up)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k.startswith("conv.")})
    x = torch.randn(1, 6, 8, 6)
    assert relative(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize("stride", [1, 2])
def test_separable_is_a_dense_convolution_of_rank_one(stride: int) -> None:
    separable = randomize(SeparableConv(5, 7, stride))
    assert isinstance(separable, SeparableConv)
    dense = separable.pointwise.weight * separable.depthwise.weight[:, 0][None]
    x = torch.randn(2, 5, 9, 8)
    wanted = F.conv2d(x, dense, separable.pointwise.bias, stride=stride, padding=1)
    assert relative(separable(x), wanted) < 1e-5


# ------------------------------------------------------------------------------------------------ whole networks
def diffusers_unet(channels: tuple[int, ...]) -> nn.Module:
    """SD 2.1's UNet at small size; its cross attention contributes nothing."""
    from diffusers import UNet2DConditionModel

    levels = len(channels)
    network = UNet2DConditionModel(
        in_channels=12,
        out_channels=16,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        layers_per_block=2,
        norm_num_groups=4,
        # The name in diffusers' configuration is the old one; these are numbers of heads.
        attention_head_dim=tuple(width // HEAD for width in channels),
        cross_attention_dim=4,
        use_linear_projection=True,
    )
    randomize(network)
    for name, value in network.named_parameters():
        if ".attn2.to_out." in name:
            nn.init.zeros_(value)
    return network


def pruned_state(network: nn.Module, time: Tensor) -> dict[str, Tensor]:
    """Its weights without conditioning, each resnet's time projection evaluated for the embedding `time` [1,E]."""
    state = {}
    for name, value in network.state_dict().items():
        if name.endswith("time_emb_proj.weight"):
            projection = network.get_submodule(name.removesuffix(".weight"))
            bias = projection(F.silu(time))[0].detach()
            state[name.replace("time_emb_proj.weight", "time_bias")] = bias
        elif not re.search(r"time_embedding|time_emb_proj|\.attn2\.|transformer_blocks\.\d+\.norm2\.", name):
            state[name] = value
    return state


def test_whole_unet_against_diffusers() -> None:
    channels = (16, 24, 32)
    theirs = diffusers_unet(channels)
    step = torch.tensor([999])
    time = theirs.time_embedding(theirs.time_proj(step))
    state = pruned_state(theirs, time)
    regular = unet_shapes(12, 16, channels, 2, transformers=(True, True, False), time_bias=True)
    assert {name: tuple(value.shape) for name, value in state.items()} == regular
    ours = PrunedUNet.from_state(state, CONFIG)
    x = torch.randn(1, 12, 8, 12)
    with torch.no_grad():
        wanted = theirs(x, step, encoder_hidden_states=torch.randn(1, 3, 4)).sample
        assert relative(ours(x), wanted) < 1e-5


def test_depths_and_widths_may_differ_from_block_to_block() -> None:
    shapes = unet_shapes(3, 5, (8, 12), 1, separable=True)
    # Prune the inner width of one resnet and make one convolution dense.
    name = "down_blocks.1.resnets.0"
    shapes |= {f"{name}.norm2.weight": (6,), f"{name}.norm2.bias": (6,)}
    shapes |= {f"{name}.conv1.pointwise.weight": (6, 8, 1, 1), f"{name}.conv1.pointwise.bias": (6,)}
    for part in ("depthwise.weight", "pointwise.weight", "pointwise.bias"):
        del shapes[f"{name}.conv2.{part}"]
    shapes |= {f"{name}.conv2.weight": (12, 6, 3, 3), f"{name}.conv2.bias": (12,)}
    network = PrunedUNet(shapes, CONFIG)
    assert {k: tuple(v.shape) for k, v in network.state_dict().items()} == shapes
    assert network(torch.randn(1, 3, 6, 8)).shape == (1, 5, 6, 8)


def test_groups_are_the_largest_that_divides() -> None:
    shapes = {"weight": (30,), "bias": (30,)}
    from model.reference.pruned_unet import group_norm

    assert group_norm(shapes, UNetConfig().groups, 1e-5).num_groups == 6
    assert group_norm({"weight": (240,), "bias": (240,)}, UNetConfig().groups, 1e-5).num_groups == 24
    with pytest.raises(ValueError, match="divides 30"):
        group_norm(shapes, (32, 16), 1e-5)


def test_a_missing_tensor_is_named() -> None:
    shapes = unet_shapes(3, 5, (8, 12), 1)
    del shapes["mid_block.resnets.1.conv2.weight"]
    with pytest.raises(KeyError, match="weight"):
        PrunedUNet(shapes, CONFIG)


def test_skips_must_match() -> None:
    shapes = {k: v for k, v in unet_shapes(3, 5, (8, 12), 1).items() if "up_blocks.1.resnets.1" not in k}
    with pytest.raises(ValueError, match="leave 4 skips, the up blocks take 3"):
        PrunedUNet(shapes, CONFIG)


def test_biases_follow_the_keys() -> None:
    assert convolution({"weight": (4, 2, 3, 3)}).bias is None
    separable = convolution({"depthwise.weight": (2, 1, 3, 3), "pointwise.weight": (4, 2, 1, 1)})
    assert isinstance(separable, SeparableConv)
    assert separable.pointwise.bias is None


# --------------------------------------------------------------------------------------------- image to image
def test_sr_starts_from_bicubic() -> None:
    config = UNetConfig(groups=(4, 2, 1), residual="bicubic", color_fix="none")
    shapes = {f"unet.{k}": v for k, v in unet_shapes(12, 8, (8, 12), 1, separable=True).items()}
    shapes |= {f"decoder.{k}": v for k, v in decoder_shapes((4, 4, 8, 8), 1, attention=False).items()}
    network = UNetSR(shapes, config)
    assert network.multiple == 4
    x = torch.rand(1, 3, 8, 12) * 2 - 1
    assert network(x).shape == (1, 3, 32, 48)
    for value in network.decoder.conv_out.parameters():
        nn.init.zeros_(value)
    assert torch.equal(network(x), F.interpolate(x, scale_factor=4.0, mode="bicubic", align_corners=False))
    again = UNetSR.from_state(network.state_dict(), config)
    assert torch.equal(again(x), network(x))
