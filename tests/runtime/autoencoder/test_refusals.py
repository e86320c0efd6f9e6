"""What accelerate does not take is refused by name, before anything is changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tinysr_kernels
from tests.runtime.autoencoder.modules import autoencoder, diffusers
from tests.runtime.autoencoder.test_fallbacks import Doubling, adapt
from tinysr_kernels import InputError


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Conv2d(3, 3, 3), "AutoencoderKL or AutoencoderTiny, found Conv2d"),
        ("vae", "found str"),
        (None, "found NoneType"),
        (SimpleNamespace(vae=1), "pass pipe.vae"),
    ],
)
def test_other_objects(module: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tinysr_kernels.accelerate(module)


def test_the_halves_alone() -> None:
    with pytest.raises(InputError, match="AutoencoderKL or AutoencoderTiny, found Decoder"):
        tinysr_kernels.accelerate(autoencoder().decoder)


def test_other_autoencoders() -> None:
    """Their halves have the same classes; what lies around them has not been looked at."""
    with pytest.raises(InputError, match="found VQModel"):
        tinysr_kernels.accelerate(diffusers.VQModel())


def same_name() -> Any:
    """A class of the user's own with the name of diffusers'."""
    return type("AutoencoderKL", (nn.Module,), {})()


def attending_blocks() -> Any:
    kinds = {"down_block_types": ("AttnDownEncoderBlock2D",), "up_block_types": ("AttnUpDecoderBlock2D",)}
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, **kinds)


def with_processor() -> Any:
    module = autoencoder()
    module.set_attn_processor(Doubling())
    return module


def with_processor_of_diffusers() -> Any:
    """One that computes something else."""
    module = autoencoder()
    processor = diffusers.models.attention_processor.AttnAddedKVProcessor()
    module.decoder.mid_block.attentions[0].processor = processor
    return module


def with_projections() -> Any:
    module = autoencoder()
    module.fuse_qkv_projections()
    return module


def with_adapter() -> Any:
    module = autoencoder()
    adapt(module)
    return module


def with_eps() -> Any:
    module = autoencoder()
    module.decoder.conv_norm_out.eps = 1e-3
    return module


def with_padding() -> Any:
    module = autoencoder()
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.padding_mode = "circular"  # as for seamless textures
    return module


def with_buffer() -> Any:
    module = autoencoder()
    module.encoder.conv_out.register_buffer("scale", torch.ones(1))
    return module


def with_hook() -> Any:
    module = autoencoder()
    module.encoder.mid_block.register_forward_pre_hook(lambda _m, _i: None)
    return module


def with_forward() -> Any:
    module = autoencoder()
    module.decoder.forward = lambda z: z
    return module


def with_an_own_layer() -> Any:
    class Scaled(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    module = autoencoder("tiny")
    module.decoder.layers[0] = Scaled(4, 12, 3, padding=1)
    return module


def with_quantized_weights() -> Any:
    """As torchao has them: a parameter of another class."""

    class Int8(nn.Parameter):
        pass

    module = autoencoder()
    module.decoder.conv_out.weight = Int8(module.decoder.conv_out.weight.data, requires_grad=False)
    return module


def with_an_adapter_in_attention() -> Any:
    module = autoencoder()
    attention = module.decoder.mid_block.attentions[0]
    attention.to_q = nn.Sequential(attention.to_q)
    return module


def with_something_else(where: str, put: nn.Module) -> Any:
    """Another module of a known class where it is not known."""
    module = autoencoder("tiny" if "layers" in where else "sd")
    parent, _, name = where.rpartition(".")
    setattr(module.get_submodule(parent), name, put)
    return module


def with_a_longer_middle() -> Any:
    module = autoencoder()
    module.decoder.mid_block.resnets.append(module.decoder.mid_block.resnets[0])
    return module


REFUSED = {
    "a class of the same name": (same_name, "found AutoencoderKL"),
    "blocks with attention": (
        attending_blocks,
        "encoder.down_blocks.0 is a AttnDownEncoderBlock2D, known is DownEncoderBlock2D",
    ),
    "a processor": (with_processor, "processor is a Doubling"),
    "another processor": (with_processor_of_diffusers, "processor is a AttnAddedKVProcessor"),
    "fused projections": (with_projections, "to_qkv"),
    "an adapter": (with_adapter, "decoder.conv_out is a .*Adapter"),
    "one norm's eps": (with_eps, "GroupNorms differ"),
    "circular padding": (with_padding, "encoder.conv_in.padding_mode is 'circular'"),
    "a buffer": (with_buffer, "encoder.conv_out has a buffer: scale"),
    "a hook": (with_hook, "encoder.mid_block has hooks"),
    "a forward": (with_forward, "forward has been replaced"),
    "a layer": (with_an_own_layer, "decoder.layers.0 is a .*Scaled"),
    "GELU": (lambda: autoencoder("tiny", act_fn="gelu"), "layers.1.conv.1 is a GELU"),
    "Mish": (lambda: autoencoder("sd", act_fn="mish"), "Mish"),
    "bilinear": (lambda: autoencoder("tiny", upsample_fn="bilinear"), "mode is 'bilinear'"),
    "factor 3": (lambda: autoencoder("tiny", upsampling_scaling_factor=3), "scale_factor is 3"),
    "quantized weights": (with_quantized_weights, "decoder.conv_out.weight is a Int8"),
    "an adapter in the attention": (with_an_adapter_in_attention, "attentions.0.to_q is a Sequential, known is Linear"),
    "no norm": (
        lambda: with_something_else("decoder.conv_norm_out", nn.Identity()),
        "conv_norm_out is a Identity, known is GroupNorm",
    ),
    "no residual block": (
        lambda: with_something_else("decoder.up_blocks.0.resnets.1", nn.Conv2d(32, 32, 3, padding=1)),
        "resnets.1 is a Conv2d, known is ResnetBlock2D",
    ),
    "no layers": (
        lambda: with_something_else("decoder.layers", nn.Conv2d(4, 3, 3, padding=1)),
        "decoder.layers is a Conv2d, known is Sequential",
    ),
    "a class with the name of torch's": (
        lambda: with_something_else("decoder.conv_out", type("Conv2d", (nn.Conv2d,), {})(16, 3, 3, padding=1)),
        "conv_out is a .*test_refusals.Conv2d",
    ),
    "another block": (
        lambda: with_something_else("encoder.down_blocks", nn.ModuleList([nn.Identity()])),
        "down_blocks.0 is a Identity",
    ),
    "a dropout that is something else": (
        lambda: with_something_else("decoder.mid_block.resnets.0.dropout", nn.ReLU()),
        "dropout is a ReLU, known is Dropout",
    ),
    "a larger kernel": (
        lambda: with_something_else("decoder.conv_out", nn.Conv2d(16, 3, 5, padding=2)),
        "kernel_size is",
    ),
    "a longer middle": (with_a_longer_middle, "3 residual blocks and 1 attentions"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_unknown_parts_are_named(what: str) -> None:
    make, message = REFUSED[what]
    module = make()
    with pytest.raises(InputError, match=message):
        tinysr_kernels.accelerate(module)
    for half in ("encoder", "decoder"):
        forward = getattr(getattr(module, half, None), "__dict__", {}).get("forward")
        assert type(forward).__name__ != "Half"


@pytest.mark.long
def test_compiled_modules() -> None:
    module = autoencoder()
    with pytest.raises(InputError, match=r"torch\.compile has wrapped"):
        tinysr_kernels.accelerate(torch.compile(module, backend="eager"))
    module.decoder = torch.compile(module.decoder, backend="eager")
    with pytest.raises(InputError, match=r"torch\.compile has wrapped"):
        tinysr_kernels.accelerate(module)


def test_a_subclass_of_the_users_own_is_taken() -> None:
    """What it adds around the halves stays; the halves are diffusers'."""
    kind = type("Mine", (diffusers.AutoencoderKL,), {})
    module = kind(block_out_channels=(8,), norm_num_groups=2).eval()
    assert tinysr_kernels.accelerate(module) is module


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": "best"}, "quality must be one of"),
        ({"quality": None}, "quality must be one of"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"dtype": 16}, "dtype must be one of"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tinysr_kernels.accelerate(autoencoder(), **options)


def test_a_backend_that_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module = autoencoder()
    with pytest.raises(InputError, match="backend 'triton' cannot run"):
        tinysr_kernels.accelerate(module, backend="triton")
    assert "forward" not in module.encoder.__dict__


def test_restoring_something_else() -> None:
    with pytest.raises(InputError, match="found str"):
        tinysr_kernels.restore("vae")  # type: ignore[type-var]
    plain = nn.Linear(2, 2)
    assert tinysr_kernels.restore(plain) is plain
    own = with_forward()
    tinysr_kernels.restore(own)
    assert own.decoder.forward(5) == 5
