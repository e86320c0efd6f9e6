"""The parent of the self-check: what it makes of children that work, lie, die, hang, or never start.

The children are small scripts that import nothing: they say what a real child would.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tinysr_kernels.first_use import children, supervise
from tinysr_kernels.first_use.items import Item
from tinysr_kernels.first_use.supervise import Bounds, Outcome

CPU = torch.device("cpu")
SOON = Bounds(start=60, step=60, total=120)
ITEMS = [Item(f"key{i}", op, "float16 4", "hash", {}) for i, op in enumerate(("norm", "conv", "norm", "linear"))]
CHILD = """
import json, os, signal, sys, time
request = json.loads(sys.stdin.readline())
def say(**message):
    sys.stdout.write("\\ntinysr-self-check " + json.dumps(message) + "\\n")
    sys.stdout.flush()
def segfault():
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)
for item in request["items"]:
    key = item["key"]
    say(begin=key)
    {begin}
    say(run=key)
    {run}
    say(verdict=key, kind="passed", reason="")
    {after}
"""


def run(tmp_path: Path, run: str = "", begin: str = "", after: str = "", bounds: Bounds = SOON) -> Outcome:
    """Check ITEMS with a child that does something before, while or after it runs an item's kernels."""
    script = CHILD
    for name, code in (("begin", begin), ("run", run), ("after", after)):
        script = script.replace(f"{{{name}}}", code or "pass")
    return of_script(tmp_path, script, bounds)


def of_script(tmp_path: Path, script: str, bounds: Bounds = SOON) -> Outcome:
    path = tmp_path / "child.py"
    path.write_text(script)
    return supervise.run(ITEMS, CPU, bounds, [sys.executable, "-I", "-S", str(path)])


def kinds(outcome: Outcome) -> dict[str, str]:
    return {key: one.kind for key, one in outcome.verdicts.items()}


def test_everything_passes(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert kinds(found) == dict.fromkeys(("key0", "key1", "key2", "key3"), "passed")
    assert (found.general, found.obstacle) == ("", "")


def test_what_libraries_print_is_no_message(tmp_path: Path) -> None:
    bad = 'sys.stderr.write("tinysr-self-check {\\n{}\\n"); os.write(1, bytes(range(256)))'
    half = 'sys.stdout.write("half a line")'
    assert set(kinds(run(tmp_path, bad, after=half)).values()) == {"passed"}


@pytest.mark.parametrize(
    ("how", "reason"),
    [("segfault()", "signal SIGSEGV"), ("os._exit(3)", "exit code 3"), ("print('last'); sys.exit(4)", "code 4, last")],
)
def test_a_crash_is_pinned_to_its_item(tmp_path: Path, how: str, reason: str) -> None:
    found = run(tmp_path, f'if key == "key1": {how}')
    assert kinds(found) == {"key0": "passed", "key1": "crashed", "key2": "passed", "key3": "passed"}
    assert reason in found.verdicts["key1"].reason
    assert (found.general, found.obstacle) == ("", "")


def test_an_operator_that_crashed_is_not_tried_again(tmp_path: Path) -> None:
    found = run(tmp_path, 'if key == "key0": os._exit(3)')
    assert kinds(found) == {"key0": "crashed", "key1": "passed", "key3": "passed"}


def test_a_hang_is_pinned_to_its_item(tmp_path: Path) -> None:
    found = run(tmp_path, 'if key == "key1": time.sleep(600)', bounds=Bounds(60, 2, 120))
    assert kinds(found) == {"key0": "passed", "key1": "hung", "key2": "passed", "key3": "passed"}
    assert "silent for 2 s" in found.verdicts["key1"].reason


def test_a_crash_of_the_reference_is_not_the_kernels(tmp_path: Path) -> None:
    found = run(tmp_path, begin='if key == "key1": os._exit(3)')
    assert kinds(found) == {"key0": "passed", "key1": "unchecked", "key2": "passed", "key3": "passed"}


def test_a_child_that_reports_its_own_end(tmp_path: Path) -> None:
    """As after a sticky CUDA error: the verdict comes first, then the process ends."""
    found = run(tmp_path, 'if key == "key1": say(verdict=key, kind="crashed", reason="illegal"); os._exit(1)')
    assert kinds(found) == {"key0": "passed", "key1": "crashed", "key2": "passed", "key3": "passed"}
    assert found.verdicts["key1"].reason == "illegal"


def test_where_every_kernel_crashes_no_kernel_is_used(tmp_path: Path) -> None:
    """After a bounded number of children."""
    found = run(tmp_path, "os._exit(3)", bounds=Bounds(children=2))
    assert kinds(found) == {"key0": "crashed", "key1": "crashed"}
    assert "2 processes" in found.general


def test_where_every_reference_crashes_nothing_is_said_of_kernels(tmp_path: Path) -> None:
    found = run(tmp_path, begin="os._exit(3)", bounds=Bounds(children=2))
    assert set(kinds(found).values()) == {"unchecked"}
    assert not found.general
    assert found.obstacle


def test_a_general_obstacle_ends_the_check(tmp_path: Path) -> None:
    found = run(tmp_path, 'say(general="no C compiler. Install one."); sys.exit(1)')
    assert found.general == "no C compiler. Install one."
    assert found.verdicts == {}


def test_a_device_that_the_child_does_not_see(tmp_path: Path) -> None:
    assert run(tmp_path, begin='say(obstacle="not visible"); sys.exit()').obstacle == "not visible"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import sys; sys.exit('no module named torch')", "exit code 1, no module named torch"),
        ("import time; time.sleep(600)", "silent for 1 s"),
        ("print('tinysr-self-check [')", "exit code 0"),
        ('print(\'tinysr-self-check {"verdict": "other", "kind": 3}\')', "exit code 0"),
        ("print('tinysr-self-check 7')", "exit code 0"),
    ],
)
def test_a_child_that_does_not_get_to_work(tmp_path: Path, script: str, reason: str) -> None:
    found = of_script(tmp_path, script, Bounds(1 if "sleep" in script else 60, 60, 120))
    assert found.verdicts == {}
    assert reason in found.obstacle


