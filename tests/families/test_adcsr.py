"""AdcSR's two pickles, against the tensors that the reference networks hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.checkpoint.edit import assert_same, edit, refused
from tests.layouts.adcsr import HALF_DECODER, NET, write_adcsr
from tests.layouts.weights import write_pickle, write_safetensors
from tinysr_kernels.families import UNetConfig, load

SMALL = {"channels": (48, 48), "layers": 1, "decoder_channels": (8, 8, 12, 12)}


@pytest.mark.parametrize(
    "kind",
    [{}, {**SMALL, "old_attention_names": True}, {**SMALL, "dtype": torch.float16}, {**SMALL, "layers": 3}],
    ids=str,
)
def test_folder(tmp_path: Path, kind: dict[str, object]) -> None:
    layout = write_adcsr(tmp_path, **kind)
    found = load(tmp_path)
    assert_same(found.tensors, layout.tensors())
    assert found.family == "adcsr"
    assert found.config == UNetConfig()
    dtypes = {t.dtype for t in found.tensors.values()}
    assert dtypes == {kind.get("dtype", torch.float32)}


def test_dicts(tmp_path: Path) -> None:
    layout = write_adcsr(tmp_path, **SMALL)
    net, decoder = tmp_path / NET, tmp_path / HALF_DECODER
    for parts in (
        {"net_params": net, "decoder": decoder},
        {"unet": str(net), "decoder": str(decoder)},
        {"unet": torch.load(net), "decoder": torch.load(decoder)["state_dict"]},
        {"unet": layout.unet, "decoder": layout.decoder},
    ):
        assert_same(load(parts).tensors, layout.tensors())
    refused({"unet": net}, '"decoder"', "'unet'")
    refused({"unet": net, "net_params": net, "decoder": decoder}, "expected the parts")
    refused({"unet": decoder, "decoder": net}, HALF_DECODER, "net_params", "halfDecoder")
    refused(net, "only one part", '{"net_params": ..., "decoder": ...}')


def test_module(tmp_path: Path) -> None:
    layout = write_adcsr(tmp_path, **SMALL)
    whole = nn.Module()
    whole.body = nn.Sequential(nn.PixelUnshuffle(2), layout.unet, layout.decoder.mid_block)
    whole.decoder = layout.decoder
    assert_same(load(whole).tensors, layout.tensors())
    assert_same(load(nn.DataParallel(whole)).tensors, layout.tensors())


def test_attention_stored_as_convolutions(tmp_path: Path) -> None:
    layout = write_adcsr(tmp_path, **SMALL)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "attentions" in name and tensor.ndim == 2 and "ff" not in name:
                tensors[name] = tensor[:, :, None, None]

    edit(tmp_path / NET, widen)
    assert_same(load(tmp_path).tensors, layout.tensors())


def test_a_full_vae_beside(tmp_path: Path) -> None:
    layout = write_adcsr(tmp_path, **SMALL)
    other = {"decoder.up_blocks.0.resnets.0.norm1.weight": torch.ones(512), "decoder.conv_out.bias": torch.ones(3)}
    write_safetensors(tmp_path / "vae/diffusion_pytorch_model.safetensors", other)
    assert_same(load(tmp_path).tensors, layout.tensors())


def test_a_decoder_with_its_encoder(tmp_path: Path) -> None:
    """Then halfDecoder has the keys of a whole Stable Diffusion VAE, and is AdcSR's decoder all the same."""
    layout = write_adcsr(tmp_path, **SMALL)
    edit(tmp_path / HALF_DECODER, lambda t: t.update({"encoder.down_blocks.0.resnets.0.norm1.weight": torch.ones(8)}))
    assert_same(load(tmp_path).tensors, layout.tensors())
    assert_same(load({"unet": tmp_path / NET, "decoder": tmp_path / HALF_DECODER}).tensors, layout.tensors())


UNET = "module.body.1."
RESNET = "down_blocks.0.resnets.0."
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."


