"""Whole processes with closed, full and broken streams, and killed ones: the work and the exit code are right.

One process imports the package and forks a child for each case, which takes milliseconds instead of seconds.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests import ROOT
from tests.files.runs import contents, save
from tests.runtime.sample_images import sample_image
from tinysr_kernels.atomic import is_temporary

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/full") or not hasattr(os, "fork"), reason="needs /dev/full")

PARENT = r"""
import contextlib, json, os, signal, sys, tempfile, time
import tinysr_kernels, tqdm
from tests.runtime.sample_images import FakeModel, sample_image
from tinysr_kernels.cli.main import main

class Chatty(FakeModel):
    def enlarge(self, rgb):
        try:
            os.write(2, b"a library's warning\n")
        except OSError:
            pass
        return super().enlarge(rgb)

tinysr_kernels.compile = lambda *_, **__: Chatty()
tinysr_kernels.describe = lambda _path: {"family": "fake"}
answers = os.fdopen(os.dup(1), "w")
tqdm.tqdm.monitor_interval = 0  # its thread would not survive a fork, but its locks would
# Once here, so that no child imports or initializes anything.
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
    sample_image("CMYK", 3, 2).save(os.path.join(folder, "a.jpg"))
    assert main(["upscale", folder, "-o", os.path.join(folder, "out"), "--model", "x", "--format", "webp"]) == 0

def redirect(number, kind):
    if kind == "closed":
        os.close(number)
        return None
    if kind == "full":
        target = os.open("/dev/full", os.O_WRONLY)
    elif kind == "pipe":
        reader, target = os.pipe()
        os.close(reader)
    else:
        target = os.open(os.devnull, os.O_WRONLY)
    os.dup2(target, number)
    os.close(target)
    return open(number, "w", closefd=False, buffering=1024)

for line in sys.stdin:
    case = json.loads(line)
    child = os.fork()
    if child == 0:
        answers.close()
        signal.alarm(120)
        sys.stdout, sys.stderr = redirect(1, case["stdout"]), redirect(2, case["stderr"])
        if case["stdin"] == "closed":
            os.close(0)
            sys.stdin = None
        try:
            code = main(case["argv"])
        except SystemExit as leaving:
            code = leaving.code
        if case.get("exit"):
            sys.exit(code)
        for stream in (sys.stdout, sys.stderr):  # as Python does in the end, without the half second that torch takes
            try:
                if stream is not None:
                    stream.flush()
            except OSError:
                code = 120
        os._exit(code)
    if case.get("kill_after") is not None:
        time.sleep(case["kill_after"])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def process():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        yield parent
        assert parent.stdin is not None
        parent.stdin.close()


def child(parent: subprocess.Popen[str], *argv: object, **case: object) -> int:
    """Run the command in a child -> its exit code."""
    assert parent.stdin is not None
    assert parent.stdout is not None
    line = {"stdin": "", "stdout": "", "stderr": "", "argv": [str(each) for each in argv], **case}
    parent.stdin.write(json.dumps(line) + "\n")
    parent.stdin.flush()
    return int(parent.stdout.readline())


@pytest.fixture
def images(tmp_path) -> Path:
    for i, name in enumerate("abc"):
        save(tmp_path / "in" / f"{name}.png", sample_image("CMYK" if i == 1 else "RGB", 3, 2).convert("RGB"))
    sample_image("CMYK", 3, 2).save(tmp_path / "in" / "d.jpg")
    return tmp_path


@pytest.mark.parametrize(
    ("stdout", "stderr"),
    [("closed", "closed"), ("full", "full"), ("pipe", "pipe"), ("", "closed"), ("closed", ""), ("pipe", "")],
)
def test_the_work_is_done_whatever_the_streams(process, images, stdout, stderr):
    arguments = ("upscale", images / "in", "-o", images / "out", "--model", "demo", "--report", images / "report.jsonl")
    streams = {"stdin": stdout, "stdout": stdout, "stderr": stderr}
    assert child(process, *arguments, **streams, exit=True) == 0
    assert sorted(contents(images / "out")) == ["a.png", "b.png", "c.png", "d.jpg"]
    for name, data in contents(images / "out").items():
        assert b"warning" not in data
        with Image.open(images / "out" / name) as image:
            image.load()
    assert b"warning" not in (images / "report.jsonl").read_bytes()
    (images / "in" / "e.png").write_text("text")
    assert child(process, *arguments, "--skip-existing", **streams) == 1
    assert child(process, *arguments, "--no-such-option", **streams) == 2


@pytest.mark.parametrize(("stdout", "code"), [("", 0), ("full", 1), ("pipe", 1), ("closed", 1)])
def test_where_the_output_is_the_work_the_exit_code_tells(process, stdout, code):
    assert child(process, "info", "demo", stdout=stdout) == code
    assert child(process, "--help", stdout=stdout) == 0


def test_twenty_kills_leave_whole_results_and_the_next_run_the_rest(process, images):
    for i in range(12):
        save(images / "in" / f"{i}.png", sample_image("RGBA" if i % 4 == 0 else "RGB", 40, 40, seed=i))
    options = ("--model", "demo", "--format", "webp", "--lossless", "--report", images / "report.jsonl")
    expected, killed = images / "alone", images / "killed"
    arguments = ("upscale", images / "in", *options, "-o")
    started = time.monotonic()
    assert child(process, *arguments, expected) == 0
    took = time.monotonic() - started
    codes = []
    for seed in range(20):
        rng = random.Random(seed)
        for path in sorted(killed.glob("*.webp"))[:: rng.randint(1, 3)]:
            path.unlink()  # so that there is work for each run
        codes.append(child(process, *arguments, killed, "--skip-existing", kill_after=rng.uniform(0, took)))
        whole = contents(killed) if killed.exists() else {}
        found = {name: data for name, data in whole.items() if not is_temporary(name)}
        assert found.items() <= contents(expected).items()
    assert codes.count(-9) >= 3
    assert child(process, *arguments, killed, "--skip-existing") == 0
    assert contents(killed) == contents(expected)
    lines = [json.loads(line) for line in (images / "report.jsonl").read_text("ascii").splitlines() if line[-1] == "}"]
    assert "summary" in lines[-1]
