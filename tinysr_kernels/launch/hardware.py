"""Facts about NVIDIA GPUs, each with its source: the one table that launches, benchmarks and autotuning read.

Nothing here was measured by this project. A figure is one of three kinds (`Kind`): published by NVIDIA, derived from
published figures, or measured by others. `Architecture` holds what follows from the compute capability, `Card` what
differs between cards. A figure without an entry in `notes` has the kind `PUBLISHED` and the source named in `source`.

Rates are dense (no structured sparsity) with float32 accumulation. Units: FLOP/s, byte/s, Hz, bytes.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

KIB, MIB = 1 << 10, 1 << 20

REGISTERS_PER_SM = 1 << 16
"""32-bit registers per SM, of every architecture below (CUDA programming guide, technical specifications)."""
REGISTER_UNIT = 256
"""Registers are allocated per warp in multiples of this, from one of four partitions (CUDA occupancy calculator)."""
SHARED_UNIT = 128
"""Shared memory is allocated per block in multiples of these bytes (CUDA occupancy calculator)."""
SHARED_RESERVED = 1 * KIB
"""Bytes of shared memory that the system reserves per block (CUDA programming guide, from compute capability 8.0)."""
L2_PORT_BYTES_PER_CLOCK = 64
"""What one SM can read from the L2 per clock at most (A100 whitepaper; the same port is assumed up to Blackwell)."""


class Kind(enum.Enum):
    """Where a figure comes from."""

    PUBLISHED = "published by NVIDIA"
    DERIVED = "derived from published figures"
    OTHERS = "measured by others"


@dataclass(frozen=True)
class Note:
    """The kind and the source of one figure."""

    kind: Kind
    source: str


GUIDE = Note(Kind.PUBLISHED, "CUDA programming guide, technical specifications per compute capability")


@dataclass(frozen=True)
class Architecture:
    """What a compute capability fixes, per SM unless said otherwise.

    shared_kib, block_shared_kib: KiB of shared memory per SM, and per block at most. warps, blocks: resident ones at
    most. fp16, fp8, fp32: FLOP per clock with operands of 16 bits (float16, bfloat16) and 8 bits (e4m3) on tensor
    cores, and with float32 on CUDA cores; an architecture without fp8 tensor cores has its 16-bit rate there.
    geforce: the share of the tensor-core rates that GeForce cards reach with float32 accumulation.
    rates: the source of the rates; the other figures are the CUDA programming guide's (`GUIDE`).
    """

    shared_kib: int
    block_shared_kib: int
    warps: int
    blocks: int
    fp16: int
    fp8: int
    fp32: int
    rates: Note
    geforce: float = 1.0


def _rates(text: str) -> Note:
    return Note(Kind.DERIVED, f"dense TFLOP/s / (SMs x clock): {text}")


_ADA = _rates("L40S 362 fp16, 733 fp8 (datasheet); RTX 4090 165.2, 330.3 (Ada whitepaper)")
_CONSUMER_BLACKWELL = _rates("RTX PRO 6000 503.8 fp16 (datasheet); RTX 5090 209.5, 419 fp8 (RTX Blackwell whitepaper)")
_BLACKWELL = _rates("B200 2250 fp16, 4500 fp8 (DGX B200 datasheet)")

ARCHITECTURES: Mapping[int, Architecture] = {
    80: Architecture(164, 163, 64, 32, 2048, 2048, 128, _rates("A100 312 fp16, 19.5 fp32 (A100 whitepaper)")),
    86: Architecture(100, 99, 48, 16, 1024, 1024, 256, _rates("A40 149.7, RTX 3090 71.2 (GA102 whitepaper)"), 0.5),
    87: Architecture(164, 163, 48, 16, 2048, 2048, 256, _rates("Jetson AGX Orin 42.5 fp16 (datasheet)")),
    89: Architecture(100, 99, 48, 24, 1024, 2048, 256, _ADA, 0.5),
    90: Architecture(228, 227, 64, 32, 4096, 8192, 256, _rates("H100 989 fp16, 1979 fp8, 67 fp32 (datasheet)")),
    100: Architecture(228, 227, 64, 32, 8192, 16384, 256, _BLACKWELL),
    103: Architecture(228, 227, 64, 32, 8192, 16384, 256, _BLACKWELL),
    120: Architecture(100, 99, 48, 24, 1024, 2048, 256, _CONSUMER_BLACKWELL, 0.5),
    121: Architecture(100, 99, 48, 24, 1024, 2048, 256, _CONSUMER_BLACKWELL),
}


@dataclass(frozen=True)
class Card:
    """One card: `name` as the driver reports it, `short` as tables print it.

    clock: the highest SM clock. memory: DRAM bandwidth. fp16, fp8: peak rate of tensor cores (float16 and bfloat16;
    e4m3, or the 16-bit rate where there is none). fp32: of CUDA cores. l2_bytes, l2: size and bandwidth of the L2.
    sustained_fp16, sustained_memory: what others measured for large GEMMs and large copies; 0 if not known.
    notes: kind and source of every field that `source` does not give.
    """

    name: str
    short: str
    capability: tuple[int, int]
    multiprocessors: int
    clock: float
    memory: float
    fp16: float
    fp8: float
    fp32: float
    l2_bytes: int
    l2: float
    source: str
    sustained_fp16: float = 0.0
    sustained_memory: float = 0.0
    notes: Mapping[str, Note] = field(default_factory=dict)

    @property
    def arch(self) -> int:
        """The compute capability as one number, such as 90."""
        return 10 * self.capability[0] + self.capability[1]

    def note(self, name: str) -> Note:
        """Kind and source of a field."""
        return self.notes.get(name, Note(Kind.PUBLISHED, self.source))


def _derived(text: str) -> Note:
    return Note(Kind.DERIVED, text)


def _others(text: str) -> Note:
    return Note(Kind.OTHERS, text)


_MAMF = "largest bfloat16 GEMM rate of the accelerator tables of github.com/stas00/ml-engineering"
_CLOCK_OF_FP32 = _derived("fp32 rate / (SMs x FLOP per clock)")
_HOPPER_L2 = _derived("5120 bytes per clock, which the A100 whitepaper gives for GA100, at this card's clock")
_AD102_L2 = "5.2 TB/s measured on an L40 (AD102 too, 96 MiB of L2, 2.49 GHz), of which no public source is known to us"
_NO_FP8 = _derived("no fp8 tensor cores: the 16-bit rate")

CARDS = (
    Card(
        "NVIDIA H200", "H200", (9, 0), 132, 1.98e9, 4.8e12, 989e12, 1979e12, 67e12, 50 * MIB, 5120 * 1.98e9,
        "H200 datasheet", 794.5e12, 4.3e12,
        {
            "clock": _CLOCK_OF_FP32,
            "l2": _HOPPER_L2,
            "l2_bytes": _derived("as the H100, the same chip (H100 whitepaper)"),
            "sustained_fp16": _others(_MAMF),
            "sustained_memory": _others("large copies on an H200; no public source is known to us"),
        },
    ),
    Card(
        "NVIDIA H100 80GB HBM3", "H100", (9, 0), 132, 1.98e9, 3.35e12, 989e12, 1979e12, 67e12, 50 * MIB, 5120 * 1.98e9,
        "H100 SXM datasheet; L2 size: H100 whitepaper", 792.1e12,
        notes={"clock": _CLOCK_OF_FP32, "l2": _HOPPER_L2, "sustained_fp16": _others(_MAMF)},
    ),
    Card(
        "NVIDIA A100-SXM4-40GB", "A100-40", (8, 0), 108, 1.41e9, 1.555e12, 312e12, 312e12, 19.5e12, 40 * MIB,
        3840 * 1.41e9, "A100 whitepaper",
        notes={
            "fp8": _NO_FP8,
            "l2": _others(
                "3840 bytes per clock on an A100 PCIe 80 GB (analysis_A100.md of "
                "github.com/smallscientist1/cuda_microbenchmark); the whitepaper's 5120 were not reached"
            ),
        },
    ),
    Card(
        "NVIDIA GeForce RTX 4090", "RTX 4090", (8, 9), 128, 2.52e9, 1.008e12, 165.2e12, 330.3e12, 82.6e12, 72 * MIB,
        5.2e12, "Ada whitepaper",
        notes={
            "l2": _others(
                f"{_AD102_L2}; 4.9 on an RTX 4090 (analysis_RTX4090.md of "
                "github.com/smallscientist1/cuda_microbenchmark)"
            ),
        },
    ),
    Card(
        "NVIDIA L4", "L4", (8, 9), 58, 2.04e9, 0.3e12, 121e12, 242e12, 30.3e12, 48 * MIB, 5.2e12 / 2 * 2.04 / 2.49,
        "L4 datasheet",
        notes={
            "clock": _CLOCK_OF_FP32,
            "l2_bytes": _others("size that the driver reports"),
            "l2": _derived(f"{_AD102_L2}: half of its slices, at this card's clock"),
        },
    ),
    Card(
        "NVIDIA GeForce RTX 3090", "RTX 3090", (8, 6), 82, 1.695e9, 0.936e12, 71.2e12, 71.2e12, 35.6e12, 6 * MIB,
        5.2e12 * 1.695 / 2.49, "GA102 whitepaper",
        notes={
            "fp8": _NO_FP8,
            "l2": _derived(f"{_AD102_L2}: as many memory partitions, at this card's clock; an upper estimate"),
        },
    ),
    Card(
        "NVIDIA B200", "B200", (10, 0), 148, 1.965e9, 8e12, 2250e12, 4500e12, 74.5e12, 126 * MIB, 148 * 64 * 1.965e9,
        "DGX B200 datasheet, per GPU", 1745e12,
        notes={
            "multiprocessors": _others("number that the driver reports"),
            "clock": _others("highest clock that the driver reports"),
            "fp32": _derived("SMs x clock x FLOP per clock"),
            "l2_bytes": _others("size that the driver reports"),
            "l2": _derived("all SM ports at once: an upper bound, no measurement is known here"),
            "sustained_fp16": _others(_MAMF),
        },
    ),
    Card(
        "NVIDIA GeForce RTX 5090", "RTX 5090", (12, 0), 170, 2.407e9, 1.792e12, 209.5e12, 419e12, 104.8e12, 96 * MIB,
        5.2e12 * 512 / 384 * 2.407 / 2.49, "RTX Blackwell whitepaper",
        notes={"l2": _derived(f"{_AD102_L2}: by width of the memory bus (512 to 384 bit) and clock; an estimate")},
    ),
)  # fmt: skip

PLANNED_FOR = ("H200", "H100", "A100-40", "RTX 4090", "L4")
"""The cards, by short name, that docs/plan.md gives floors for, in its order."""
COMPILED_FOR = ("A100-40", "RTX 3090", "RTX 4090", "H200", "B200", "RTX 5090")
"""One card per architecture that kernels are compiled for ahead of time."""


def card(short: str) -> Card:
    """The card with this short name. KeyError if there is none."""
    return {one.short: one for one in CARDS}[short]


def representative(arch: int) -> Card:
    """The card that stands for this architecture, or for the nearest one that kernels are compiled for."""
    return min((card(short) for short in COMPILED_FOR), key=lambda one: abs(one.arch - arch))


def architecture(arch: int) -> Architecture:
    """The facts of this architecture; of the nearest one that kernels are compiled for if it is not in the table."""
    return ARCHITECTURES.get(arch) or ARCHITECTURES[representative(arch).arch]


def block_shared_bytes(arch: int) -> int:
    """Bytes of shared memory per block at most; of an architecture that is not in the table the least of all."""
    known = ARCHITECTURES.get(arch)
    return KIB * (known.block_shared_kib if known else min(one.block_shared_kib for one in ARCHITECTURES.values()))
