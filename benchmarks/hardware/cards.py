"""What a card cannot exceed, and the shortest time that a launch can take on it.

Matrix rates and memory bandwidths: measured on an H200 (790 TFLOP/s of 989 in the datasheet, 4.3 TB/s of 4.8), with
the same matrix rate for the H100, which is the same chip at the same clock; everything else, all rates of fp8 among it,
from NVIDIA's datasheets (dense, float32 accumulation; A100, RTX 4090: the architecture whitepapers).

L2: sizes from the same sources. NVIDIA gives a bandwidth for the A100 alone, 5120 bytes a clock (A100 whitepaper), here
taken for Hopper too. For Ada it is what the multiprocessors can ask for, 64 bytes a clock each, which is a bound and
not a rate to expect. Both at the boost clock.

Such a floor is a sum of the best each part could do, not an estimate: no measurement may read below it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tinysr_kernels.ops.trace import Moved, Step


@dataclass(frozen=True)
class Card:
    """Ceilings of one card: operations a second in half and single precision, bytes a second, bytes of L2.

    fp8: operations a second in e4m3; a card without has its rate of half precision there.
    """

    name: str
    half: float
    single: float
    memory: float
    l2: float
    l2_bytes: int
    fp8: float

    def floor(self, step: Step, single: bool, cached_weights: bool) -> float:
        """Seconds that a launch takes at least: the longer of its arithmetic and its traffic.

        single: float32 products, which run without tensor cores here. cached_weights: whether all weights of the
        network together stay in the L2 from one image to the next (`keeps`); if not, each comes from memory once.
        """
        rate = self.fp8 if step.fp8 else self.single if single else self.half
        arithmetic = step.flops / rate
        return max(arithmetic, sum(self._transfer(moved, cached_weights) for moved in step.moved))

    def keeps(self, size: int) -> bool:
        """Whether something of this size is still in the L2 when it is used again: below half of it."""
        return 2 * size < self.l2_bytes

    def _transfer(self, moved: Moved, cached_weights: bool) -> float:
        cached = cached_weights if moved.weight else self.keeps(moved.bytes)
        return moved.bytes / (self.l2 if cached else self.memory)


MIB = 1 << 20
CARDS = (
    Card("H200", 790e12, 67e12, 4.3e12, 5120 * 1.98e9, 50 * MIB, 1979e12),
    Card("H100", 790e12, 67e12, 3.35e12, 5120 * 1.98e9, 50 * MIB, 1979e12),
    Card("A100-40", 312e12, 19.5e12, 1.555e12, 5120 * 1.41e9, 40 * MIB, 312e12),
    Card("RTX 4090", 165.2e12, 82.6e12, 1.008e12, 128 * 64 * 2.52e9, 72 * MIB, 330.3e12),
    Card("L4", 121e12, 30.3e12, 0.3e12, 58 * 64 * 2.04e9, 48 * MIB, 242e12),
)


def floors(steps: Iterable[Step], single: bool, weights: int) -> list[dict[str, float]]:
    """For each launch the microseconds it takes at least, by card; `weights`: bytes of all weights together."""
    kept = {card: card.keeps(weights) for card in CARDS}
    return [{card.name: 1e6 * card.floor(step, single, kept[card]) for card in CARDS} for step in steps]
