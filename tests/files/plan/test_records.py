"""The file of records: found again, appended by several runs, never trusted, never taken for anything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests import ROOT
from tests.runtime.sample_images import put
from tinysr_kernels.files.plan import records as module
from tinysr_kernels.files.plan.records import FILE_NAME, Records, source_of

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX names, links and locks")


@pytest.fixture
def source(tmp_path):
    return put(tmp_path, "source.png", b"pixels")


def result(folder: Path, source: Path, name: str = "a.png", data: bytes = b"result") -> Path:
    folder.mkdir(exist_ok=True)
    Records().add(folder / name, len(data), source_of(source))
    return put(folder, name, data)


def lines(folder: Path) -> list[bytes]:
    return (folder / FILE_NAME).read_bytes().splitlines()


def test_a_result_counts_for_the_input_that_made_it(tmp_path, source):
    made = result(tmp_path / "out", source)
    other = put(tmp_path, "other.png", b"PIXELS")
    records = Records()
    assert records.made_from(made, source)
    assert not records.made_from(made, other)
    assert not records.made_from(tmp_path / "out" / "b.png", source)
    source.write_bytes(b"edited")
    assert not records.made_from(made, source)
    source.unlink()
    assert not records.made_from(made, source)


def test_an_input_is_read_again_only_if_its_status_is_another(tmp_path, source, monkeypatch):
    made = result(tmp_path / "out", source)
    moved = source.rename(tmp_path / "moved.png")
    assert Records().made_from(made, moved)
    moved.rename(source)
    os.utime(source, ns=(1, 1))
    assert Records().made_from(made, source)
    made = result(tmp_path / "out", source)
    monkeypatch.setattr(module, "_digest", lambda _path: pytest.fail("read without need"))
    assert Records().made_from(made, source)


def test_a_file_of_another_size_is_not_the_result(tmp_path, source):
    made = result(tmp_path / "out", source)
    made.write_bytes(b"edited by hand")
    assert Records().of_result(made) is None
    made.unlink()
    assert Records().of_result(made) is None


def test_records_move_with_their_folder(tmp_path, source):
    result(tmp_path / "out", source)
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    os.utime(moved / "a.png", ns=(1, 1))
    assert Records().made_from(moved / "a.png", source)


@posix
def test_names_that_are_not_utf8(tmp_path):
    source = put(tmp_path, "source.png", b"x")
    name = os.fsdecode(b"\xff\n\x1b.png")
    made = result(tmp_path / "out", source, name)
    assert Records().made_from(made, source)
    assert len(lines(tmp_path / "out")) == 2
    assert (tmp_path / "out" / FILE_NAME).read_bytes().isascii()


HOSTILE = [
    b"",
    b"\xff\xfe",
    b"{",
    b"[" * 100_000,
    b"null",
    b'{"result": 1, "size": "x", "source": {}}',
    b'{"result": "a.png", "size": 6, "source": {"name": "a", "size": 1, "mtime_ns": 1, "inode": 1}}',
    b'{"result": "a.png", "size": true, "source": {"name": "a", "size": 1, "mtime_ns": 1, "inode": 1, "blake2b": ""}}',
    b'{"result": "a.png", "size": ' + b"9" * 5000 + b"}",
]


def test_damaged_lines_are_passed_over(tmp_path, source):
    made = result(tmp_path / "out", source)
    with open(tmp_path / "out" / FILE_NAME, "ab") as file:
        file.write(b"\n".join(HOSTILE))  # torn off, too
    assert Records().made_from(made, source)
    second = result(tmp_path / "out", source, "b.png")
    records = Records()
    assert records.made_from(made, source)
    assert records.made_from(second, source)


def test_a_torn_header_is_written_again(tmp_path, source):
    (tmp_path / "out").mkdir()
    put(tmp_path / "out", FILE_NAME, b'{"tinysr_re')
    made = result(tmp_path / "out", source)
    assert Records().made_from(made, source)
    assert len(lines(tmp_path / "out")) == 2


@posix
@pytest.mark.parametrize("kind", ["foreign", "link", "dangling", "fifo", "folder"])
def test_what_has_the_name_and_is_no_file_of_records_is_left_alone(tmp_path, source, kind):
    (tmp_path / "out").mkdir()
    path, kept = tmp_path / "out" / FILE_NAME, put(tmp_path, "kept", b'{"tinysr_results": 1}\n')
    if kind == "foreign":
        path.write_bytes(b"somebody's notes\n")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(kept if kind == "link" else tmp_path / "nowhere")
    made = put(tmp_path / "out", "a.png", b"result")
    records = Records()
    assert records.of_result(made) is None
    with pytest.raises(OSError, match=r".+"):
        records.add(made, 6, source_of(source))
    assert kept.read_bytes() == b'{"tinysr_results": 1}\n'
    assert not (tmp_path / "nowhere").exists()
    assert kind != "foreign" or path.read_bytes() == b"somebody's notes\n"


def test_superseded_lines_are_dropped_in_the_end(tmp_path, source, monkeypatch):
    monkeypatch.setattr(module, "_SPARE_LINES", 10)
    made = result(tmp_path / "out", source)
    gone = result(tmp_path / "out", source, "gone.png")
    for _ in range(20):
        result(tmp_path / "out", source)
    gone.unlink()
    assert Records().made_from(made, source)
    assert len(lines(tmp_path / "out")) == 2
    assert Records().made_from(made, source)


def test_a_run_sees_what_another_one_adds(tmp_path, source, monkeypatch):
    first = Records()
    made = result(tmp_path / "out", source)
    assert first.made_from(made, source)
    later = result(tmp_path / "out", source, "b.png", b"another")
    assert first.made_from(later, source)
    monkeypatch.setattr(module, "_SPARE_LINES", -10)
    Records().of_result(made)  # writes the file anew
    assert first.made_from(later, source)
    assert first.made_from(result(tmp_path / "out", source, "c.png"), source)


@posix
def test_a_file_written_anew_before_it_was_locked_is_opened_again(tmp_path, source, monkeypatch):
    made = result(tmp_path / "out", source)
    lock, replaced = module.lock, []

    def slow_lock(descriptor, **options):
        if not replaced:
            replaced.append(1)
            path = tmp_path / "out" / FILE_NAME
            copy = put(tmp_path, "copy", path.read_bytes())
            os.replace(copy, path)
        return lock(descriptor, **options)

    monkeypatch.setattr(module, "lock", slow_lock)
    Records().add(tmp_path / "out" / "b.png", 6, source_of(source))
    second = put(tmp_path / "out", "b.png", b"result")
    assert Records().made_from(made, source)
    assert Records().made_from(second, source)


@posix
def test_several_runs_append_at_once(tmp_path, source):
    script = """
import sys
from pathlib import Path
from tinysr_kernels.files.plan import records as module
module._SPARE_LINES = 20  # so that the file is written anew now and then
folder, name = Path(sys.argv[1]), sys.argv[2]
described = module.source_of(folder / "source.png")
for i in range(60):
    records = module.Records()
    (folder / f"{name}{i % 5}.png").write_bytes(b"12345")
    records.add(folder / f"{name}{i % 5}.png", 5, described)
    assert records.of_result(folder / f"{name}{i % 5}.png") is not None
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen([*command, name], env=environment) for name in "pqr"]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    records = Records()
    assert all(records.of_result(tmp_path / f"{name}{i}.png") for name in "pqr" for i in range(5))
    assert all(json.loads(line) for line in lines(tmp_path))


def test_a_description_is_of_the_content(tmp_path, source):
    described = source_of(source)
    assert described == source_of(source)
    twin = source_of(put(tmp_path, "twin.png", b"pixels"))
    assert replace(twin, name="source.png", mtime_ns=described.mtime_ns, inode=described.inode) == described
    with pytest.raises(OSError, match="not a regular file"):
        source_of(tmp_path)
