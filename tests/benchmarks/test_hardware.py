"""The table of hardware facts: every figure has a source and agrees with the others; the ceilings computed from it."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.hardware import ceilings
from tinysr_kernels.launch import hardware
from tinysr_kernels.launch.device import GPUS, Gpu
from tinysr_kernels.launch.hardware import ARCHITECTURES, CARDS, Card, Kind

PEAKS = ("clock", "memory", "fp16", "fp8", "fp32", "l2", "l2_bytes")
LABELS = {"name", "short", "capability", "source", "notes"}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.short)
def test_every_figure_has_a_source(card: Card) -> None:
    """What others measured is never called published, and notes name fields that exist."""
    figures = {one.name for one in dataclasses.fields(Card)} - LABELS
    assert set(card.notes) <= figures
    assert all(getattr(card, name) > 0 for name in PEAKS)
    assert all(card.note(name).source for name in figures)
    for name in ("sustained_fp16", "sustained_memory"):
        assert (card.note(name).kind is Kind.OTHERS) == (getattr(card, name) > 0)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.short)
def test_peaks_follow_from_clock_and_architecture(card: Card) -> None:
    """SMs x clock x FLOP per clock is at least the published rate, and within a tenth unless the clock differs."""
    facts = ARCHITECTURES[card.arch]
    each = card.multiprocessors * card.clock
    share = facts.geforce if "GeForce" in card.name else 1.0
    for flops, rate in ((facts.fp16 * share, card.fp16), (facts.fp8 * share, card.fp8), (facts.fp32, card.fp32)):
        assert 0.99 < each * flops / rate < 1.1, (card.short, rate)
    assert card.sustained_fp16 < card.fp16
    assert card.sustained_memory < card.memory
    assert card.memory < card.l2 <= each * hardware.L2_PORT_BYTES_PER_CLOCK


def test_architectures() -> None:
    for arch, facts in ARCHITECTURES.items():
        assert facts.rates.source
        assert facts.shared_kib == facts.block_shared_kib + hardware.SHARED_RESERVED // hardware.KIB
        assert facts.fp8 == (2 * facts.fp16 if arch >= 89 else facts.fp16)
        assert hardware.block_shared_bytes(arch) == facts.block_shared_kib * 1024
    assert hardware.block_shared_bytes(75) == hardware.block_shared_bytes(200) == 99 * 1024
    assert hardware.architecture(110) == ARCHITECTURES[100]  # the nearest, of two equally near the earlier
    assert hardware.representative(103).short == "B200"
    with pytest.raises(KeyError):
        hardware.card("GTX 1080")


def test_one_card_per_architecture_is_compiled_for() -> None:
    assert sorted(GPUS) == [80, 86, 89, 90, 100, 120]
    for arch, gpu in GPUS.items():
        card = hardware.representative(arch)
        assert (card.name, card.capability, card.multiprocessors) == (gpu.name, gpu.capability, gpu.multiprocessors)
        assert gpu.shared_limit == ARCHITECTURES[arch].block_shared_kib * 1024


def test_ceilings_are_the_datasheets() -> None:
    h200 = ceilings(GPUS[90])
    assert 0.95 < h200.fp16 / 989e12 < 1.1
    assert h200.memory == 4.8e12
    a100 = ceilings(GPUS[80])
    assert 0.98 < a100.fp16 / 312e12 < 1.02
    assert 0.98 < a100.fp32 / 19.5e12 < 1.02
    assert h200.rate(8) == 2 * h200.rate(16) == 2 * h200.fp16
    assert a100.rate(8) == a100.rate(16)  # Ampere has no fp8 tensor cores
    assert a100.rate(32) == a100.fp32
    assert 0.98 < ceilings(GPUS[89]).fp16 / 165.2e12 < 1.02  # GeForce: half of what an L40S does
    assert 0.98 < ceilings(Gpu("NVIDIA L40S", (8, 9), 142), clock=2.52e9).fp16 / 362e12 < 1.02
    # A card that the table does not name has its architecture's card for what is not passed.
    other = ceilings(Gpu("NVIDIA GB300", (10, 3), 148), clock=2e9, memory=8e12)
    assert other.fp16 == 148 * 2e9 * 8192
    assert other.memory == 8e12
    assert ceilings(Gpu("NVIDIA L4", (8, 9), 58)).memory == 0.3e12


def test_the_l2_has_a_limit_of_its_own() -> None:
    """The H200's is 10.1 TB/s, not the 16.7 that the ports of its SMs add up to; a few SMs are bound by their ports."""
    h200 = ceilings(GPUS[90])
    assert h200.l2_rate(1.0) == pytest.approx(10.1e12, rel=0.01)
    assert h200.ports == pytest.approx(16.7e12, rel=0.01)
    assert h200.l2_rate(0.25) == pytest.approx(h200.ports / 4)
    assert ceilings(GPUS[80]).l2 == pytest.approx(5.4e12, rel=0.01)
    assert ceilings(GPUS[89]).l2 == pytest.approx(5.2e12, rel=0.01)
    half_an_h200 = ceilings(Gpu("NVIDIA H200 MIG", (9, 0), 66))
    assert half_an_h200.l2 == pytest.approx(h200.l2 / 2)
