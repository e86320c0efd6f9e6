"""Bank conflicts of shared memory, sectors of global memory."""

import numpy as np
import pytest

from benchmarks.predict.cycles.traffic import _sectors, wavefronts
from benchmarks.predict.emulate.state import Access

LANE = np.arange(32)
EVERY = np.ones((1, 32), dtype=bool)


def access(kind: str, width: int, address: np.ndarray, active: np.ndarray = EVERY) -> Access:
    return Access(kind, width, np.array([0]), address[None].astype(np.uint64), active)


@pytest.mark.parametrize(
    ("width", "address", "expected"),
    [
        (4, 4 * LANE, 1),
        (4, 0 * LANE, 1),  # one word is broadcast
        (4, 8 * LANE, 2),
        (4, 128 * LANE, 32),
        (4, 132 * LANE, 1),  # padded rows
        (2, 2 * LANE, 1),
        (2, 64 * LANE, 16),
        (8, 8 * LANE, 2),
        (16, 16 * LANE, 4),
        (16, 128 * LANE, 32),
        (16, 144 * LANE, 4),
    ],
)
def test_bank_conflicts(width: int, address: np.ndarray, expected: int) -> None:
    waves, ideal = wavefronts(access("LDS", width, address))
    assert waves.tolist() == [expected]
    assert ideal.tolist() == [{8: 2, 16: 4}.get(width, 1)]


@pytest.mark.parametrize(("stride", "expected"), [(16, 4), (128, 32), (144, 4)])
def test_bank_conflicts_of_matrices(stride: int, expected: int) -> None:
    """Four matrices of eight rows; rows of 128 bytes without swizzle or padding meet in the same banks."""
    waves, ideal = wavefronts(access("LDSM", 4, stride * LANE))
    assert (waves.tolist(), ideal.tolist()) == ([expected], [4])


def test_lanes_that_are_off_want_nothing() -> None:
    few = EVERY & (LANE < 2)
    assert wavefronts(access("LDS", 4, 128 * LANE, few))[0].tolist() == [2]
    assert wavefronts(access("LDS", 4, 128 * LANE, ~EVERY))[0].tolist() == [0]


def test_each_warp_by_itself() -> None:
    address = np.stack([4 * LANE, 128 * LANE]).astype(np.uint64)
    two = Access("STS", 4, np.array([0, 1]), address, np.ones((2, 32), dtype=bool))
    assert wavefronts(two)[0].tolist() == [1, 32]


@pytest.mark.parametrize(
    ("width", "address", "expected"),
    [
        (2, 2 * LANE, 2),
        (16, 16 * LANE, 16),
        (4, 4 * LANE + 16, 5),  # not aligned to sectors
        (4, 256 * LANE, 32),
        (1, 0 * LANE, 1),
        (8, 32 * LANE + 28, 33),  # across the border of two
    ],
)
def test_sectors(width: int, address: np.ndarray, expected: int) -> None:
    (found,) = _sectors(access("LDG", width, address))
    assert len(found) == expected
