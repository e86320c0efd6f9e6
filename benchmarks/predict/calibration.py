"""Kernels whose times others published, predicted by the same model: how far to trust it.

The kernels are written here after the descriptions of those measured: a blocked matmul with grouped program order, a
flash attention without a mask, a copy. Each takes the best of a few configurations by the model, as the published
figures take the best by measurement.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.predict.cycles.machines import MACHINES
from benchmarks.predict.launches import program
from benchmarks.predict.store import RESULTS, Job, predict_all
from tinysr_kernels.launch.json_file import read_json
from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.launch.plan import Launch, cdiv

FILE = RESULTS / "predicted-calibration.json"
TEXT = """Kernels of the kinds that others measured, written for this table and predicted by the same model: a blocked
matmul, flash attention without a mask, a copy. The published figures are the best of several configurations by
measurement, the predicted ones the best of several by the model. The model's constants were chosen with these in view,
so the table shows that one set of constants fits them, not that any other kernel is right. **Attention is predicted too
fast by up to a half**: its softmax between two matmuls overlaps better in the model than on a GPU. `predict
--calibrate` fails where a ratio leaves its tolerance.
"""


@jit
def matmul(  # type: ignore[no-untyped-def]
    a,  # [M, K], row major
    b,  # [N, K], row major: weights as linear layers have them
    c,  # [M, N]
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """c = a @ b^T in float32, rounded once; every extent is a multiple of its block."""
    program = tl.program_id(0)
    in_group = GROUP_M * (N // BLOCK_N)
    first = program // in_group * GROUP_M
    rows_of_group = tl.minimum(M // BLOCK_M - first, GROUP_M)
    row = (first + program % in_group % rows_of_group) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = program % in_group // rows_of_group * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at_a = a + row[:, None] * K + k
    at_b = b + column[None, :] * K + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        total = tl.dot(tl.load(at_a), tl.load(at_b), total)
        at_a += BLOCK_K
        at_b += BLOCK_K
    tl.store(c + row[:, None] * N + column, total.to(c.dtype.element_ty))


@jit
def attention(  # type: ignore[no-untyped-def]
    q,  # [heads, tokens, WIDTH], and so are k, v and out
    k,
    v,
    out,
    tokens,
    scale,  # of the logits, times log2(e)
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """softmax(q k^T) v per head, with the running maximum and sum of flash attention."""
    head = tl.program_id(1) * tokens * WIDTH
    row, column, key = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, WIDTH), tl.arange(0, BLOCK_N)
    queries = tl.load(q + head + row[:, None] * WIDTH + column)
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    at_k = k + head + key[None, :] * WIDTH + column[:, None]
    at_v = v + head + key[:, None] * WIDTH + column
    for _ in range(0, tokens, BLOCK_N):
        logits = tl.dot(queries, tl.load(at_k))
        highest = tl.maximum(most, tl.max(logits, 1) * scale)
        share = tl.exp2(logits * scale - highest[:, None])
        shrink = tl.exp2(most - highest)
        weight = weight * shrink + tl.sum(share, 1)
        total = tl.dot(share.to(v.dtype.element_ty), tl.load(at_v), total * shrink[:, None])
        most = highest
        at_k += BLOCK_N * WIDTH
        at_v += BLOCK_N * WIDTH
    result = total / weight[:, None]
    tl.store(out + head + row[:, None] * WIDTH + column, result.to(out.dtype.element_ty))


@jit
def copy(source, target, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whole blocks of 16-bit values, 16 bytes per thread and load."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at))


def _empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def matmuls(m: int, n: int, k: int, dtype: torch.dtype, blocks: Iterable[tuple[int, ...]]) -> list[Launch]:
    """The matmul in some configurations: (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages)."""
    made = []
    for block_m, block_n, block_k, warps, stages in blocks:
        arguments = {
            "a": _empty(m, k, dtype=dtype), "b": _empty(n, k, dtype=dtype), "c": _empty(m, n), "M": m, "N": n, "K": k,
            "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8,
        }  # fmt: skip
        made.append(Launch(matmul, (m // block_m * (n // block_n),), arguments, warps, stages))
    return made


def attentions(heads: int, tokens: int, width: int, blocks: Iterable[tuple[int, ...]]) -> list[Launch]:
    """The attention in some configurations: (BLOCK_M, BLOCK_N, warps, stages)."""
    made = []
    for block_m, block_n, warps, stages in blocks:
        tensors = {name: _empty(heads, tokens, width) for name in ("q", "k", "v", "out")}
        numbers = {"tokens": tokens, "scale": 0.18, "WIDTH": width, "BLOCK_M": block_m, "BLOCK_N": block_n}
        made.append(Launch(attention, (cdiv(tokens, block_m), heads), {**tensors, **numbers}, warps, stages))
    return made


def copies(values: int, block: int = 4096) -> list[Launch]:
    """The copy of this many 16-bit values."""
    return [
        Launch(copy, (values // block,), {"source": _empty(values), "target": _empty(values), "BLOCK": block}, 4, 1)
    ]


@dataclass(frozen=True)
class Published:
    """A figure that others measured: its range, its unit, and what one launch does in units times seconds.

    tolerance: of the ratio of predicted and published.
    """

    name: str
    arch: int
    low: float
    high: float
    unit: str
    work: float
    launches: Callable[[], list[Launch]]
    source: str
    tolerance: float = 0.15


WIDE = ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4))
NARROW = ((128, 128, 32, 4, 3), (128, 128, 32, 4, 4), (128, 256, 32, 8, 3), (128, 128, 64, 8, 3), (128, 64, 32, 4, 4))
FP8 = ((128, 256, 128, 8, 3), (128, 128, 128, 8, 3), (128, 128, 128, 8, 4))
FLASH = ((128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (128, 32, 4, 4))
ON_H100 = "Triton on an H100, which has the H200's SMs"
ATTENTION = 0.5
"""The tolerance of attention."""

TABLE = (
    Published("matmul 3072^3, fp16", 90, 525, 525, "TFLOP/s", 2 * 3072**3 / 1e12,
              lambda: matmuls(3072, 3072, 3072, torch.float16, WIDE), ON_H100),
    Published("matmul 8192x8192x4096, fp8", 90, 1208, 1208, "TFLOP/s", 2 * 8192 * 8192 * 4096 / 1e12,
              lambda: matmuls(8192, 8192, 4096, torch.float8_e4m3fn, FP8), ON_H100),
    Published("attention, heads of 64", 90, 382, 382, "TFLOP/s", 4 * 128 * 4096**2 * 64 / 1e12,
              lambda: attentions(128, 4096, 64, FLASH), ON_H100, ATTENTION),
    Published("copy of 1 GiB", 90, 4.3, 4.3, "TB/s", 2 * 2**30 / 1e12, lambda: copies(1 << 29), "large copies"),
    Published("matmul 4096^3, fp16", 89, 150, 160, "TFLOP/s", 2 * 4096**3 / 1e12,
              lambda: matmuls(4096, 4096, 4096, torch.float16, NARROW), "cuBLAS and Triton"),
    Published("matmul 4096^3, fp16", 80, 220, 245, "TFLOP/s", 2 * 4096**3 / 1e12,
              lambda: matmuls(4096, 4096, 4096, torch.float16, NARROW), "cuBLAS and Triton"),
    Published("attention, heads of 64", 80, 160.6, 160.6, "TFLOP/s", 4 * 128 * 4096**2 * 64 / 1e12,
              lambda: attentions(128, 4096, 64, FLASH), "outputs of Triton's tutorial 06, of a GPU like it", ATTENTION),
)  # fmt: skip
"""The page with the tutorials' outputs is triton-lang.org/main/getting-started/tutorials; it names no GPU. Of the other
figures no address is known to us."""


@dataclass(frozen=True)
class Row:
    """A published figure and its prediction, in the same unit."""

    published: Published
    predicted: float

    @property
    def ratio(self) -> float:
        """Predicted over published: 1 inside its range."""
        nearest = min(max(self.predicted, self.published.low), self.published.high)
        return self.predicted / nearest

    @property
    def within(self) -> bool:
        """Whether it is inside its tolerance."""
        return abs(self.ratio - 1) <= self.published.tolerance

    def cells(self) -> list[str]:
        """The row of the page's table."""
        one = self.published
        span = f"{one.low:g}" if one.low == one.high else f"{one.low:g}-{one.high:g}"
        name = f"{one.name} ({one.source})"
        return [name, MACHINES[one.arch].name, span, one.unit, f"{self.predicted:.4g}", f"{self.ratio:.2f}"]


def keep(found: Sequence[Row]) -> None:
    """Store the rows for the page."""
    lines = ",\n ".join(json.dumps(row.cells()) for row in found)
    FILE.write_text(f"[\n {lines}\n]\n", encoding="utf-8")


def compare(table: Sequence[Published] = TABLE, workers: int = 1) -> list[Row]:
    """Predict the table's kernels. ValueError if one cannot be predicted."""
    jobs = {one: [Job(program(launch, one.arch), MACHINES[one.arch]) for launch in one.launches()] for one in table}
    found = predict_all((job for several in jobs.values() for job in several), {}, workers)
    rows = []
    for one, several in jobs.items():
        times = []
        for job in several:
            made = found[job.key]
            if isinstance(made, str):
                raise ValueError(f"{one.name}, sm_{one.arch}: {made}")
            times.append(made.us)
        rows.append(Row(one, one.work / (min(times) * 1e-6)))
    return rows


def rows() -> list[list[str]]:
    """The page's table, as the last `--calibrate` left it."""
    return read_json(FILE, 1 << 20) if FILE.exists() else []
