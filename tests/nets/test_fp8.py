"""TinySR's transformer in fp8: what is quantized and how, and how near the image stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.reference.tinysr_dit import TinySRTransformer
from tests.nets.fp8_quality import (
    Networks,
    image_psnr,
    networks,
    per_row,
    prediction,
    relative_error,
    static_scales,
    with_scales,
)
from tests.nets.test_networks import CPU, compiled, randomise, tinysr_parts
from tinysr_kernels.errors import InputError
from tinysr_kernels.families import TinySRConfig, build, fold
from tinysr_kernels.nets import folds, fp8, is_fp8, place, to_fp8
from tinysr_kernels.nets.layers import ops
from tinysr_kernels.ops.linear.quantize import E4M3

# Rounding to e4m3 errs evenly over +-1/16 of the power of two below a value, in the root mean square by 1/16/sqrt(3) =
# 0.036 of it, and by 0.036 * sqrt(mean of 1/m^2) = 0.036 * 0.74 = 0.0265 of values whose mantissas m are spread evenly
# (on a logarithmic scale). Both operands of a product are rounded, and a residual branch is two products deep.
BRANCH = 0.0265 * 2**0.5 * 2**0.5


def parts(width: int = 64, gate_scale: float = 1.0) -> tuple[dict[str, Tensor], TinySRConfig]:
    """A normalized checkpoint of two blocks."""
    _, vae, config = tinysr_parts(separable_decoder=True)
    transformer = TinySRTransformer(
        dim=width, layers=2, head_dim=16, channels=4, pooled_dim=24, table=4, sample_size=8, pos_embed_max_size=8
    )
    randomise(transformer)
    transformer.cache_modulation(pooled=torch.randn(1, 24, dtype=torch.float64))
    for block in transformer.transformer_blocks:
        block.gate_msa *= gate_scale
    return transformer.normalized_state() | vae.state_dict(), config


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    with torch.inference_mode():
        return networks(tmp_path_factory.mktemp("layout"), dim=128, layers=2, table=8)


def test_only_the_blocks_linears_are_quantized() -> None:
    tensors, config = parts()
    folded = place(fold("tinysr-dit", config, tensors, torch.float16, "fp8"), CPU, torch.float16)
    linears = {f"transformer.blocks.{i}.{name}" for i in range(2) for name in fp8.LINEARS}
    assert {name for name, t in folded.items() if t.dtype == E4M3} == {f"{linear}.weight" for linear in linears}
    for linear in linears:
        scale, weight = folded[f"{linear}.weight_scale"], folded[f"{linear}.weight"]
        assert (scale.dtype, scale.shape) == (torch.float32, weight.shape[:1])
        assert weight.float().abs().amax(1).eq(448).all()
    assert folded["transformer.proj_out.weight"].dtype == torch.float16
    assert folded["transformer.patch.table"].dtype == torch.float32
    assert is_fp8(folded)
    assert any("8 linears in e4m3" in phrase for phrase in folds(folded))


def test_weights_are_rounded_once_from_float64() -> None:
    """Each is the e4m3 number nearest to the folded weight over its scale, whatever dtype the rest comes in."""
    tensors, config = parts()
    exact = fold("tinysr-dit", config, tensors, torch.float64)
    for dtype in (torch.float16, torch.float32):
        folded = fold("tinysr-dit", config, tensors, dtype, "fp8")
        for name in ("transformer.blocks.0.qkv", "transformer.blocks.1.ff2"):
            weight, scale = exact[f"{name}.weight"], folded[f"{name}.weight_scale"].double()[:, None]
            error = (folded[f"{name}.weight"].double() * scale - weight).abs()
            assert bool((error <= torch.maximum(weight.abs() / 16, scale * 2.0**-10) * (1 + 1e-6)).all())


def test_gates_are_always_folded() -> None:
    """Those too small for half precision too: a scale per channel holds them."""
    tensors, config = parts(gate_scale=1e-7)
    half = fold("tinysr-dit", config, tensors, torch.float16)
    assert "transformer.blocks.0.out.gate" in half
    folded = fold("tinysr-dit", config, tensors, torch.float16, "fp8")
    assert not any(name.endswith(".gate") for name in folded)
    weight, scale = (folded[f"transformer.blocks.0.out.{name}"] for name in ("weight", "weight_scale"))
    expected = half["transformer.blocks.0.out.weight"].double() * half["transformer.blocks.0.out.gate"][:, None]
    assert relative_error(weight.double() * scale[:, None], expected) < 0.03


def test_quantizing_what_was_folded_before() -> None:
    """From float32 the same numbers come as from float64, but for ties; a second time nothing changes."""
    tensors, config = parts()
    expected = fold("tinysr-dit", config, tensors, torch.float32, "fp8")
    later = to_fp8(fold("tinysr-dit", config, tensors, torch.float32))
    assert later.keys() == expected.keys()
    for name, tensor in later.items():
        near = torch.isclose(tensor.double(), expected[name].double(), rtol=1e-6, atol=1e-9)
        assert near.double().mean() > 0.999, name
    again = to_fp8(later)
    assert all(again[name] is later[name] for name in later)


def test_widths_that_fp8_does_not_take_are_named() -> None:
    tensors, config = parts(width=48)
    with pytest.raises(InputError, match=r"multiples of 32, transformer.blocks.0.qkv takes 48"):
        fold("tinysr-dit", config, tensors, torch.float32, "fp8")


@pytest.mark.parametrize("family", ["adcsr", "tinysr-unet"])
def test_other_families_are_refused_by_name(family: str) -> None:
    with pytest.raises(InputError, match=f"tinysr-dit's transformer, this checkpoint is {family}"):
        fold(family, TinySRConfig(), {}, torch.float32, "fp8")


@torch.inference_mode()
def test_a_block_is_eight_operators_on_what_it_says() -> None:
    """Against the same arithmetic written out with dequantized weights and activations."""
    tensors, config = parts()
    folded = place(fold("tinysr-dit", config, tensors, torch.float64, "fp8"), CPU, torch.float64)
    block = build("tinysr-dit", config, folded).transformer.blocks[1]
    x = torch.randn(2, 16, 64, dtype=torch.float64)

    def linear(name: str, v: Tensor, groups: int = 1) -> Tensor:
        layer = block.get_submodule(name)
        parts = v.unflatten(-1, (groups, -1))
        scale = parts.abs().amax(-1, keepdim=True) / 448
        v = ((parts / scale).to(E4M3).double() * scale).flatten(-2)
        return v @ (layer.weight.double() * layer.weight_scale[:, None]).T + layer.bias

    def norm(v: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(v, v.shape[-1:], eps=1e-6)

    y = x + linear("out", ops.attention(linear("qkv", norm(x)), 4, 0.25))
    hidden = torch.nn.functional.gelu(linear("ff1", norm(y)), approximate="tanh")
    assert relative_error(block(x), y + linear("ff2", hidden, groups=2)) < 1e-9


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_around_fp8_changes_little(dtype: torch.dtype) -> None:
    """Beside what fp8 itself costs."""
    tensors, config = parts()
    image = torch.rand(1, 3, 64, 64)
    folded = fold("tinysr-dit", config, tensors, torch.float32, "fp8")
    halved, single = (build("tinysr-dit", config, place(folded, CPU, d)) for d in (dtype, torch.float32))
    exact = compiled("tinysr-dit", config, tensors, torch.float32)
    z = exact.encoder(image)
    lost = relative_error(prediction(single, z), prediction(exact, z))
    assert relative_error(prediction(halved, z), prediction(single, z)) < lost


@torch.inference_mode()
def test_the_prediction_errs_as_e4m3_rounds(found: Networks) -> None:
    """No more than one residual branch does by rounding alone: branches add up, and so do their errors."""
    expected = prediction(found.single, found.latent)
    error = relative_error(prediction(found.fp8, found.latent), expected)
    assert 0.01 < error < BRANCH


@torch.inference_mode()
def test_the_image_stays(found: Networks) -> None:
    """45 dB and more where the transformer's correction is half of the latent, to float32 and to float16 alike."""
    z, expected = found.latent, prediction(found.single, found.latent)
    for other in (expected, prediction(found.half, z)):
        assert image_psnr(found.single, z, prediction(found.fp8, z), other, 0.5) > 45


