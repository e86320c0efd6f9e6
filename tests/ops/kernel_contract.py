"""What every operator's kernels owe, as a class of tests: a subclass names the contract, configurations and mutations.

The kernels run in Triton's interpreter on the CPU; with TRITON_INTERPRET=0 on a machine with a GPU, on that. Mutations
are edits of the kernels' own source text: each must make a comparison fail that the true source passes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.ops.cases import CASES, Arguments, Case
from tests.ops.contract import FLOATS, OperatorContract, relaid, tensors
from tinysr_kernels.launch import configs
from tinysr_kernels.launch.backend import using
from tinysr_kernels.launch.device import GPUS
from tinysr_kernels.launch.kernel import interpreting
from tinysr_kernels.launch.plan import Plan
from tinysr_kernels.ops import REGISTRY

DEVICE = torch.device("cpu" if interpreting() else "cuda")

if interpreting():
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

    # The interpreter asks after every integer operation whether it overflowed, which takes half of its time; nothing
    # here is large enough to.
    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)

    # A GPU's tl.maximum and tl.minimum drop NaN unless told otherwise; NumPy's keep it.
    for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        setattr(InterpreterBuilder, name, lambda self, a, b, f=function: self.binary_op(a, b, f))


DRAWS = 3
"""Of each case at most: the interpreter takes a hundred times as long as a reference."""
ENOUGH = 256
"""Elements from which on one draw is enough in 16 bits, where the rounding of the result decides: the mean square of
their errors spreads by 9 %, the worst is half a unit in the last place. In float32 the worst element needs several."""


@contextlib.contextmanager
def rows_alike() -> Iterator[None]:
    """Products of the interpreter that give a row the same bits wherever it stands in a tile, as tensor cores do.

    BLAS adds in another order at the end of a tile than inside; in float64 that vanishes in the rounding.
    """
    if not interpreting():
        yield
        return
    original = InterpreterBuilder.create_dot

    def in_double(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.primitive_bitwidth == 8 or b.dtype.primitive_bitwidth == 8:
            return original(self, a, b, d, *rest)
        sums = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
        return TensorHandle(sums + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", in_double)
        yield


def to_device(value: Any, device: torch.device = DEVICE) -> Any:
    """A tensor on the device; anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


def poison(plan: Plan) -> Plan:
    """The plan with every tensor that its launches will write filled with NaN: what is not written shows.

    Bytes are filled with 173, flags with False.
    """
    given = {id(t) for t in tensors(plan.result)}
    for launch in plan.launches:
        for name, value in launch.arguments.items():
            if isinstance(value, Tensor) and (id(value) in given or name.startswith("scratch")):
                value.fill_(math.nan if value.is_floating_point() else 173 * (value.dtype != torch.bool))
    return plan


@contextlib.contextmanager
def mutated(module: Any, old: str, new: str, folder: Path) -> Iterator[Any]:
    """A copy of a kernel module in which the text `old`, which occurs once, reads `new`.

    Where the text is not in the module but in one whose functions its kernels call, the copy calls a copy's.
    """
    called = {v.function.__module__ for v in vars(module).values() if type(v).__name__ == "Kernel"}
    sources = {name: Path(sys.modules[name].__file__ or "").read_text(encoding="utf-8") for name in called}
    times = {name: text.count(old) for name, text in sources.items() if old in text}
    times = {module.__name__: times[module.__name__]} if module.__name__ in times else times
    assert list(times.values()) == [1], f"{old!r} occurs {times or 'nowhere'}"
    (where,) = times
    with contextlib.ExitStack() as stack:
        wrong = stack.enter_context(_executed(sources[where].replace(old, new), folder / "mutated.py"))
        if where == module.__name__:
            yield wrong
            return
        copied = stack.enter_context(_executed(sources[module.__name__], folder / "calling_mutated.py"))
        for name, value in vars(module).items():
            if type(value).__name__ == "Kernel" and value.function.__module__ == where:
                setattr(copied, name, getattr(wrong, name))
        yield copied


@contextlib.contextmanager
def _executed(text: str, path: Path) -> Iterator[Any]:
    """A module of this text, which is written to the path because Triton reads the source of kernels."""
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[path.stem]


