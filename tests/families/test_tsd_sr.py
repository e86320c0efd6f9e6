"""TSD-SR's folder as its authors and the base model's publish it, against the reference networks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tinysr_kernels
from tests.checkpoint.edit import assert_same, edit, edit_json, refused
from tests.layouts.diffusers_module import STEM
from tests.layouts.tsd_sr import (
    LORA,
    POOLED,
    PROMPT,
    TRANSFORMER,
    VAE,
    VAE_LORA,
    TSDSRLayout,
    write_tsd_sr,
)
from tests.layouts.weights import random_image, write_pickle, write_safetensors
from tinysr_kernels.checkpoint.lora import Merged
from tinysr_kernels.checkpoint.modulation import OUT_PARTS
from tinysr_kernels.cli.main import main
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families import fold, load, tsd_sr
from tinysr_kernels.nets import place
from tinysr_kernels.nets.diffusion import sd3

TABLE = "transformer.pos_embed.pos_embed"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tsd_sr, "WINDOW", 8)
    monkeypatch.setattr(sd3, "WINDOW_BATCH", 256)  # for what compile() traces


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> TSDSRLayout:
    return write_tsd_sr(tmp_path_factory.mktemp("tsd-sr"))


@pytest.fixture
def copied(written: TSDSRLayout, tmp_path: Path) -> Path:
    """A folder of the test's own."""
    return Path(shutil.copytree(written.folder, tmp_path / "copy"))


def expected_tensors(layout: TSDSRLayout) -> dict[str, Tensor]:
    """The normalized checkpoint of the reference networks."""
    network, tensors = layout.transformer.double(), {}
    temb = F.silu(network.time_text_embed(layout.pooled.double()))
    for name, tensor in network.state_dict().items():
        module = name.rpartition(".")[0]
        if module.endswith("norm1_context.linear"):
            evaluated = name.replace("norm1_context.linear", "context_modulation")
        else:
            evaluated = name.replace("norm1.linear", "modulation").replace("norm_out.linear", "norm_out.modulation")
        if module.endswith(".linear"):
            value = network.get_submodule(module)(temb)
            tensors[evaluated.rpartition(".")[0]] = value.view(-1, network.config.dim)
        elif not name.startswith(("time_text_embed.", "context_embedder.")):
            tensors[name] = tensor
    last = f"transformer_blocks.{network.config.num_layers - 1}.attn.add_q_proj"
    del tensors[f"{last}.weight"], tensors[f"{last}.bias"]
    # 4x4 tokens, the center of 7x7.
    tensors["pos_embed.pos_embed"] = tensors["pos_embed.pos_embed"].view(1, 7, 7, -1)[:, 1:5, 1:5].flatten(1, 2)
    tensors["context"] = network.context_embedder(layout.prompt.double())[0]
    named = {f"transformer.{name}": tensor.float() for name, tensor in tensors.items()}
    return named | layout.vae.float().state_dict()


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
        {"files": "bin", "ranks": (1, 5)},
        {"files": "snapshot", "layers": 1},
        pytest.param({"files": "sharded bin", "heads": 3, "head_dim": 4}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_folder(tmp_path: Path, kind: dict[str, Any]) -> None:
    layout = write_tsd_sr(tmp_path, **kind)
    found = load(tmp_path)
    assert (found.family, found.config) == ("tsd-sr", layout.config)
    close(found.tensors, expected_tensors(layout))
    ignored = [notice for notice in found.notices if "taken for a copy" in notice]
    assert len(ignored) == (6 if kind.get("files") == "snapshot" else 0)
    assert len(found.merged) == 2


def test_dicts_and_names(written: TSDSRLayout, copied: Path) -> None:
    """Parts anywhere, under any name: both LoRA have keys of one form and are told apart by their modules."""
    (copied / LORA).rename(copied / "a.safetensors")
    (copied / VAE_LORA).rename(copied / "z.safetensors")
    close(load(copied).tensors, expected_tensors(written))
    parts: dict[str, Any] = {
        "transformer": copied / TRANSFORMER,
        "vae": copied / VAE,
        "lora": copied / "a.safetensors",
        "vae_lora": copied / "z.safetensors",
    }
    close(load({**parts, "embeddings": copied / "dataset/default"}).tensors, expected_tensors(written))
    files = {name: parts[name] / f"{STEM}.safetensors" for name in ("transformer", "vae")}
    given = {"prompt": written.prompt, "pooled": written.pooled}
    close(load({**parts, **files}, embeddings=given).tensors, expected_tensors(written))
    refused({**parts, "lora": parts["vae_lora"]}, "expected a LoRA", "found TSD-SR's LoRA of the VAE")
    refused({**parts, "vae_lora": parts["lora"]}, "expected TSD-SR's LoRA of the VAE", "found a LoRA")
    refused({**parts, "transformer": parts["vae"]}, "a Stable Diffusion 3 transformer")
    refused({**parts, "vae": parts["transformer"]}, "a Stable Diffusion VAE")
    refused({**parts, "lora": None}, "LoRA of the transformer, found none", '"lora"')


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ([LORA], ["TSD-SR's LoRA of the VAE, without TSD-SR's LoRA of the transformer"]),
        ([VAE_LORA], ["make a checkpoint of tsd-sr together with TSD-SR's LoRA of the VAE"]),
        (["checkpoint"], ["a Stable Diffusion 3 transformer", "make a checkpoint of tsd-sr together with"]),
        ([TRANSFORMER], ["without a Stable Diffusion 3 transformer", "the folder of Stable Diffusion 3"]),
        ([VAE], ["without the VAE of the same model"]),
        (["sd3", LORA], ["LoRA of the transformer and a Stable Diffusion 3 transformer", "and the VAE"]),
        (["sd3", VAE_LORA], ["(lora)", "TSD-SR's two LoRA"]),
        (["dataset"], ["a prompt's embedding [1,T,12], found none", "dataset/default", "embeddings="]),
        ([PROMPT], ["a prompt's embedding [1,T,12], found none"]),
        ([POOLED], ["a pooled embedding [1,10], found none"]),
    ],
    ids=str,
)
def test_parts_that_are_missing(copied: Path, gone: list[str], words: list[str]) -> None:
    for name in gone:
        path = copied / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(copied, *words)


