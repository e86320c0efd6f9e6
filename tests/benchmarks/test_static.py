"""`python -m benchmarks static`: which calls it covers, what it reads from the machine code, and its faults.

`make static` compiles everything; these tests compile one or two kernels.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.hardware import resident_warps
from benchmarks.static import generate_docs, machine_code, ptx, static
from benchmarks.static.network_calls import CALLS, main_calls
from tinysr_kernels import ops
from tinysr_kernels.launch.device import GPUS, assume
from tinysr_kernels.ops import REGISTRY, device_functions
from tinysr_kernels.ops.conv.kernels import sepconv as sepconv_kernel

pytest.importorskip("triton.backends.nvidia", reason="the compiler's own tools are needed")

DESIGN_FIELDS = (
    "op config arch triton registers spill_bytes shared_bytes shared_limit tensor_core wide_loads wide_stores seconds"
)
CODE = machine_code.Code(128, 0, 1024, True, True, 64, 4, 2, ("bias", "x"), ("out", "scratch"), True)


@pytest.fixture
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first call of each operator."""
    for op in CALLS:
        first = next(CALLS[op](torch.float16))
        monkeypatch.setitem(CALLS, op, lambda dtype, first=first: iter([first]))


def test_a_kernel_is_compiled_and_reported(few_calls: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """sepconv on Hopper: wgmma, wide loads and stores; the report contains them and is written."""
    file = tmp_path / "static.json"
    arguments = ["static", "--op", "sepconv", "--arch", "90", "--dtype", "float16", "--fresh", "--json", str(file)]
    assert main(arguments) == 0, capsys.readouterr()
    (report,) = static.read_reports(file).values()
    assert list(vars(report))[: len(DESIGN_FIELDS.split())] == DESIGN_FIELDS.split()
    assert (report.op, report.arch, report.kernel) == ("sepconv", 90, "march")
    assert 16 <= report.registers <= 255
    assert report.spill_bytes == 0
    assert report.shared_bytes <= report.shared_limit
    assert (report.tensor_core, report.wgmma) == (True, True)
    assert report.product_rows >= 64
    assert report.wide_loads > 0
    assert report.wide_stores > 0
    assert not {"x", "pointwise"} & set(report.narrow_loads)
    assert not report.narrow_stores
    assert report.seconds > 0


def test_unchanged_kernels_are_not_compiled_again(
    few_calls: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A stored report is used while the source is unchanged, and checked against the current rules."""
    options = ["static", "--op", "layer_norm", "--arch", "80", "--dtype", "float16"]
    monkeypatch.setattr(static, "RESULTS", tmp_path)
    stored = tmp_path / f"static-triton-{static.installed(None)}.json"
    assert main([*options, "--json", str(stored)]) == 0
    assert "1 kernels, 1 of them compiled" in capsys.readouterr().out
    monkeypatch.setattr(static, "compile_all", lambda todo, *_: pytest.fail("compiled again") if todo else [])
    assert main(options) == 0
    assert "1 kernels, 0 of them compiled, 0 with faults" in capsys.readouterr().out
    entries = json.loads(stored.read_text(encoding="utf-8"))
    stored.write_text(json.dumps([{**entries[0], "spill_bytes": 8}]), encoding="utf-8")
    assert main(options) == 1
    assert "spills 8 bytes" in capsys.readouterr().err


def test_a_partial_run_keeps_other_reports(
    few_calls: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(static, "RESULTS", tmp_path)
    monkeypatch.setattr(
        static, "compile_all", lambda todo, *_: [machine_code.Compiled(CODE, "", "3", 1.0) for _ in todo]
    )
    stored = tmp_path / f"static-triton-{static.installed(None)}.json"
    for arch in ("80", "90", "80"):
        main(["static", "--op", "layer_norm", "--dtype", "float16", "--arch", arch, "--keep"])
    assert [one["arch"] for one in json.loads(stored.read_text(encoding="utf-8"))] == [80, 90]


def test_the_digest_follows_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernel, and of a function it calls in another module."""
    with assume(GPUS[90]):
        plan = next(CALLS["sepconv"](torch.float16)).planned()[0]
    made = machine_code.variant(90, plan.launches[0])
    before = made.digest
    assert "def tile_dot(" in machine_code.source(sepconv_kernel.march)
    read = machine_code.inspect.getsource
    for changed in (sepconv_kernel.march.function, device_functions.tile_dot.function):
        with monkeypatch.context() as patch:
            other = {changed: read(changed) + "#"}
            patch.setattr(machine_code.inspect, "getsource", lambda f, other=other: other.get(f) or read(f))
            machine_code.source.cache_clear()
            assert dataclasses.replace(made).digest != before
    machine_code.source.cache_clear()
    assert dataclasses.replace(made).digest == before
    assert dataclasses.replace(made, arch=80).digest != before


def test_kernels_are_compiled_as_they_are_launched() -> None:
    """With fused multiply-adds, which a later Triton leaves out unless it is asked for them."""
    with assume(GPUS[90]):
        launch = next(CALLS["sepconv"](torch.float16)).planned()[0].launches[0]
    assert launch.options()["enable_fp_fusion"] is True
    assert machine_code._options(machine_code.variant(90, launch)) == launch.options()


def test_the_released_networks_alone() -> None:
    """What `static --released` compiles is part of what is compiled without it."""
    every, released = (
        {one.variant for one in static.compilations(["layer_norm"], [90], None, x)} for x in (False, True)
    )
    assert released < every
    assert released


@pytest.mark.parametrize("arch", sorted(GPUS))
def test_every_architecture_covers_the_networks_calls(arch: int) -> None:
    """All operators with kernels, in each family's own dtype; more dtypes and shapes on two architectures."""
    todo = static.compilations(CALLS, [arch])
    assert {one.op for one in todo} == {op for op in CALLS if _runs_on(op, arch) and _has_own_launches(op)}
    dtypes = {one.config.split()[0] for one in todo}
    assert dtypes == {"float16", "bfloat16"} | ({"float32"} if arch in static.EVERY_DTYPE else set())
    assert len({one.variant for one in todo}) == len(todo)
    assert all(one.variant.arch == arch for one in todo)


def _runs_on(op: str, arch: int) -> bool:
    return REGISTRY[op].capability <= GPUS[arch].capability


def _has_own_launches(op: str) -> bool:
    calls = [call for _, call in main_calls(op)] or list(CALLS[op](torch.float16))
    return any(isinstance(launch, static.Launch) for call in calls for launch in call.planned()[0].launches)


def compilation(arch: int = 90, warps: int = 4, large: str = "") -> static.Compilation:
    variant = machine_code.Variant(arch, "module", "kernel", (), (), (), warps, 1)
    return static.Compilation(variant, "op", "config", set(large.split()), set(large.split()))


@pytest.mark.parametrize(
    ("changes", "one", "expected"),
    [
        ({}, compilation(), ()),
        ({"registers": None}, compilation(), ("does not compile",)),
        ({"spill_bytes": 8}, compilation(), ("spills 8 bytes",)),
        ({"shared_bytes": 4096}, compilation(), ("needs 4096 bytes of shared memory of 2048",)),
        ({"wgmma": False}, compilation(), ("has a dot of 64 rows without wgmma",)),
        ({"wgmma": False}, compilation(warps=2), ()),
        ({"wgmma": False}, compilation(arch=80), ()),
        ({"wgmma": False, "product_rows": 32}, compilation(), ()),
        ({"tensor_core": False}, compilation(arch=80), ("has a dot without tensor-core instructions",)),
        ({"tensor_core": False, "wgmma": False, "product_rows": 0}, compilation(), ()),
        ({}, compilation(large="x out"), ()),
    ],
)
def test_faults(changes: dict[str, Any], one: static.Compilation, expected: tuple[str, ...]) -> None:
    code = {**dataclasses.asdict(CODE), "shared_limit": 2048, **changes}
    assert static.faults(code, one) == expected


def test_narrow_accesses_of_large_tensors_are_counted() -> None:
    found = static.narrow(dataclasses.asdict(CODE), compilation(large="x out"))
    assert found == ("loads x in less than 16 bytes", "stores out in less than 16 bytes")
    assert static.narrow(dataclasses.asdict(CODE), compilation(large="weight")) == ()


def test_large_tensors_with_aligned_rows() -> None:
    """Those of a separable convolution with a residual are its activations, not its weights."""
    x = torch.empty(1, 512, 512, 64, dtype=torch.float16, device="meta").permute(0, 3, 1, 2)
    taps, points = torch.empty(64, 3, 3, device="meta"), torch.empty(64, 64, dtype=torch.float16, device="meta")
    with assume(GPUS[90]):
        plan = REGISTRY["sepconv"](x, taps, points, residual=x.clone()).planned()[0]
    assert static._large(plan, plan.launches[0]) == ({"x", "residual"}, {"out"})


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.empty(1, 64, 512, 512, dtype=torch.float16, device="meta").to(memory_format=torch.channels_last), True),
        (torch.empty(1, 63, 512, 512, dtype=torch.float16, device="meta").to(memory_format=torch.channels_last), False),
        (torch.empty(1, 4, 512, 512, device="meta").to(memory_format=torch.channels_last), True),
        (torch.empty(1024, 1536, device="meta")[:, 2:], False),
        (torch.empty(1, 1, 1 << 20, device="meta"), True),
        (torch.empty(1 << 20, 3, device="meta"), False),
    ],
)
def test_aligned_rows(tensor: torch.Tensor, expected: bool) -> None:
    assert static._has_aligned_rows(tensor) == expected


