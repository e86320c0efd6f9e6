"""OSEDiff's folder as its authors and the base model's publish it, against the reference networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tinysr_kernels
from tests.checkpoint.edit import assert_same, edit, refused
from tests.layouts.diffusers_module import STEM
from tests.layouts.osediff import (
    EMBEDDING,
    FEATURES,
    LORA,
    TOKENS,
    UNET,
    VAE,
    OSEDiffLayout,
    write_osediff,
)
from tests.layouts.weights import random_image, write_pickle, write_safetensors
from tinysr_kernels.checkpoint.lora import Merged
from tinysr_kernels.families import fold, load, osediff
from tinysr_kernels.nets import place

ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2"


def expected_tensors(layout: OSEDiffLayout) -> dict[str, Tensor]:
    """The normalized checkpoint of the reference networks."""
    unet, tensors = layout.unet.float(), {}
    temb = torch.nn.functional.silu(unet.double().temb(999.0))
    for name, module in unet.named_modules():
        if name.endswith("time_emb_proj"):
            tensors[f"unet.{name.replace('time_emb_proj', 'time_bias')}"] = module(temb)[0].float()
        elif name.endswith("attn2"):
            for part, to in (("keys", module.to_k), ("values", module.to_v)):
                heads = to(layout.prompt.double())[0].unflatten(1, (-1, module.head_dim))
                tensors[f"unet.{name}.{part}"] = heads.transpose(0, 1).float()
    for name, tensor in unet.float().state_dict().items():
        dropped = ("time_embedding.", "time_emb_proj", "attn2.to_k", "attn2.to_v")
        if not any(part in name for part in dropped):
            tensors[f"unet.{name}"] = tensor
    return tensors | layout.vae.float().state_dict()


def close(found: Any, expected: dict[str, Tensor]) -> None:
    """The same names, and values to float32 rounding: sums of LoRA's products may have another order."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"files": "sharded", "dtype": torch.float16},
        {"files": "bin", "old_attention_names": False},
        {"files": "snapshot", "heads": (1, 2, 8)},
        pytest.param({"files": "sharded bin", "ranks": (1, 5)}, marks=pytest.mark.long),
        pytest.param({"layers": 2, "channels": (8, 16, 16, 24), "heads": (4, 1, 2, 3)}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_folder(tmp_path: Path, kind: dict[str, Any]) -> None:
    layout = write_osediff(tmp_path, **kind)
    found = load(tmp_path)
    assert (found.family, found.config) == ("osediff", layout.config)
    close(found.tensors, expected_tensors(layout))
    keys = found.tensors[f"{ATTENTION}.keys"]
    assert keys.shape == (layout.heads[0], TOKENS, layout.unet.conv_in.out_channels // layout.heads[0])
    ignored = [notice for notice in found.notices if "taken for a copy" in notice]
    assert len(ignored) == (6 if kind.get("files") == "snapshot" else 0)


def test_a_variant_comes_last(tmp_path: Path) -> None:
    """A pickle before a variant in safetensors, which may be rounded; a variant's shards by their own index."""
    layout = write_osediff(tmp_path, files="bin")
    folder = tmp_path / UNET
    other = {name: tensor.half() for name, tensor in torch.load(folder / f"{STEM}.bin", weights_only=True).items()}
    write_safetensors(folder / f"{STEM}.fp16-00001-of-00001.safetensors", other)
    places = dict.fromkeys(other, f"{STEM}.fp16-00001-of-00001.safetensors")
    (folder / f"{STEM}.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": places}))
    close(load(tmp_path).tensors, expected_tensors(layout))
    (folder / f"{STEM}.bin").unlink()
    assert load(tmp_path).tensors["unet.conv_out.weight"].dtype == torch.float32  # merged
    assert load(tmp_path).tensors["unet.conv_norm_out.weight"].dtype == torch.float16


def test_dicts_and_names(tmp_path: Path) -> None:
    """Parts anywhere, under any name; where no schedule was found, Stable Diffusion's, which is said."""
    layout = write_osediff(tmp_path)
    (tmp_path / LORA).rename(tmp_path / "anything.pth")
    close(load(tmp_path).tensors, expected_tensors(layout))
    parts: dict[str, Any] = {"osediff": tmp_path / "anything.pth", "unet": tmp_path / UNET, "vae": tmp_path / VAE}
    found = load({**parts, "embeddings": tmp_path / EMBEDDING})
    close(found.tensors, expected_tensors(layout))
    assert any("scheduler_config.json" in notice for notice in found.notices)
    files = {name: parts[name] / f"{STEM}.safetensors" for name in ("unet", "vae")}
    close(load({**parts, **files}, embeddings=layout.prompt).tensors, expected_tensors(layout))
    # A dict of a half's own tensors: the sides of the LoRA are told apart by their names.
    refused({**parts, "unet": parts["vae"]}, "a Stable Diffusion UNet")
    refused({**parts, "vae": parts["unet"]}, "a Stable Diffusion VAE")
    refused({"osediff": parts["osediff"], "unet": parts["unet"]}, '"osediff" and "unet" and "vae"')


