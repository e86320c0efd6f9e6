"""Mask learning on a network as a stage: it finds the blocks that matter, and goes on where it was interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.compress.mask_stage import MaskBatch, MaskSettings, learn_mask, masked, read_history
from model.compress.masks import Mask
from model.compress.restoration import adapt, finish
from model.compress.training.settings import StageSettings
from model.reference.tinysr_dit import TinySRTransformer
from tests.layouts.weights import fill

DIM, USEFUL = 16, (0, 3)


def settings(steps: int, keep: int = 2) -> MaskSettings:
    stage = StageSettings(steps, 1e-3, 16, warmup_steps=1, constant_learning_rate=True, save_every=4, log_every=2)
    return MaskSettings(stage, keep=keep, group=2, logit_learning_rate=0.2)


def network(useful: tuple[int, ...] = USEFUL) -> TinySRTransformer:
    """Four blocks, of which only some change what passes through them."""
    built = TinySRTransformer(dim=DIM, layers=4, head_dim=8, channels=4, pooled_dim=None, table=4, pos_embed_max_size=4)
    fill(built, 0)
    with torch.no_grad():
        for i, block in enumerate(built.transformer_blocks):
            if i not in useful:
                block.attn.to_out[0].weight.zero_()
                block.attn.to_out[0].bias.zero_()
                block.ff.net[2].weight.zero_()
                block.ff.net[2].bias.zero_()
    return built


def learned(folder: Path, steps: int, stop: int | None = None) -> tuple[Mask, TinySRTransformer]:
    student, teacher, temb = network(), network(), torch.randn(1, DIM, generator=torch.Generator().manual_seed(1))
    adapt(student, 2)

    def batch(step: int, count: int) -> MaskBatch:
        if step == stop:
            raise InterruptedError
        z = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        with torch.no_grad():
            shown = teacher(z, temb=temb)
        return MaskBatch(z, shown, lambda found: (found - (z - shown)).abs().mean())

    return learn_mask(student, temb, batch, settings(steps), folder), student


def test_the_blocks_that_do_something_are_kept(tmp_path: Path) -> None:
    mask, _ = learned(tmp_path, 40)
    assert mask == (True, False, False, True)
    rows = read_history(tmp_path / "masks.history.jsonl")
    assert [row["step"] for row in rows] == list(range(0, 41, 2))
    assert rows[0]["marginals"] == [0.5] * 4
    assert read_history(tmp_path / "none") == []


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    _, whole = learned(tmp_path / "whole", 8)
    with pytest.raises(InterruptedError):
        learned(tmp_path / "torn", 8, stop=6)
    _, resumed = learned(tmp_path / "torn", 8)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    histories = [read_history(tmp_path / name / "masks.history.jsonl") for name in ("whole", "torn")]
    assert histories[0] == histories[1]


def test_activity_of_all_blocks_is_the_plain_network() -> None:
    built, temb = network((0, 1, 2, 3)), torch.randn(1, DIM)
    z = torch.randn(2, 4, 8, 8)
    assert torch.allclose(masked(built, z, torch.ones(2, 4), temb), built(z, temb=temb), atol=1e-6)
    halved = masked(built, z, torch.tensor([1.0, 0.0, 1.0, 0.0]), temb)
    del built.transformer_blocks[3], built.transformer_blocks[1]
    assert torch.allclose(halved, built(z, temb=temb), atol=1e-6)


def test_the_finished_network_is_the_adapted_one() -> None:
    """LoRA merged, modulation stored: the same function without the modules."""
    built, temb = network(), torch.randn(1, DIM)
    adapt(built, 2)
    with torch.no_grad():
        for name, value in built.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1)
    z = torch.randn(1, 4, 8, 8)
    wanted: Tensor = built(z, temb=temb).detach()
    done = finish(built, temb)
    assert torch.allclose(done(z), wanted, atol=1e-5)
    assert not any("norm1" in name or "lora" in name for name in done.state_dict())


def test_a_count_that_the_groups_cannot_give(tmp_path: Path) -> None:
    student = network()
    adapt(student, 2)
    with pytest.raises(ValueError, match="not 3"):
        learn_mask(
            student, torch.zeros(1, DIM), lambda step, count: MaskBatch(None, None, None), settings(1, 3), tmp_path
        )