def test_the_whole_is_bounded(tmp_path: Path) -> None:
    """Children that are slow, but never silent for long; what is left is nobody's fault."""
    started = time.monotonic()
    found = run(tmp_path, after="time.sleep(0.6)", bounds=Bounds(60, 60, 1))
    assert time.monotonic() - started < 60
    assert len(found.verdicts) < 4
    assert set(kinds(found).values()) <= {"passed"}
    assert "more than 1 s" in found.obstacle


def test_no_process_can_be_started() -> None:
    found = supervise.run(ITEMS, CPU, SOON, ["/no/such/python"])
    assert "no process could be started" in found.obstacle


def test_nothing_outlives_the_check(tmp_path: Path) -> None:
    """Neither the child nor the compiler that it waits for."""
    note = tmp_path / "pid"
    code = "import subprocess; p = subprocess.Popen(['sleep', '600']); "
    code += f"open({str(note)!r}, 'w').write(str(p.pid)); p.wait()"
    found = run(tmp_path, code, bounds=Bounds(60, 2, 120, children=1))
    assert found.verdicts["key0"].kind == "hung"
    for _ in range(600):
        if not is_running(int(note.read_text())):
            return
        time.sleep(0.1)
    pytest.fail("the compiler outlived the check")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_embedded_pythons_start_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sys.executable` is then another program, which would start once more."""
    for name in ("python", "python3.11", "/usr/bin/python3", "/opt/python_embeded/python.exe", "pythonw.exe"):
        monkeypatch.setattr(sys, "executable", name)
        assert children.obstacle() == ""
    for name in ("", "/usr/bin/uwsgi", "/opt/blender/blender", "server.exe"):
        monkeypatch.setattr(sys, "executable", name)
        assert "embedded" in children.obstacle()
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert "embedded" in children.obstacle()


def test_a_child_finds_the_packages_of_its_parent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those on a path that only this process has, whatever the working folder holds."""
    (tmp_path / "tinysr_kernels").mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "its o'wn")])
    start = children.command(supervise.CHILD)
    start[-1] = start[-1].partition("; import runpy")[0] + "; print(sys.path)"
    done = subprocess.run(start, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == repr(sys.path)
