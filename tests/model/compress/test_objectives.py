"""The losses of VAE compression and mask learning against float64 formulas; what they train and what stays as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model.compress.mask_stage import MaskBatch, MaskSettings, learn_mask, masked
from model.compress.restoration import adapt
from model.compress.training.lora_layers import lora_state
from model.compress.training.losses import (
    Discriminator,
    discriminator_hinge_loss,
    generator_hinge_loss,
    latent_distance,
    perceptual,
)
from model.compress.training.settings import StageSettings
from model.compress.vae.train import DecoderWeights, add_adversarial, train_decoder, train_encoder
from model.reference.tinysr_dit import TinySRTransformer
from tests.layouts.weights import fill

ONE = StageSettings(1, 1e-2, 2, warmup_steps=0, constant_learning_rate=True, save_every=1000, log_every=1)
DIM = 16


def images(step: int, count: int) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(step)) * 2 - 1


def latents(x: Tensor) -> Tensor:
    """The teacher's encoder."""
    return torch.sin(5 * nn.functional.avg_pool2d(x, 8).repeat(1, 2, 1, 1)[:, :4])


def log(folder: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------- adversary
def test_hinge_losses() -> None:
    """max(0, 1 - D(real)) + max(0, 1 + D(fake)) for the discriminator, -D(fake) for the generator."""
    generator = torch.Generator().manual_seed(0)
    real, fake = (3 * torch.randn(4, 1, 3, 3, generator=generator) for _ in range(2))
    identity = nn.Identity()
    expected = (1 - real.double()).clamp(min=0).mean() + (1 + fake.double()).clamp(min=0).mean()
    assert float(discriminator_hinge_loss(identity, real, fake)) == pytest.approx(float(expected))
    assert float(generator_hinge_loss(identity, fake)) == pytest.approx(-float(fake.double().mean()))


def test_generator_and_discriminator_do_not_train_each_other() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(4)
    fake = torch.randn(1, 3, 16, 16, requires_grad=True)
    losses = add_adversarial(torch.zeros(()), {}, discriminator, fake, torch.randn(1, 3, 16, 16), 0.5)
    losses.loss.backward()
    assert fake.grad is not None
    assert all(p.grad is None for p in discriminator.parameters())
    before = fake.grad.clone()
    assert losses.discriminator is not None
    losses.discriminator().backward()
    assert torch.equal(fake.grad, before)
    assert all(p.grad is not None for p in discriminator.parameters())
    plain = add_adversarial(torch.ones(()), {}, discriminator, fake, fake, 0.0)
    assert (float(plain.loss), plain.discriminator) == (1.0, None)


# ---------------------------------------------------------------------------------------------------------------- VAE
def test_the_encoder_learns_latents_by_mean_squared_error(tmp_path: Path) -> None:
    a, b = (torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(k)) for k in range(2))
    assert float(latent_distance(a, b)) == pytest.approx(float((a.double() - b.double()).square().mean()))
    torch.manual_seed(0)
    encoder = nn.Conv2d(3, 4, 8, 8)
    x = images(0, 2)
    expected = (encoder(x).detach().double() - latents(x).double()).square().mean()
    train_encoder(encoder, latents, lambda step, count: images(0, count), replace(ONE, steps=40), tmp_path)
    rows = log(tmp_path, "encoder")
    assert rows[0]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def test_the_decoder_learns_images_by_features_and_an_adversary(tmp_path: Path) -> None:
    """3 perceptual + 1 adversarial, from the first step; the images are those whose latents it is shown."""
    assert DecoderWeights() == DecoderWeights(perceptual=3, adversarial=1, discriminator_start_step=0)
    torch.manual_seed(0)
    decoder = nn.ConvTranspose2d(4, 3, 8, 8)
    x = images(0, 2)
    with torch.no_grad():
        seen = float(perceptual()[1](decoder(latents(x)), x))
    train_decoder(decoder, latents, images, ONE, tmp_path, discriminator_width=4)
    (row,) = log(tmp_path, "decoder")
    assert row["perceptual"] == pytest.approx(seen, rel=1e-5)
    assert row["loss"] == pytest.approx(3 * seen + row["adversarial"], rel=1e-5)
    assert {"adversarial", "discriminator"} <= row.keys()


