"""Compile a kernel ahead of time for an architecture and read its resource usage. No GPU is needed."""

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
    torch.bool: "*u1",
}
ALIGNED = [["tt.divisibility", 16]]
WIDE_BYTES = 16
"""Bytes per thread of the widest load and store that every architecture has."""
TT_DOT = re.compile(r"tt\.dot .*: tensor<(\d+)x\d+x(?:f16|bf16|f8\w+)> \* ")


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel by module and name, its arguments as Triton specializes them, and the target."""

    arch: int
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    warps: int
    stages: int

    @property
    def source_kernel(self) -> Kernel:
        """The kernel object."""
        return getattr(importlib.import_module(self.module), self.kernel)

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the compilation: of all fields, and of the source of the kernel and the functions it calls."""
        text = repr((self.arch, self.signature, self.constants, self.aligned, self.warps, self.stages))
        return hashlib.sha256((text + source(self.source_kernel)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Code:
    """Resource usage and instructions of a compiled variant.

    wide_loads, wide_stores: instructions of 16 bytes per thread or more. narrow_loads, narrow_stores: the tensors, by
    argument, most of whose bytes are loaded (stored) by narrower instructions. product_rows: M of the largest tl.dot
    with operands of 16 bits or fewer in the Triton IR, 0 for none. wgmma: whether dots use Hopper's warpgroup
    instructions. waits: whether griddepcontrol.wait precedes every access to global memory.
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
    """The result of a compilation: the code, or an error; Triton's version and the compile time in seconds."""

    code: Code | None
    error: str
    triton: str
    seconds: float


def variant(arch: int, launch: Launch) -> Variant:
    """A launch as Triton specializes it: None and 1 become constants; tensors and multiples of 16 are aligned.

    Arguments annotated as `extent` or `extent_or_1` are not (`launch/kernel.py`).
    """
    signature, constants, aligned = {}, {}, []
    for name in launch.kernel.names:
        value, kernel = launch.arguments[name], launch.kernel
        kind = _kind(value)
        is_one = isinstance(value, int) and value == 1 and name not in kernel.extents
        if name in kernel.constants or value is None or is_one:
            constants[name], kind = value, "constexpr"
        elif name not in kernel.extents | kernel.extents_or_1 and _is_aligned(value):
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
    """Whether Triton assumes divisibility by 16. Tensors are aligned as torch allocates them, except offset views."""
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


@functools.cache
def source(kernel: Kernel) -> str:
    """The source of a kernel and of every function that it calls."""
    return "".join(inspect.getsource(one.function) for one in kernel.reachable())


def _source_of(v: Variant) -> Any:
    """The variant as Triton's compiler takes it."""
    from triton.compiler import ASTSource

    kernel = v.source_kernel.made
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    return ASTSource(
        fn=kernel,
        signature=dict(v.signature),
        constexprs={(index[name],): value for name, value in v.constants},
        attrs={(index[name],): ALIGNED for name in v.aligned},
    )


def _options(v: Variant) -> dict[str, Any]:
    """As `Launch.options`."""
    return {"num_warps": v.warps, "num_stages": v.stages, "enable_fp_fusion": True}


def build(v: Variant) -> Any:
    """Compile and return Triton's CompiledKernel."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", v.arch, 32)
    with _as_active_device(target):
        return triton.compile(_source_of(v), target=target, options=_options(v))


def front_end_error(v: Variant) -> str:
    """What Triton's front end says of the variant, nothing if it accepts it: no code is generated."""
    import triton
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    target = GPUTarget("cuda", v.arch, 32)
    backend, source = make_backend(target), _source_of(v)
    options = backend.parse_options(_options(v) | source.parse_options())
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    try:
        with _as_active_device(target):
            source.make_ir(target, options, functions, backend.get_module_map(), context)
    except triton.TritonError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def _as_active_device(target: Any) -> Iterator[None]:
    """Make the target Triton's active device: kernels query that, not the target they are compiled for."""
    from triton.runtime import driver

    before = driver._active  # Triton's reset_active() needs a GPU
    driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    try:
        yield
    finally:
        driver._active = before


def sass(v: Variant) -> str:
    """Compile and return the SASS as text."""
    return _dump(build(v).asm["cubin"], "--dump-sass")


def compile_variant(v: Variant) -> Compiled:
    """Compile and read resource usage and instructions."""
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


def resource_usage(v: Variant) -> tuple[int, int, int] | None:
    """Registers per thread, bytes of shared memory, bytes spilled per thread; None if it does not compile."""
    import triton

    try:
        built = build(v)
    except (triton.TritonError, RuntimeError, ValueError, TypeError):
        return None
    text = _dump(built.asm["cubin"], "--dump-resource-usage")
    return _registers(text), built.metadata.shared, _stack(text)


def read_code(asm: Mapping[str, Any], shared: int, parameters: Sequence[str]) -> Code:
    """Resource usage of a compiled kernel: registers and spills from the cubin, instructions from the PTX.

    asm: Triton's output by stage. parameters: names of the run-time arguments, in order.
    """
    text = _dump(asm["cubin"], "--dump-resource-usage")
    loads, stores = ptx.widths(asm["ptx"], parameters)
    wide_loads, wide_stores = (sum(width >= WIDE_BYTES for _, width in side) for side in ptx.accesses(asm["ptx"]))
    return Code(
        registers=_registers(text),
        spill_bytes=_stack(text),
        shared_bytes=shared,
        tensor_core=bool(ptx.MMA.search(asm["ptx"])),
        wgmma=bool(ptx.WGMMA.search(asm["ptx"])),
        product_rows=max((int(rows) for rows in TT_DOT.findall(asm["ttir"])), default=0),
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
    """Bytes of local memory per thread: spilled registers."""
    return max(int(n) for n in re.findall(r"STACK:(\d+)", text))


def _narrow(widths: Mapping[str, list[int]]) -> tuple[str, ...]:
    return tuple(sorted(name for name, w in widths.items() if 2 * sum(n for n in w if n >= WIDE_BYTES) < sum(w)))


def compile_all(
    todo: Iterable[Variant],
    workers: int,
    triton_folder: Path | None = None,
    function: Callable[[Variant], Any] = compile_variant,
) -> list[Any]:
    """Apply `function` to every variant in worker processes; this process's TRITON_INTERPRET is unaffected.

    triton_folder: a folder with another Triton than the installed one (pip install --target). function: returns a
    `Compiled` by default.
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
    """Set up a worker before it imports Triton: no interpreter, and no cache, which would falsify the compile time."""
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    if triton_folder:
        sys.path.insert(0, triton_folder)
