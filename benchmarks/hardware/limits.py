"""What a GPU cannot exceed, from its multiprocessors and clocks, and the time that follows for a call.

Operations a clock and multiprocessor: the datasheets' dense rates divided by multiprocessors and boost clock (A100 312
TFLOP/s, A40 149.7, L40S 362, H100 989, B200 2250, RTX PRO 6000 503.8, Orin 42.5 in half precision; twice the CUDA cores
in single). From Ada on products of 8-bit floats run at twice the rate of half precision (H100 1979, L40S 733, B200
4500). Clocks and bandwidths of the cards that kernels are compiled for: their datasheets; of others: NVML.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinysr_kernels.launch.device import GPUS, Gpu
from tinysr_kernels.ops.call import Cost

HALF_PER_CLOCK = {80: 2048, 86: 1024, 87: 2048, 89: 1024, 90: 4096, 100: 8192, 103: 8192, 120: 1024, 121: 1024}
SINGLE_PER_CLOCK = {80: 128}
L2_BYTES_PER_CLOCK = 64  # what one multiprocessor can ask for (Ada whitepaper)
CLOCK = {80: 1.41e9, 86: 1.695e9, 89: 2.52e9, 90: 1.98e9, 100: 1.965e9, 120: 2.407e9}
MEMORY = {80: 1.555e12, 86: 0.936e12, 89: 1.008e12, 90: 4.8e12, 100: 8e12, 120: 1.792e12}


@dataclass(frozen=True)
class Ceilings:
    """Operations a second with operands of 8, 16 and 32 bits, bytes a second from memory and from the L2."""

    quarter: float
    half: float
    single: float
    memory: float
    l2: float
    multiprocessors: int

    def rate(self, bits: int) -> float:
        """Operations a second on operands of so many bits."""
        return self.quarter if bits <= 8 else self.half if bits <= 16 else self.single

    def floor(self, cost: Cost, bits: int) -> float:
        """Seconds that a call takes at least when its tensors come from memory; bits: of its products' operands."""
        return max(cost.flops / self.rate(bits), cost.bytes / self.memory)


def nearest_known(gpu: Gpu) -> Gpu:
    """The card that stands for the GPU's architecture, or for the one closest to it."""
    return GPUS[min(GPUS, key=lambda arch: abs(arch - gpu.arch))]


def ceilings(gpu: Gpu, clock: float | None = None, memory: float | None = None) -> Ceilings:
    """A GPU's ceilings. clock: its highest in Hz; memory: its bandwidth in bytes a second; both if they are known."""
    arch = nearest_known(gpu).arch
    clock = clock or CLOCK[arch]
    each = gpu.multiprocessors * clock
    half = each * HALF_PER_CLOCK.get(gpu.arch, HALF_PER_CLOCK[arch])
    return Ceilings(
        quarter=2 * half if gpu.arch >= 89 else half,
        half=half,
        single=each * SINGLE_PER_CLOCK.get(gpu.arch, 256),
        memory=memory or MEMORY[arch],
        l2=each * L2_BYTES_PER_CLOCK,
        multiprocessors=gpu.multiprocessors,
    )