def test_faults_fail_the_command(
    few_calls: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["static", "--op", "layer_norm", "--arch", "90", "--dtype", "float16", "--fresh"]
    clean = dataclasses.replace(CODE, narrow_loads=(), narrow_stores=())
    monkeypatch.setattr(static, "compile_all", lambda todo, *_: [machine_code.Compiled(clean, "", "3.7", 1.0)])
    assert main(arguments) == 0
    monkeypatch.setattr(static, "compile_all", lambda todo, *_: [machine_code.Compiled(None, "because", "3.7", 1.0)])
    assert main(arguments) == 1
    assert "does not compile because" in capsys.readouterr().err


WAIT = "\tgriddepcontrol.wait; // dummy %r1\n"
LOAD = "\t@%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd1 + 0 ];\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (WAIT, True),
        (WAIT + LOAD, True),
        (LOAD + WAIT, False),
        (LOAD, False),
        ("\tst.global.b8 [ %rd1 + 0 ], { %rs1 };\n" + WAIT, False),
        ("\tcp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;\n" + WAIT, False),
        ("\tld.param.b64 \t%rd5, [f_param_0];\n" + WAIT, True),
        ("// griddepcontrol.wait;\n" + LOAD, False),
    ],
)
def test_wait_before_the_first_access_to_global_memory(text: str, expected: bool) -> None:
    assert ptx.waits(text) == expected


