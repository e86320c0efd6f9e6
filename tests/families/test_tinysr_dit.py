"""TinySR's folder in every variant that occurs, against the tensors that the reference networks hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from model.reference.tinysr_dit import position_table as reference_table
from tests.checkpoint.edit import assert_same, edit, edit_json, read, refused
from tests.layouts.tinysr import LORA, STEM, TRANSFORMER, VAE, write_tinysr
from tests.layouts.weights import write_pickle, write_safetensors
from tinysr_kernels.checkpoint.embeddings import position_table
from tinysr_kernels.families import TinySRConfig, load

WEIGHTS = f"{TRANSFORMER}/{STEM}.safetensors"
VAE_WEIGHTS = f"{VAE}/{STEM}.safetensors"
POOLED = "dataset/default/pool_embeds.pt"
TABLE = "dataset/cache/pos_embed.pt"


@pytest.mark.parametrize("lora", [0, 1, 3])
@pytest.mark.parametrize("conditioning", ["pooled", "temb", "buffers"])
def test_conditioning_and_lora(tmp_path: Path, conditioning: str, lora: int) -> None:
    layout = write_tinysr(tmp_path, conditioning=conditioning, lora=lora, decoys=True, leftovers=True)
    found = load(tmp_path)
    assert_same(found.tensors, layout.tensors())
    assert found.family == "tinysr-dit"
    assert found.config == layout.config
    assert not found.folded
    assert any("context stream" in notice for notice in found.notices)
    ignored = [n for n in found.notices if "LoRA on cached modulation ignored" in n]
    assert bool(ignored) == (bool(lora) and conditioning != "pooled")


@pytest.mark.parametrize(
    "kind",
    [
        {"sharded": True},
        {"sharded": True, "as_bin": True},
        {"as_bin": True, "lora": True},
        {"separable_encoder": False},
        {"separable_decoder": True},
        {"conditioning": "temb", "embedders": False},
        {"dtype": torch.float16, "lora": True},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
        # As wide as the pooled embedding: only the names of the files tell it from temb.
        {"pooled_dim": 128, "decoys": True},
        {"pooled_dim": 128, "conditioning": "temb"},
        {"table": 4, "layers": 1},
        {"config": TinySRConfig(head_dim=32, encoder_blocks=(1, 2), decoder_blocks=(1, 1), scaling_factor=0.5)},
    ],
    ids=str,
)
def test_kinds_of_files(tmp_path: Path, kind: dict[str, object]) -> None:
    layout = write_tinysr(tmp_path, **kind)
    found = load(str(tmp_path))
    assert_same(found.tensors, layout.tensors())
    assert found.config == layout.config


def test_stored_dtypes_stay_except_for_what_was_computed(tmp_path: Path) -> None:
    write_tinysr(tmp_path, dtype=torch.float16, lora=True)
    tensors = load(tmp_path).tensors
    assert tensors["encoder.layers.0.pointwise.weight"].dtype == torch.float16
    assert tensors["transformer.transformer_blocks.0.attn.to_q.bias"].dtype == torch.float16
    assert tensors["transformer.transformer_blocks.0.attn.to_q.weight"].dtype == torch.float32
    assert tensors["transformer.transformer_blocks.0.modulation"].dtype == torch.float32


def test_float64_stays_float64(tmp_path: Path) -> None:
    write_tinysr(tmp_path, dtype=torch.float64, lora=True)
    assert {t.dtype for t in load(tmp_path).tensors.values()} == {torch.float64}


def test_dict_of_paths_modules_and_tensors(tmp_path: Path) -> None:
    layout = write_tinysr(tmp_path, lora=True)
    by_folder = {"transformer": tmp_path / TRANSFORMER, "vae": tmp_path / VAE, "lora": tmp_path / "tinysr"}
    by_file = {
        "transformer": str(tmp_path / WEIGHTS),
        "vae": tmp_path / VAE_WEIGHTS,
        "lora": tmp_path / LORA,
        "embeddings": tmp_path / POOLED,
    }
    assert_same(load({**by_folder, "embeddings": tmp_path / "dataset"}).tensors, layout.tensors())
    assert_same(load(by_file).tensors, layout.tensors())
    lora = {"proj_out.lora_A.weight": torch.zeros(2, 128), "proj_out.lora_B.weight": torch.zeros(64, 2)}
    modules = {"transformer": layout.transformer, "vae": layout.vae, "lora": lora}
    found = load(modules)
    assert_same(found.tensors, layout.tensors())
    assert any("no configuration" in notice for notice in found.notices)


def test_whole_module(tmp_path: Path) -> None:
    layout = write_tinysr(tmp_path, config=TinySRConfig(head_dim=32, encoder_blocks=(1, 1), decoder_blocks=(1, 1)))
    whole = nn.ModuleDict({"transformer": layout.transformer, "vae": layout.vae})
    whole.config = layout.config
    found = load(whole)
    assert_same(found.tensors, layout.tensors())
    assert found.config == layout.config
    before = found.tensors["encoder.layers.0.pointwise.weight"].clone()
    with torch.no_grad():
        layout.vae.encoder.layers[0].pointwise.weight.zero_()
    assert torch.equal(found.tensors["encoder.layers.0.pointwise.weight"], before), "a snapshot, not a view"


def test_parts_anywhere_and_other_files_about(tmp_path: Path) -> None:
    layout = write_tinysr(tmp_path)
    (tmp_path / TRANSFORMER).rename(tmp_path / "a")
    (tmp_path / VAE / "config.json").rename(tmp_path / "vae.json")
    (tmp_path / "model_index.json").write_text('{"_class_name": "TinySRPipeline"}')
    (tmp_path / "notes.json").write_text("not JSON")
    write_safetensors(tmp_path / "text_encoder/model.safetensors", {"text_model.x": torch.zeros(3)})
    (tmp_path / "vae/again").symlink_to(tmp_path, target_is_directory=True)
    assert_same(load(tmp_path).tensors, layout.tensors())


def test_a_teacher_beside(tmp_path: Path) -> None:
    layout = write_tinysr(tmp_path, conditioning="buffers")
    write_tinysr(tmp_path / "teacher", leftovers=True)
    edit_json(tmp_path / "teacher" / TRANSFORMER / "config.json", _class_name="SD3Transformer2DModel")
    edit_json(tmp_path / "teacher" / VAE / "config.json", _class_name="AutoencoderKL")
    assert_same(load(tmp_path).tensors, layout.tensors())


def test_copies_of_the_same_weights(tmp_path: Path) -> None:
    layout = write_tinysr(tmp_path)
    tensors, _ = read(tmp_path / WEIGHTS)
    write_pickle((tmp_path / WEIGHTS).with_suffix(".bin"), {k: -v for k, v in tensors.items()})
    write_safetensors((tmp_path / WEIGHTS).with_suffix(".fp16.safetensors"), {k: -v for k, v in tensors.items()})
    found = load(tmp_path)
    assert_same(found.tensors, layout.tensors())
    assert sum("taken for a copy" in notice for notice in found.notices) == 2


# ----------------------------------------------------------------------------------------------------- LoRA
@pytest.mark.parametrize(
    "prefix", ["", "transformer.", "base_model.model.", "base_model.model.transformer.", "module."]
)
def test_names_of_lora(tmp_path: Path, prefix: str) -> None:
    layout = write_tinysr(tmp_path, lora=2)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            plain = name.removeprefix("transformer.").replace(".weight", ".default.weight")
            tensors[prefix + plain] = tensors.pop(name)

    edit(tmp_path / LORA, rename)
    assert_same(load(tmp_path).tensors, layout.tensors())


def test_adapter_still_attached(tmp_path: Path) -> None:
    layout = write_tinysr(tmp_path, lora=2)
    pairs, _ = read(tmp_path / LORA)
    (tmp_path / LORA).unlink()

    def attach(tensors: dict[str, torch.Tensor]) -> None:
        for name in pairs:
            weight = name.removeprefix("transformer.").replace(".lora_A", "")
            if weight in tensors:
                tensors[weight.replace(".weight", ".base_layer.weight")] = tensors.pop(weight)
            tensors[name.removeprefix("transformer.").replace(".weight", ".default.weight")] = pairs[name]

    edit(tmp_path / WEIGHTS, attach)
    assert_same(load(tmp_path).tensors, layout.tensors())


def test_scale_of_lora(tmp_path: Path) -> None:
    layout = write_tinysr(tmp_path, lora=4)
    name = "transformer.transformer_blocks.0.attn.to_q.weight"
    base = read(tmp_path / WEIGHTS)[0][name.removeprefix("transformer.")]
    (tmp_path / "tinysr/adapter_config.json").write_text('{"lora_alpha": 2, "r": 4}')
    half = load(tmp_path).tensors[name]
    torch.testing.assert_close(half - base, (layout.tensors()[name] - base) / 2)
    (tmp_path / "tinysr/adapter_config.json").write_text('{"lora_alpha": 2, "r": 4, "use_rslora": true}')
    refused(tmp_path, "adapter_config.json", "merge it first")


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        ("transformer.transformer_blocks.7.attn.to_q.lora_A.weight", (4, 128), ["no lora_B"]),
        ("transformer.proj_in.lora_A.weight", (4, 128), ["proj_in", "no lora_B"]),
        ("transformer.proj_out.alpha", (1,), ["alpha", "lora_A.weight"]),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", (4, 127), ["to_q", "[any, 128]", "[4, 127]"]),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", (5, 128), ["to_q", "[any, 5]", "[128, 4]"]),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.other.weight", (4, 128), ["to_q", "second adapter"]),
        ("transformer.pos_embed.proj.lora_A.weight", (4, 64), ["pos_embed.proj", "[4, 64]"]),
    ],
)
def test_lora_that_does_not_fit(tmp_path: Path, key: str, shape: tuple[int, ...], words: list[str]) -> None:
    write_tinysr(tmp_path, lora=4)
    edit(tmp_path / LORA, lambda tensors: tensors.update({key: torch.ones(shape)}))
    refused(tmp_path, LORA, *words)


def test_lora_of_a_module_that_is_not_there(tmp_path: Path) -> None:
    write_tinysr(tmp_path, lora=4)
    pair = {f"transformer.transformer_blocks.2.attn.to_q.lora_{s}.weight": torch.ones(4, 4) for s in "AB"}
    edit(tmp_path / LORA, lambda tensors: tensors.update(pair))
    refused(tmp_path, LORA, "transformer_blocks.2.attn.to_q", "no module")


# ----------------------------------------------------------------------------------------------- embeddings
def test_embeddings_given_go_first(tmp_path: Path) -> None:
    mine, tmp_path = tmp_path / "mine.pt", tmp_path / "checkpoint"
    layout = write_tinysr(tmp_path, decoys=True)
    pooled = torch.load(tmp_path / POOLED)
    (tmp_path / POOLED).rename(mine)
    other = load(tmp_path).tensors  # from the temb that lies about
    name = "transformer.norm_out.modulation"
    assert not torch.equal(other[name], layout.tensors()[name])
    for given in (mine, pooled, pooled[0], {"pooled": pooled}, {"pooled": mine}, [mine]):
        assert_same(load(tmp_path, embeddings=given).tensors, layout.tensors())
    refused(tmp_path, "embeddings", "[1, 96]", "[1, 128]", "[1, 7]", embeddings=torch.zeros(1, 7))
    refused(tmp_path, "embeddings", "int", embeddings=3)
    refused(tmp_path, "nowhere.pt", embeddings=tmp_path / "nowhere.pt")


def test_embeddings_of_equal_width_need_names(tmp_path: Path) -> None:
    write_tinysr(tmp_path, pooled_dim=128)
    pooled = torch.load(tmp_path / POOLED)
    refused(tmp_path, "pool_embeds", "temb", embeddings=pooled)
    assert load(tmp_path, embeddings={"pool_embeds": pooled}).tensors


def test_two_different_prompts(tmp_path: Path) -> None:
    write_tinysr(tmp_path)
    pooled = torch.load(tmp_path / POOLED)
    write_pickle(tmp_path / "dataset/other/pool_embeds.pt", pooled.clone())
    assert load(tmp_path).tensors, "equal ones are one"
    write_pickle(tmp_path / "dataset/other/pool_embeds.pt", pooled * 2)
    refused(tmp_path, "dataset/other/pool_embeds.pt", "second pooled embedding")


def test_no_conditioning(tmp_path: Path) -> None:
    write_tinysr(tmp_path)
    (tmp_path / POOLED).unlink()
    refused(tmp_path, "no conditioning", "[1, 96]", "temb [1, 128]", "pos_embed.pt")


@pytest.mark.parametrize(("side", "full", "base"), [(8, 12, 16), (4, 5, 3), (32, 192, 64)])
def test_position_table(side: int, full: int, base: int) -> None:
    torch.testing.assert_close(position_table(32, side, base, full), reference_table(32, side, full, base))


def test_position_table_from_file_or_configuration(tmp_path: Path) -> None:
    layout = write_tinysr(tmp_path)
    edit(tmp_path / WEIGHTS, lambda tensors: tensors.pop("pos_embed.pos_embed"))
    assert_same(load(tmp_path).tensors, layout.tensors())
    (tmp_path / TABLE).unlink()
    refused(tmp_path, "pos_embed_max_size", "at least 32")
    config = edit_json(tmp_path / TRANSFORMER / "config.json", pos_embed_max_size=40)
    found = load(tmp_path)
    expected = reference_table(128, 32, 40, 16)
    torch.testing.assert_close(found.tensors["transformer.pos_embed.pos_embed"], expected)
    assert any("position table computed" in notice for notice in found.notices)
    edit_json(config, pos_embed_max_size=None)
    refused(tmp_path, "pos_embed.pos_embed", "none of them")


# ------------------------------------------------------------------------------------- what does not agree
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_layers", 12, ["num_layers", "2", "12"]),
        ("attention_head_dim", 48, ["attention_head_dim", "128", "48"]),
        ("attention_head_dim", "64", ["attention_head_dim", "'64'"]),
        ("attention_head_dim", 0, ["attention_head_dim"]),
        ("num_attention_heads", 24, ["num_attention_heads", "2", "24"]),
        ("patch_size", 4, ["patch_size", "2", "4"]),
        ("in_channels", 4, ["in_channels", "16", "4"]),
        ("pooled_projection_dim", 2048, ["pooled_projection_dim", "96", "2048"]),
        ("_class_name", "SD3Transformer2DModel", ["_class_name", "TinySD3Transformer2DModel"]),
        ("_class_name", None, ["_class_name", "TinySD3Transformer2DModel"]),
    ],
)
def test_transformer_and_its_configuration(tmp_path: Path, field: str, value: object, words: list[str]) -> None:
    write_tinysr(tmp_path)
    edit_json(tmp_path / TRANSFORMER / "config.json", **{field: value})
    refused(tmp_path, *words)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_encoder_blocks", [1, 3, 3, 2], ["encoder.layers", "13"]),
        ("num_decoder_blocks", [3, 3, 1], ["decoder_block_out_channels"]),
        ("num_decoder_blocks", "many", ["num_decoder_blocks", "'many'"]),
        ("encoder_block_out_channels", [64] * 4, ["encoder.layers.0", "64", "16"]),
        ("decoder_block_out_channels", [16, 16, 24, 24], ["decoder.layers.11", "24", "16"]),
        ("latent_channels", 4, ["[4, 16", "[16, 16"]),
        ("act_fn", "silu", ["act_fn", "'silu'"]),
        ("upsampling_scaling_factor", 3, ["upsampling_scaling_factor", "3"]),
        ("scaling_factor", float("nan"), ["scaling_factor", "nan"]),
        ("scaling_factor", None, ["scaling_factor"]),
        ("scaling_factor", True, ["scaling_factor"]),
    ],
)
def test_vae_and_its_configuration(tmp_path: Path, field: str, value: object, words: list[str]) -> None:
    write_tinysr(tmp_path)
    edit_json(tmp_path / VAE / "config.json", **{field: value})
    refused(tmp_path, VAE, *words)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        (WEIGHTS, "transformer_blocks.1.attn.to_k.bias"),
        (WEIGHTS, "transformer_blocks.0.norm1.linear.weight"),
        (WEIGHTS, "time_text_embed.text_embedder.linear_2.bias"),
        (WEIGHTS, "norm_out.linear.bias"),
        (WEIGHTS, "pos_embed.proj.bias"),
        (WEIGHTS, "proj_out.weight"),
        (VAE_WEIGHTS, "encoder.layers.3.conv.2.depthwise.weight"),
        (VAE_WEIGHTS, "decoder.layers.18.bias"),
        (VAE_WEIGHTS, "decoder.layers.6.weight"),
    ],
)
def test_missing_extra_misshapen_and_broken_weights(tmp_path: Path, file: str, key: str) -> None:
    write_tinysr(tmp_path)
    path = tmp_path / file
    kept = read(path)[0][key]
    edit(path, lambda tensors: tensors.pop(key))
    refused(tmp_path, file, key)
    edit(path, lambda tensors: tensors.update({key: torch.cat([kept, kept])}))
    refused(tmp_path, file, key, "found [")
    edit(path, lambda tensors: tensors.update({key: kept.fill_(float("nan"))}))
    refused(tmp_path, file, key, "NaN")
    edit(path, lambda tensors: tensors.update({key: kept.fill_(-float("inf"))}))
    refused(tmp_path, file, key, "infinity")
    edit(path, lambda tensors: tensors.update({key: kept.fill_(1).to(torch.int32)}))
    refused(tmp_path, file, key, "int32")
    edit(path, lambda tensors: tensors.update({key: kept, "blocks.extra": kept}))
    refused(tmp_path, file, "blocks.extra", "unexpected")


def test_half_filled_buffers(tmp_path: Path) -> None:
    write_tinysr(tmp_path, conditioning="buffers")
    edit(tmp_path / WEIGHTS, lambda t: t.update({"transformer_blocks.1.gate_mlp": torch.zeros(0)}))
    refused(tmp_path, "transformer_blocks.1.gate_mlp", "filled")


def test_missing_and_ambiguous_parts(tmp_path: Path) -> None:
    write_tinysr(tmp_path)
    (tmp_path / TRANSFORMER / "config.json").rename(tmp_path / "away.txt")
    refused(tmp_path, WEIGHTS, "config.json", "TinySD3Transformer2DModel")
    refused({"transformer": tmp_path / WEIGHTS, "vae": tmp_path / VAE}, WEIGHTS, "config.json")
    (tmp_path / "away.txt").rename(tmp_path / TRANSFORMER / "config.json")
    write_tinysr(tmp_path / "second")
    refused(tmp_path, "several", WEIGHTS, f"second/{WEIGHTS}")
    refused(tmp_path / TRANSFORMER, "tiny VAE", str(tmp_path / TRANSFORMER))
    refused(tmp_path / VAE, "expected a TinySR folder", "(vae)")
    refused(tmp_path / WEIGHTS, "only one part", '{"transformer": ..., "vae": ..., "lora": ..., "embeddings": ...}')
    refused({"transformer": tmp_path / VAE_WEIGHTS, "vae": tmp_path / VAE}, "expected a TinySR transformer", "tiny VAE")
    refused({"transformer": tmp_path / TRANSFORMER}, '"vae"', "'transformer'")
    refused({"transformer": 3, "vae": tmp_path / VAE}, "transformer", "int")
    refused({}, "none")
    refused(7, "int")
    refused(nn.Linear(2, 2), "Linear", "'weight'")


def test_two_loras(tmp_path: Path) -> None:
    write_tinysr(tmp_path, lora=True)
    write_safetensors(tmp_path / "other.safetensors", read(tmp_path / LORA)[0])
    refused(tmp_path, "several", LORA, "other.safetensors")


def test_a_lora_or_embeddings_alone_name_the_dict_they_belong_in(tmp_path: Path) -> None:
    write_tinysr(tmp_path, lora=True)
    for file in (LORA, POOLED):
        refused(tmp_path / file, file, "only one part", '"vae": ...')
