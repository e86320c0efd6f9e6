"""The command `tinysr`: outputs, messages and exit codes, with a model that repeats pixels."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

import tinysr_kernels
from tests import ROOT
from tests.cli.command import upscale
from tests.files.runs import written
from tests.runtime.sample_images import FakeModel
from tinysr_kernels.cli.main import main
from tinysr_kernels.errors import InputError


def test_one_file(compiled, folder, capsys):
    assert upscale(folder / "in" / "a.png", "-o", folder / "b.png") == 0
    captured = capsys.readouterr()
    assert captured.out == f"{folder / 'b.png'}\n"
    assert captured.err == ""
    with Image.open(folder / "b.png") as image:
        assert image.size == (12, 8)


def test_a_folder_with_a_file_that_is_not_an_image(compiled, folder, capsys):
    assert upscale(folder / "in", "-o", folder / "out", "--report", folder / "report.jsonl") == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [str(folder / "out" / "a.png"), str(folder / "out" / "b.jpg")]
    assert captured.err.splitlines() == [
        f"tinysr: {folder / 'in' / 'b.jpg'}: CMYK was converted to RGB",
        f"tinysr: error: {folder / 'in' / 'text.png'}: text, not an image (begins with 'remember the milk')",
        "tinysr: 2 done, 1 failed",
        "tinysr: ignored: 1 not images or films",
    ]
    lines = [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]
    assert [line.get("status") for line in lines] == [None, "done", "done", "failed", None]
    assert lines[0]["run"]["model"] == "demo"
    assert lines[0]["run"]["arguments"][0] == "upscale"
    assert lines[-1] == {"summary": {"done": 2, "failed": 1, "ignored": {"not images or films": 1}}}


def test_quiet_prints_errors_only(compiled, folder, capsys):
    assert upscale(folder / "in", "-o", folder / "out", "--quiet") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


def test_resuming_a_finished_run_loads_no_model(compiled, folder, capsys):
    upscale(folder / "in", "-o", folder / "out")
    assert len(compiled) == 1
    (folder / "in" / "text.png").unlink()
    assert upscale(folder / "in", "-o", folder / "out", "--skip-existing") == 0
    assert len(compiled) == 1
    assert "0 done, 2 skipped (exists)" in capsys.readouterr().err


def test_strict_stops_and_counts_the_rest(compiled, folder, capsys):
    (folder / "in" / "0.png").write_text("first of all")
    assert upscale(folder / "in", "-o", folder / "out", "--strict") == 1
    assert "0 done, 1 failed, 3 not started" in capsys.readouterr().err


def test_arguments_reach_the_model_and_the_encoder(compiled, folder):
    options = (
        "--device cpu --dtype float32 --backend library --quantize fp8 --color-fix wavelet --scale 1.5 --tile 64 "
        "--format webp --lossless --embeddings e.pt"
    )
    arguments = [*options.split(), "--prompt", "a cat"]
    assert upscale(folder / "in" / "a.png", "-o", folder / "out", *arguments) == 0
    expected = {
        "device": "cpu",
        "dtype": "float32",
        "backend": "library",
        "quantize": "fp8",
        "color_fix": "wavelet",
        "tile": 64,
        "prompt": "a cat",
        "embeddings": "e.pt",
    }
    assert compiled == [("demo", expected)]
    with Image.open(folder / "out" / "a.webp") as image:
        assert image.size == (5, 3)  # 4.5 rounded up


@pytest.mark.parametrize(
    ("option", "size"),
    [("--scale 1", (3, 2)), ("--size 7x11", (7, 11)), ("--size 7X11", (7, 11)), ("--longest 20", (20, 13))],
)
def test_results_of_any_size(compiled, folder, option: str, size: tuple[int, int]) -> None:
    report = folder / "report.jsonl"
    assert upscale(folder / "in" / "a.png", "-o", folder / "b.png", *option.split(), "--report", report) == 0
    with Image.open(folder / "b.png") as image:
        assert image.size == size
    _run, result, _summary = map(json.loads, report.read_text().splitlines())
    assert result["output_size"] == list(size)


def test_the_limit_of_pillow_is_as_before(compiled, folder) -> None:
    before = Image.MAX_IMAGE_PIXELS
    assert upscale(folder / "in" / "a.png", "-o", folder / "b.png", "--max-pixels", "3") == 1
    assert upscale(folder / "in", "-o", folder / "none" / ".." / "b.exr") == 2
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_size_that_an_image_cannot_have_fails_that_image(compiled, folder, capsys) -> None:
    assert upscale(folder / "in" / "a.png", "-o", folder / "b.png", "--longest", "25") == 1
    assert "3x2 cannot become 25x17: the most is 8 times per side" in capsys.readouterr().err


def test_the_bar_shows_the_tiles_of_an_image(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    Image.new("RGB", (40, 16)).save(folder / "wide.png")
    arguments = ["--model", "demo", "--device", "cpu", "--tile", "16", "-o", str(folder / "b.png")]
    assert main(["upscale", str(folder / "wide.png"), *arguments]) == 0
    assert "tile 1/4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["upscale"],
        ["upscale", "-o", "b.png", "--model", "demo"],
        ["upscale", "a.png", "-o", "b.png", "--model", "demo", "--quality", "0"],
        ["upscale", "a.png", "-o", "b.png", "--model", "demo", "--frame", "-1"],
        ["upscale", "a.png", "-o", "b.png", "--model", "demo", "--dtype", "int8"],
        ["upscale", "a.png", "-o", "b.png", "--model", "demo", "--backend", "cuda"],
        ["upscale", "a.png", "-o", "b.png", "--model", "demo", "--scale", "2x"],
        ["upscale", "a.png", "-o", "b.png", "--model", "demo", "--size", "20"],
        ["upscale", "a.png", "-o", "b.png", "--model", "demo", "--size", "-2x5"],
        ["upscale", "a.png", "-o", "b.png", "--model", "demo", "--longest", "0"],
        ["nonsense"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert "usage: tinysr" in capsys.readouterr().err


def test_errors_before_the_first_file_exit_with_2(compiled, folder, capsys, monkeypatch):
    source = folder / "in" / "a.png"
    assert main(["upscale", str(source), "-o", str(folder / "b.png"), "--model", "broken"]) == 2
    assert capsys.readouterr().err == "tinysr: error: broken: no such checkpoint\n"
    assert upscale(source, "-o", folder / "b.gif") == 2
    assert upscale(folder / "in", "-o", folder / "b.png") == 2
    assert upscale(source, "-o", folder / "b.png", "--report", folder / "no" / "report") == 2
    assert upscale(source, "-o", folder / "b.png", "--report", source) == 2
    with Image.open(source) as image:
        assert image.size == (3, 2)

    def refuse(*_arguments, **_options):
        raise InputError("tile must be an integer of at least 16")

    monkeypatch.setattr(tinysr_kernels, "compile", refuse)
    assert upscale(source, "-o", folder / "b.png", "--tile", "1") == 2
    assert not (folder / "b.png").exists()


def test_missing_inputs_exit_with_1(compiled, folder, capsys):
    assert upscale(folder / "none.png", folder / "in" / "a.png", "-o", folder / "out") == 1
    captured = capsys.readouterr()
    assert "none.png: no such file" in captured.err
    assert "1 done, 1 failed" in captured.err
    (folder / "empty").mkdir()
    assert upscale(folder / "empty", "-o", folder / "out") == 1
    assert "the folder is empty" in capsys.readouterr().err


def test_interruption_exits_with_130(compiled, folder, capsys, monkeypatch):
    def interrupt(self, rgb):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeModel, "enlarge", interrupt)
    assert upscale(folder / "in", "-o", folder / "out", "--report", folder / "report.jsonl") == 130
    assert "resume with --skip-existing" in capsys.readouterr().err
    lines = (folder / "report.jsonl").read_text().splitlines()
    assert [json.loads(line).get("status") for line in lines] == [None, "interrupted"]


def test_info(compiled, capsys):
    assert main(["info", "demo"]) == 0
    assert capsys.readouterr().out == "family   fake\nnotices  one\n         two\n"
    assert main(["info", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notices"] == ["one", "two"]


def test_convert(compiled, tmp_path, capsys):
    assert main(["convert", "demo", str(tmp_path / "out.safetensors"), "--dtype", "float16"]) == 0
    assert (tmp_path / "out.safetensors").read_bytes() == b"weights"
    options = {"device": "cpu", "dtype": "float16", "quantize": None, "embeddings": None, "prompt": None}
    options |= {"lora_weights": None, "lora_alpha": None}
    assert compiled == [("demo", options)]
    same = str(tmp_path / "out.safetensors")
    assert main(["convert", same, same]) == 2
    assert main(["convert", "demo", str(tmp_path / "no" / "out.safetensors")]) == 2


def test_env_prints_versions_and_nothing_private(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone-secret")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/home/someone-secret/cache")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for word in ("tinysr-kernels", "python", "torch", "pillow", "free memory", "~/cache"):
        assert word in text
    assert "someone-secret" not in text
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tinysr-kernels"] == tinysr_kernels.__version__


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_help_imports_neither_torch_nor_image_libraries():
    script = (
        "import sys; from tinysr_kernels.cli.main import main\n"
        "try: main(['upscale', '--help'])\n"
        "except SystemExit as leaving: assert leaving.code == 0\n"
        "print(sorted({'torch', 'numpy', 'PIL', 'triton', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    version = subprocess.run(
        [sys.executable, "-m", "tinysr_kernels.cli.main", "--version"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert version.stdout.strip() == f"tinysr {tinysr_kernels.__version__}"


posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


@posix
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_signals_set_the_exit_code(compiled, folder, monkeypatch, name, code):
    number = getattr(signal, name)
    monkeypatch.setattr(FakeModel, "enlarge", lambda _self, _rgb: os.kill(os.getpid(), number))
    outer = signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    try:
        assert upscale(folder / "in", "-o", folder / "out") == code
        # Of nohup and of shells' background jobs: what is ignored stays so.
        if name == "SIGHUP":
            signal.signal(number, signal.SIG_IGN)
            assert upscale(folder / "in", "-o", folder / "out") == 1
            assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, outer)
    assert not list((folder / "out").glob("*"))


@posix
def test_a_signal_while_the_network_runs_leaves_complete_files(folder):
    script = f"""
import sys, time
import tinysr_kernels
from tests.runtime.sample_images import FakeModel
from tinysr_kernels.cli.main import main
class Slow(FakeModel):
    def enlarge(self, rgb):
        if self.calls:
            print("second", flush=True)
            time.sleep(600)
        return super().enlarge(rgb)
tinysr_kernels.compile = lambda *_, **__: Slow()
sys.exit(main(["upscale", {str(folder / "in")!r}, "-o", {str(folder / "out")!r}, "--model", "x",
                   "--report", {str(folder / "report.jsonl")!r}]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() != "second":
        assert process.poll() is None
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    assert written(folder / "out") == ["a.png"]
    lines = [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]
    assert [line.get("status") for line in lines] == [None, "done", "interrupted"]