def test_a_part_by_itself(written: TSDSRLayout) -> None:
    folder = written.folder
    refused(folder / TRANSFORMER / f"{STEM}.safetensors", "a Stable Diffusion 3 transformer", "only one part")
    refused(folder / LORA, "a LoRA", "only one part", '"vae_lora": ...')
    refused(folder / VAE_LORA, "TSD-SR's LoRA of the VAE", "only one part", '"vae_lora": ...')


def test_several_lora(written: TSDSRLayout, copied: Path) -> None:
    """The release has LoRA of another training beside: a choice is not guessed."""
    shutil.copytree(copied / "checkpoint/tsdsr", copied / "checkpoint/tsdsr-mse")
    refused(copied, "several", "tsdsr-mse", VAE_LORA)
    (copied / "checkpoint/tsdsr-mse/vae.safetensors").unlink()
    refused(copied, "several candidates for a LoRA", "tsdsr-mse", LORA)


def test_what_lies_beside_the_base_model(written: TSDSRLayout, copied: Path) -> None:
    """Text encoders, and the whole model in the old layout, of which only headers are read."""
    text = {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.full((2, 2), float("nan"))}
    for name in ("text_encoder/model.fp16.safetensors", "text_encoder_2/model.safetensors"):
        write_safetensors(copied / "sd3" / name, text)
    t5 = {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2), "shared.weight": torch.ones(3, 2)}
    write_safetensors(copied / "sd3/text_encoder_3/model-00001-of-00001.safetensors", t5)
    index = {"weight_map": dict.fromkeys(t5, "model-00001-of-00001.safetensors")}
    (copied / "sd3/text_encoder_3/model.safetensors.index.json").write_text(json.dumps(index))
    whole = {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.ones(2, 2)}
    write_safetensors(copied / "sd3/sd3_medium.safetensors", whole)
    close(load(copied).tensors, expected_tensors(written))


