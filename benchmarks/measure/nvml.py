"""A GPU's limits, current state, throttling and other processes, from NVML. Optional.

Without nvidia-ml-py, or where the driver does not answer, all is unknown and no sample counts as disturbed.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import Any

try:
    import pynvml
except ImportError:
    pynvml = None

# Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h). A power cap is no disturbance: it is how the card runs.
SLOWDOWNS = {0x8: "hardware slowdown", 0x20: "thermal slowdown", 0x40: "thermal slowdown", 0x80: "power brake"}
DROP = 0.1
"""Fraction of its clock that a GPU may lose during one sample."""


@dataclass(frozen=True)
class State:
    """State of the GPU: SM clock in MHz, reason for throttling, other compute processes.

    memory_clock in MHz, power in W, temperature in degrees Celsius; 0 where unknown.
    """

    clock: int = 0
    slowed: str = ""
    others: frozenset[int] = frozenset()
    memory_clock: int = 0
    power: float = 0.0
    temperature: int = 0


@dataclass
class Monitor:
    """Monitors one GPU, named by its UUID. Made when this process has a context on it.

    known_processes: those that ran before the first sample, this one among them: in a container the driver gives the
    host's process numbers, by which it does not know itself.
    """

    uuid: str
    handle: Any = None
    known_processes: frozenset[int] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        if pynvml is not None:
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlInit()
                uuid = self.uuid if self.uuid.startswith(("GPU-", "MIG-")) else f"GPU-{self.uuid}"
                self.handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        self.known_processes = self.state().others

    def limits(self) -> dict[str, Any]:
        """driver, memory_mib, power_limit_w, clock in Hz, memory bandwidth in bytes a second; None where unknown."""
        clock = self._ask("nvmlDeviceGetMaxClockInfo", 1)  # NVML_CLOCK_SM
        memory_clock = self._ask("nvmlDeviceGetMaxClockInfo", 2)  # NVML_CLOCK_MEM
        width = self._ask("nvmlDeviceGetMemoryBusWidth")
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        power = self._ask("nvmlDeviceGetEnforcedPowerLimit")
        return {
            "driver": self._driver(),
            "memory_mib": None if memory is None else memory.total >> 20,
            "power_limit_w": None if power is None else round(power / 1000),
            "clock": None if clock is None else clock * 1e6,
            # Two transfers per clock.
            "memory": None if memory_clock is None or width is None else 2e6 * memory_clock * width / 8,
        }

    def busy(self) -> int:
        """GPU utilization in percent over the last second or less."""
        rates = self._ask("nvmlDeviceGetUtilizationRates")
        return 0 if rates is None else int(rates.gpu)

    def state(self) -> State:
        """The current state."""
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:
            bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        slowed = next((name for bit, name in SLOWDOWNS.items() if bits & bit), "")
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses") or ()
        others = frozenset(p.pid for p in processes) - {os.getpid(), os.getppid()}
        return State(
            self._ask("nvmlDeviceGetClockInfo", 1) or 0,
            slowed,
            others,
            self._ask("nvmlDeviceGetClockInfo", 2) or 0,
            (self._ask("nvmlDeviceGetPowerUsage") or 0) / 1000,
            self._ask("nvmlDeviceGetTemperature", 0) or 0,  # NVML_TEMPERATURE_GPU
        )

    def _ask(self, question: str, *arguments: Any) -> Any:
        function = getattr(pynvml, question, None)
        if self.handle is None or function is None:
            return None
        try:
            return function(self.handle, *arguments)
        except pynvml.NVMLError:
            return None

    def _driver(self) -> str | None:
        if self.handle is None:
            return None
        try:
            version = pynvml.nvmlSystemGetDriverVersion()
        except pynvml.NVMLError:
            return None
        return version.decode() if isinstance(version, bytes) else str(version)

    def disturbance(self, before: State, after: State) -> str:
        """The disturbance of a sample between two states, or an empty string."""
        if before.slowed or after.slowed:
            return before.slowed or after.slowed
        if (before.others | after.others) - self.known_processes:
            return "another process on the GPU"
        if after.clock < (1 - DROP) * before.clock:
            return f"the clock fell from {before.clock} to {after.clock} MHz"
        return ""
