"""Stages of training: interrupted and resumed they end where an uninterrupted one ends."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from model.compress.training.device import Device
from model.compress.training.losses import Discriminator, discriminator_hinge_loss, perceptual, structure_distance
from model.compress.training.settings import StageSettings, rate
from model.compress.training.stage import PATIENCE, Losses, Stage, Turn, checkpointed
from model.compress.vae.train import add_adversarial
from tests import ROOT
from tests.model.compress import two_processes

SETTINGS = StageSettings(7, 1e-2, 4, warmup_steps=2, save_every=3, log_every=2, ema_decay=0.9)


class Interrupted(Exception):
    pass


def stage(folder: Path, settings: StageSettings = SETTINGS, **about: object) -> tuple[Stage, nn.Module, Discriminator]:
    torch.manual_seed(0)
    network, discriminator = nn.Conv2d(3, 3, 3, padding=1), Discriminator(4)
    return (
        Stage("test", folder, settings, {"network": network}, discriminator=discriminator, about=about),
        network,
        discriminator,
    )


def objective(network: nn.Module, discriminator: Discriminator, stop: int | None = None) -> object:
    def losses(turn: Turn) -> Losses:
        if turn.step == stop:
            raise Interrupted
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(turn.batch))
        fake = network(x)
        return add_adversarial((fake - x).abs().mean(), {}, discriminator, fake, x, 0.3)

    return losses


def train(folder: Path, stop: int | None = None) -> nn.Module:
    own, network, discriminator = stage(folder)
    own.run(objective(network, discriminator, stop))  # type: ignore[arg-type]
    return network


@pytest.mark.parametrize("stop", [3, 4])
def test_an_interrupted_stage_goes_on_as_if_nothing_had_happened(tmp_path: Path, stop: int) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "torn", stop)
    resumed = train(tmp_path / "torn")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    again = train(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    entries = [json.loads(line) for line in (tmp_path / "whole/test.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [2, 4, 6, 7]
    assert entries[-1].keys() >= {"loss", "adversarial", "discriminator", "seconds"}


@pytest.mark.parametrize("changed", [{"learning_rate": 1.0}, {"steps": 9}, {"precision": "bfloat16"}])
def test_another_configuration_is_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    train(tmp_path)
    own = stage(tmp_path, replace(SETTINGS, **changed))[0]
    with pytest.raises(ValueError, match=f"another configuration .*{next(iter(changed))}"):
        own.resume()
    with pytest.raises(ValueError, match="weights: None there, 3 here"):
        stage(tmp_path, weights=3)[0].resume()
    other = Stage("test", tmp_path, SETTINGS, {"network": nn.Conv2d(3, 4, 3)})
    with pytest.raises(ValueError, match="shapes differ"):
        other.resume()


def test_steps_that_are_trained_again_are_logged_once(tmp_path: Path) -> None:
    """After a kill between two states; also before the first one, and in the middle of writing a row."""
    log = tmp_path / "test.jsonl"
    with pytest.raises(Interrupted):
        train(tmp_path, 5)  # the last state is that of step 3
    assert [json.loads(row)["step"] for row in log.read_text().splitlines()] == [2, 4]
    log.write_text(log.read_text() + '{"stage": "te')
    train(tmp_path)
    assert [json.loads(row)["step"] for row in log.read_text().splitlines()] == [2, 4, 6, 7]
    (tmp_path / "test.pt").unlink()
    train(tmp_path)
    assert [json.loads(row)["step"] for row in log.read_text().splitlines()] == [2, 4, 6, 7]


@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_a_damaged_state_is_named(tmp_path: Path, keep: int) -> None:
    train(tmp_path)
    path = tmp_path / "test.pt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"test\.pt: damaged .*remove it to begin the stage anew"):
        train(tmp_path)


def test_observation_sees_the_averaged_weights_and_changes_nothing(tmp_path: Path) -> None:
    own, network, discriminator = stage(tmp_path)
    seen: list[torch.Tensor] = []

    def observe(step: int) -> dict[str, float]:
        seen.append(next(network.parameters()).detach().clone())
        return {"psnr": float(step)}

    own.run(objective(network, discriminator), observe=observe)  # type: ignore[arg-type]
    assert len(seen) == 3
    assert torch.equal(seen[-1], next(network.parameters()))
    plain = train(tmp_path / "plain")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), network.parameters(), strict=True))


def test_frozen_weights_are_not_stored(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[0].requires_grad_(False)
    own = Stage("test", tmp_path, SETTINGS, {"network": network})
    own.save()
    assert torch.load(own.path)["trained"]["network"].keys() == {"1.weight", "1.bias"}
    network.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        Stage("test", tmp_path, SETTINGS, {"network": network})


def test_settings() -> None:
    with pytest.raises(ValueError, match="precision must be one of"):
        StageSettings(1, 1.0, 1, precision="float8")
    for values, name in (
        ((1, 1.0, 0), "batch_size"),
        ((-1, 1.0, 1), "steps"),
        ((1, -1.0, 1), "learning_rate"),
        ((1, float("nan"), 1), "learning_rate"),
        ((1, 1.0, 1, -1), "micro_batch"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be from"):
            StageSettings(*values)  # type: ignore[arg-type]
    for name, value in {"ema_decay": 2.0, "beta2": 1.0, "warmup_steps": -1, "save_every": 0, "log_every": 0}.items():
        with pytest.raises(ValueError, match=f"{name} must be from"):
            replace(SETTINGS, **{name: value})
    rates = [rate(step, SETTINGS) for step in range(7)]
    assert rates[0] == pytest.approx(5e-3)
    assert max(rates) == rates[1] == rates[2]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rate(6, replace(SETTINGS, constant_learning_rate=True)) == 1e-2


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3))
    x = torch.randn(2, 4)

    def gradients(enabled: bool) -> list[torch.Tensor]:
        with checkpointed(blocks, enabled):
            y = x
            for block in blocks:
                y = block(y)
            return list(torch.autograd.grad(y.square().sum(), list(blocks.parameters())))

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))
    assert "forward" not in vars(blocks[0])


def test_a_non_finite_gradient_leaves_the_weights_alone(tmp_path: Path) -> None:
    network = nn.Linear(2, 1)
    before = network.weight.detach().clone()
    own = Stage("test", tmp_path, replace(SETTINGS, ema_decay=0.0), {"network": network})
    own.train_step(lambda turn: Losses(network(torch.full((1, 2), float("inf"))).sum(), {}))
    assert torch.equal(network.weight, before)


def test_losses_that_stay_without_a_value_end_the_stage(tmp_path: Path) -> None:
    """A few in a row do not: with float16 the scale of the losses adapts to them."""
    network = nn.Linear(1, 1)
    settings = replace(SETTINGS, steps=3 * PATIENCE, ema_decay=0.0)

    def lost(*steps: int) -> Callable[[Turn], Losses]:
        return lambda turn: Losses(network(torch.ones(1, 1)).sum() * (float("nan") if turn.step in steps else 1), {})

    Stage("few", tmp_path, settings, {"network": network}).run(lost(*range(1, PATIENCE), *range(PATIENCE + 1, 39)))
    with pytest.raises(ValueError, match=rf"stage many: the loss was not finite in {PATIENCE} steps .*many.pt"):
        Stage("many", tmp_path, settings, {"network": network}).run(lost(*range(5, 5 + PATIENCE)))


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path, micro: int) -> None:
    """Each turn draws samples of its own; the log has the batch's means; the discriminator learns from all of it."""
    x = torch.randn(7 * 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def weights(settings: StageSettings, name: str) -> tuple[list[torch.Tensor], str]:
        own, network, discriminator = stage(tmp_path / name, settings)
        seen: list[int] = []

        def losses(turn: Turn) -> Losses:
            real = x[turn.batch * turn.count : (turn.batch + 1) * turn.count]
            seen.extend(range(turn.batch * turn.count, (turn.batch + 1) * turn.count))
            fake = network(real)
            return add_adversarial((fake - real).abs().mean(), {}, discriminator.eval(), fake, real, 0.3)

        own.run(losses)
        assert seen == list(range(28))
        logged = [json.loads(line) for line in (tmp_path / name / "test.jsonl").read_text().splitlines()]
        values = [[round(entry[key], 4) for key in ("loss", "adversarial", "discriminator")] for entry in logged]
        return [p.detach() for p in (*network.parameters(), *discriminator.parameters())], str(values)

    whole, log = weights(SETTINGS, "whole")
    parts, other = weights(replace(SETTINGS, micro_batch=micro), "parts")
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, atol=2e-4)
    assert log == other


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size 4 is no multiple of 1 processes x micro_batch 3"):
        stage(tmp_path, replace(SETTINGS, micro_batch=3))
    assert stage(tmp_path, replace(SETTINGS, micro_batch=8))[0].count == 4