def test_the_decoder_overfits_one_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder = nn.ConvTranspose2d(4, 3, 8, 8)
    weights = DecoderWeights(adversarial=0.0)
    settings = replace(ONE, steps=40)
    train_decoder(decoder, latents, lambda step, count: images(0, count), settings, tmp_path, weights=weights)
    rows = log(tmp_path, "decoder")
    assert rows[-1]["perceptual"] < 0.9 * rows[0]["perceptual"]
    assert "discriminator" not in rows[0]


# -------------------------------------------------------------------------------------------------------------- masks
def network() -> TinySRTransformer:
    built = TinySRTransformer(dim=DIM, layers=4, head_dim=8, channels=4, pooled_dim=None, table=4, pos_embed_max_size=4)
    fill(built, 0)
    return built


def test_masks_are_learned_by_task_and_distillation_with_lora(tmp_path: Path) -> None:
    """The loss of the first step is the task's plus the L1 distance of the predictions, under the masks drawn.

    LoRA and the distributions are trained, the teacher's weights are not.
    """
    student, temb = network(), torch.randn(1, DIM, generator=torch.Generator().manual_seed(1))
    adapt(student, 2)
    frozen = {name: t.clone() for name, t in student.state_dict().items() if "lora_" not in name}
    before = {name: t.clone() for name, t in lora_state(student).items()}
    drawn: dict[str, Tensor] = {}

    def batch(step: int, count: int) -> MaskBatch:
        z, shown = (torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(k)) for k in (step, 99))

        def task(x0: Tensor) -> Tensor:
            drawn.setdefault("task", (x0 - 0.5).abs().mean().detach())
            drawn.setdefault("found", (z - x0).detach())
            drawn.setdefault("teacher", shown)
            return (x0 - 0.5).abs().mean()

        return MaskBatch(z, shown, task)

    settings = MaskSettings(replace(ONE, steps=3, batch_size=4), keep=2, group=2, logit_learning_rate=0.2)
    learn_mask(student, temb, batch, settings, tmp_path)
    first = log(tmp_path, "masks")[0]
    distance = (drawn["found"].double() - drawn["teacher"].double()).abs().mean()
    assert first["loss"] == pytest.approx(float(drawn["task"].double() + distance), rel=1e-5)
    changed = {name for name, t in lora_state(student).items() if not torch.equal(t, before[name])}
    used = {name for name in before if name.startswith("transformer_blocks.") and "lora_B" in name and ".ff." in name}
    assert used
    assert used <= changed
    assert all(torch.equal(t, frozen[name]) for name, t in student.state_dict().items() if name in frozen)
    rows = [json.loads(line) for line in (tmp_path / "masks.history.jsonl").read_text().splitlines()]
    assert rows[0]["marginals"] != rows[-1]["marginals"]


def test_mask_learning_lowers_its_loss_on_one_batch(tmp_path: Path) -> None:
    student, teacher = network(), network()
    temb = torch.randn(1, DIM, generator=torch.Generator().manual_seed(1))
    adapt(student, 8)
    z = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shown = masked(teacher, z, torch.ones(8, 4), temb)
    settings = MaskSettings(
        replace(ONE, steps=40, batch_size=8, learning_rate=3e-3), keep=2, group=2, logit_learning_rate=0.05
    )

    def batch(step: int, count: int) -> MaskBatch:
        return MaskBatch(z, shown, lambda x0: (x0 - (z - shown)).abs().mean())

    learn_mask(student, temb, batch, settings, tmp_path)
    losses = [row["loss"] for row in log(tmp_path, "masks")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