def test_embeddings(written: TSDSRLayout, copied: Path) -> None:
    """Of several those in "default", both; the caller's before the folder's own, both as well."""
    other = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    wanted = written.transformer.float().context_embedder(other)
    for given in ([other, written.pooled], [other[None], written.pooled[0]], {"p": other, "q": written.pooled}):
        found = load(copied, embeddings=given).tensors["transformer.context"]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    refused(copied, "embeddings: expected a pooled embedding [1,10], found none", embeddings=other)
    refused(
        copied,
        "expected a prompt's embedding [1,T,12] or a pooled embedding [1,10]",
        "[5, 11]",
        embeddings=other[:, 1:],
    )
    refused(copied, "several", embeddings=[other, other + 1, written.pooled])
    refused(copied, "NaN", embeddings=[other * float("nan"), written.pooled])
    shutil.move(copied / "dataset/default", copied / "dataset/mine")
    refused(copied, "several", "mine", "null", "embeddings=")
    shutil.rmtree(copied / "dataset/null")
    close(load(copied).tensors, expected_tensors(written))
    write_pickle(copied / "dataset/cache/pos_embed.pt", torch.ones(1, 16, 16))  # TinySR's, of another width
    close(load(copied).tensors, expected_tensors(written))


A = "transformer.proj_out.lora_A.weight"


def pair(module: str, outputs: int, inputs: int) -> dict[str, Tensor]:
    """An update of a module."""
    shapes = {"A": (2, inputs), "B": (outputs, 2)}
    return {f"transformer.{module}.lora_{side}.weight": torch.ones(shape) for side, shape in shapes.items()}


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (LORA, lambda t: t.pop(A), ["proj_out", "no lora_A"]),
        (LORA, lambda t: t.update({A: torch.ones(2, 16)}), ["proj_out", "found"]),
        (LORA, lambda t: t.update({A: torch.ones(3, 15)}), ["proj_out", "found"]),
        (
            LORA,
            lambda t: t.update(pair("other", 4, 4)),
            ["there is no module", "other"],
        ),
        (
            VAE_LORA,
            lambda t: t.update(pair("decoder.x", 4, 3)),
            ["there is no module", "decoder.x"],
        ),
    ],
)
def test_a_lora_that_does_not_fit(copied: Path, file: str, change: Any, words: list[str]) -> None:
    """Every key is consumed, and each has its module."""
    edit(copied / file, change)
    refused(copied, *words)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        (TRANSFORMER, {"qk_norm": "rms_norm"}),
        (TRANSFORMER, {"dual_attention_layers": [0, 1]}),
        (TRANSFORMER, {"num_layers": 4}),
        (TRANSFORMER, {"num_layers": 0}),
        (TRANSFORMER, {"num_attention_heads": 3}),
        (TRANSFORMER, {"attention_head_dim": 10**9}),
        (TRANSFORMER, {"caption_projection_dim": 17}),
        (TRANSFORMER, {"out_channels": 8}),
        (TRANSFORMER, {"in_channels": 8, "out_channels": 8}),
        (TRANSFORMER, {"patch_size": 3}),
        (TRANSFORMER, {"pos_embed_max_size": 8}),
        (TRANSFORMER, {"pos_embed_max_size": 3}),
        (TRANSFORMER, {"pooled_projection_dim": 11}),
        (VAE, {"latent_channels": 16}),
        (VAE, {"use_quant_conv": True}),
        (VAE, {"use_post_quant_conv": True}),
        (VAE, {"block_out_channels": [4, 8, 8]}),
        (VAE, {"scaling_factor": 0}),
    ],
    ids=str,
)
def test_configuration_and_weights_agree(copied: Path, part: str, values: dict[str, Any]) -> None:
    edit_json(copied / part / "config.json", **values)
    refused(copied, *(["3.5 is not supported"] if "qk_norm" in values or "dual" in str(values) else []))


