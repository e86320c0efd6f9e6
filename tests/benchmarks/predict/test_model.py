"""Predictions of compiled kernels: bytes, FLOPs and bounds are those of the call, and nothing leaves its tensors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.predict import calibration, launches, store
from benchmarks.predict.cycles import sm
from benchmarks.predict.cycles.machines import MACHINES
from benchmarks.predict.execution import OutOfBounds, execute
from benchmarks.predict.launches import Program, TensorArgument, program
from benchmarks.predict.model import Prediction
from tinysr_kernels.launch.kernel import triton_is_installed

pytestmark = pytest.mark.skipif(
    not triton_is_installed() or sm.compiler() is None, reason="needs Triton and a C++ compiler"
)
HALF = torch.float16


def _predicted(*programs: Program) -> list[Prediction]:
    """Predictions made anew, in processes of their own: this one has Triton's interpreter in place of its compiler."""
    jobs = [store.Job(one, MACHINES[one.variant.arch]) for one in programs]
    made = store.predict_all(jobs, {}, workers=2)
    found = [made[job.key] for job in jobs]
    assert not [one for one in found if isinstance(one, str)], found
    return [one for one in found if isinstance(one, Prediction)]


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.long), 90])
def test_matmul_executes_its_flops_and_stores_its_result(arch: int) -> None:
    m, n, k = 256, 128, 192
    (launch,) = calibration.matmuls(m, n, k, HALF, [(128, 64, 64, 4, 3)])
    (made,) = _predicted(program(launch, arch))
    assert made.flops == 2 * m * n * k
    assert made.stored_bytes == 2 * m * n
    assert made.spilled == 0
    assert made.us >= max(made.bounds_us.values())
    assert made.guesses == 0


def test_copy_is_bound_by_the_dram() -> None:
    (launch,) = calibration.copies(1 << 26)
    one = program(launch, 90)
    (made,) = _predicted(one)
    assert made.stored_bytes == 2 << 26
    assert made.limit == "dram"
    assert made.us == pytest.approx(4 * (1 << 26) / MACHINES[90].memory * 1e6, rel=0.05)
    assert made.narrow_share == 0
    shorter = dataclasses.replace(one, arguments=tuple(_cut(argument) for argument in one.arguments))
    with pytest.raises(OutOfBounds, match=r"LDG of 16 bytes at byte \d+ of source"):
        execute(shorter)


def _cut(argument: tuple[str, object]) -> tuple[str, TensorArgument]:
    """The tensor, ending in the middle."""
    name, tensor = argument
    assert isinstance(tensor, TensorArgument)
    return name, dataclasses.replace(tensor, span=tensor.span // 2)


def test_digests_tell_programs_apart() -> None:
    (launch,) = calibration.copies(1 << 20)
    one = program(launch, 90)
    assert one.digest == program(calibration.copies(1 << 20)[0], 90).digest
    others = [
        program(calibration.copies(1 << 21)[0], 90),
        program(calibration.copies(1 << 20, 2048)[0], 90),
        program(launch, 80),
        dataclasses.replace(one, grid=(1, 1, 1)),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 5
    faster = dataclasses.replace(MACHINES[90], l2_rate=6000.0)
    assert store.Job(one, MACHINES[90]).key != store.Job(one, faster).key


def test_storage_shared_by_arguments_is_one_tensor() -> None:
    t = torch.empty(64, 64, dtype=HALF, device="meta")
    first = launches._tensor(t, 0, False)
    assert first == TensorArgument(0, 0, 64 * 64 * 2)
    assert launches._tensor(t[2:], 0, True) == TensorArgument(0, 2 * 64 * 2, 62 * 64 * 2, True)
    assert launches._tensor(t[:, :8], 0, False).span == (63 * 64 + 8) * 2


def test_the_stored_calibration_is_within_its_tolerance() -> None:
    """One row per kernel of the table, in its order; the last cell is predicted over published."""
    rows = calibration.rows()
    assert [row[0].startswith(one.name) for row, one in zip(rows, calibration.TABLE, strict=True)] == [True] * len(rows)
    for row, one in zip(rows, calibration.TABLE, strict=True):
        assert abs(float(row[-1]) - 1) <= one.tolerance + 0.005, row


@pytest.mark.long
def test_calibration() -> None:
    """Kernels whose times others published, predicted anew."""
    launches = [(row, program(launch, row.arch)) for row in calibration.TABLE for launch in row.launches()]
    made = _predicted(*(one for _, one in launches))
    for row in calibration.TABLE:
        best = min(one.us for (of, _), one in zip(launches, made, strict=True) if of is row)
        assert calibration.Row(row, row.work / (best * 1e-6)).within, (row, best)


def test_a_row_outside_its_tolerance_is_seen() -> None:
    one = dataclasses.replace(calibration.TABLE[0], low=100.0, high=120.0, tolerance=0.1)
    assert [calibration.Row(one, rate).within for rate in (89, 91, 110, 131, 133)] == [False, True, True, True, False]
    assert calibration.Row(one, 132.0).ratio == pytest.approx(1.1)
