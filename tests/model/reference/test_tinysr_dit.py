"""The reference transformer against diffusers' SD3 modules; public names, cached modulation, LoRA."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.attention import FeedForward as DiffusersFeedForward
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, Timesteps
from diffusers.models.embeddings import PatchEmbed as DiffusersPatchEmbed
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from diffusers.models.transformers.transformer_sd3 import SD3SingleTransformerBlock
from torch import Tensor, nn

from model.reference.lora import merge_lora
from model.reference.tinysr_dit import (
    BLOCK_MODULATION,
    NORM_EPS,
    Attention,
    Block,
    FeedForward,
    Modulation,
    PatchEmbed,
    TimeTextEmbed,
    TinySRTransformer,
    modulated_norm,
    position_table,
    timestep_embedding,
)
from tests.layouts.weights import fill
from tinysr_kernels.families import TinySRConfig

pytestmark = pytest.mark.numeric
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
DIM, HEAD_DIM, POOLED, CHANNELS, LAYERS, TABLE, SAMPLE, MAX_SIZE = 48, 16, 20, 4, 3, 4, 16, 16
CONFIG = TinySRConfig(head_dim=HEAD_DIM)


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.dtype == expected.dtype
    return float((found - expected).norm() / expected.norm())


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def twins(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Both modules with the same random weights, matched by name."""
    fill(ours, 1)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype), theirs.to(dtype).requires_grad_(False)


def small(**changes: object) -> TinySRTransformer:
    sizes = {"dim": DIM, "layers": LAYERS, "head_dim": HEAD_DIM, "channels": CHANNELS, "pooled_dim": POOLED}
    sizes |= {"table": TABLE, "sample_size": SAMPLE, "pos_embed_max_size": MAX_SIZE}
    model = TinySRTransformer(**(sizes | changes))
    fill(model, 2)
    return model