@torch.inference_mode()
def test_scales_from_the_values_are_as_good_as_calibrated_ones(found: Networks) -> None:
    """Which is why there is no calibration: neither it nor coarser scales would be nearer by more than a tenth."""
    expected = prediction(found.single, found.latent)
    ours = relative_error(prediction(found.fp8, found.latent), expected)
    for other in (per_row, static_scales(found, ("astronaut", "chelsea"))):
        assert ours < 1.1 * relative_error(with_scales(found, other), expected)


@torch.inference_mode()
def test_outliers_saturate_nothing(found: Networks) -> None:
    """A token a thousand times as large as the others stays finite, and leaves the others' rows alone."""
    block = found.fp8.transformer.blocks[0]
    x = torch.randn(1, 64, 128)
    x[0, 3] *= 1000
    x[0, 3, 7] = 60000
    y = block(x)
    assert bool(torch.isfinite(y).all())
    q, scale = ops.layer_norm_quantize(x, 1e-6)
    others = torch.arange(64) != 3
    alone = ops.layer_norm_quantize(x[:, others], 1e-6)
    assert torch.equal(q[:, others], alone[0])
    assert torch.equal(scale[:, others], alone[1])


@torch.inference_mode()
def test_what_overflows_shows(found: Networks) -> None:
    """Infinity in the stream is not hidden by a saturating conversion, so that the caller can turn to a wider dtype."""
    block = found.fp8.transformer.blocks[0]
    for broken in (float("inf"), float("nan")):
        x = torch.randn(1, 64, 128)
        x[0, 3, 7] = broken
        assert not bool(torch.isfinite(block(x)).all())


def test_placing_for_another_dtype_keeps_what_is_quantized(found: Networks) -> None:
    """A network in a wider dtype, to which the runtime turns after an overflow, has the same linears."""
    weights = dict(found.fp8.transformer.named_buffers())
    moved = place({f"transformer.{k}": v for k, v in weights.items()}, CPU, torch.bfloat16)
    for name, tensor in weights.items():
        if tensor.dtype == E4M3:
            assert torch.equal(moved[f"transformer.{name}"].float(), tensor.float())
