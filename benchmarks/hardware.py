"""Floors, ceilings and occupancy, computed from the table of hardware facts (tinysr_kernels.launch.hardware).

Two kinds of bound. `ceilings` are peaks: SMs x clock x FLOP per clock and the published DRAM bandwidth. No measurement
may exceed them; one that does is wrong. `floors` answer what a plan could take on a card: they use the sustained rates
that others measured where these are known (`Card.sustained_fp16`), so a short launch at a high clock may stay below.
This project has measured neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tinysr_kernels.launch import hardware
from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.hardware import Card
from tinysr_kernels.ops.call import Cost
from tinysr_kernels.ops.trace import Moved, Step

CARDS = tuple(hardware.card(short) for short in hardware.PLANNED_FOR)


def keeps(card: Card, nbytes: int) -> bool:
    """Whether a tensor of this size is still in the L2 when it is used again: below half of the L2."""
    return 2 * nbytes < card.l2_bytes


def floor(card: Card, step: Step, single: bool, cached_weights: bool) -> float:
    """Seconds that a launch takes at least: the longer of its arithmetic and its traffic.

    single: float32 GEMMs, which run without tensor cores here. cached_weights: whether all weights of the network
    together stay in the L2 from one image to the next (`keeps`); if not, each comes from DRAM once.
    """
    rate = card.fp8 if step.fp8 else card.fp32 if single else card.sustained_fp16 or card.fp16
    return max(step.flops / rate, sum(_transfer(card, moved, cached_weights) for moved in step.moved))


def _transfer(card: Card, moved: Moved, cached_weights: bool) -> float:
    cached = cached_weights if moved.weight else keeps(card, moved.bytes)
    return moved.bytes / (card.l2 if cached else card.sustained_memory or card.memory)


def floors(steps: Iterable[Step], single: bool, weights: int) -> list[dict[str, float]]:
    """For each launch its floor in microseconds per card; `weights`: bytes of all weights together."""
    kept = {card.short: keeps(card, weights) for card in CARDS}
    return [{card.short: 1e6 * floor(card, step, single, kept[card.short]) for card in CARDS} for step in steps]


@dataclass(frozen=True)
class Ceilings:
    """A GPU's peaks: FLOP/s with operands of 8, 16 and 32 bits; byte/s of DRAM, of the L2 and of all SM ports to it."""

    fp8: float
    fp16: float
    fp32: float
    memory: float
    l2: float
    ports: float
    multiprocessors: int

    def rate(self, bits: int) -> float:
        """FLOP/s with operands of this many bits."""
        return self.fp8 if bits <= 8 else self.fp16 if bits <= 16 else self.fp32

    def floor(self, cost: Cost, bits: int) -> float:
        """Seconds that a call takes at least when its tensors come from DRAM; bits: of the operands of its GEMMs."""
        return max(cost.flops / self.rate(bits), cost.bytes / self.memory)

    def l2_rate(self, active: float) -> float:
        """Byte/s from the L2 while this share of the SMs is active: the L2's own limit or that of their ports."""
        return min(self.l2, active * self.ports)


def ceilings(gpu: Gpu, clock: float | None = None, memory: float | None = None) -> Ceilings:
    """A GPU's ceilings. clock: its highest SM clock in Hz; memory: its DRAM bandwidth in byte/s; both if known.

    GeForce cards halve the 16-bit rate with float32 accumulation. Their 8-bit rate is not halved here, since libraries
    may accumulate with fewer bits. A GPU that the table does not name has the clock, the DRAM bandwidth and the L2
    bandwidth per SM and clock of the card that stands for its architecture.
    """
    named = {one.name: one for one in hardware.CARDS}
    card = named.get(gpu.name) or hardware.representative(gpu.arch)
    facts = hardware.architecture(gpu.arch)
    clock = clock or card.clock
    each = gpu.multiprocessors * clock
    ports = each * hardware.L2_PORT_BYTES_PER_CLOCK
    return Ceilings(
        fp8=each * facts.fp8,
        fp16=each * facts.fp16 * (facts.geforce if "GeForce" in gpu.name else 1.0),
        fp32=each * facts.fp32,
        memory=memory or card.memory,
        l2=min(ports, card.l2 * each / (card.multiprocessors * card.clock)),
        ports=ports,
        multiprocessors=gpu.multiprocessors,
    )


def resident_warps(arch: int, warps: int, registers: int, shared: int) -> int:
    """Resident warps per SM of a kernel with this many warps per block, registers per thread, bytes per block."""
    facts = hardware.architecture(arch)
    unit = hardware.REGISTER_UNIT
    per_warp = -(-registers * 32 // unit) * unit
    by_registers = 4 * (hardware.REGISTERS_PER_SM // 4 // per_warp) // warps
    per_block = -(-shared // hardware.SHARED_UNIT) * hardware.SHARED_UNIT + hardware.SHARED_RESERVED
    by_shared = facts.shared_kib * hardware.KIB // per_block
    return warps * min(facts.warps // warps, facts.blocks, by_registers, by_shared)
