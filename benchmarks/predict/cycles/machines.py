"""The constants of the cycle model, one set per GPU.

Published figures (multiprocessors, sizes) come from tinysr_kernels.launch.hardware. The others were fitted by hand so
that kernels of the calibration table (calibration.py) take the times that others published, starting from
microbenchmarks: latencies and L2 rates near those of github.com/smallscientist1/cuda_microbenchmark (A100, RTX 4090)
and of Luo et al., "Dissecting the NVIDIA Hopper architecture through microbenchmarking" (arXiv:2501.12084); issue rates
per scheduler from the CUDA programming guide's table of arithmetic instructions. This project has measured none of
them: with a GPU at hand they are to be fitted again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tinysr_kernels.launch import hardware
from tinysr_kernels.launch.hardware import Card


@dataclass(frozen=True)
class Machine:
    """One GPU as the model sees it.

    clock: Hz that the SMs sustain. alu .. mma: cycles that a scheduler's pipe is busy with one instruction of a warp:
    integer and logic, float32, integer multiply and half, special functions and conversions, float64, one m16n8k16.
    fma_pipes: 2 where float32 also runs on the pipe of `fma_heavy`. wgmma_start, wgmma_latency: cycles from issue to
    start, and from the end to the wait. l2_rate: bytes per clock of the whole L2; port_rate: of one SM's port to it.
    memory: bytes per second of DRAM. Latencies: cycles from issue to result; the L2's and DRAM's without queueing.
    l1_bytes: L1 and shared memory together. fetch: cycles per eight instructions fetched for the first time. starts:
    programs per nanosecond that all SMs together start. gap: seconds between dependent nodes of a CUDA graph.
    """

    card: Card
    clock: float
    alu: float
    fma: float
    fma_heavy: float
    fma_pipes: int
    xu: float
    fp64: float
    mma: float
    wgmma_start: float
    wgmma_latency: float
    l2_rate: float
    port_rate: float
    memory: float
    l1_latency: float
    l2_latency: float
    dram_latency: float
    shared_latency: float
    l1_bytes: int
    fetch: float
    starts: float
    gap: float

    @property
    def arch(self) -> int:
        """The compute capability as one number."""
        return self.card.arch

    @property
    def name(self) -> str:
        """The GPU's name in tables."""
        return self.card.short


KIB = hardware.KIB

MACHINES = {
    machine.arch: machine
    for machine in (
        Machine(
            hardware.card("H200"), 1.755e9, alu=2, fma=1, fma_heavy=2, fma_pipes=2, xu=8, fp64=2, mma=8,
            wgmma_start=16, wgmma_latency=28, l2_rate=5000, port_rate=64, memory=4.0e12, l1_latency=38, l2_latency=265,
            dram_latency=590, shared_latency=29, l1_bytes=256 * KIB, fetch=10, starts=132 / 85, gap=1.0e-6,
        ),
        Machine(
            hardware.card("A100-40"), 1.41e9, alu=2, fma=2, fma_heavy=2, fma_pipes=1, xu=8, fp64=1, mma=8,
            wgmma_start=0, wgmma_latency=0, l2_rate=3830, port_rate=64, memory=1.4e12, l1_latency=38, l2_latency=240,
            dram_latency=480, shared_latency=29, l1_bytes=192 * KIB, fetch=10, starts=1.5, gap=1.0e-6,
        ),
        Machine(
            hardware.card("RTX 4090"), 2.52e9, alu=2, fma=1, fma_heavy=2, fma_pipes=2, xu=8, fp64=64, mma=32,
            wgmma_start=0, wgmma_latency=0, l2_rate=1700, port_rate=64, memory=0.93e12, l1_latency=43, l2_latency=273,
            dram_latency=560, shared_latency=30, l1_bytes=128 * KIB, fetch=10, starts=1.9, gap=0.9e-6,
        ),
    )
}  # fmt: skip
"""By architecture: one GPU that stands for it."""


def at_clock(machine: Machine, clock: float | None) -> Machine:
    """The same GPU with its SMs and L2 at another clock in Hz; None: as it is."""
    return machine if clock is None else dataclasses.replace(machine, clock=clock)