# --------------------------------------------------------------------------------------------------------------- losses
def test_the_substitute_orders_images_as_eyes_do() -> None:
    name, distance = perceptual()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    x = nn.functional.avg_pool2d(x, 3, 1, 1)
    assert "substitute" in name or "VGG" in name
    assert float(structure_distance(x, x)) == pytest.approx(0, abs=1e-6)
    blurred = nn.functional.avg_pool2d(x, 5, 1, 2)
    assert float(distance(blurred, x)) > float(distance(0.9 * x + 0.1 * blurred, x)) > 0


def test_the_discriminator_learns_to_tell_images_from_noise() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(4)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        real, fake = torch.ones(4, 3, 16, 16) * torch.rand(4, 3, 1, 1), torch.randn(4, 3, 16, 16)
        loss = discriminator_hinge_loss(discriminator, real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


# ---------------------------------------------------------------------------------------------------- several processes
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """Gradients are averaged: two halves of a batch give the whole batch's steps; one process writes the files."""
    pytest.importorskip("accelerate")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    two_processes.main(tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(two_processes.__file__)
    root = str(ROOT)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "two")],
        cwd=root,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wanted, alone), (first, both), (second, _) = (
        torch.load(tmp_path / name) for name in ("one/0.pt", "two/0.pt", "two/1.pt")
    )
    assert (alone, both) == (1, 2)
    for name, tensor in wanted.items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], tensor, atol=1e-6)
    assert len((tmp_path / "two/two.jsonl").read_text().splitlines()) == 1


def test_several_processes_without_accelerate_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="need the package accelerate"):
        Device()
