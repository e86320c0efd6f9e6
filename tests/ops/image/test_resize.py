"""resize_bicubic against the Keys kernel summed over sixteen pixels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.cases import Arguments, Draw
from tests.ops.contract import OperatorContract, is_exact, reference_of
from tests.ops.mathematics import altered, gather
from tinysr_kernels.ops.image.resize import ResizeBicubic

reference = reference_of("resize_bicubic")


def keys(t: Tensor, a: float = -0.75) -> Tensor:
    """The cubic kernel with slope a at one pixel's distance."""
    t = t.abs()
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * (t**3 - 5 * t**2 + 8 * t - 4)
    return torch.where(t <= 1, near, torch.where(t < 2, far, 0.0))


def oracle(
    x: Tensor,
    factor: int,
    mul: float = 1.0,
    add: float = 0.0,
    pillow: bool = False,
    clamp: bool = False,
    a: float | None = None,
) -> Tensor:
    x = x.double()
    a = a or (-0.5 if pillow else -0.75)
    rows, columns = (_weights(extent, factor, a, pillow) for extent in x.shape[2:])
    out = 0.0
    for near_rows, across in rows:
        for near_columns, along in columns:
            out = out + across[:, None] * along * gather(x, near_rows, near_columns, border=None)
    return (mul * out + add).clamp(0, 1) if clamp else mul * out + add


def _weights(extent: int, factor: int, a: float, inside: bool) -> list[tuple[Tensor, Tensor]]:
    """The four pixels near every place of an axis, and their weights; `inside`: of those in the image alone."""
    places = (torch.arange(extent * factor).double() + 0.5) / factor - 0.5
    near = [places.floor() + i for i in range(-1, 3)]
    weights = [keys(places - pixel, a) for pixel in near]
    if inside:
        weights = [w * (pixel >= 0) * (pixel < extent) for w, pixel in zip(weights, near, strict=True)]
        weights = [w / sum(weights) for w in weights]
    return [(pixel.long(), w) for pixel, w in zip(near, weights, strict=True)]


def eager(
    x: Tensor,
    factor: int,
    mul: float = 1.0,
    add: float = 0.0,
    dtype: torch.dtype | None = None,
    pillow: bool = False,
    clamp: bool = False,
) -> Tensor:
    u = x if dtype is None else x.to(dtype)
    size = (x.shape[2] * factor, x.shape[3] * factor)
    if pillow:  # which PyTorch does not have in half precision on a CPU; elsewhere it sums in float32
        wide = u.to(torch.promote_types(u.dtype, torch.float32))
        y = F.interpolate(wide, size=size, mode="bicubic", antialias=True).to(u.dtype)
    else:
        y = F.interpolate(u, size=size, mode="bicubic", align_corners=False)
    y = y * mul + add
    return y.clamp(0, 1) if clamp else y


def interpolated(mode: str, **options: bool) -> object:
    """Another interpolation in the place of the right one."""

    def run(
        x: Tensor, factor: int, mul: float = 1.0, add: float = 0.0, dtype: torch.dtype | None = None, **rest: bool
    ) -> Tensor:
        wide = x.to(dtype or x.dtype).double()
        y = F.interpolate(wide, scale_factor=factor, mode=mode, **options) * mul + add
        return y.to(dtype or x.dtype)

    return run


MUTANTS = {
    "bilinear": interpolated("bilinear", align_corners=False),
    "aligned corners": interpolated("bicubic", align_corners=True),
    "slope -0.6": lambda dtype=None, **a: oracle(**a, a=-0.6).to(dtype or a["x"].dtype),
    "no offset": altered(reference, "add", lambda _: 0.0),
    "no scale": altered(reference, "mul", lambda _: 1.0),
    "clamped": lambda **a: reference(**a).clamp(-1, 1),
    "not clamped": altered(reference, "clamp", lambda _: False),
    "torch's borders": lambda dtype=None, **a: oracle(
        **{**a, "pillow": False, "a": -0.5 if "pillow" in a else None}
    ).to(dtype or a["x"].dtype),
    "torch's kernel": altered(reference, "pillow", lambda _: False),
    "shifted": altered(reference, "x", lambda t: t.roll(1, 3)),
    "offset scaled": lambda **a: reference(**{**a, "add": a.get("mul", 1.0) * a.get("add", 0.0)}),
}

MISTAKES = [
    ({"x": torch.ones(3, 5, 7)}, r"x must be \[N,C,H,W\], found \[3, 5, 7\]"),
    ({"factor": 0}, "factor must be at least 1, found 0"),
    ({"dtype": torch.uint8}, r"dtype must be floating, found torch.uint8"),
]


class TestResizeBicubic(OperatorContract):
    op = "resize_bicubic"
    oracle = staticmethod(oracle)
    eager = staticmethod(eager)
    bytes_are_numbers = True
    mutants = MUTANTS
    mistakes = MISTAKES

    def counted_flops(self, arguments: Arguments) -> int:
        """Two passes of 4 taps and the affine map: 18 per output element."""
        return 18 * arguments["x"].numel() * arguments["factor"] ** 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_result_in_another_dtype(dtype: torch.dtype) -> None:
    """One rounding, from float32 or wider, to the dtype asked for."""
    x = Draw("resize dtypes").unit(1, 3, 4, 5)
    single = x.float()
    result = torch.ops.tinysr.resize_bicubic(single, 4, 2.0, -1.0, dtype)
    assert result.dtype == dtype
    if dtype == torch.float64:
        assert is_exact(result, oracle(single, 4, 2.0, -1.0))
    else:
        assert torch.equal(result, torch.ops.tinysr.resize_bicubic(single, 4, 2.0, -1.0).to(dtype))


def test_bytes_become_float32() -> None:
    x = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16)
    result = torch.ops.tinysr.resize_bicubic(x, 1, 1 / 255)
    assert result.dtype == torch.float32
    assert torch.equal(result.flatten(), torch.arange(256) * torch.tensor(1 / 255))


def test_cost_by_hand() -> None:
    x = torch.empty(2, 3, 4, 5, dtype=torch.uint8, device="meta")
    found = ResizeBicubic(x, 4, dtype=torch.float16).cost()
    assert (found.flops, found.bytes) == (18 * 1920, 120 + 2 * 1920)


def test_pillow_itself() -> None:
    """Pillow in its float mode, which does not clamp."""
    image = pytest.importorskip("PIL.Image")
    x = Draw("pillow").unit(5, 7).float()
    large = image.fromarray(x.numpy(), mode=None).resize((28, 20), image.Resampling.BICUBIC)
    wanted = torch.tensor([[large.getpixel((j, i)) for j in range(28)] for i in range(20)])
    found = torch.ops.tinysr.resize_bicubic(x[None, None], 4, pillow=True)[0, 0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert not torch.allclose(torch.ops.tinysr.resize_bicubic(x[None, None], 4)[0, 0], wanted, atol=1e-3)
