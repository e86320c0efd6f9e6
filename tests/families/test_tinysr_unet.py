"""This project's own layout in its variants, its metadata, and files in it that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.checkpoint.edit import assert_same, edit, edit_metadata, read, refused
from tests.layouts.unet import EMBEDDINGS, MODEL, write_unet
from tests.layouts.weights import write_safetensors
from tinysr_kernels.families import UNetConfig, config_to_dict, load

VAE = UNetConfig(input="vae", prediction="subtract", encoder_blocks=(1, 1, 1, 1), decoder_blocks=(1, 1, 1, 1))
RESNET = "unet.down_blocks.0.resnets.0"


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"separable": False},
        {"channels": (48, 48), "transformers": (True, False), "layers": 2},
        {"attention": False, "dtype": torch.float16},
        {"time": "inline"},
        {"config": VAE, "decoder": "tiny"},
        {
            "config": UNetConfig(input="vae", encoder_blocks=(1, 1, 1), scaling_factor=0.5),
            "decoder_channels": (8, 8, 8),
        },
        {"config": UNetConfig(unshuffle=4, residual="bicubic"), "decoder_channels": (8, 8, 8, 8, 8)},
    ],
    ids=str,
)
def test_file(tmp_path: Path, kind: dict[str, object]) -> None:
    layout = write_unet(tmp_path / "model.safetensors", **kind)
    for ckpt in (layout.path, str(layout.path), tmp_path):
        found = load(ckpt)
        assert_same(found.tensors, layout.tensors())
        assert found.family == "tinysr-unet"
        assert found.config == layout.config


@pytest.mark.parametrize("kind", [{"time": "bias"}, {"time": "bias", "keep_projection": True}, {"time": "temb"}])
def test_embeddings(tmp_path: Path, kind: dict[str, object]) -> None:
    layout = write_unet(tmp_path, **kind)
    for ckpt in (tmp_path, tmp_path / MODEL):
        assert_same(load(ckpt).tensors, layout.tensors())
    stored, _ = read(tmp_path / EMBEDDINGS)
    (tmp_path / EMBEDDINGS).rename(tmp_path / "other.txt")
    if kind != {"time": "bias"}:  # a bias without projection leaves no trace when it is gone
        refused(tmp_path, MODEL, "time_emb_proj", "embeddings=")
    for given in (stored, [{name: value} for name, value in stored.items()]):
        assert_same(load(tmp_path, embeddings=given).tensors, layout.tensors())
    if kind["time"] == "temb":
        assert_same(load(tmp_path, embeddings=stored["temb"]).tensors, layout.tensors())
        refused(tmp_path, "temb", "[1, 20]", "[1, 19]", embeddings={"temb": torch.ones(1, 19)})
        refused(tmp_path, "temb", "NaN", embeddings=stored["temb"] * float("nan"))
    extra = {**stored, "unet.nothing.time_bias": torch.ones(3)}
    refused(tmp_path, "unet.nothing.time_bias", "unexpected", embeddings=extra)


def test_embeddings_given_go_first(tmp_path: Path) -> None:
    write_unet(tmp_path, time="temb")
    zero = load(tmp_path, embeddings=torch.zeros(1, 20)).tensors
    bias = read(tmp_path / MODEL)[0][f"{RESNET}.time_emb_proj.bias"]
    assert torch.equal(zero[f"{RESNET}.time_bias"], bias)


def test_float64_time_bias(tmp_path: Path) -> None:
    write_unet(tmp_path, time="temb", dtype=torch.float64)
    assert {t.dtype for t in load(tmp_path).tensors.values()} == {torch.float64}


def test_module(tmp_path: Path) -> None:
    layout = write_unet(tmp_path / MODEL)
    whole = nn.ModuleDict({"unet": layout.unet, "decoder": layout.decoder})
    refused(whole, "config", "UNetConfig")
    whole.config = layout.config
    found = load(whole)
    assert_same(found.tensors, layout.tensors())
    assert found.config == layout.config


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"version": "2"}, ["version", "expected 1", "found 2", "newer"]),
        ({"version": "0"}, ["version", "found 0"]),
        ({"version": "1.5"}, ["version", "'1.5'"]),
        ({"version": None}, ["version"]),
        ({"version": "9" * 5000}, ["version"]),
        ({"family": "adcsr3"}, ["family", "adcsr3"]),
        ({"family": "tinysr-dit"}, ["config"]),
        ({"family": None}, ["family", "None"]),
        ({"format": "pt"}, ["format", "tinysr_kernels"]),
        ({"folded": "yes"}, ["folded", "'yes'"]),
        ({"folded": "1", "dtype": "float99"}, ["dtype", "float99"]),
        ({"folded": "1", "dtype": "nn"}, ["dtype", "'nn'"]),
        ({"config": None}, ["config"]),
        ({"config": "{"}, ["config", "JSON"]),
        ({"config": "[1]"}, ["config", "list"]),
        ({"config": '{"head_dim": 48, "head_dim": 64}'}, ["config", "twice"]),
        ({"config": '{"depth": 3}'}, ["config", "depth"]),
        ({"config": '{"color_fix": ["none"]}'}, ["config", "color_fix"]),
        ({"config": '{"color_fix": {}}'}, ["config", "color_fix"]),
        ({"config": '{"unet_eps": Infinity}'}, ["config", "unet_eps"]),
        ({"config": '{"groups": [5]}'}, ["norm1.weight", "groups", "(5,)"]),
        ({"config": '{"unshuffle": 4}'}, ["unet.conv_in", "48", "12"]),
        ({"config": '{"prediction": "subtract"}'}, ["prediction", "vae"]),
        ({"config": '{"input": "vae"}'}, ["encoder.layers"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_metadata(tmp_path: Path, metadata: dict[str, str | None], words: list[str]) -> None:
    write_unet(tmp_path / MODEL)
    edit_metadata(tmp_path / MODEL, **metadata)
    refused(tmp_path / MODEL, MODEL, *words)


@pytest.mark.parametrize(
    "key",
    [
        "unet.conv_in.depthwise.weight",
        f"{RESNET}.norm2.weight",
        f"{RESNET}.conv2.pointwise.weight",
        "unet.mid_block.resnets.1.norm1.bias",
        "unet.up_blocks.1.resnets.1.conv_shortcut.weight",
        "unet.up_blocks.0.upsamplers.0.conv.depthwise.weight",
        "decoder.mid_block.attentions.0.to_k.bias",
        "decoder.up_blocks.2.upsamplers.0.conv.pointwise.weight",
        "decoder.conv_out.weight",
    ],
)
def test_missing_extra_misshapen_and_broken_weights(tmp_path: Path, key: str) -> None:
    path = write_unet(tmp_path / MODEL).path
    kept = read(path)[0][key]
    edit(path, lambda tensors: tensors.pop(key))
    refused(path, MODEL, key)
    edit(path, lambda tensors: tensors.update({key: torch.cat([kept, kept])}))
    refused(path, MODEL, "expected", "found")
    edit(path, lambda tensors: tensors.update({key: kept.fill_(float("inf"))}))
    refused(path, MODEL, key, "infinity")
    edit(path, lambda tensors: tensors.update({key: kept.fill_(0), f"{key}.more": kept}))
    refused(path, MODEL, f"{key}.more", "unexpected")


def test_structure_that_does_not_fit(tmp_path: Path) -> None:
    path = write_unet(tmp_path / MODEL, layers=2).path
    tensors, metadata = read(path)

    def cut(start: str) -> None:
        write_safetensors(path, {k: v for k, v in tensors.items() if not k.startswith(start)}, metadata)

    cut("unet.up_blocks.1.resnets.2.")
    refused(path, "1 skip connections unused")
    cut("unet.down_blocks.0.resnets.1.")
    refused(path, "unet.up_blocks.", "skip connection")
    cut("unet.down_blocks.0.downsamplers.")
    refused(path, "unet.")
    cut("unet.up_blocks.0.upsamplers.")
    refused(path, "skip connection")
    cut("unet.mid_block.")
    refused(path, "unet.mid_block", "0 resnets")
    cut("unet.up_blocks.0.")
    refused(path, "unet.up_blocks.0", "number 1")
    cut("decoder.up_blocks.3.")
    refused(path, "decoder.conv_norm_out")
    cut("decoder.up_blocks.0.upsamplers.")
    refused(path, "enlarges by 8", "2 upsamplers")
    cut("decoder.")
    refused(path, "decoder.mid_block")
    cut("unet.")
    refused(path, "unet.conv_in")


def test_subtraction_needs_the_latents_channels(tmp_path: Path) -> None:
    config = UNetConfig(input="vae", encoder_blocks=(1, 1, 1, 1))
    path = write_unet(tmp_path / MODEL, config).path
    subtract = {**config_to_dict(config), "prediction": "subtract"}
    edit_metadata(path, config=json.dumps(subtract))
    refused(path, "subtract", "8", "24")