@pytest.mark.parametrize("arch", sorted(GPUS))
def test_not_waiting_is_a_fault_with_programmatic_dependent_launch(arch: int) -> None:
    with assume(GPUS[arch]):
        plan = REGISTRY["layer_norm"](torch.empty(9, 64, dtype=torch.float16, device="meta"), 1e-5).planned()[0]
    one = static.Compilation(machine_code.variant(arch, plan.launches[0]), "layer_norm", "")
    code = {**dataclasses.asdict(CODE), "shared_limit": GPUS[arch].shared_limit}
    assert static.faults(code, one) == ()
    found = static.faults({**code, "waits": False}, one)
    assert found == (("accesses global memory before griddepcontrol.wait",) if arch >= 90 else ())


def test_every_launched_kernel_waits_first() -> None:
    """All kernels with a grid: each may start before the previous launch has finished."""
    modules = [
        importlib.import_module(one.name)
        for one in pkgutil.walk_packages(ops.__path__, "tinysr_kernels.ops.")
        if not one.ispkg
    ]
    launched = [
        kernel
        for module in modules
        for kernel in vars(module).values()
        if type(kernel).__name__ == "Kernel" and "Grid:" in (kernel.__doc__ or "")
    ]
    assert len(set(launched)) >= 30
    for kernel in launched:
        (function,) = ast.parse(inspect.getsource(kernel.function)).body
        assert isinstance(function, ast.FunctionDef)
        assert ast.unparse(function.body[1]) == "await_inputs()", kernel.function


