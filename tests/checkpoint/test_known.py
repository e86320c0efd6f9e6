"""What is recognized and refused: each named, alone and in a folder, with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.edit import refused
from tests.layouts.adcsr import write_adcsr
from tests.layouts.diffusers_module import STEM
from tests.layouts.osediff import LORA, UNET, VAE, write_osediff
from tests.layouts.osediff_kin import UNET_ADAPTER, VAE_ADAPTER, write_relative
from tests.layouts.tinysr import write_tinysr
from tests.layouts.unet import write_unet
from tests.layouts.weights import write_pickle, write_safetensors
from tinysr_kernels.checkpoint.known import KNOWN, hint

ONE = torch.ones(2, 2)
S3DIFF = {
    "state_dict_unet": {f"conv_in.lora_{side}.default.weight": ONE for side in "AB"},
    "state_dict_vae": {f"encoder.conv_in.lora_{side}.vae_skip.weight": ONE for side in "AB"},
    "state_dict_vae_de_mlp": {"0.weight": ONE},
    "state_dict_unet_fuse_mlp": {"weight": ONE},
    "w": ONE,
}
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "SUPIR": ({"model.control_model.input_blocks.0.0.weight": ONE, "model.diffusion_model.x": ONE}, ["SUPIR", "one"]),
    "StableSR": ({"structcond_stage_model.x": ONE, "model.diffusion_model.x": ONE}, ["StableSR", "many steps"]),
    "DiffBIR": ({"zero_convs.0.0.weight": ONE, "input_blocks.0.0.weight": ONE}, ["ControlNet", "DiffBIR"]),
    "DiffBIR 1": ({"control_model.input_blocks.0.0.weight": ONE}, ["ControlNet", "DiffBIR"]),
    "one file": ({"model.diffusion_model.input_blocks.0.0.weight": ONE}, ["from_single_file(FILE)"]),
    "SD 3.5": ({"transformer_blocks.0.attn.norm_added_q.weight": ONE}, ["Stable Diffusion 3.5", "3-medium"]),
    "S3Diff": (S3DIFF, ["S3Diff", "OSEDiff"]),
    "InvSR": (
        {"encoder.down_blocks.0.resnets.0.time_emb_proj.weight": ONE, "encoder.conv_in.weight": ONE},
        ["InvSR", "many steps"],
    ),
    "SeedVR2": ({"blocks.0.attn.proj_qkv.vid.weight": ONE, "vid_in.proj.weight": ONE}, ["SeedVR2", "tinysr upscale"]),
    "SeedVR2, shared": ({"blocks.30.attn.proj_qkv.all.weight": ONE}, ["SeedVR2"]),
    "FlashVSR": ({"blocks.0.self_attn.q.weight": ONE, "patch_embedding.weight": ONE}, ["Wan 2.1", "FlashVSR"]),
    "ResShift": ({"input_blocks.0.0.weight": ONE, "time_embed.0.weight": ONE}, ["ResShift", "SinSR"]),
    "Real-ESRGAN": ({"params_ema": {"conv_first.weight": ONE, "body.0.rdb1.conv1.weight": ONE}}, ["spandrel"]),
    "ESRGAN": ({"model.1.sub.0.RDB1.conv1.0.weight": ONE}, ["ESRGAN", "pip install spandrel"]),
    "SwinIR": ({"layers.0.residual_group.blocks.0.norm1.weight": ONE}, ["SwinIR", "spandrel"]),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_by_name(case: str, tmp_path: Path) -> None:
    """As a file and as a folder; as pickle, and where the content is flat as safetensors too."""
    content, words = CASES[case]
    write_pickle(tmp_path / "a" / "x.pth", content)
    paths = [tmp_path / "a" / "x.pth", tmp_path / "a"]
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        write_safetensors(tmp_path / "b" / "x.safetensors", content)
        paths += [tmp_path / "b" / "x.safetensors", tmp_path / "b"]
    for path in paths:
        message = refused(path, *words)
        assert message.isprintable()


def test_every_hint_is_reached() -> None:
    """By the cases above: each text is that of one of them."""
    found = {hint([*content, *(f"state_dict_vae_de_mlp.{k}" for k in content.get("state_dict_vae_de_mlp", ()))])
             for content, _ in CASES.values()}  # fmt: skip
    assert found == {f"; {text}" for _, text in KNOWN}


def test_no_supported_checkpoint_is_taken_for_one(tmp_path: Path) -> None:
    """Nor for a part of one: patterns look for what no network here has."""
    from tinysr_kernels.checkpoint.read.shards import read_weights

    write_osediff(tmp_path / "osediff")
    for name in ("pisa-sr", "hypir", "omgsr-s"):
        write_relative(tmp_path / name, name)
    write_adcsr(tmp_path / "adcsr")
    write_tinysr(tmp_path / "tinysr", dim=64, layers=1, channels=4, vae_width=4)
    write_unet(tmp_path / "unet.safetensors")
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".pkl", ".pth", ".ckpt", ".pt")]
    assert len(files) > 15
    for path in files:
        file = read_weights(path)
        assert hint([*file.tensors, *file.others]) == "", path


def test_beside_a_base_model(tmp_path: Path) -> None:
    """The base of InvSR and S3Diff is one that other families take: what lies beside it is named all the same."""
    for case, name in (("InvSR", "noise_predictor.pth"), ("S3Diff", "s3diff.pkl")):
        folder = tmp_path / case
        write_osediff(folder)
        (folder / LORA).unlink()
        write_pickle(folder / name, CASES[case][0])
        refused(folder, case, "make a checkpoint of osediff together with OSEDiff's LoRA", "of pisa-sr together with")


def test_parts_alone_and_wrong_pairs(tmp_path: Path) -> None:
    """A VAE's LoRA, a VAE, a base model, two halves of different models: by name, with what is missing."""
    layout = write_relative(tmp_path / "omgsr", "omgsr-s").folder
    vae_alone = tmp_path / "vae lora"
    vae_alone.mkdir()
    (layout / VAE_ADAPTER).rename(vae_alone / "adapter")
    lora = "OMGSR-S's LoRA of the VAE's encoder"
    refused(vae_alone, lora, "make a checkpoint of omgsr-s together with OMGSR-S's LoRA of the UNet")
    refused(layout, f"LoRA of omgsr-s, without {lora}")
    write_osediff(tmp_path / "osediff")
    alone = tmp_path / "vae"
    (tmp_path / "osediff" / VAE).rename(alone)
    refused(alone, "a Stable Diffusion VAE", "make a checkpoint of osediff together with", "a Stable Diffusion UNet")
    refused(alone / f"{STEM}.safetensors", "a Stable Diffusion VAE", "is only one part of a checkpoint")
    # The adapter of one model with the base of another: no module of that size is there.
    other = write_osediff(tmp_path / "wide", channels=(8, 16, 16, 24), heads=(4, 1, 2, 3)).folder
    parts = {"unet_lora": layout / UNET_ADAPTER, "vae_lora": vae_alone, "unet": other / UNET, "vae": other / VAE}
    message = refused(parts, str(layout / UNET_ADAPTER), str(other / UNET), embeddings=torch.ones(3, 12))
    assert "belong to another base model" in message
    refused({**parts, "vae_lora": layout / UNET_ADAPTER}, f"looked for {lora}", "omgsr-unet-lora")
    refused({"hypir": layout / UNET_ADAPTER, "unet": other / UNET, "vae": other / VAE}, "HYPIR's LoRA")
