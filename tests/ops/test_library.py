"""The library forms of operators: as good as eager PyTorch, chosen where the backend says so, never in tf32."""

from __future__ import annotations

import copy
import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.bounds import tensors
from tests.ops.cases import CASES, Case
from tests.ops.contract import DRAWS, FLOATS, OperatorContract, opcheck, relaid
from tinysr_kernels.launch import guard
from tinysr_kernels.launch.backend import using
from tinysr_kernels.launch.plan import Launch
from tinysr_kernels.ops import REGISTRY, Operator, call, library_math
from tinysr_kernels.ops.norm.channel_moments import library_moments_of

HERE = Path(__file__).parent
ENOUGH = 64
"""Elements over all draws from which the mean square of their roundings says something."""


@functools.cache
def contracts() -> dict[str, type[OperatorContract]]:
    """The class that tests each operator's reference, by the operator's name."""
    found = {}
    for path in sorted(HERE.glob("*/test_*.py")):
        if not path.stem.endswith("_kernel"):
            module = importlib.import_module(f"tests.ops.{path.parent.name}.{path.stem}")
            classes = (v for v in vars(module).values() if isinstance(v, type) and issubclass(v, OperatorContract))
            found |= {one.op: one for one in classes if hasattr(one, "op")}
    return found


OPERATORS = sorted(name for name, op in REGISTRY.items() if op.library is not Operator.library)
ALL = [pytest.param(case, id=f"{op}-{case}") for op in OPERATORS for case in CASES[op]]
SOME = [pytest.param(case, id=f"{op}-{case}") for op in OPERATORS for case in CASES[op][:3]]


def library(op: str, **arguments: Any) -> Any:
    """The library form's result."""
    return REGISTRY[op](**arguments).library()


def check(case: Case, dtype: torch.dtype, draws: int) -> None:
    """Within the bound of tests/ops/bounds.py, in the form that the fake implementation promises, inputs unchanged.

    The phases of an upsampling convolution are rounded before the bias is added: so is eager's convolution of cuDNN.
    """
    contract = contracts()[case.op]()
    made = REGISTRY[case.op](**case.arguments(dtype))
    kept = copy.deepcopy(made.arguments)
    result = made.library()
    for got, want in zip(tensors(result), tensors(made.empty()), strict=True):
        assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    assert all(torch.equal(v, kept[k]) for k, v in made.arguments.items() if isinstance(v, Tensor))
    draws = max(draws, -(-ENOUGH // min(t.numel() for t in tensors(result))))
    results = [library(case.op, **case.arguments(dtype, i)) for i in range(draws)]
    verdict = contract.judge(results, case, dtype, contract.in_steps if "upsample" in case.op else None)
    assert verdict.holds, verdict


def test_who_has_one() -> None:
    """Where networks spend their time; the others leave it to the reference."""
    assert {
        "attention", "conv3x3", "conv3x3_moments", "conv3x3_norm", "group_norm", "input_conv", "layer_norm", "linear",
        "linear_fp8", "linear_row_moments", "patch_embed", "patch_embed_row_moments", "sepconv", "sepconv_block",
        "sepconv_moments", "tanh_scaled", "unpatchify_subtract", "upsample_conv", "upsample_conv_norm",
    } <= set(OPERATORS)  # fmt: skip
    for op in set(REGISTRY) - set(OPERATORS):
        arguments = CASES[op][0].arguments(torch.bfloat16)
        expected = tensors(REGISTRY[op](**arguments).reference())
        assert all(torch.equal(a, b) for a, b in zip(tensors(library(op, **arguments)), expected, strict=True))


@pytest.mark.numeric
@pytest.mark.parametrize("case", ALL)
def test_bfloat16(case: Case) -> None:
    check(case, torch.bfloat16, 1)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("case", SOME)
def test_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, 1)


@pytest.mark.long
@pytest.mark.numeric
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", ALL)
def test_all(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, DRAWS)


@pytest.mark.parametrize("case", SOME)
def test_layouts(case: Case) -> None:
    """Inputs of any strides are laid out first."""
    arguments = case.arguments(torch.bfloat16)
    expected = tensors(library(case.op, **arguments))
    for layout in ("channels_last", "transposed", "sliced"):
        moved = {k: relaid(v, layout) for k, v in arguments.items()}
        for got, want in zip(tensors(library(case.op, **moved)), expected, strict=True):
            assert torch.equal(got, want), layout
            assert got.stride() == want.stride()


@pytest.mark.parametrize("op", ["conv3x3_norm", "linear"])
def test_opcheck(op: str) -> None:
    with using("library"):
        opcheck(op, CASES[op][0].arguments(torch.bfloat16))


@pytest.mark.long
@pytest.mark.parametrize("op", OPERATORS)
def test_opcheck_of_all(op: str) -> None:
    with using("library"):
        opcheck(op, CASES[op][0].arguments(torch.bfloat16))


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 63, 5, 7), (1, 64, 96, 80), (3, 3, 1, 1)])
def test_statistics_in_16_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Float32 from all of the elements, at a mean of 50 standard deviations."""
    x = (torch.randn(shape) + 50).to(dtype)
    found = library_moments_of(x)
    variance, mean = torch.var_mean(x.double(), (2, 3), correction=0)
    assert found.dtype == torch.float32
    assert found.shape == (shape[0], 2, shape[1])
    torch.testing.assert_close(found[:, 0].double(), mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[:, 1].double(), variance, rtol=1e-3, atol=1e-6)


# Which form runs.


@pytest.fixture
def told_apart(monkeypatch: pytest.MonkeyPatch) -> Any:
    """tanh_scaled on [1,2,2,2], whose forms return 1 (reference) and 2 (library)."""
    monkeypatch.setattr(REGISTRY["tanh_scaled"], "reference", lambda self: torch.ones_like(self.z))
    monkeypatch.setattr(REGISTRY["tanh_scaled"], "library", lambda self: 2 * torch.ones_like(self.z))

    def run(dtype: torch.dtype = torch.float32) -> str:
        value = int(REGISTRY["tanh_scaled"].overload()(torch.zeros(1, 2, 2, 2, dtype=dtype), 1.0)[0, 0, 0, 0])
        return {1: "reference", 2: "library"}[value]

    return run


def test_which_form_runs_on_a_cpu(told_apart: Any) -> None:
    """The library form only if it is asked for, and never in float64."""
    assert told_apart() == "reference"
    for backend, expected in (("library", "library"), ("reference", "reference"), ("auto", "reference")):
        with using(backend):
            assert [told_apart(dtype) for dtype in FLOATS] == [expected] * 3
            assert told_apart(torch.float64) == "reference"


def test_bfloat16_where_the_device_has_none(told_apart: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN refuses it below compute capability 8.0: the reference computes in float32."""
    monkeypatch.setattr(call, "has_bfloat16", lambda device: False)
    with using("library"):
        assert [told_apart(dtype) for dtype in FLOATS] == ["library", "library", "reference"]