@pytest.mark.parametrize(
    ("file", "key"),
    [
        (NET, f"{UNET}conv_in.weight"),
        (NET, f"{UNET}{RESNET}norm1.bias"),
        (NET, f"{UNET}{BLOCK}attn1.to_q.weight"),
        (NET, f"{UNET}{BLOCK}ff.net.0.proj.weight"),
        (NET, f"{UNET}up_blocks.1.resnets.0.conv_shortcut.weight"),
        (NET, f"{UNET}up_blocks.0.upsamplers.0.conv.bias"),
        (NET, f"{UNET}conv_norm_out.weight"),
        (NET, "module.body.2.attentions.0.group_norm.weight"),
        (NET, "module.body.2.resnets.1.conv2.weight"),
        (HALF_DECODER, "decoder.up_blocks.3.resnets.1.conv1.weight"),
        (HALF_DECODER, "decoder.conv_out.bias"),
    ],
)
def test_missing_misshapen_and_broken_weights(tmp_path: Path, file: str, key: str) -> None:
    write_adcsr(tmp_path, **SMALL)
    path = tmp_path / file
    kept = torch.load(path)
    kept = kept.get("state_dict", kept)[key].clone()
    short = key.removeprefix("module.")
    edit(path, lambda tensors: tensors.pop(key))
    refused(tmp_path, file, short)
    edit(path, lambda tensors: tensors.update({key: kept[None]}))
    refused(tmp_path, file, short, "found [")
    edit(path, lambda tensors: tensors.update({key: kept.fill_(float("nan"))}))
    refused(tmp_path, file, short, "NaN")


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (NET, {"module.body.1.extra.weight": torch.ones(1)}, ["body.1.extra.weight", "unexpected"]),
        (NET, {"module.body.3.conv_in.weight": torch.ones(1)}, ["body.3.conv_in.weight", "unexpected"]),
        (NET, {f"module.body.1.{RESNET}time_emb_proj.weight": torch.ones(48, 8)}, ["time_emb_proj", "unexpected"]),
        (NET, {"module.body.1.down_blocks.4.resnets.0.norm1.weight": torch.ones(1)}, ["down_blocks.2", "number 4"]),
        (NET, {"module.body.1.step": 3}, ["body.1.step", "int"]),
        (HALF_DECODER, {"decoder.up_blocks.0.extra": torch.ones(1)}, ["decoder.up_blocks.0.extra", "unexpected"]),
        (NET, {f"module.body.1.{BLOCK}attn2.to_q.weight": torch.ones(48, 48)}, ["attn2.to_q.weight", "unexpected"]),
    ],
)
def test_keys_without_a_place(tmp_path: Path, file: str, change: dict[str, object], words: list[str]) -> None:
    write_adcsr(tmp_path, **SMALL)
    edit(tmp_path / file, lambda tensors: tensors.update(change))
    refused(tmp_path, file, *words)


def test_whole_attentions_missing(tmp_path: Path) -> None:
    write_adcsr(tmp_path, **{**SMALL, "layers": 2})

    def cut(start: str) -> None:
        edit(tmp_path / NET, lambda t: [t.pop(k) for k in list(t) if k.removeprefix("module.").startswith(start)])

    cut("body.1.down_blocks.0.attentions.1.")
    refused(tmp_path, "body.1.down_blocks.0.attentions", "none or 2")
    cut("body.1.down_blocks.0.attentions.0.")
    cut("body.2.attentions.0.")
    refused(tmp_path, "body.2.attentions.0.group_norm.weight")


def test_heads_and_scale(tmp_path: Path) -> None:
    layout = write_adcsr(tmp_path / "a", channels=(48, 48), layers=1, decoder_channels=(8, 12, 12))
    refused(layout.folder, HALF_DECODER, "enlarges by 8", "2 upsamplers")
    write_adcsr(tmp_path / "b", **SMALL)
    cut = {
        f"{UNET}{BLOCK}attn1.{name}.weight": torch.ones(shape)
        for name, shape in {"to_q": (40, 48), "to_k": (40, 48), "to_v": (40, 48), "to_out.0": (48, 40)}.items()
    }
    edit(tmp_path / "b" / NET, lambda tensors: tensors.update(cut))
    refused(tmp_path / "b", "to_q.weight", "heads of 48", "40")


def test_missing_and_several(tmp_path: Path) -> None:
    write_adcsr(tmp_path, **SMALL)
    net = torch.load(tmp_path / NET)
    write_pickle(tmp_path / "weight/net_params_100.pkl", net)
    refused(tmp_path, "several checkpoints", "net_params_100.pkl", "net_params_200.pkl")
    (tmp_path / "weight/net_params_100.pkl").unlink()
    (tmp_path / HALF_DECODER).unlink()
    refused(tmp_path, "halfDecoder", "net_params_200.pkl (adcsr)")
    write_pickle(tmp_path / HALF_DECODER, {"state_dict": {"encoder.x": torch.ones(1)}})
    refused({"net_params": tmp_path / NET, "decoder": tmp_path / HALF_DECODER}, "decoder.up_blocks", "encoder.x")


def test_embeddings_for_a_family_without(tmp_path: Path) -> None:
    write_adcsr(tmp_path, **SMALL)
    refused(tmp_path, "adcsr takes no embeddings", embeddings=torch.ones(1, 3))