class DiffusersTinySR(nn.Module):
    """The same network put together from diffusers' modules, under the public names."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = DiffusersPatchEmbed(SAMPLE, SAMPLE, 2, CHANNELS, DIM, pos_embed_max_size=MAX_SIZE)
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(DIM, POOLED)
        blocks = [SD3SingleTransformerBlock(DIM, DIM // HEAD_DIM, HEAD_DIM) for _ in range(LAYERS)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out = AdaLayerNormContinuous(DIM, DIM, elementwise_affine=False, eps=NORM_EPS)
        self.proj_out = nn.Linear(DIM, 4 * CHANNELS)

    def forward(self, z: Tensor, pooled: Tensor) -> Tensor:
        embed = self.time_text_embed
        temb = embed.timestep_embedder(timestep_embedding().to(pooled)) + embed.text_embedder(pooled)
        x = self.pos_embed(z)
        for block in self.transformer_blocks:
            x = block(x, temb)
        x = self.proj_out(self.norm_out(x, temb))
        side = z.shape[2] // 2
        x = torch.einsum("nhwpqc->nchpwq", x.reshape(len(z), side, side, 2, 2, CHANNELS))
        return x.reshape(z.shape)


# --------------------------------------------------------------------------------------------- embeddings
def test_timestep_embedding() -> None:
    theirs = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(torch.tensor([1000.0]))
    # Theirs is evaluated in float32: three roundings (exponent, exp, product) of angles of up to 1000.
    assert float((timestep_embedding() - theirs.double()).abs().max()) < 3 * 1000 * 2**-24


@pytest.mark.parametrize(
    ("dim", "side", "max_size", "sample"), [(48, 4, 16, 16), (64, 32, 96, 128), (32, 8, 8, 32), (24, 32, 192, 128)]
)
def test_position_table(dim: int, side: int, max_size: int, sample: int) -> None:
    theirs = DiffusersPatchEmbed(sample, sample, 2, 4, dim, pos_embed_max_size=max_size)
    cropped = theirs.cropped_pos_embed(2 * side, 2 * side)
    ours = position_table(dim, side, max_size, sample // 2)
    assert ours.shape == (1, side * side, dim)
    # Their coordinates, of up to sample/2, are rounded to float32 before the sine.
    assert float((ours - cropped).abs().max()) <= 2**-24 * (sample / 2) + 2**-23


def test_position_table_larger_than_its_source() -> None:
    with pytest.raises(ValueError, match="side 9"):
        position_table(16, 9, 8, 4)


@dtypes
def test_patch_embed(dtype: torch.dtype) -> None:
    theirs = DiffusersPatchEmbed(SAMPLE, SAMPLE, 2, CHANNELS, DIM, pos_embed_max_size=MAX_SIZE)
    ours = PatchEmbed(CHANNELS, DIM, 2, theirs.cropped_pos_embed(8, 8))
    fill(ours, 1)
    theirs.requires_grad_(False).proj.load_state_dict(ours.proj.state_dict())
    z = randn(2, CHANNELS, 8, 8, dtype=dtype)
    assert relative(ours.to(dtype)(z), theirs.to(dtype)(z)) < BOUNDS[dtype]


@dtypes
def test_conditioning(dtype: torch.dtype) -> None:
    ours, theirs = twins(TimeTextEmbed(POOLED, DIM), CombinedTimestepTextProjEmbeddings(DIM, POOLED), dtype)
    pooled = randn(1, POOLED, dtype=dtype)
    same_time = theirs.timestep_embedder(timestep_embedding().to(dtype)) + theirs.text_embedder(pooled)
    assert relative(ours(pooled), same_time) < BOUNDS[dtype]
    # With their own time features, which float32 makes uncertain by up to 3 * 1000 * 2^-24.
    assert relative(ours(pooled), theirs(torch.tensor([1000.0]), pooled)) < 3 * 1000 * 2**-24


# ------------------------------------------------------------------------------------------------- blocks
@dtypes
def test_modulation_is_ordered_as_in_adaln_zero(dtype: torch.dtype) -> None:
    ours, theirs = twins(Modulation(DIM, 6), AdaLayerNormZero(DIM), dtype)
    x, temb = randn(2, 5, DIM, dtype=dtype), randn(1, DIM, dtype=dtype, seed=4)
    named = dict(zip(BLOCK_MODULATION, ours(temb), strict=True))
    normed, *rest = theirs(x, emb=temb)
    assert relative(modulated_norm(x, named["scale_msa"], named["shift_msa"]), normed) < BOUNDS[dtype]
    for name, expected in zip(("gate_msa", "shift_mlp", "scale_mlp", "gate_mlp"), rest, strict=True):
        assert relative(named[name], expected) < BOUNDS[dtype], name


@dtypes
def test_last_modulation_is_scale_then_shift(dtype: torch.dtype) -> None:
    theirs = AdaLayerNormContinuous(DIM, DIM, elementwise_affine=False, eps=NORM_EPS)
    ours, theirs = twins(Modulation(DIM, 2), theirs, dtype)
    x, temb = randn(2, 5, DIM, dtype=dtype), randn(1, DIM, dtype=dtype, seed=4)
    scale, shift = ours(temb)
    assert relative(modulated_norm(x, scale, shift), theirs(x, temb)) < BOUNDS[dtype]


@dtypes
def test_attention(dtype: torch.dtype) -> None:
    theirs = DiffusersAttention(DIM, heads=DIM // HEAD_DIM, dim_head=HEAD_DIM, bias=True)
    ours, theirs = twins(Attention(DIM, HEAD_DIM), theirs, dtype)
    x = randn(2, 17, DIM, dtype=dtype)
    assert relative(ours(x), theirs(x)) < BOUNDS[dtype]


@dtypes
def test_feed_forward(dtype: torch.dtype) -> None:
    ours, theirs = twins(FeedForward(DIM), DiffusersFeedForward(DIM, activation_fn="gelu-approximate"), dtype)
    x = randn(2, 17, DIM, dtype=dtype)
    assert relative(ours(x), theirs(x)) < BOUNDS[dtype]


@dtypes
def test_block(dtype: torch.dtype) -> None:
    theirs = SD3SingleTransformerBlock(DIM, DIM // HEAD_DIM, HEAD_DIM)
    ours = Block(DIM, HEAD_DIM, cached=False)
    fill(ours, 1)
    theirs.requires_grad_(False).load_state_dict(dict(ours.named_parameters()))
    x, temb = randn(2, 17, DIM, dtype=dtype), randn(1, DIM, dtype=dtype, seed=4)
    assert relative(ours.to(dtype)(x, temb), theirs.to(dtype)(x, temb)) < BOUNDS[dtype]


@dtypes
def test_whole_network(dtype: torch.dtype) -> None:
    ours, theirs = small(), DiffusersTinySR().requires_grad_(False)
    # The same values in both, whatever the last bit of the table is.
    ours.pos_embed.pos_embed = theirs.pos_embed.cropped_pos_embed(ours.window, ours.window)
    missing, unexpected = theirs.load_state_dict(dict(ours.named_parameters()), strict=False)
    assert (missing, unexpected) == (["pos_embed.pos_embed"], [])
    z, pooled = randn(2, CHANNELS, 8, 8, dtype=dtype), randn(1, POOLED, dtype=dtype, seed=4)
    ours, expected = ours.to(dtype), theirs.to(dtype)(z, pooled)
    assert relative(ours(z, pooled=pooled), expected) < BOUNDS[dtype]
    assert relative(ours.cache_modulation(pooled=pooled)(z), expected) < BOUNDS[dtype]


# ----------------------------------------------------------------------------------------- cached modulation
def names(model: TinySRTransformer) -> set[str]:
    return set(model.state_dict())


def linear(name: str) -> set[str]:
    return {f"{name}.weight", f"{name}.bias"}


def test_public_names() -> None:
    model = small(layers=1)
    block = "transformer_blocks.0"
    kept = linear("pos_embed.proj") | {"pos_embed.pos_embed", "scale", "shift"} | linear("proj_out")
    for name in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"):
        kept |= linear(f"{block}.{name}")
    kept |= {f"{block}.{name}" for name in BLOCK_MODULATION}
    gone = linear(f"{block}.norm1.linear") | linear("norm_out.linear")
    for part in ("timestep_embedder", "text_embedder"):
        gone |= linear(f"time_text_embed.{part}.linear_1") | linear(f"time_text_embed.{part}.linear_2")
    assert names(model) == kept | gone
    assert model.scale.numel() == model.transformer_blocks[0].gate_mlp.numel() == 0
    model.cache_modulation(temb=randn(1, DIM, dtype=torch.float32))
    assert names(model) == kept
    assert model.scale.shape == model.transformer_blocks[0].gate_mlp.shape == (1, DIM)


def test_released_sizes() -> None:
    """The defaults are the released network's; on the meta device no memory is taken."""
    with torch.device("meta"):
        model = TinySRTransformer()
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert model.window == 64
    assert shapes["pos_embed.proj.weight"] == (1536, 16, 2, 2)
    assert shapes["pos_embed.pos_embed"] == (1, 1024, 1536)
    assert shapes["transformer_blocks.11.norm1.linear.weight"] == (6 * 1536, 1536)
    assert shapes["time_text_embed.text_embedder.linear_1.weight"] == (1536, 2048)
    assert shapes["norm_out.linear.weight"] == (2 * 1536, 1536)
    assert shapes["proj_out.weight"] == (64, 1536)
    assert "transformer_blocks.12.attn.to_q.weight" not in shapes


