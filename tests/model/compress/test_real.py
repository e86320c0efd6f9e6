"""The recipe on a teacher in diffusers' layout, a few steps of every stage, and its configuration file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tinysr_kernels
from model.compress.__main__ import main
from model.compress.recipe import Recipe, as_json, build, load
from model.compress.training.image_folder import ImageFolder, Prefetcher
from tests.model.compress.teachers import SD3, lora_pairs, write_lora, write_teacher

pytest.importorskip("diffusers")

FEW = {"steps": 2, "batch_size": 2, "warmup_steps": 1, "save_every": 1, "log_every": 1, "precision": "bfloat16"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, LoRA, prompt, images and a configuration that runs in seconds."""
    folder = tmp_path_factory.mktemp("real")
    write_lora(folder / "lora", lora_pairs(write_teacher(folder / "teacher"), "transformer."))
    generator = torch.Generator().manual_seed(0)
    torch.save(torch.randn(1, SD3["pooled_projection_dim"], generator=generator), folder / "pool_embeds.pt")
    torch.save(torch.randn(1, 5, SD3["joint_attention_dim"], generator=generator), folder / "prompt_embeds.pt")
    (folder / "images" / "inside").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (150, 140)), ("inside/b.jpg", (90, 200))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / "images" / name)
    (folder / "images" / "broken.png").write_bytes(b"no image")
    values = {
        "teacher": str(folder / "teacher"),
        "lora": str(folder / "lora"),
        "prompt": str(folder / "prompt_embeds.pt"),
        "pooled": str(folder / "pool_embeds.pt"),
        "images": str(folder / "images"),
        "out": str(folder / "out"),
        "image_size": 128,
        "vae_width": 8,
        "lora_rank": 2,
        "latent_pairs": 3,
        "device": "cpu",
        "masks": {"keep": 2, "group": 2, "stage": FEW},
        "encoder": FEW,
        "decoder": FEW,
        "restore_latents": FEW,
        "restore_images": FEW,
    }
    (folder / "recipe.json").write_text(json.dumps(values))
    return folder