@pytest.mark.parametrize(
    ("part", "key"),
    [
        (TRANSFORMER, "transformer_blocks.0.attn.to_add_out.weight"),
        (TRANSFORMER, "transformer_blocks.2.norm1_context.linear.weight"),
        (TRANSFORMER, "transformer_blocks.2.attn.add_q_proj.bias"),  # not needed, and checked all the same
        (TRANSFORMER, "time_text_embed.text_embedder.linear_2.weight"),
        (VAE, "encoder.conv_out.weight"),
    ],
)
def test_missing_misshapen_and_broken_weights(copied: Path, part: str, key: str) -> None:
    path = copied / part / f"{STEM}.safetensors"
    kept: dict[str, Tensor] = {}
    edit(path, lambda tensors: kept.update({key: tensors.pop(key)}))
    refused(copied, part, key)
    edit(path, lambda tensors: tensors.update({key: kept[key][None]}))
    refused(copied, part, key, "found [")
    edit(path, lambda tensors: tensors.update({key: kept[key].fill_(float("nan"))}))
    refused(copied, part, key, "NaN")
    edit(path, lambda tensors: tensors.update({key: kept[key].fill_(0), "extra": torch.ones(1)}))
    refused(copied, part, "extra", "unexpected")


def test_a_table_that_is_not_stored(written: TSDSRLayout, copied: Path) -> None:
    edit(copied / TRANSFORMER / f"{STEM}.safetensors", lambda tensors: tensors.pop("pos_embed.pos_embed"))
    found = load(copied)
    torch.testing.assert_close(found.tensors[TABLE], expected_tensors(written)[TABLE], rtol=1e-6, atol=1e-6)
    assert any("computed from pos_embed_max_size" in notice for notice in found.notices)


def test_memory_is_taken_tensor_by_tensor(written: TSDSRLayout) -> None:
    """Nothing is merged or evaluated before it is asked for, so that a network is never there twice."""
    tensors = load(written.folder).tensors
    for name in ("transformer.transformer_blocks.1.attn.to_q.weight", "transformer.transformer_blocks.1.modulation"):
        assert tensors[name] is not tensors[name]
    assert isinstance(tensors._network, Merged)  # type: ignore[attr-defined]
    assert tensors["transformer.norm_out.modulation"].shape[0] == len(OUT_PARTS)
    for gone in ("transformer_blocks.0.norm1.linear.weight", "context_embedder.weight", "norm_out.linear.bias"):
        assert f"transformer.{gone}" not in tensors
    with pytest.raises(KeyError):
        tensors["transformer.nothing"]


def test_folded_weights_are_not_copied(written: TSDSRLayout) -> None:
    """At most once in memory, with the largest tensor; nothing of the modulation and of what is constant is left."""
    found = load(written.folder)
    folded = fold(found.family, found.config, found.tensors, torch.float16)
    placed = place(folded, torch.device("cpu"), torch.float16)
    assert all(placed[name].data_ptr() == tensor.data_ptr() for name, tensor in folded.items())
    blocks = [name for name in folded if name.startswith("transformer.blocks.")]
    assert not [name for name in blocks if "norm" in name or "modulation" in name]
    text = {name.split(".")[2] + "." + name.split(".")[4] for name in blocks if ".text." in name}
    parts = {f"{i}.{part}" for i in range(2) for part in ("qkv", "out", "ff1", "ff2")} - {"0.qkv"}
    assert text == parts | {"2.kv"}


def test_saved_and_converted(written: TSDSRLayout, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One folded file, from which neither the base model nor the prompt is needed any more."""
    model = tinysr_kernels.compile(written.folder)
    assert main(["convert", str(written.folder), str(tmp_path / "folded.safetensors")]) == 0
    again = tinysr_kernels.compile(tmp_path / "folded.safetensors")
    assert_same(again._folded, model._folded)
    image = random_image(16, 18)[0]
    assert torch.equal(again(image), model(image))
    assert again.config == model.config
    assert main(["info", str(tmp_path / "folded.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "tsd-sr" in said
    assert "queries, keys and values in the first block" in said
    assert again.info()["color_fix"] == "wavelet"
    assert any("into the VAE's encoder" in line for line in model.info()["folded"])
    with pytest.raises(CheckpointError, match="leave the embeddings out"):
        tinysr_kernels.compile(tmp_path / "folded.safetensors", embeddings=written.pooled)