def test_cached_modulation_changes_nothing() -> None:
    model, z, pooled = small().double(), randn(1, CHANNELS, 8, 8), randn(1, POOLED, seed=4)
    temb = model.time_text_embed(pooled)
    before = model(z, pooled=pooled)
    assert torch.equal(model(z, temb=temb), before)
    assert torch.equal(model.cache_modulation(temb=temb)(z), before)


def test_conditioning_must_be_given_once() -> None:
    model, z = small(), randn(1, CHANNELS, 8, 8, dtype=torch.float32)
    pooled, temb = torch.ones(1, POOLED), torch.ones(1, DIM)
    for given in ({}, {"pooled": pooled, "temb": temb}):
        with pytest.raises(ValueError, match="either"):
            model(z, **given)
        with pytest.raises(ValueError, match="either"):
            model.cache_modulation(**given)
    with pytest.raises(ValueError, match="no embedders"):
        small(pooled_dim=None)(z, pooled=pooled)
    with pytest.raises(ValueError, match="cache"):
        model.normalized_state()
    model.cache_modulation(temb=temb)
    with pytest.raises(ValueError, match="cached already"):
        model.cache_modulation(temb=temb)


@pytest.mark.parametrize("size", [(8, 10), (16, 16), (4, 8)])
def test_other_latents_are_refused(size: tuple[int, int]) -> None:
    model = small().cache_modulation(temb=torch.ones(1, DIM))
    with pytest.raises(ValueError, match="8x8"):
        model(torch.zeros(1, CHANNELS, *size))