@pytest.mark.long
def test_all_stages_lead_to_a_student_that_compiles(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(place / "recipe.json")
    assert main(["restore", "--config", config]) == 2
    assert "run `masks` first" in capsys.readouterr().err
    for stage in ("masks", "vae", "restore"):
        assert main([stage, "--config", config]) == 0, capsys.readouterr().err
    out = place / "out"
    image = torch.rand(3, 32, 40)
    released, own = (
        tinysr_kernels.compile(out / name, device="cpu", color_fix="none")(image)
        for name in ("student", "student.safetensors")
    )
    assert released.shape == (3, 128, 160)
    assert float((released - own).norm() / released.norm()) < 1e-5
    assert sum(json.loads((out / "mask.json").read_text())["mask"]) == 2
    assert (out / "samples" / "000002.png").exists()

    # Finished stages are not trained again, another configuration is refused.
    capsys.readouterr()
    assert main(["vae", "--config", config]) == 0
    assert "  loss " not in capsys.readouterr().out
    values = json.loads((place / "recipe.json").read_text())
    other = place / "other.json"
    other.write_text(json.dumps(values | {"encoder": FEW | {"learning_rate": 0.5}}))
    assert main(["vae", "--config", str(other)]) == 2
    assert "another configuration (learning_rate: 0.0003 there, 0.5 here)" in capsys.readouterr().err

    # So are other inputs, before anything is read or written; and what is damaged is named.
    weights = (out / "student.safetensors").read_bytes()
    write_lora(place / "lora2", lora_pairs(write_teacher(place / "teacher2"), "transformer.", seed=6))
    torch.save(torch.ones(1, SD3["pooled_projection_dim"]), place / "pool2.pt")
    for changed, stages, name in (
        ({"lora": str(place / "lora2")}, ("masks", "vae", "restore"), "lora"),
        ({"pooled": str(place / "pool2.pt")}, ("masks", "restore"), "pooled"),
        ({"images": str(place / "images" / "inside")}, ("masks", "vae", "restore"), "images"),
        ({"seed": 81}, ("masks", "vae", "restore"), "seed"),
        ({"lora_rank": 3}, ("masks", "restore"), "lora_rank"),
    ):
        other.write_text(json.dumps(values | changed))
        for stage in stages:
            assert main([stage, "--config", str(other)]) == 2
            assert f"was made of another {name}; remove it" in capsys.readouterr().err, (stage, name)
    kept = json.loads((out / "mask.json").read_text())
    (out / "mask.json").write_text(json.dumps({"mask": kept["mask"][::-1]}))
    if kept["mask"] != kept["mask"][::-1]:
        assert main(["restore", "--config", config]) == 2
        assert "was made of another mask" in capsys.readouterr().err
    (out / "mask.json").write_text(json.dumps(kept))
    shard = out / "vae" / "separable" / "diffusion_pytorch_model.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-4] + b"1234")
    assert main(["restore", "--config", config]) == 2
    assert "pairs was made of another vae" in capsys.readouterr().err
    shard.write_bytes(content)
    (out / "restore" / "restore-latents.pt").unlink()
    pairs = out / "pairs" / "00000.safetensors"
    pairs.write_bytes(pairs.read_bytes()[:1000])
    assert main(["restore", "--config", config]) == 2
    assert "00000.safetensors: damaged" in capsys.readouterr().err
    assert (out / "student.safetensors").read_bytes() == weights


# ------------------------------------------------------------------------------------------------------------- images
def test_images_depend_on_seed_step_and_process(place: Path) -> None:
    folder = ImageFolder(place / "images", 64, 0)
    enlarged, original = folder.pairs(3, 2)
    assert enlarged.shape == original.shape == (2, 3, 64, 64)
    assert original.abs().max() <= 1
    assert torch.equal(folder.pairs(3, 2)[1], original)
    assert not torch.equal(folder.pairs(3, 2, process=1)[1], original)
    ahead = Prefetcher(lambda step: folder.pairs(step, 2))
    assert torch.equal(ahead(2)[1], folder.pairs(2, 2)[1])
    assert torch.equal(ahead(3)[1], original)
    with pytest.raises(ValueError, match="no images"):
        ImageFolder(place / "teacher", 64, 0)


# -------------------------------------------------------------------------------------------------------- configuration
def test_a_configuration_comes_back(tmp_path: Path) -> None:
    recipe = Recipe(teacher="t", images="p", out="o", image_size=128)
    path = tmp_path / "recipe.json"
    path.write_text(as_json(recipe))
    assert load(path) == recipe
    assert (recipe.encoder.steps, recipe.decoder.steps, recipe.masks.stage.steps) == (100_000, 200_000, 100_000)
    stages = (recipe.encoder, recipe.decoder, recipe.masks.stage, recipe.restore_latents, recipe.restore_images)
    assert [stage.learning_rate for stage in stages] == [3e-4, 5e-4, 5e-5, 1e-4, 1e-6]
    assert [stage.batch_size for stage in stages] == [64, 64, 8, 128, 96]
    assert (recipe.decoder.discriminator_learning_rate, recipe.restore_images.discriminator_learning_rate) == (
        1e-5,
        5e-6,
    )
    assert (recipe.restore_latents.steps, recipe.restore_images.steps) == (150_000, 50_000)
    assert (recipe.masks.stage.warmup_steps, recipe.masks.stage.constant_learning_rate, recipe.masks.reach) == (
        3000,
        False,
        1,
    )
    for stage in stages:
        assert (stage.beta2, stage.weight_decay, stage.precision, stage.seed) == (0.999, 1e-4, "float16", 80)
        assert stage.batch_size % (8 * stage.micro_batch) == 0  # eight GPUs


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stpes": 1}, "unknown field 'stpes'"),
        ({"encoder": {"steps": "many"}}, "encoder: steps: expected int, found 'many'"),
        ({"encoder": 3}, "encoder: expected a table"),
        ({"masks": {"stage": {"precision": "fp8"}}}, "precision must be one of"),
        ({"image_size": 100}, "multiple of 64"),
        ({"image_size": -64}, "multiple of 64"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"encoder": {"learning_rate": -1.0}}, "learning_rate must be from 0 to 1"),
        ({"decoder": {"ema_decay": 2.0}}, "ema_decay must be from 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"teacher": None}, "teacher"),
    ],
)
def test_configurations_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    values = {"teacher": "t", "images": "p", "out": "o"} | changed
    values = {name: value for name, value in values.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        build(Recipe, values, "recipe.json")


def test_toml_and_broken_json(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('teacher = "t"\nimages = "p"\nout = "o"\n[encoder]\nsteps = 5\n')
    assert load(path).encoder.steps == 5
    assert load(path).encoder.learning_rate == 3e-4
    broken = tmp_path / "recipe.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        load(broken)
    path.write_text("teacher =")
    with pytest.raises(ValueError, match="no TOML"):
        load(path)
