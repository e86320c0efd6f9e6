"""Parameters in constant bank 0, and accesses checked against the tensors."""

import struct

import numpy as np
import pytest

from benchmarks.predict.emulate.disassembly import UnknownCode
from benchmarks.predict.emulate.state import Access
from benchmarks.predict.execution import SCRATCH, STORAGE, STORAGE_BYTES, OutOfBounds, _bank, _check
from benchmarks.predict.launches import Program, TensorArgument
from benchmarks.static.machine_code import Variant

SIGNATURE = (("n", "i32"), ("x", "*fp16"), ("eps", "fp32"), ("BLOCK", "constexpr"), ("big", "i64"), ("none", "*fp32"))


def program(arch: int) -> Program:
    variant = Variant(arch, "module", "kernel", SIGNATURE, (("BLOCK", 8),), (), 4, 2)
    x = TensorArgument(1, 64, 1000, weight=True)
    return Program(variant, (5, 6, 7), (("n", -3), ("x", x), ("eps", 1e-5), ("big", 1 << 40), ("none", None)))


@pytest.mark.parametrize(("arch", "first"), [(80, 0x160), (89, 0x160), (90, 0x210)])
def test_parameters_are_aligned_to_their_size(arch: int, first: int) -> None:
    bank, (x,) = _bank(program(arch))

    def pointer(offset: int) -> int:
        return bank[first + offset] | bank[first + offset + 4] << 32

    assert bank[first] == 2**32 - 3
    assert pointer(8) == STORAGE + STORAGE_BYTES + 64
    assert bank[first + 16] == struct.unpack("<I", struct.pack("<f", 1e-5))[0]
    assert pointer(24) == 1 << 40
    assert pointer(32) == 0
    assert pointer(40) == SCRATCH  # Triton's own two pointers come last
    assert (x.begin, x.end - x.begin, x.weight) == (pointer(8), 1000, True)
    assert [bank[0xC + 4 * i] for i in range(3)] == [5, 6, 7]
    assert bank[0] == 128


def test_an_architecture_whose_parameters_are_unknown_is_an_error() -> None:
    with pytest.raises(UnknownCode, match="sm_120"):
        _bank(program(120))


@pytest.mark.parametrize(
    ("first", "active", "fails"),
    [(0, 32, False), (1000 - 128, 32, False), (1000 - 124, 32, True), (-4, 32, True), (1000 - 124, 31, False)],
)
def test_every_lane_stays_in_a_tensor(first: int, active: int, fails: bool) -> None:
    one = program(90)
    _, tensors = _bank(one)
    address = (tensors[0].begin + first + 4 * np.arange(32))[None].astype(np.uint64)
    access = Access("LDG", 4, np.array([0]), address, (np.arange(32) < active)[None])
    if fails:
        with pytest.raises(
            OutOfBounds, match=r"kernel \(5, 6, 7\): LDG of 4 bytes at byte (1000|-4) of x, which has 1000"
        ):
            _check(access, tensors, one)
    else:
        _check(access, tensors, one)


def test_an_address_that_depends_on_data_is_an_error() -> None:
    one = program(90)
    access = Access("STG", 4, np.array([0]), None, np.ones((1, 32), dtype=bool))
    with pytest.raises(UnknownCode, match="address of an STG depends on data"):
        _check(access, [], one)