def test_width_and_heads_must_agree() -> None:
    with pytest.raises(ValueError, match="head width 20"):
        small(head_dim=20)


def test_normalized_state() -> None:
    model = small()
    model.cache_modulation(temb=randn(1, DIM, dtype=torch.float32))
    state = model.normalized_state()
    block = model.transformer_blocks[1]
    expected = torch.stack([block.get_buffer(name)[0] for name in BLOCK_MODULATION])
    assert torch.equal(state["transformer.transformer_blocks.1.modulation"], expected)
    assert torch.equal(state["transformer.norm_out.modulation"], torch.cat([model.scale, model.shift]))
    assert state["transformer.pos_embed.pos_embed"].shape == (1, TABLE * TABLE, DIM)
    assert not [n for n in state if n.rpartition(".")[2] in (*BLOCK_MODULATION, "scale", "shift")]
    assert all(n.startswith("transformer.") for n in state)


# -------------------------------------------------------------------------------------------- from a state
@pytest.mark.parametrize("form", ["fresh", "cached", "without embedders"])
def test_from_state(form: str) -> None:
    model, z, temb = small(), randn(1, CHANNELS, 8, 8, dtype=torch.float32), torch.ones(1, DIM)
    expected = model(z, temb=temb)
    if form == "cached":
        model.cache_modulation(temb=temb)
    state = model.state_dict()
    if form == "without embedders":
        state = {k: v for k, v in state.items() if not k.startswith("time_text_embed")}
    state |= {
        "context_embedder.weight": torch.ones(DIM, 7),
        "transformer_blocks.0.attn.add_q_proj.weight": torch.ones(DIM, DIM),
        "transformer_blocks.0.ff_context.net.0.proj.bias": torch.ones(4 * DIM),
        "transformer_blocks.0.norm1_context.linear.bias": torch.ones(6 * DIM),
        "transformer_blocks.0.attn.to_add_out.bias": torch.ones(DIM),
    }
    again = TinySRTransformer.from_state(state, CONFIG)
    assert again.window == model.window
    assert torch.equal(again(z) if form == "cached" else again(z, temb=temb), expected)


def test_from_state_names_what_is_wrong() -> None:
    state = dict(small().state_dict())
    lacking = {k: v for k, v in state.items() if k != "transformer_blocks.1.attn.to_k.bias"}
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.1\.attn\.to_k\.bias"):
        TinySRTransformer.from_state(lacking, CONFIG)
    with pytest.raises(RuntimeError, match="surplus"):
        TinySRTransformer.from_state(state | {"surplus.weight": torch.ones(1)}, CONFIG)
    with pytest.raises(KeyError, match="pos_embed"):
        TinySRTransformer.from_state({k: v for k, v in state.items() if "pos_embed" not in k}, CONFIG)
    with pytest.raises(ValueError, match="15 positions"):
        TinySRTransformer.from_state(state | {"pos_embed.pos_embed": torch.ones(1, 15, DIM)}, CONFIG)


