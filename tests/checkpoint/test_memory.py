"""How much memory a checkpoint takes: little beside its folded weights, and nothing for what is not read."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tinysr_kernels
from tests import ROOT
from tests.checkpoint.edit import raw_safetensors
from tests.layouts.diffusers_module import STEM
from tests.layouts.osediff import UNET, write_osediff
from tests.layouts.weights import random_image, write_safetensors
from tinysr_kernels.checkpoint.read.paths import Released, aligned, release
from tinysr_kernels.checkpoint.read.shards import read_weights
from tinysr_kernels.families import FAMILIES, load

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="measured and released on Linux alone")
CHILD = """
import json, sys
from pathlib import Path
import tinysr_kernels

def peak():  # not ru_maxrss, which a process inherits from the one that started it
    line, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

tinysr_kernels.compile("demo")  # what is imported and loaded for any network
before = peak()
model = tinysr_kernels.compile(sys.argv[1], dtype=sys.argv[2])
compiled = peak() - before
model.save(sys.argv[3])
folded = sum(t.numel() * t.element_size() for t in model._folded.values())
print(json.dumps([compiled / folded, (peak() - before) / folded]))
"""
BLOCKED = """
import sys
for name in ("diffusers", "transformers", "accelerate", "peft"):
    sys.modules[name] = None
import torch, tinysr_kernels
model = tinysr_kernels.compile(sys.argv[1])
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
"""


def child(code: str, *arguments: object, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@LINUX
@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_peak_of_compiling_and_saving(dtype: str, tmp_path: Path) -> None:
    """Below 1.5 times the folded weights, from a base model of 300 MB in float32 and from its folded file.

    The threshold keeps the C library's free lists, which do not grow with the network, out of the measurement.
    """
    write_osediff(
        tmp_path, channels=(96, 192, 384, 384), heads=(3, 6, 12, 12), layers=2, vae_channels=(32, 64, 96, 96), groups=32
    )
    folded, again = tmp_path / "folded.safetensors", tmp_path / "again.safetensors"
    for source, target in ((tmp_path, folded), (folded, again)):
        found = json.loads(child(CHILD, source, dtype, target, MALLOC_MMAP_THRESHOLD_=str(1 << 18)))
        assert max(found) < 1.5, (source, found)
        assert min(found) > 1.0


def test_a_folded_file_needs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the base model nor the libraries that wrote it."""
    monkeypatch.setattr(type(FAMILIES["osediff"]), "least", 8)
    layout = write_osediff(tmp_path / "model")
    model = tinysr_kernels.compile(layout.folder)
    model.save(tmp_path / "folded.safetensors")
    image = random_image(16, 18)[0]
    torch.save(image, tmp_path / "image.pt")
    layout.folder.rename(tmp_path / ".gone")
    child(BLOCKED, tmp_path / "folded.safetensors", tmp_path / "image.pt", tmp_path / "found.pt")
    torch.testing.assert_close(torch.load(tmp_path / "found.pt"), model(image), rtol=1e-5, atol=1e-6)


@LINUX
def test_only_headers_of_what_is_not_used(tmp_path: Path) -> None:
    """Text encoders and variants of a terabyte, which no test could read, beside the modules."""
    layout = write_osediff(tmp_path, files="snapshot")
    size = 1 << 40
    header = {"text_model.embeddings.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    unet = {"conv_in.weight": {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}}
    places = {
        tmp_path / "sd/text_encoder/model.safetensors": header,
        tmp_path / "sd/text_encoder/model.fp16.safetensors": header,
        tmp_path / UNET / f"{STEM}.non_ema.safetensors": unet,
    }
    for path, content in places.items():
        path.parent.mkdir(exist_ok=True)
        raw_safetensors(path, content)
        try:
            with open(path, "rb+") as file:
                file.truncate(path.stat().st_size + size)
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            pytest.skip("the file system has no files of a terabyte")
    found = load(tmp_path)
    assert torch.equal(found.tensors["unet.conv_norm_out.weight"], layout.unet.conv_norm_out.weight)
    assert any("non_ema" in notice for notice in found.notices)


@LINUX
def test_what_is_released_is_read_again(tmp_path: Path) -> None:
    kept = {name: torch.randn(3000, 700) for name in ("a", "b")}
    write_safetensors(tmp_path / "x.safetensors", kept)
    torch.save(kept, tmp_path / "x.bin")
    for name in ("x.safetensors", "x.bin"):
        tensors = read_weights(tmp_path / name).tensors
        assert resident(tmp_path / name) < 1 << 22  # the header, and what the system reads ahead
        for key, tensor in tensors.items():
            assert torch.equal(tensor, kept[key])
        touched = resident(tmp_path / name)
        assert touched >= 2 * 3000 * 700 * 4 - 4 * 4096
        for tensor in tensors.values():
            release(tensor)
        assert resident(tmp_path / name) < touched / 20
        for key, tensor in Released(tensors).items():
            assert torch.equal(tensor, kept[key])
        assert resident(tmp_path / name) < 0.6 * touched  # the last alone
    release(torch.ones(3))
    release(torch.ones(3, device="meta"))
    odd = torch.func.functionalize(lambda x: release(x) or aligned(x))  # without an address
    assert torch.equal(odd(torch.ones(3)), torch.ones(3))
    assert torch.equal(tensors["a"][:, :9], kept["a"][:, :9])


def resident(path: Path) -> int:
    """Bytes of a mapped file that this process has in memory."""
    found, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            found = line.endswith(str(path))
        elif found and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total