class KernelContract:
    """Inherit as Test<Operator>Kernels and fill in the attributes."""

    contract: ClassVar[type[OperatorContract]]  # the operator's name, oracle and eager computation
    configs: ClassVar[dict[str, Any]]  # configurations to run besides the heuristic's, by a short name
    kernels: ClassVar[Any]  # the module whose kernels are launched, and mutated
    mutations: ClassVar[dict[str, tuple[str, str]]]  # name -> text that occurs once in the module, and what to read

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrise by the arguments that a test asks for."""
        cases = CASES[self.contract.op]
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", cases, ids=str)
        if "some_case" in metafunc.fixturenames:
            metafunc.parametrize("some_case", cases[:3], ids=str)
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
        if "config" in metafunc.fixturenames:
            metafunc.parametrize("config", list(self.configs))
        if "mutation" in metafunc.fixturenames:
            metafunc.parametrize("mutation", list(self.mutations))

    def call(self, arguments: Arguments, config: str | None = None) -> Any:
        """The operator's kernels on the device, outputs poisoned; the result on the CPU."""
        op = self.contract.op
        chosen = {} if config is None else {op: self.configs[config]}
        moved = {k: to_device(v) for k, v in arguments.items()}
        with configs.given(**chosen), torch.inference_mode():
            result = poison(REGISTRY[op](**moved).planned()[0]).run()
        moved_back = tuple(t.cpu() for t in tensors(result))
        return moved_back[0] if isinstance(result, Tensor) else moved_back

    def check(self, case: Case, dtype: torch.dtype, config: str | None, draws: int = DRAWS) -> bool:
        """Whether the kernels' errors over several draws are within the bound of tests/ops/bounds.py.

        A library's kernel rounds before our epilogue adds the bias: so does eager's convolution of cuDNN on a GPU.
        """
        contract = self.contract()
        self.result = self.call(case.arguments(dtype), config)
        elements = min(t.numel() for t in tensors(self.result))
        enough = elements >= ENOUGH and dtype != torch.float32
        more = range(1, 1 if enough else draws)
        results = [self.result, *(self.call(case.arguments(dtype, draw), config) for draw in more)]
        self.found = contract.judge(results, case, dtype, contract.in_steps if config == "library" else None)
        return self.found.holds

    @pytest.mark.numeric
    def test_numbers(self, case: Case, dtype: torch.dtype) -> None:
        """Right, and in the form that the fake implementation promises: dtype, shape and strides."""
        assert self.check(case, dtype, None), self.found
        promised = REGISTRY[self.contract.op].overload()(
            **{k: to_device(v, torch.device("meta")) for k, v in case.arguments(dtype).items()}
        )
        for got, want in zip(tensors(self.result), tensors(promised), strict=True):
            assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())

    def test_configurations(self, case: Case, config: str) -> None:
        """Other blocks than the heuristic's, in one dtype: what differs is where the blocks end."""
        assert self.check(case, torch.float16, config), self.found

    def test_layouts(self, case: Case) -> None:
        """Inputs of any strides give the same bits as dense ones, and are left alone."""
        arguments = case.arguments(torch.float32)
        expected = tensors(self.call(arguments))
        for layout in ("channels_last", "transposed", "sliced"):
            moved = {k: relaid(v, layout) for k, v in arguments.items()}
            kept = copy.deepcopy(moved)
            for got, want in zip(tensors(self.call(moved)), expected, strict=True):
                assert torch.equal(got, want), layout
            for k, v in moved.items():
                assert not isinstance(v, Tensor) or torch.equal(v, kept[k]), f"{k}, {layout}, was written to"

    def test_repeats_and_any_batch(self, case: Case) -> None:
        """The same bits from run to run, and for a sample whatever stands beside it in the batch."""
        arguments = case.arguments(torch.float16)
        contract = self.contract()
        contract.call = self.call  # type: ignore[method-assign]
        with rows_alike():
            together = tensors(self.call(arguments))
            assert all(torch.equal(a, b) for a, b in zip(together, tensors(self.call(arguments)), strict=True))
            apart = contract.one_by_one(**arguments)
        assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))

    def test_through_the_operator(self, some_case: Case) -> None:
        """The dispatcher runs the kernels where the backend says so, inside autocast and compiled graphs too."""
        overload = REGISTRY[self.contract.op].overload()
        arguments = {k: to_device(v) for k, v in some_case.arguments(torch.float32).items()}
        expected = tensors(self.call(some_case.arguments(torch.float32)))
        torch._dynamo.reset()
        compiled = torch.compile(lambda a: overload(**a), fullgraph=True, backend="aot_eager", dynamic=False)
        with using("triton"):
            for run in (lambda a: overload(**a), compiled):
                with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                    found = tensors(run(arguments))
                assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))

    def test_float64_goes_to_the_reference(self) -> None:
        arguments = CASES[self.contract.op][0].arguments(torch.float64)
        with using("triton"):
            found = REGISTRY[self.contract.op].overload()(**arguments)
        assert all(
            torch.equal(a, b)
            for a, b in zip(tensors(found), tensors(REGISTRY[self.contract.op](**arguments).reference()), strict=True)
        )

    @pytest.mark.mutation
    def test_mutations_are_caught(self, mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        old, new = self.mutations[mutation]
        with mutated(self.kernels, old, new, tmp_path) as wrong:
            for name, value in vars(wrong).items():
                if name in vars(self.kernels) and type(value).__name__ == "Kernel":
                    monkeypatch.setattr(self.kernels, name, value)
            passed = (
                self.check(case, torch.float16, config, draws=1)
                for config in (None, *self.configs)
                for case in CASES[self.contract.op]
            )
            assert not all(passed), "nothing noticed"

    def test_configurations_fit_every_gpu(self, case: Case) -> None:
        """Configurations that the plan accepts, for each card, and that JSON holds without loss."""
        call = REGISTRY[self.contract.op](**case.arguments(torch.float16))
        for gpu in GPUS.values():
            space = set(call.space(gpu))
            assert space
            for chosen in (call.heuristic(gpu), *space):
                assert isinstance(chosen, call.config)
                assert all(type(v) in (int, str, bool) for v in dataclasses.asdict(chosen).values())
                assert call.plan(chosen).launches


class KernelMutations(KernelContract):
    """Of a further module whose kernels serve an operator that another class tests: the mutations alone."""

    test_numbers = None
    test_configurations = None
    test_layouts = None
    test_repeats_and_any_batch = None
    test_through_the_operator = None
    test_float64_goes_to_the_reference = None
    test_configurations_fit_every_gpu = None