# --------------------------------------------------------------------------------------------------- LoRA
def pair(module: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}


@pytest.mark.parametrize("rank", [1, 4, 50])
def test_merged_lora_is_the_sum_of_both_paths(rank: int) -> None:
    model = small().double()
    patch, query = model.pos_embed.proj, model.transformer_blocks[0].attn.to_q
    down, up = randn(rank, CHANNELS, 2, 2), randn(DIM, rank, 1, 1, seed=5)
    linear_down, linear_up = randn(rank, DIM, seed=6), randn(DIM, rank, seed=7)
    z, x = randn(1, CHANNELS, 8, 8, seed=8), randn(1, 3, DIM, seed=9)
    expected = patch(z) + nn.functional.conv2d(nn.functional.conv2d(z, down, stride=2), up)
    expected_query = query(x) + x @ linear_down.T @ linear_up.T
    lora = pair("pos_embed.proj", down, up) | pair("transformer_blocks.0.attn.to_q", linear_down, linear_up)
    state = merge_lora(model.state_dict(), lora)
    merged = TinySRTransformer.from_state(state, CONFIG, torch.float64)
    assert relative(merged.pos_embed.proj(z), expected) < BOUNDS[torch.float64]
    assert relative(merged.transformer_blocks[0].attn.to_q(x), expected_query) < BOUNDS[torch.float64]
    untouched = "transformer_blocks.0.attn.to_k.weight"
    assert torch.equal(state[untouched], model.state_dict()[untouched])


def test_lora_is_merged_in_float32_at_least() -> None:
    """A change of 2^-12 is lost in half precision beside a weight of 1."""
    state = {"m.weight": torch.ones(2, 2, dtype=torch.float16)}
    lora = pair("m", torch.full((1, 2), 2.0**-12), torch.ones(2, 1))
    merged = merge_lora(state, lora)["m.weight"]
    assert merged.dtype == torch.float32
    assert torch.equal(merged, torch.full((2, 2), 1 + 2.0**-12))


def test_lora_without_a_target() -> None:
    model = small()
    model.cache_modulation(temb=torch.ones(1, DIM))
    state = model.state_dict()
    down, up = torch.ones(2, DIM), torch.ones(DIM, 2)
    passed_over = ("norm_out.linear", "transformer_blocks.0.norm1.linear", "transformer_blocks.0.norm1_context.linear")
    for module in (*passed_over, "time_text_embed.text_embedder.linear_1", "transformer_blocks.0.ff_context.net.2"):
        merged = merge_lora(state, pair(module, down, up))
        assert merged.keys() == state.keys()
        assert all(torch.equal(merged[k], state[k]) for k in state)
    with pytest.raises(KeyError, match=r"transformer_blocks\.7\.attn\.to_q"):
        merge_lora(state, pair("transformer_blocks.7.attn.to_q", down, up))
    with pytest.raises(KeyError, match="lora_B"):
        merge_lora(state, {"transformer.proj_out.lora_A.weight": down})
    with pytest.raises(ValueError, match="alpha"):
        merge_lora(state, {"transformer.proj_out.alpha": torch.ones(())})


def test_scale_is_the_inverse_root_of_the_head_width() -> None:
    """Two tokens, keys that differ by one in one channel: softmax of 1/sqrt(16) apart."""
    attention = Attention(16, 16)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.zero_()
        attention.to_q.bias[0] = 1
        attention.to_k.weight[0, 0] = 1
        attention.to_v.weight[0, 0] = 1
        attention.to_out[0].weight.copy_(torch.eye(16))
    tokens = torch.zeros(1, 2, 16)
    tokens[0, 0, 0] = 1
    found = float(attention(tokens).detach()[0, 0, 0])
    assert math.isclose(found, 1 / (1 + math.exp(-0.25)), rel_tol=1e-6)
