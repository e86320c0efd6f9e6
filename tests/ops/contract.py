"""What every operator owes, as a class of tests: a subclass names the operator, its oracle and some mistakes."""

from __future__ import annotations

import copy
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.bounds import RESPONSES, Verdict, arithmetic, disturbed, errors, is_exact, judge, tensors
from tests.ops.cases import CASES, Arguments, Case, convert
from tinysr_kernels.ops import REGISTRY

BATCHED = {
    "x",
    "residual",
    "shortcut",
    "skip",
    "q",
    "qkv",
    "t",
    "z",
    "style",
    "x2",
    "x_scale",
    "moments",
    "skip_moments",
    "row_moments",
    "normed_skip",
    "norm_moments",
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DRAWS = 5


def reference_of(op: str) -> Callable[..., Any]:
    """The reference of an operator as a function of its arguments."""
    return lambda *args, **kwargs: REGISTRY[op](*args, **kwargs).reference()


def opcheck(op: str, arguments: Arguments) -> None:
    """torch.library's checks of an operator: schema, autograd, fake tensors, tracing with static and dynamic shapes.

    That of the schema compares what went in before and after by a product, which torch has not for e4m3.
    """
    quantized = any(isinstance(v, Tensor) and v.dtype == torch.float8_e4m3fn for v in arguments.values())
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    checks += () if quantized else ("test_schema",)
    torch.library.opcheck(REGISTRY[op].overload(), (), arguments, test_utils=checks)


def relaid(t: Any, layout: str) -> Any:
    """The same values in another memory layout."""
    if not isinstance(t, Tensor) or t.dim() == 0:
        return t
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    fill = math.nan if t.is_floating_point() else 255
    larger = torch.full([extent + 3 for extent in t.shape], fill, dtype=t.dtype)
    view = larger[tuple(slice(1, extent + 1) for extent in t.shape)]
    view.copy_(t)
    return view


def _is_bytes(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8


class _BiasApart(TorchFunctionMode):
    """Convolutions add their bias in a step of its own, as torch does where cuDNN convolves."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.conv2d, F.conv_transpose2d) and len(args) > 2 and args[2] is not None:
            return func(*args[:2], None, *args[3:], **(kwargs or {})) + args[2][:, None, None]
        return func(*args, **(kwargs or {}))


class OperatorContract:
    """Inherit as Test<Operator> and fill in the attributes; every test then runs on the operator's cases."""

    op: ClassVar[str]
    oracle: ClassVar[Callable[..., Any]]  # the docstring's mathematics on float64 tensors
    eager: ClassVar[Callable[..., Any]]  # PyTorch's own operations in the tensors' dtype
    mutants: ClassVar[dict[str, Callable[..., Any]]]  # wrong implementations that must be found out
    mistakes: ClassVar[list[tuple[Arguments, str]]]  # arguments put into the first case, pattern of the ValueError
    channels_last = True  # memory format of the result
    # Whether a sample's result has the same bits in any batch. Convolutions and products of the library choose
    # their algorithm by the batch; theirs is then only as accurate.
    same_bits_in_any_batch = True
    bytes_are_numbers = False  # whether the oracle takes the values of bytes in float64 as well
    # Whether it has the same bits wherever its inputs begin in memory.
    same_bits_at_any_address = True

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrise by the arguments that a test asks for."""
        names, cases = metafunc.fixturenames, CASES[self.op]
        if "case" in names:
            metafunc.parametrize("case", cases, ids=str)
        if "some_case" in names:
            metafunc.parametrize("some_case", cases[:3], ids=str)
        if "dtype" in names:
            metafunc.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
        if "mutant" in names:
            metafunc.parametrize("mutant", list(self.mutants))
        if "mistake" in names:
            metafunc.parametrize("mistake", self.mistakes, ids=[pattern for _, pattern in self.mistakes])

    def call(self, arguments: Arguments) -> Any:
        """The operator itself, through the dispatcher."""
        return REGISTRY[self.op].overload()(**arguments)

    @classmethod
    @functools.cache
    def exact(cls, case: Case, dtype: torch.dtype, draw: int = 0) -> Any:
        """The oracle's result on the arguments as rounded to dtype."""
        arguments = case.arguments(dtype, draw)
        return cls.oracle(**{k: convert(v, torch.float64) for k, v in arguments.items() if k != "dtype"})

    def terms(self, arguments: Arguments) -> float:
        """Operations that lead to an element of the result, for bounds.py: its share of the flops of a call."""
        meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
        flops: int = REGISTRY[self.op](**meta).cost().flops
        return flops / tensors(self.call(meta))[0].numel()

    @classmethod
    @functools.cache
    def responses(cls, case: Case, dtype: torch.dtype, draw: int) -> list[tuple[Any, Any]]:
        """The oracle's results on inputs that are off by as much as the operations round, each beside the exact one."""
        arguments, exact = case.arguments(dtype, draw), cls.exact(case, dtype, draw)
        terms = cls().terms(arguments)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{case.op} {case.name} {draw}".encode()))
        given = {k: v.double() if cls.bytes_are_numbers and _is_bytes(v) else v for k, v in arguments.items()}
        return [
            (cls.oracle(**{k: disturbed(v, dtype, terms, generator) for k, v in given.items() if k != "dtype"}), exact)
            for _ in range(RESPONSES)
        ]

    def allowed(self, case: Case, dtype: torch.dtype) -> list[float]:
        """What the arithmetic lets a result in `dtype` err, on the case's first draw."""
        exact = self.exact(case, dtype)
        nearest = [t.to(dtype) for t in tensors(exact)]
        return arithmetic(errors(nearest, exact), self.responses(case, dtype, 0))

    def judge(
        self, results: Sequence[Any], case: Case, dtype: torch.dtype, eagerly: Callable[[Arguments], Any] | None = None
    ) -> Verdict:
        """The errors of an implementation's results on the case's first draws, against the bound of bounds.py."""
        draws = range(len(results))
        return judge(
            results,
            [(eagerly or self.eagerly)(case.arguments(dtype, draw)) for draw in draws],
            [self.exact(case, dtype, draw) for draw in draws],
            lambda: [pair for draw in draws for pair in self.responses(case, dtype, draw)],
        )

    def check_as_good_as_eager(self, function: Callable[..., Any], case: Case, dtype: torch.dtype) -> None:
        """Over several draws, because the errors of a handful of elements are mostly luck."""
        verdict = self.judge([function(**case.arguments(dtype, draw)) for draw in range(DRAWS)], case, dtype)
        assert verdict.holds, verdict

    def counted_flops(self, arguments: Arguments) -> int:
        """What the flop counter sees in eager's products; operators without any say what they count."""
        with FlopCounterMode(display=False) as counter:
            type(self).eager(**arguments)
        return counter.get_total_flops()

    def eagerly(self, arguments: Arguments) -> Any:
        """Eager's result with images in channels_last memory, as networks hold them.

        Its convolutions round otherwise there than on contiguous planes: 6.8e-7 against 1.9e-7 at 240 channels.
        """
        return type(self).eager(**{k: relaid(v, "channels_last") for k, v in arguments.items()})

    def in_steps(self, arguments: Arguments) -> Any:
        """Eager's result where a convolution's is rounded before its bias is added."""
        with _BiasApart():
            return self.eagerly(arguments)

    @pytest.mark.numeric
    def test_float64(self, case: Case) -> None:
        result = self.call(case.arguments(torch.float64))
        found = [t.dtype for t in tensors(result)]
        assert found == self.result_dtypes(torch.float64, len(found))
        exact = self.exact(case, torch.float64)
        assert is_exact(result, exact), errors(result, exact)

    @pytest.mark.numeric
    def test_float(self, case: Case, dtype: torch.dtype) -> None:
        self.check_as_good_as_eager(lambda **a: self.call(a), case, dtype)

    def test_result_form(self, case: Case, dtype: torch.dtype) -> None:
        """dtype and memory format, and that fake and meta tensors promise exactly those."""
        arguments = case.arguments(dtype)
        real = tensors(self.call(arguments))
        with FakeTensorMode() as mode:
            faked = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
            fake = tensors(self.call(faked))
        meta = tensors(self.call({k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}))
        assert [r.dtype for r in real] == self.result_dtypes(dtype, len(real))
        for r, f, m in zip(real, fake, meta, strict=True):
            image = self.channels_last and r.dim() == 4
            assert r.is_contiguous(memory_format=torch.channels_last if image else torch.contiguous_format)
            for promised in (f, m):
                assert promised.dtype == r.dtype
                assert promised.shape == r.shape
                assert promised.stride() == r.stride()
            assert f.device == r.device

    def result_dtypes(self, dtype: torch.dtype, number: int) -> list[torch.dtype]:
        """The dtypes of an operator's results, one unless it says otherwise."""
        return [self.result_dtype(dtype)] * number

    def result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the result for inputs of `dtype`."""
        return dtype

    @pytest.mark.numeric
    @pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced"])
    def test_layouts(self, case: Case, layout: str) -> None:
        arguments = case.arguments(torch.float32)
        if not self.same_bits_at_any_address:
            self.check_as_good_as_eager(
                lambda **a: self.call({k: relaid(v, layout) for k, v in a.items()}), case, torch.float32
            )
            return
        moved = {k: relaid(v, layout) for k, v in arguments.items()}
        for got, want in zip(tensors(self.call(moved)), tensors(self.call(arguments)), strict=True):
            assert torch.equal(got, want)
            assert got.stride() == want.stride()

    @pytest.mark.numeric
    def test_repeatable_and_inputs_kept(self, case: Case) -> None:
        arguments = case.arguments(torch.float32)
        kept = copy.deepcopy(arguments)
        first, second = tensors(self.call(arguments)), tensors(self.call(arguments))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.equal(v, kept[k]) for k, v in arguments.items() if isinstance(v, Tensor))

    @pytest.mark.numeric
    def test_any_batch(self, case: Case) -> None:
        arguments = case.arguments(torch.float32)
        if not self.same_bits_in_any_batch:
            self.check_as_good_as_eager(self.one_by_one, case, torch.float32)
            return
        together, apart = tensors(self.call(arguments)), tensors(self.one_by_one(**arguments))
        assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))

    def one_by_one(self, **arguments: Any) -> tuple[Tensor, ...]:
        """The operator on each sample of the batch alone."""
        batched = {k for k, v in arguments.items() if k in BATCHED and v is not None and v.dim() > 1}
        if not batched:
            return tensors(self.call(arguments))
        samples = range(arguments[min(batched)].shape[0])
        parts = [{k: v[i : i + 1] if k in batched else v for k, v in arguments.items()} for i in samples]
        return tuple(torch.cat(same) for same in zip(*(tensors(self.call(p)) for p in parts), strict=True))

    def test_autocast_changes_nothing(self, some_case: Case) -> None:
        arguments = some_case.arguments(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = tensors(self.call(arguments))
        assert all(torch.equal(a, b) for a, b in zip(inside, tensors(self.call(arguments)), strict=True))

    def test_opcheck(self, some_case: Case) -> None:
        opcheck(self.op, some_case.arguments(torch.float32))

    def test_compile(self, some_case: Case) -> None:
        arguments = some_case.arguments(torch.float32)
        torch._dynamo.reset()  # each case is a function of its own, not a recompilation of the last
        compiled = torch.compile(lambda a: self.call(a), fullgraph=True, backend="aot_eager", dynamic=False)
        pairs = zip(tensors(compiled(arguments)), tensors(self.call(arguments)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

    def test_cost(self, case: Case, dtype: torch.dtype) -> None:
        arguments = case.arguments(dtype)
        cost = REGISTRY[self.op](**arguments).cost()
        moved = [*(v for v in arguments.values() if isinstance(v, Tensor)), *tensors(self.call(arguments))]
        assert cost.bytes == sum(t.nbytes for t in moved)
        assert cost.flops == self.counted_flops(arguments)

    def test_mistakes(self, mistake: tuple[Arguments, str]) -> None:
        """A wrong argument is named with what was expected and found, by the operator and by its fake."""
        changes, pattern = mistake
        arguments = {**CASES[self.op][0].arguments(torch.float32), **changes}
        with pytest.raises(ValueError, match=pattern):
            self.call(arguments)
        with pytest.raises(ValueError, match=pattern):
            self.call({k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()})

    def test_mutants_are_caught(self, mutant: str) -> None:
        """The comparisons can fail: a wrong implementation does not pass, in float64 nor in half precision."""
        wrong = self.mutants[mutant]
        cases = CASES[self.op]
        doubles = [is_exact(wrong(**c.arguments(torch.float64)), self.exact(c, torch.float64)) for c in cases]
        halves = [self.judge([wrong(**c.arguments(torch.bfloat16))], c, torch.bfloat16).holds for c in cases]
        assert not all(doubles), "passes for exact"
        assert not all(halves), "passes in bfloat16"