def test_a_barred_operator_runs_its_library_form(told_apart: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that cannot be launched are barred by the guard; what they do not take is the reference's."""
    launched = []

    def fail(self: Launch, pdl: bool = False) -> None:
        launched.append(self)
        names: dict[str, Any] = {"__name__": "triton.runtime.driver"}
        exec("def fail():\n    raise RuntimeError('Failed to find C compiler')\n", names)  # noqa: S102
        names["fail"]()

    monkeypatch.setattr(Launch, "run", fail)
    monkeypatch.setattr(call, "kernels_run_on", lambda device: True)
    monkeypatch.setattr(guard, "interpreting", lambda: False)
    monkeypatch.delenv(guard.SWITCH)
    guard.forget()
    try:
        with using("triton"):
            assert [told_apart(), told_apart(), told_apart(torch.float64)] == ["library", "library", "reference"]
    finally:
        guard.forget()
    assert len(launched) == 1


# What libraries are asked for.


class _Cudnn(TorchDispatchMode):
    """Computes cuDNN's convolution without it, and remembers its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.cudnn_convolution.default:
            return func(*args, **(kwargs or {}))
        self.calls.append(args[2:])
        x, weight, padding, stride, dilation, groups = args[:6]
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)


CONVOLUTIONS = ("conv3x3", "sepconv", "upsample_conv", "input_conv", "patch_embed", "wavelet_fix")


@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_float32_convolutions_never_take_tf32(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's are told so in each call, by reference and library form; PyTorch's own switch stays as it is."""
    before = torch.backends.cudnn.allow_tf32
    made = REGISTRY[op](**CASES[op][0].arguments(torch.float32))
    expected = tensors(made.reference())
    monkeypatch.setattr(library_math, "_by_cudnn", lambda x: True)
    for form in (made.reference, made.library):
        with _Cudnn() as cudnn:
            found = tensors(form())
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want)
        assert cudnn.calls
        assert all((benchmark, tf32) == (False, False) for *_, benchmark, _, tf32 in cudnn.calls)
    assert torch.backends.cudnn.allow_tf32 == before


def test_no_other_convolution() -> None:
    """Every operator convolves by `library_math.conv2d`, which knows of tf32."""
    ops = Path(library_math.__file__).parent
    found = [path.name for path in ops.rglob("*.py") if "F.conv2d(" in path.read_text(encoding="utf-8")]
    assert sorted(found) == ["implicit_gemm.py", "library_math.py"]
