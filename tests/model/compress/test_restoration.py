"""Restoration: each loss against a float64 formula, and that it lowers what it is to lower."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.compress import real
from model.compress.recipe import Recipe
from model.compress.restoration import ImageLossWeights, adapt, distill_latents, train_on_images
from model.compress.training.losses import perceptual
from model.compress.training.settings import StageSettings
from model.reference.tinysr_dit import TinySRTransformer
from tests.layouts.weights import fill

SETTINGS = StageSettings(1, 1e-2, 2, warmup_steps=0, constant_learning_rate=True, save_every=100, log_every=1)
SCALING = 1.5
TEMB = torch.randn(1, 16, generator=torch.Generator().manual_seed(1))


def network(seed: int = 0) -> TinySRTransformer:
    built = TinySRTransformer(dim=16, layers=2, head_dim=8, channels=4, pooled_dim=None, table=8, pos_embed_max_size=8)
    fill(built, seed)
    return built


def vae() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(2)
    return nn.Conv2d(3, 4, 8, 8), nn.ConvTranspose2d(4, 3, 8, 8)


def pairs(step: int, count: int) -> tuple[Tensor, Tensor]:
    """Originals are images that the decoder can give."""
    generator = torch.Generator().manual_seed(step)
    enlarged = torch.rand(count, 3, 128, 128, generator=generator) * 2 - 1
    with torch.no_grad():
        original = vae()[1](2 * torch.randn(count, 4, 16, 16, generator=generator))
    return enlarged, original


def wanted(enlarged: Tensor) -> Tensor:
    return torch.sin(7 * nn.functional.avg_pool2d(enlarged, 8).repeat(1, 2, 1, 1)[:, :4])


def trained(folder: Path, settings: StageSettings, **weights: Any) -> list[dict[str, float]]:
    """The log of the second stage."""
    student = network()
    adapt(student, 2)
    encoder, decoder = vae()
    train_on_images(
        student, TEMB, encoder, decoder, SCALING, pairs, settings, folder,
        teacher=wanted, weights=ImageLossWeights(**weights), discriminator_width=4,
    )  # fmt: skip
    return [json.loads(line) for line in (folder / "restore-images.jsonl").read_text().splitlines()]


@torch.no_grad()
def formulas() -> dict[str, float]:
    """Of the first batch, before the first step, in float64."""
    encoder, decoder = (part.double() for part in vae())
    student = network().double()
    enlarged, original = (t.double() for t in pairs(0, 2))
    z = SCALING * encoder(enlarged)
    x0 = z - student(z, temb=TEMB.double())
    found = decoder(x0 / SCALING)
    return {
        "latent_l1": float((x0 - wanted(enlarged)).abs().mean()),
        "l1": float((found - original).abs().mean()),
        "perceptual": float(perceptual()[1](found.float(), original.float())),
    }


def test_the_second_stage_weighs_latents_features_and_the_adversary(tmp_path: Path) -> None:
    """The weight 5 is that of the distance from the teacher's latents; images themselves have none."""
    assert ImageLossWeights() == ImageLossWeights(latent_l1=5, image_l1=0, perceptual=1, adversarial=0.3)
    (first,) = trained(tmp_path, SETTINGS)
    expected = formulas()
    for name, value in expected.items():
        assert first[name] == pytest.approx(value, rel=1e-4), name
    total = 5 * expected["latent_l1"] + expected["perceptual"] + 0.3 * first["adversarial"]
    assert first["loss"] == pytest.approx(total, rel=1e-4)
    (other,) = trained(tmp_path / "other", SETTINGS, latent_l1=0, image_l1=2, perceptual=0.5, adversarial=0)
    assert other["loss"] == pytest.approx(2 * expected["l1"] + 0.5 * expected["perceptual"], rel=1e-4)
    assert "latent_l1" not in other


@pytest.mark.parametrize(("weight", "metric"), [("latent_l1", "latent_l1"), ("image_l1", "l1"), ("perceptual",) * 2])
def test_each_loss_lowers_what_it_measures(tmp_path: Path, weight: str, metric: str) -> None:
    """One batch, again and again."""
    settings = replace(SETTINGS, steps=25, batch_size=1)
    weights = dict.fromkeys(("latent_l1", "image_l1", "perceptual", "adversarial"), 0.0) | {weight: 1.0}
    student = network()
    adapt(student, 8)
    encoder, decoder = vae()
    train_on_images(
        student, TEMB, encoder, decoder, SCALING, lambda step, count: pairs(0, count), settings, tmp_path,
        teacher=wanted, weights=ImageLossWeights(**weights), discriminator_width=4,
    )  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "restore-images.jsonl").read_text().splitlines()]
    assert log[-1][metric] < 0.97 * log[0][metric]


def test_latents_without_a_teacher_are_refused(tmp_path: Path) -> None:
    student = network()
    adapt(student, 2)
    with pytest.raises(ValueError, match="needs the teacher's x0"):
        train_on_images(student, TEMB, *vae(), SCALING, pairs, SETTINGS, tmp_path)


def test_the_first_stage_is_the_distance_from_the_teacher_s_x0(tmp_path: Path) -> None:
    student = network()
    adapt(student, 8)

    def latents(step: int, count: int) -> tuple[Tensor, Tensor]:
        z, x0 = (torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(k)) for k in range(2))
        return z, x0

    z, x0 = latents(0, 2)
    with torch.no_grad():
        expected = float((z.double() - network().double()(z.double(), temb=TEMB.double()) - x0).abs().mean())
    distill_latents(student, TEMB, latents, replace(SETTINGS, steps=30), tmp_path)
    log = [json.loads(line) for line in (tmp_path / "restore-latents.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert log[-1]["loss"] < 0.97 * log[0]["loss"]


def test_the_decoder_is_shown_latents_of_sd3_s_own_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder those with TSD-SR's LoRA."""
    shown: dict[str, Any] = {}

    class FakeVAE(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def encode(self, x: Tensor) -> Tensor:
            shown.setdefault("read", []).append(self.name)
            return x

    tiny = type("Tiny", (), {"encoder": nn.Identity(), "decoder": nn.Identity(), "state_dict": dict})()
    tiny.requires_grad_ = tiny.to = lambda *_: tiny
    monkeypatch.setattr(real, "part", lambda *_: (Path(), {}))
    monkeypatch.setattr(real, "transformer_config", lambda *_: None)
    monkeypatch.setattr(real, "start_vae", lambda *_, **__: ({}, None))
    monkeypatch.setattr(real.TinyVAE, "from_state", lambda *_: tiny)
    monkeypatch.setattr(real, "read_vae", lambda _, lora: (FakeVAE("plain" if lora is None else "adapted"), 1.0))
    monkeypatch.setattr(real, "batches", lambda *_: None)
    monkeypatch.setattr(real, "made_of", lambda *_: {})
    monkeypatch.setattr(real, "write_vae", lambda *_: None)
    for name in ("train_encoder", "train_decoder"):
        monkeypatch.setattr(real, name, lambda half, teacher, *_, **__: teacher(torch.zeros(1)))
    real.run_vae(Recipe(teacher="t", images="p", out=str(tmp_path), lora="l", device="cpu"), lambda line: None)
    assert shown["read"] == ["adapted", "plain"]
