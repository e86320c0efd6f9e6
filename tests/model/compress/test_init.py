"""The student of a teacher on disk: what it computes, how it is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tinysr_kernels
from model.compress.__main__ import main
from model.compress.conditions import parse_mask, student_tensors
from model.compress.init import init, read_vae
from model.compress.teacher_files import LoRA, weights_in
from model.reference.lora import merge_lora
from model.reference.sd3_transformer import SD3Config
from model.reference.tinysr_dit import TinySRTransformer
from tests.model.compress.teachers import SD3, WINDOW, lora_pairs, write_lora, write_teacher
from tinysr_kernels.families import TinySRConfig

pytest.importorskip("diffusers")

MASK = "0110"
CONFIG = TinySRConfig(head_dim=SD3["attention_head_dim"])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("teacher")
    return folder, write_teacher(folder, shards=True)


@pytest.fixture(scope="module")
def pooled() -> Tensor:
    return torch.randn(1, SD3["pooled_projection_dim"], generator=torch.Generator().manual_seed(3))


def without_context(transformer: Any, z: Tensor, pooled: Tensor, mask: str) -> Tensor:
    """diffusers' own modules on the image's stream alone."""
    temb = transformer.time_text_embed(torch.tensor([1000.0]), pooled)
    x = transformer.pos_embed(z)
    for block, kept in zip(transformer.transformer_blocks, mask, strict=True):
        if kept == "0":
            continue
        normed, gate, shift, scale, gate_ff = block.norm1(x, emb=temb)
        attn = block.attn
        q, k, v = (
            f(normed).unflatten(-1, (-1, SD3["attention_head_dim"])).transpose(1, 2)
            for f in (attn.to_q, attn.to_k, attn.to_v)
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate[:, None] * attn.to_out[0](mixed)
        x = x + gate_ff[:, None] * block.ff(block.norm2(x) * (1 + scale[:, None]) + shift[:, None])
    x = transformer.proj_out(transformer.norm_out(x, temb))
    side = z.shape[2] // 2
    return x.reshape(-1, side, side, 2, 2, z.shape[1]).permute(0, 5, 1, 3, 2, 4).reshape(z.shape)


# --------------------------------------------------------------------------------------------------- what it computes
@pytest.mark.parametrize("mask", ["1111", "0110", "1001"])
def test_the_student_is_the_teachers_image_stream(teacher: tuple[Path, Any], pooled: Tensor, mask: str) -> None:
    folder, transformer = teacher
    weights = weights_in(folder / "transformer")
    assert len(weights.paths) > 2
    tensors = dict(student_tensors(weights, SD3Config(**SD3), parse_mask(mask, 4), window=WINDOW, pooled=pooled))
    network = TinySRTransformer.from_state(tensors, CONFIG)
    z = torch.randn(2, SD3["in_channels"], WINDOW, WINDOW)
    with torch.no_grad():
        wanted = without_context(transformer, z, pooled, mask)
    # diffusers evaluates the time step's angles, up to 1000, in float32.
    assert float((network(z) - wanted).abs().max() / wanted.abs().max()) < 1e-4


def test_lora_is_merged_before_the_modulation_is_evaluated(teacher: tuple[Path, Any], pooled: Tensor) -> None:
    transformer = teacher[1]
    pairs = lora_pairs(transformer, "transformer.")
    state = transformer.state_dict()
    merged = merge_lora(state, {k: v for k, v in pairs.items() if "context" not in k and "add_" not in k})
    arguments = (SD3Config(**SD3), parse_mask(MASK, 4))
    found = dict(student_tensors(state, *arguments, window=WINDOW, pooled=pooled, lora=LoRA(pairs, "")))
    wanted = dict(student_tensors(merged, *arguments, window=WINDOW, pooled=pooled))
    plain = dict(student_tensors(state, *arguments, window=WINDOW, pooled=pooled))
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor, wanted[name], atol=1e-5), name
    assert not torch.allclose(found["transformer_blocks.0.gate_msa"], plain["transformer_blocks.0.gate_msa"])


def test_caching_later_gives_the_same(teacher: tuple[Path, Any], pooled: Tensor) -> None:
    state = teacher[1].state_dict()
    arguments = (SD3Config(**SD3), parse_mask(MASK, 4))
    now = dict(student_tensors(state, *arguments, window=WINDOW, pooled=pooled))
    later = dict(student_tensors(state, *arguments, window=WINDOW))
    assert all(later[name].numel() == 0 for name in now if name.endswith("gate_mlp"))
    network = TinySRTransformer.from_state(later, CONFIG, torch.float64).cache_modulation(pooled=pooled.double())
    for name, tensor in network.state_dict().items():
        assert torch.allclose(tensor, now[name].double(), atol=1e-6), name


# ------------------------------------------------------------------------------------------------------------ the files
@pytest.mark.parametrize("shard", [2**31, 20_000])
def test_init_writes_the_released_layout(teacher: tuple[Path, Any], pooled: Tensor, tmp_path: Path, shard: int) -> None:
    folder, transformer = teacher
    torch.save(pooled, tmp_path / "pool_embeds.pt")
    write_lora(tmp_path / "lora", lora_pairs(transformer, "transformer."))
    out = tmp_path / "student"
    init(
        folder,
        parse_mask(MASK, 4),
        out,
        lora=tmp_path / "lora",
        pooled=tmp_path / "pool_embeds.pt",
        width=8,
        window=WINDOW,
        shard=shard,
    )
    files = sorted((out / "tinybackbone/prune-2-merge-tinysr/transformer").glob("*.safetensors"))
    assert (len(files) > 1) == (shard == 20_000)
    assert not list(out.rglob("*.part"))
    config = json.loads((out / "vae/separable/config.json").read_text())
    assert config["scaling_factor"] == 1.5
    vae = load_file(out / "vae/separable/diffusion_pytorch_model.safetensors")
    assert "encoder.layers.1.conv.0.depthwise.weight" in vae
    assert "decoder.layers.2.conv.0.weight" in vae
    model = tinysr_kernels.compile(out, device="cpu", color_fix="none")
    assert model.info()["family"] == "tinysr-dit"
    assert model(torch.rand(3, 32, 32)).shape == (3, 128, 128)


def test_the_command(teacher: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["init", "--teacher", str(teacher[0]), "--mask", MASK, "--out", str(tmp_path), "--width", "8"]
    assert main([*arguments, "--window", str(WINDOW)]) == 0
    assert "the modules of the modulation stay" in capsys.readouterr().out
    assert main([*arguments, "--window", str(WINDOW), "--width", "6"]) == 2
    assert "6 channels do not divide into the 4 groups" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("01101", "the mask has 5 entries, the network 4 blocks"),
        ("0111", "the mask keeps 3 blocks, not 2"),
        ("01x0", "written with 0 and 1"),
    ],
)
def test_masks_that_do_not_fit(
    teacher: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], mask: str, message: str
) -> None:
    assert main(["init", "--teacher", str(teacher[0]), "--mask", mask, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_is_no_sd3_transformer(teacher: tuple[Path, Any], tmp_path: Path) -> None:
    mask = parse_mask(MASK, 4)
    with pytest.raises(ValueError, match=r"no transformer/config\.json"):
        init(tmp_path, mask, tmp_path / "out")
    place = tmp_path / "transformer"
    place.mkdir()
    values = json.loads((teacher[0] / "transformer/config.json").read_text())

    def refused(message: str, **changed: Any) -> None:
        (place / "config.json").write_text(json.dumps(values | changed))
        with pytest.raises(ValueError, match=message):
            init(tmp_path, mask, tmp_path / "out")

    refused("expected a SD3Transformer2DModel, found FluxTransformer2DModel", _class_name="FluxTransformer2DModel")
    refused("dual attention", dual_attention_layers=[0])
    refused("num_layers: expected an integer", num_layers="four")
    refused("expected diffusion_pytorch_model.safetensors")
    state = {name: t.contiguous() for name, t in teacher[1].state_dict().items()}
    file = place / "diffusion_pytorch_model.safetensors"
    save_file(state, file)
    refused(r"blocks\.3\.norm1_context\.linear\.weight: expected \[192, 32\], .* found \[64, 32\]", num_layers=5)
    save_file({k: v for k, v in state.items() if k != "transformer_blocks.1.attn.to_k.bias"}, file)
    refused(r"transformer_blocks\.1\.attn\.to_k\.bias: missing")
    save_file(state | {"foreign": torch.zeros(1)}, file)
    refused("foreign: not a tensor of an SD3 transformer")
    file.write_bytes(b"nothing of the kind")
    refused("cannot be read as safetensors")


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    write_teacher(tmp_path, shards=True)
    sorted((tmp_path / "transformer").glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match=r"names diffusion_pytorch_model-00002-of-.*, which is missing"):
        init(tmp_path, parse_mask(MASK, 4), tmp_path / "out")


def vae_pairs(folder: Path, prefix: str) -> dict[str, Tensor]:
    """As TSD-SR's vae.safetensors: the encoder's convolutions and attention projections."""
    weights = weights_in(folder / "vae")
    generator = torch.Generator().manual_seed(8)
    pairs = {}
    for name in weights:
        own = name.removesuffix(".weight")
        if not own.startswith("encoder.") or own == name or "norm" in own:
            continue
        outputs, *rest = weights.shape(name)
        pairs[f"{prefix}{own}.lora_A.weight"] = torch.randn(2, *rest, generator=generator)
        ones = [1] * len(rest[1:])
        pairs[f"{prefix}{own}.lora_B.weight"] = 0.1 * torch.randn(outputs, 2, *ones, generator=generator)
    return pairs


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_the_vae_s_lora_carries_the_transformer_s_prefix(
    teacher: tuple[Path, Any], tmp_path: Path, prefix: str
) -> None:
    folder = teacher[0]
    pairs = vae_pairs(folder, prefix)
    assert len(pairs) > 40
    save_file(pairs, tmp_path / "vae.safetensors")
    plain, _ = read_vae(folder, None)
    merged, scaling = read_vae(folder, tmp_path)
    assert scaling == 1.5
    for name, tensor in plain.state_dict().items():
        own = f"{prefix}{name.removesuffix('.weight')}"
        change = torch.zeros_like(tensor)
        if f"{own}.lora_A.weight" in pairs:
            down, up = (pairs[f"{own}.lora_{half}.weight"].double().flatten(1) for half in "AB")
            change = (up @ down).reshape(tensor.shape)
        assert torch.allclose(merged.state_dict()[name], (tensor.double() + change).float(), atol=1e-5)


def test_lora_that_does_not_fit(teacher: tuple[Path, Any], tmp_path: Path) -> None:
    pairs = lora_pairs(teacher[1], "transformer.")
    name = "transformer.transformer_blocks.0.attn.to_q"
    mask = parse_mask(MASK, 4)

    def refused(message: str, tensors: dict[str, Tensor]) -> None:
        write_lora(tmp_path, tensors)
        with pytest.raises(ValueError, match=message):
            init(teacher[0], mask, tmp_path / "out", lora=tmp_path)

    refused("has lora_B without its other half", {k: v for k, v in pairs.items() if k != f"{name}.lora_A.weight"})
    refused("do not make a weight", pairs | {f"{name}.lora_A.weight": torch.zeros(3, 5)})
    foreign = {f"transformer.elsewhere.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    refused("elsewhere: the teacher has no such module", pairs | foreign)
    refused("expected <module>.lora_A.weight", pairs | {"transformer.alpha": torch.zeros(1)})
    with pytest.raises(ValueError, match="no such LoRA"):
        init(teacher[0], mask, tmp_path / "out", lora=tmp_path / "none")


def test_pooled_embeddings_that_do_not_fit(teacher: tuple[Path, Any], tmp_path: Path) -> None:
    torch.save(torch.zeros(1, 7), tmp_path / "pooled.pt")
    with pytest.raises(ValueError, match=r"must be \[1, 20\], found \[1, 7\]"):
        init(teacher[0], parse_mask(MASK, 4), tmp_path / "out", pooled=tmp_path / "pooled.pt", window=WINDOW)
    with pytest.raises(ValueError, match="no whole patches"):
        init(teacher[0], parse_mask(MASK, 4), tmp_path / "out", window=7)
    with pytest.raises(ValueError, match="more than the 12 positions"):
        init(teacher[0], parse_mask(MASK, 4), tmp_path / "out", window=64)
