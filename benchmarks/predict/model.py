"""The predicted time of one launch: a middle program executed, its trace replayed on one SM, bounds beside it.

The launch takes as long as the SM with the most programs: ceil(programs / SMs) of them, as many at a time as registers
and shared memory allow. The memory system is shared: this SM has its share of the L2's and DRAM's bandwidth. A tensor
below half of the L2 is still in it when it is used; weights, unless those of the whole network are, come from DRAM
once per image. Not modelled: coalescing of equal requests in the L2, TMA, programs that differ from the middle one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.hardware import resident_warps
from benchmarks.predict.cycles.classes import Kind, Pipe, class_of, flops, table
from benchmarks.predict.cycles.machines import Machine
from benchmarks.predict.cycles.sm import simulate
from benchmarks.predict.cycles.traffic import Storage, Traffic, traffic
from benchmarks.predict.execution import Execution, execute
from benchmarks.predict.launches import Program
from tinysr_kernels.launch.hardware import KIB, SHARED_RESERVED

SAME_FOR_ALL_BYTES = 64 * KIB
"""Tensors up to this size, such as biases, are taken to be read alike by all programs; so are weights."""
LEAST_L1_BYTES = 16 * KIB
BINDING = 0.62
"""The share of the predicted time from which the largest bound is named as the limit; below it, latency is."""


@dataclass(frozen=True)
class Prediction:
    """One launch. All times are predicted, in microseconds.

    us: from the first program's start to the last store; launch gaps not included. bounds_us: what each resource alone
    would take. limit: the resource that binds, "latency" if none does. conflicts: cycles of shared memory over those
    without bank conflicts. narrow_share: of the bytes of global memory, accessed by 1 or 2 bytes per lane. flops: of
    matrix instructions, all programs. stored_bytes: all programs, as the middle one.
    """

    us: float
    bounds_us: Mapping[str, float]
    limit: str
    registers: int
    spilled: int
    shared_bytes: int
    programs_per_sm: int
    instructions_per_warp: float
    ipc: float
    conflicts: float
    narrow_share: float
    flops: float
    stored_bytes: int
    guesses: int


def predict(one: Program, machine: Machine) -> Prediction:
    """Predict a launch. OutOfBounds, UnknownCode and RuntimeError as in execution.py and sm.py."""
    execution = execute(one)
    return replay(one, execution, traffic(execution), machine)


def replay(one: Program, execution: Execution, made: Traffic, machine: Machine) -> Prediction:
    """The time of an executed program's launch on a machine."""
    warps, cubin = execution.warps, execution.cubin
    fit = max(1, resident_warps(machine.arch, warps, cubin.registers, cubin.shared) // warps)
    each = math.ceil(one.programs / machine.card.multiprocessors)
    resident = min(fit, each)
    result = simulate(
        _shares(machine, one.programs, each, resident, cubin.shared),
        table(execution.code),
        made,
        [_tensor(storage, one.programs, machine) for storage in made.storages],
        each,
        resident,
    )
    us = 1e6 / machine.clock
    bounds = {name: cycles * us for name, cycles in _bounds(execution, result, machine, one.programs, each).items()}
    time = result["end"] * us
    binding = max(bounds, key=lambda name: bounds[name])
    return Prediction(
        us=time,
        bounds_us=bounds,
        limit=binding if bounds[binding] >= BINDING * time else "latency",
        registers=cubin.registers,
        spilled=cubin.spilled,
        shared_bytes=cubin.shared,
        programs_per_sm=fit,
        instructions_per_warp=len(made.steps) / warps,
        ipc=result["issued"] / result["cycles"],
        conflicts=made.conflicts,
        narrow_share=made.narrow_share,
        flops=sum(flops(execution.code[at]) * count for at, count in _counts(execution).items()) * one.programs,
        stored_bytes=sum(storage.stored for storage in made.storages) * one.programs,
        guesses=execution.guesses,
    )


def _shares(machine: Machine, programs: int, each: int, resident: int, shared: int) -> dict[str, float]:
    """The constants of sm.cpp: the machine's, with this SM's share of what all share."""
    sms = machine.card.multiprocessors
    memory = machine.memory / machine.clock

    def share(total: float, active: int) -> float:
        return min(machine.port_rate, total / active)

    # The last programs run while SMs with one program less are idle.
    last = programs % sms if programs > sms else 0
    busy = min(sms, programs)
    carved = math.ceil((shared + SHARED_RESERVED) * resident / (8 * KIB)) * 8 * KIB
    return {
        "alu_cycles": machine.alu,
        "fma_cycles": machine.fma,
        "fma_heavy_cycles": machine.fma_heavy,
        "fma_pipes": machine.fma_pipes,
        "xu_cycles": machine.xu,
        "fp64_cycles": machine.fp64,
        "mma_cycles": machine.mma,
        "wgmma_start": machine.wgmma_start,
        "wgmma_latency": machine.wgmma_latency,
        "l2_rate": share(machine.l2_rate, busy),
        "dram_rate": share(memory, busy),
        "port_rate": machine.port_rate,
        "tail_programs": each - programs // sms if last else 0,
        "tail_l2_rate": share(machine.l2_rate, last or busy),
        "tail_dram_rate": share(memory, last or busy),
        "l1_latency": machine.l1_latency,
        "l2_latency": machine.l2_latency,
        "dram_latency": machine.dram_latency,
        "shared_latency": machine.shared_latency,
        "l1_bytes": max(machine.l1_bytes - carved, LEAST_L1_BYTES),
        "fetch_cycles": machine.fetch,
        "start_interval": int(sms / machine.starts * machine.clock / 1e9),
    }


def _tensor(one: Storage, programs: int, machine: Machine) -> tuple[float, int, int]:
    """sm.cpp's `Tensor`: the share of its sectors that come from DRAM, and whether stores go there."""
    large = 2 * one.nbytes >= machine.card.l2_bytes
    requested = (one.bypassing or one.read) * programs
    from_dram = min(one.nbytes, requested) if (large or one.weight) else 0
    same = one.nbytes <= SAME_FOR_ALL_BYTES or one.weight
    return (min(1.0, from_dram / requested) if requested else 0.0), int(same), int(large and one.written > 0)


def _counts(execution: Execution) -> Counter[int]:
    """How often the warps of one program together execute each instruction."""
    counts: Counter[int] = Counter()
    for numbers, steps in execution.groups:
        for at, _, _ in steps:
            counts[at] += len(numbers)
    return counts


def _bounds(
    execution: Execution, result: Mapping[str, float], machine: Machine, programs: int, each: int
) -> dict[str, float]:
    """Cycles that each resource is busy: a scheduler's pipes, the SM's L1 and shared memory, the GPU's L2 and DRAM."""
    pipes: Counter[Pipe] = Counter()
    tensor = issued = 0.0
    for at, count in _counts(execution).items():
        pipe, kind = class_of(execution.code[at])
        pipes[pipe] += count
        issued += count
        if kind is Kind.MMA:
            tensor += count * machine.mma
    half = machine.fma_heavy if machine.fma_pipes == 1 else 1
    per_scheduler = each / 4
    of_all = programs / each
    memory = machine.memory / machine.clock
    return {
        "issue": issued * per_scheduler,
        "alu": pipes[Pipe.ALU] * machine.alu * per_scheduler,
        "fma": max(
            pipes[Pipe.FMA] * machine.fma + pipes[Pipe.FMA_HEAVY] * half, pipes[Pipe.FMA_HEAVY] * machine.fma_heavy
        )
        * per_scheduler,
        "mufu": pipes[Pipe.XU] * machine.xu * per_scheduler,
        "tensor": tensor * per_scheduler if tensor else result["tensor"],
        "l1": max(result["l1_busy"], result["tags"]),
        "shared": result["shared"],
        "l2": result["l2_bytes"] * of_all / machine.l2_rate,
        "dram": (result["dram_read"] + result["dram_written"]) * of_all / memory,
    }
