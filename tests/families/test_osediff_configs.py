"""What the base model's configurations may say, the noise schedule, and prompts through a text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.edit import edit_json, refused
from tests.layouts.osediff import EMBEDDING, FEATURES, SCHEDULER, UNET, VAE, write_osediff
from tests.layouts.weights import write_pickle
from tinysr_kernels.errors import CheckpointError, InputError
from tinysr_kernels.families import load
from tinysr_kernels.runtime.compiling import compile as compiled

KEYS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.keys"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_osediff(tmp_path_factory.mktemp("osediff")).folder


@pytest.mark.parametrize(
    ("part", "values"),
    [
        (UNET, {"class_embed_type": "timestep"}),
        (UNET, {"num_class_embeds": 10}),
        (UNET, {"dual_cross_attention": True}),
        (UNET, {"only_cross_attention": [True, False, False]}),
        (UNET, {"addition_embed_type": "text_time"}),
        (UNET, {"in_channels": 9}),
        (UNET, {"down_block_types": ["AttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]}),
        (UNET, {"up_block_types": ["UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"]}),
        (UNET, {"act_fn": "gelu"}),
        (UNET, {"flip_sin_to_cos": False}),
        (UNET, {"freq_shift": 1}),
        (UNET, {"downsample_padding": 0}),
        (UNET, {"attention_head_dim": [2, 4]}),
        (UNET, {"attention_head_dim": [3, 4, 1]}),
        (UNET, {"norm_num_groups": 5}),
        (UNET, {"norm_eps": 0}),
        (UNET, {"block_out_channels": [8, 16, 10**9]}),
        (UNET, {"block_out_channels": [8] * 99}),
        (UNET, {"resnet_time_scale_shift": "scale_shift"}),
        (VAE, {"act_fn": "relu"}),
        (VAE, {"in_channels": 4}),
        (VAE, {"scaling_factor": 0}),
        (VAE, {"mid_block_add_attention": False}),
        (VAE, {"use_quant_conv": "yes"}),
        (VAE, {"up_block_types": ["UpDecoderBlock2D"]}),
        (VAE, {"norm_num_groups": 3}),
        (SCHEDULER, {"prediction_type": "v_prediction"}),
        (SCHEDULER, {"clip_sample": True}),
        (SCHEDULER, {"beta_schedule": "linear"}),
        (SCHEDULER, {"trained_betas": [0.1]}),
        (SCHEDULER, {"beta_end": "much"}),
        (SCHEDULER, {"rescale_betas_zero_snr": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value)[:40],
)
def test_another_network_is_refused_by_name(written: Path, part: str, values: dict[str, Any]) -> None:
    name = "scheduler_config.json" if part == SCHEDULER else "config.json"
    path = written / part / name
    kept = path.read_text()
    try:
        edit_json(path, **values)
        message = refused(written, part, next(iter(values)))
        assert len(message) < 700
    finally:
        path.write_text(kept)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        (UNET, {"layers_per_block": 2}),
        (UNET, {"cross_attention_dim": 9}),
        (UNET, {"block_out_channels": [8, 16, 24]}),
        (VAE, {"latent_channels": 8}),
        (VAE, {"use_post_quant_conv": False}),
    ],
)
def test_configuration_and_weights_agree(tmp_path: Path, part: str, values: dict[str, Any]) -> None:
    write_osediff(tmp_path)
    edit_json(tmp_path / part / "config.json", **values)
    refused(tmp_path, part if "cross" not in str(values) else "prompt")


def test_the_schedule(written: Path) -> None:
    """alpha of SD 2.1-base; other numbers give another one, several that differ are refused."""
    notices: list[str] = []
    found = load(written)
    assert found.config.alpha == pytest.approx(0.0046600985, abs=1e-10)
    assert not any("scheduler" in notice for notice in found.notices + notices)
    path = written / SCHEDULER / "scheduler_config.json"
    kept = path.read_text()
    other = written / "another/scheduler_config.json"
    try:
        edit_json(path, beta_end=0.02)
        assert load(written).config.alpha < 0.001
        other.parent.mkdir()
        other.write_text(kept)
        refused(written, "several that differ", "another")
        path.write_text(kept)
        assert load(written).config.alpha == found.config.alpha
    finally:
        path.write_text(kept)
        other.unlink()


# Prompts


def text_encoder(folder: Path) -> Any:
    """A tiny CLIP and its tokenizer as in Stable Diffusion 2.1's folder, where "!" (0) pads."""
    transformers = pytest.importorskip("transformers")
    letters = "!abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(f"{one}</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    values = {**special, "pad_token": "!", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(values))
    (tokenizer / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": "!"}))
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=FEATURES, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=54, eos_token_id=55, pad_token_id=0,
    )  # fmt: skip
    model = transformers.CLIPTextModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    model.save_pretrained(folder / "text_encoder")
    return model


def test_a_prompt_is_evaluated_once(tmp_path: Path) -> None:
    layout = write_osediff(tmp_path, embedding=False)
    model = text_encoder(tmp_path / "sd")
    letters = {one: 27 + ord(one) - ord("a") + 1 for one in "ab"}
    for text, words in (("", []), ("a b", [letters["a"], letters["b"]])):
        ids = [54, *words, 55]
        with torch.no_grad():
            wanted = model(torch.tensor([ids + [0] * (77 - len(ids))])).last_hidden_state
        found = load(tmp_path, prompt=text or None)
        to_k = layout.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
        keys = to_k(wanted)[0].unflatten(1, (layout.heads[-1], -1)).transpose(0, 1)
        torch.testing.assert_close(found.tensors[KEYS], keys, rtol=1e-4, atol=1e-5)
        assert any(repr(text) in notice and "text_encoder" in notice for notice in found.notices)
    # A file beside goes before the encoder, a prompt that was given before the file, embeddings before all.
    write_pickle(tmp_path / EMBEDDING, layout.prompt)
    without, given = load(tmp_path).tensors[KEYS], load(tmp_path, prompt="a b").tensors[KEYS]
    assert (without.shape[1], given.shape[1]) == (layout.prompt.shape[1], 77)
    last = load(tmp_path, prompt="a b", embeddings=layout.prompt)
    assert torch.equal(last.tensors[KEYS], without)
    assert any("prompt given is ignored" in notice for notice in last.notices)
    (tmp_path / "sd/tokenizer/vocab.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.*embeddings="):
        load(tmp_path, prompt="a b")


@pytest.mark.parametrize("prompt", [3, b"text", "x" * 100_000])
def test_what_is_no_prompt(prompt: Any) -> None:
    with pytest.raises(InputError, match="prompt must be a text"):
        compiled("demo", prompt=prompt)
