"""Compile a kernel ahead of time for an architecture, and read what the machine code uses. No GPU is needed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.static import ptx
from tinysr_kernels.launch.kernel import Kernel
from tinysr_kernels.launch.plan import Launch

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
ALIGNED = [["tt.divisibility", 16]]
WIDE = 16
"""Bytes a thread moves by one of the widest instructions that every architecture has."""
PRODUCT = re.compile(r"tt\.dot .*: tensor<(\d+)x\d+x(?:f16|bf16|f8\w+)> \* ")


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel by module and name, its arguments as Triton specialises them, and the target."""

    arch: int
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    warps: int
    stages: int

    @property
    def made_of(self) -> Kernel:
        """The kernel itself."""
        return getattr(importlib.import_module(self.module), self.kernel)

    @functools.cached_property
    def digest(self) -> str:
        """Identifies the compilation: all of the above, and the source of the kernel and of what it calls."""
        text = repr((self.arch, self.signature, self.constants, self.aligned, self.warps, self.stages))
        return hashlib.sha256((text + source(self.made_of)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Code:
    """What the machine code of a variant uses.

    wide_loads, wide_stores: instructions that move 16 bytes or more a thread. narrow_loads, narrow_stores: the tensors,
    by argument, of whose bytes most are loaded (stored) in smaller pieces. product_rows: of the largest product with
    operands of 16 bits or fewer in the compiler's input, 0 for none. wgmma: whether products run on Hopper's
    warpgroup instructions. waits: whether it waits for the launch before, ahead of every access to global memory.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core: bool
    wgmma: bool
    product_rows: int
    wide_loads: int
    wide_stores: int
    narrow_loads: tuple[str, ...]
    narrow_stores: tuple[str, ...]
    waits: bool


@dataclass(frozen=True)
class Compiled:
    """The outcome of a compilation: the code, or why there is none; Triton's version and the seconds it took."""

    code: Code | None
    error: str
    triton: str
    seconds: float


def variant(arch: int, launch: Launch) -> Variant:
    """A launch as Triton would specialise it: None and 1 are constants, multiples of 16 and tensors are aligned."""
    signature, constants, aligned = {}, {}, []
    for name in launch.kernel.names:
        value = launch.arguments[name]
        kind = _kind(value)
        if name in launch.kernel.constants or value is None or (isinstance(value, int) and value == 1):
            constants[name], kind = value, "constexpr"
        elif _is_aligned(value):
            aligned.append(name)
        signature[name] = kind
    function = launch.kernel.function
    return Variant(
        arch,
        function.__module__,
        function.__qualname__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(aligned),
        launch.num_warps,
        launch.num_stages,
    )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    return "constexpr"


def _is_aligned(value: Any) -> bool:
    """Tensors begin on 16 bytes, as torch allocates them, unless they are views that begin elsewhere."""
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


@functools.cache
def source(kernel: Kernel) -> str:
    """The source of a kernel and of every function that it calls."""
    return "".join(inspect.getsource(one.function) for one in _reachable(kernel, set()))


def _reachable(kernel: Kernel, seen: set[str]) -> Iterator[Kernel]:
    if kernel.function.__name__ in seen:
        return
    seen.add(kernel.function.__name__)
    yield kernel
    for name in sorted(kernel.function.__code__.co_names):
        called = kernel.function.__globals__.get(name)
        if isinstance(called, Kernel):
            yield from _reachable(called, seen)


def build(v: Variant) -> Any:
    """Compile; what Triton makes of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = v.made_of.made
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    target = GPUTarget("cuda", v.arch, 32)
    with _present(target):
        return triton.compile(
            ASTSource(
                fn=kernel,
                signature=dict(v.signature),
                constexprs={(index[name],): value for name, value in v.constants},
                attrs={(index[name],): ALIGNED for name in v.aligned},
            ),
            target=target,
            options={"num_warps": v.warps, "num_stages": v.stages},
        )


@contextlib.contextmanager
def _present(target: Any) -> Iterator[None]:
    """As if the target were the current device: kernels ask Triton for that, not for what they are compiled for."""
    from triton.runtime import driver

    before = driver._active  # its own reset_active() wants a GPU
    driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    try:
        yield
    finally:
        driver._active = before


def listing(v: Variant) -> str:
    """Compile, and give the instructions as text."""
    return _dump(build(v).asm["cubin"], "--dump-sass")


def compile_variant(v: Variant) -> Compiled:
    """Compile and read the machine code."""
    import triton

    started = time.perf_counter()
    try:
        built = build(v)
    except (triton.TritonError, RuntimeError, ValueError, TypeError) as error:
        return Compiled(None, str(error), triton.__version__, round(time.perf_counter() - started, 3))
    seconds = time.perf_counter() - started
    pointers = [name for name, kind in v.signature if kind != "constexpr"]
    code = read_code(built.asm, built.metadata.shared, pointers)
    return Compiled(code, "", triton.__version__, round(seconds, 3))


def needs(v: Variant) -> tuple[int, int, int] | None:
    """Registers a thread, bytes of shared memory and bytes spilled, or None where it does not compile."""
    import triton

    try:
        built = build(v)
    except (triton.TritonError, RuntimeError, ValueError, TypeError):
        return None
    text = _dump(built.asm["cubin"], "--dump-resource-usage")
    return _registers(text), built.metadata.shared, _stack(text)


def read_code(asm: Mapping[str, Any], shared: int, parameters: Sequence[str]) -> Code:
    """What a compiled kernel uses: registers and spills by the machine code, its instructions by the PTX.

    asm: by stage, as Triton gives it. parameters: names of the arguments that are left at run time, in order.
    """
    text = _dump(asm["cubin"], "--dump-resource-usage")
    loads, stores = ptx.widths(asm["ptx"], parameters)
    wide_loads, wide_stores = (sum(width >= WIDE for _, width in side) for side in ptx.accesses(asm["ptx"]))
    return Code(
        registers=_registers(text),
        spill_bytes=_stack(text),
        shared_bytes=shared,
        tensor_core=bool(ptx.PRODUCT.search(asm["ptx"])),
        wgmma=bool(ptx.WGMMA.search(asm["ptx"])),
        product_rows=max((int(rows) for rows in PRODUCT.findall(asm["ttir"])), default=0),
        wide_loads=wide_loads,
        wide_stores=wide_stores,
        narrow_loads=_narrow(loads),
        narrow_stores=_narrow(stores),
        waits=ptx.waits(asm["ptx"]),
    )


def _dump(cubin: bytes, *what: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *what, file.name], capture_output=True, text=True, check=True).stdout


def _registers(text: str) -> int:
    return max(int(n) for n in re.findall(r"REG:(\d+)", text))


def _stack(text: str) -> int:
    """Bytes a thread keeps in memory: registers that were spilled."""
    return max(int(n) for n in re.findall(r"STACK:(\d+)", text))


def _narrow(widths: Mapping[str, list[int]]) -> tuple[str, ...]:
    return tuple(sorted(name for name, w in widths.items() if 2 * sum(n for n in w if n >= WIDE) < sum(w)))


def compile_all(
    todo: Iterable[Variant],
    workers: int,
    triton_folder: Path | None = None,
    function: Callable[[Variant], Any] = compile_variant,
) -> list[Any]:
    """Compile in worker processes, which leave this one's choice between compiler and interpreter alone.

    triton_folder: where another Triton than the installed one lies (pip install --target). function: gives a
    `Compiled` for each variant, unless it is another.
    """
    todo = list(todo)
    if not todo:
        return []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        max_workers=min(workers, len(todo)),
        mp_context=context,
        initializer=_start_worker,
        initargs=(str(triton_folder.resolve()) if triton_folder else "",),
    ) as pool:
        done = []
        for compiled in pool.map(function, todo):
            done.append(compiled)
            if sys.stderr.isatty():
                print(
                    f"{len(done)} of {len(todo)} compiled",
                    end="\n" if len(done) == len(todo) else "\r",
                    file=sys.stderr,
                )
    return done


def _start_worker(triton_folder: str) -> None:
    """Before Triton is imported: compile, and past Triton's cache, which would hide the time."""
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    if triton_folder:
        sys.path.insert(0, triton_folder)