def test_the_base_model_alone_and_the_lora_alone(tmp_path: Path) -> None:
    layout = write_osediff(tmp_path)
    refused(tmp_path / LORA, "OSEDiff's LoRA", "only one part", '{"osediff": ..., "unet": ..., "vae": ...')
    refused(tmp_path / UNET / f"{STEM}.safetensors", "a Stable Diffusion UNet", "only one part")
    (tmp_path / VAE / f"{STEM}.safetensors").rename(layout.folder / "vae.safetensors.off")
    refused(tmp_path, "is a LoRA of osediff, without a Stable Diffusion VAE", "2.1-base")
    (tmp_path / LORA).unlink()
    refused(tmp_path, "a Stable Diffusion UNet", "make a checkpoint of osediff together with OSEDiff's LoRA")


def test_a_snapshot_of_the_whole_repository(tmp_path: Path) -> None:
    """Whole models in the old layout at its top are not read, nor are other models' weights looked into."""
    layout = write_osediff(tmp_path, files="snapshot")
    (tmp_path / "sd/v2-1_512-ema-pruned.ckpt").write_bytes(b"a pickle with code")
    other = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(4),
        "first_stage_model.decoder.up.0.x": torch.ones(2),
    }
    write_safetensors(tmp_path / "sd/v2-1_512-ema-pruned.safetensors", other)
    text = {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)}
    write_safetensors(tmp_path / "sd/text_encoder/model.safetensors", text)
    write_pickle(tmp_path / "sd/text_encoder/pytorch_model.bin", text)
    found = load(tmp_path)
    close(found.tensors, expected_tensors(layout))
    assert any("v2-1_512-ema-pruned.ckpt" in notice for notice in found.notices)
    refused(tmp_path / "sd/v2-1_512-ema-pruned.safetensors", "model.diffusion_model", "diffusers")


def test_embeddings(tmp_path: Path) -> None:
    """The caller's before the folder's own, of any number of tokens, with or without a leading one."""
    layout = write_osediff(tmp_path)
    other = torch.randn(5, FEATURES, generator=torch.Generator().manual_seed(3))
    write_pickle(tmp_path / "other.pt", other)
    refused(tmp_path, "several", "other.pt", EMBEDDING, "embeddings=")
    for given in (other, other[None], tmp_path / "other.pt", {"prompt": other}):
        keys = load(tmp_path, embeddings=given).tensors[f"{ATTENTION}.keys"]
        weight = layout.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight
        wanted = (other @ weight.T).unflatten(1, (layout.heads[0], -1)).transpose(0, 1)
        torch.testing.assert_close(keys, wanted, rtol=1e-5, atol=1e-6)
    refused(tmp_path, f"[1,T,{FEATURES}]", "[5, 11]", embeddings=other[:, 1:])
    refused(tmp_path, "several", embeddings=[other, other + 1])
    refused(tmp_path, "NaN", embeddings=other * float("nan"))
    for path in (tmp_path / "other.pt", tmp_path / EMBEDDING):
        path.unlink()
    refused(tmp_path, "expected the embedding of a prompt", "text_encoder", "prompt_embeds.pt", "embeddings=")
    write_pickle(tmp_path / "pool_embeds.pt", torch.ones(1, 30))  # of another width: no prompt's
    refused(tmp_path, "expected the embedding of a prompt")