# Computed by hand from the limits in the programming guide and the rules of the occupancy calculator.
@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "expected"),
    [
        (90, 4, 32, 0, 64),  # 16 programs of 4 warps: the maximum
        (90, 4, 128, 0, 16),  # 4096 registers per warp, 4 warps per quarter of the register file
        (90, 8, 168, 0, 8),  # 5376 per warp: 3 per quarter make 12, one program of 8
        (80, 4, 255, 0, 8),
        (90, 8, 64, 113 * 1024, 16),  # two programs, limited by shared memory
        (86, 1, 16, 0, 16),  # at most 16 programs
        (120, 4, 32, 49 * 1024, 8),
    ],
)
def test_occupancy(arch: int, warps: int, registers: int, shared: int, expected: int) -> None:
    assert resident_warps(arch, warps, registers, shared) == expected


def test_a_triton_in_a_folder(tmp_path: Path) -> None:
    info = tmp_path / "triton-9.8.7.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 9.8.7\n", encoding="utf-8")
    assert static.installed(tmp_path) == "9.8.7"
    with pytest.raises(ValueError, match="no Triton"):
        static.installed(tmp_path / "nothing")


def test_tensor_core_instructions_are_recognized() -> None:
    for text, core, warpgroup in (
        ("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16", True, True),
        ("mma.sync.aligned.m16n8k16.row.col.f32.e4m3.e4m3.f32", True, False),
        ("tcgen05.mma.cta_group::1.kind::f16", True, False),
        ("wgmma.commit_group.sync.aligned; tcgen05.alloc.cta_group; fma.rn.f32", False, False),
    ):
        assert (bool(ptx.MMA.search(text)), bool(ptx.WGMMA.search(text))) == (core, warpgroup)
    text = (
        "%4 = tt.dot %1, %2, %3, inputPrecision = tf32 : tensor<64x32xbf16> * tensor<32x16xbf16> -> tensor<64x16xf32>"
    )
    assert machine_code.TT_DOT.findall(text) == ["64"]
    assert not machine_code.TT_DOT.findall(text.replace("bf16", "f32"))


def test_accesses_are_traced_to_their_tensor() -> None:
    """Through additions, through moves in a loop, and for copies to shared memory."""
    code = """
        ld.param.b64    %rd1, [kernel_param_0];
        ld.param.b64    %rd2, [kernel_param_2];
        ld.param.b32    %r1, [kernel_param_1];
        mad.wide.s32    %rd3, %r7, 2, %rd1;
        mov.b64 %rd5, %rd3;
        add.s64         %rd5, %rd5, 64;
        add.s64         %rd4, %rd2, %rd9;
        @%p1 ld.global.v4.b32 { %r95, %r96, %r97, %r98 }, [ %rd5 + 0 ];
        @%p1 ld.global.L1::evict_last.b16 { %rs1 }, [ %rd3 + 4 ];
        cp.async.cg.shared.global [ %r5 + 0 ], [ %rd3 + 0 ], 0x10, %r8;
        @%p2 st.global.v2.b32 [ %rd4 + 0 ], { %r7, %r8 };
    """
    loads, stores = ptx.widths(code, ["x", "count", "out"])
    assert {name: sorted(found) for name, found in loads.items()} == {"x": [2, 16, 16]}
    assert stores == {"out": [8]}
    assert [sorted(width for _, width in side) for side in ptx.accesses(code)] == [[2, 16, 16], [8]]
    assert machine_code._narrow({"x": [2, 16, 16], "out": [8], "half": [16, 16, 2, 2, 4, 8]}) == ("out",)


def test_pages_are_generated_from_the_results() -> None:
    """docs/ agrees with benchmarks/results/; `make tables` writes both."""
    for path, text in generate_docs.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: python -m benchmarks pages"
