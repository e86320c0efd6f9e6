"""tanh_scaled against the quotient of exponentials."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.ops.cases import Arguments
from tests.ops.contract import OperatorContract, reference_of
from tests.ops.mathematics import altered
from tinysr_kernels.ops.image.tanh_scaled import TanhScaled

reference = reference_of("tanh_scaled")


def oracle(z: Tensor, gain: float) -> Tensor:
    """(exp(u) - exp(-u)) / (exp(u) + exp(-u)); expm1 keeps the digits of small u."""
    raised = torch.expm1(2 * (gain * z).abs().clamp(max=300))
    return (gain * z).sign() * raised / (raised + 2)


class TestTanhScaled(OperatorContract):
    op = "tanh_scaled"
    oracle = staticmethod(oracle)
    eager = staticmethod(lambda z, gain: torch.tanh(z * gain))
    mutants = {
        "no gain": altered(reference, "gain", lambda _: 1.0),
        "gain after": lambda z, gain: torch.tanh(z) * gain,
        "linear": lambda z, gain: (z * gain).clamp(-1, 1),
        "shifted": altered(reference, "z", lambda t: t.roll(1, 3)),
    }
    mistakes = [({"z": torch.ones(3, 5)}, r"z must be \[N,C,H,W\], found \[3, 5\]")]

    def counted_flops(self, arguments: Arguments) -> int:
        """One multiplication and one tanh per element."""
        return 2 * arguments["z"].numel()


def test_what_is_not_finite_stays_visible() -> None:
    z = torch.tensor([float("nan"), float("inf"), -float("inf")]).view(1, 1, 1, 3)
    found = torch.ops.tinysr.tanh_scaled(z, 0.5).flatten()
    assert found[0].isnan()
    assert found[1:].tolist() == [1.0, -1.0]


def test_cost_by_hand() -> None:
    found = TanhScaled(torch.empty(1, 3, 4, 5, dtype=torch.float16, device="meta"), 2.0).cost()
    assert (found.flops, found.bytes) == (120, 240)