IN = "conv_in.lora_A.default_encoder.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["state_dict_unet"].pop("conv_in.base_layer.bias"), ["conv_in.base_layer.bias", "expected"]),
        (lambda d: d["state_dict_unet"].pop(IN), ["conv_in", "no lora_A"]),
        (lambda d: d["state_dict_unet"].update({"time.lora_A.x.weight": torch.ones(2, 3)}), ["time", "no lora_B"]),
        (lambda d: d["state_dict_unet"].update({"conv_in.lora_A.other.weight": torch.ones(2, 3)}), ["second adapter"]),
        (lambda d: d["state_dict_unet"].update({"conv_in.alpha": torch.ones(1)}), ["conv_in.alpha", "lora_A"]),
        (lambda d: d["state_dict_unet"].update({IN: torch.ones(3, 5, 3, 3)}), ["conv_in", "found [3, 5, 3, 3]"]),
        (lambda d: d["state_dict_unet"].update({IN: torch.ones(2, 4, 3, 3)}), ["conv_in", "found"]),
        (
            lambda d: d["state_dict_vae"].update(
                {"decoder.x.lora_A.a.weight": torch.ones(2, 3), "decoder.x.lora_B.a.weight": torch.ones(4, 2)}
            ),
            ["there is no module", "decoder.x"],
        ),
        (
            lambda d: d["state_dict_unet"].update({"conv_in.base_layer.weight": torch.ones(8, 5, 3, 3)}),
            ["conv_in.base_layer.weight", "[8, 5, 3, 3]"],
        ),
        (lambda d: d.update({"state_dict_text": {"a": torch.ones(1)}}), ["state_dict_text.a", "unexpected"]),
        (lambda d: d.update({"state_dict_vae": {}}), ["state_dict_vae", "found none"]),
    ],
)
def test_a_lora_that_does_not_fit(tmp_path: Path, change: Any, words: list[str]) -> None:
    """Every key is consumed, and each has its module."""
    write_osediff(tmp_path)
    content = torch.load(tmp_path / LORA, weights_only=True)
    change(content)
    write_pickle(tmp_path / LORA, content)
    refused(tmp_path, *words)


@pytest.mark.parametrize(
    ("part", "key"),
    [
        (UNET, "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"),
        pytest.param(UNET, "time_embedding.linear_1.weight", marks=pytest.mark.long),
        pytest.param(UNET, "up_blocks.1.resnets.0.time_emb_proj.bias", marks=pytest.mark.long),
        (UNET, "conv_in.weight"),
        (VAE, "encoder.mid_block.attentions.0.query.weight"),
        pytest.param(VAE, "quant_conv.bias", marks=pytest.mark.long),
    ],
)
def test_missing_misshapen_and_broken_weights(tmp_path: Path, part: str, key: str) -> None:
    write_osediff(tmp_path)
    path = tmp_path / part / f"{STEM}.safetensors"
    if key == "conv_in.weight":  # which is replaced, and has to be there all the same
        edit(path, lambda tensors: tensors.pop(key))
        refused(tmp_path, "conv_in")
        return
    kept: dict[str, Tensor] = {}
    edit(path, lambda tensors: kept.update({key: tensors.pop(key)}))
    refused(tmp_path, part, key.replace("query", "to_q"))
    edit(path, lambda tensors: tensors.update({key: kept[key][None]}))
    refused(tmp_path, part, key, "found [")
    edit(path, lambda tensors: tensors.update({key: kept[key].fill_(float("nan"))}))
    refused(tmp_path, part, key, "NaN")
    edit(path, lambda tensors: tensors.update({key: kept[key].fill_(0), "extra": torch.ones(1)}))
    refused(tmp_path, part, "extra", "unexpected")


def test_memory_is_taken_tensor_by_tensor(tmp_path: Path) -> None:
    """Nothing is merged before it is asked for, so that a network is never there twice."""
    write_osediff(tmp_path)
    tensors = load(tmp_path).tensors
    name = "unet.mid_block.resnets.0.conv1.weight"
    assert tensors[name] is not tensors[name]
    assert isinstance(tensors._network, Merged)  # type: ignore[attr-defined]
    assert name in tensors
    assert "unet.time_embedding.linear_1.weight" not in tensors
    with pytest.raises(KeyError):
        tensors["unet.nothing"]


def test_folded_weights_are_not_copied(tmp_path: Path) -> None:
    """Kernels are folded into the memory layout that the network reads: at most once in memory, with the largest."""
    write_osediff(tmp_path)
    found = load(tmp_path)
    folded = fold(found.family, found.config, found.tensors, torch.float16)
    placed = place(folded, torch.device("cpu"), torch.float16)
    assert all(placed[name].data_ptr() == tensor.data_ptr() for name, tensor in folded.items())


def test_saved_and_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folded file, from which neither the base model nor the prompt is needed any more."""
    monkeypatch.setattr(osediff.OSEDiff, "least", 8)
    write_osediff(tmp_path / "a")
    model = tinysr_kernels.compile(tmp_path / "a")
    model.save(tmp_path / "folded.safetensors")
    again = tinysr_kernels.compile(tmp_path / "folded.safetensors")
    assert_same(again._folded, model._folded)
    image = random_image(16, 18)[0]
    assert torch.equal(again(image), model(image))
    assert again.config == model.config
    info = again.info()
    assert info["color_fix"] == "adain"
    assert any("cross-attentions" in line for line in info["folded"])
    assert any("8 / rank" in line for line in model.info()["folded"])
