"""Fingerprints of what results were made of."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from model.compress.training.made_of import SAMPLE, SAMPLES, claim, fingerprint, names_and_sizes


def test_fingerprints_follow_the_content_and_not_the_place(tmp_path: Path) -> None:
    content = os.urandom(3 * SAMPLE)
    for name in ("a", "b"):
        (tmp_path / name / "inside").mkdir(parents=True)
        (tmp_path / name / "inside" / "weights").write_bytes(content)
        (tmp_path / name / "config.json").write_text("{}")
    before = fingerprint(tmp_path / "a")
    assert fingerprint(tmp_path / "b") == before
    changed = bytearray(content)
    changed[SAMPLE + 7] ^= 1
    (tmp_path / "b" / "inside" / "weights").write_bytes(changed)
    assert fingerprint(tmp_path / "b") != before
    assert names_and_sizes(tmp_path / "a") == names_and_sizes(tmp_path / "b")
    (tmp_path / "a" / "config.json").rename(tmp_path / "a" / "other.json")
    assert fingerprint(tmp_path / "a") != before
    assert names_and_sizes(tmp_path / "a") != names_and_sizes(tmp_path / "b")


def test_large_files_are_sampled_from_begin_to_end(tmp_path: Path) -> None:
    path = tmp_path / "large"
    size = 100 * SAMPLES * SAMPLE
    with path.open("wb") as file:
        file.truncate(size)
    before = fingerprint(path)
    for at in (0, size - 1, size // (SAMPLES - 1)):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"x")
        now = fingerprint(path)
        assert now != before
        before = now
    (tmp_path / "empty").touch()
    assert fingerprint(tmp_path / "empty") != before
    with pytest.raises(ValueError, match="none: cannot be read"):
        fingerprint(tmp_path / "none")


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "vae"
    claim(folder, {"seed": 1}, write=False)
    assert not folder.exists()
    claim(folder, {"seed": 1, "mask": (True, False), "lora": None})
    claim(folder, {"seed": 1, "mask": [True, False], "lora": None})
    with pytest.raises(ValueError, match="was made of another lora, another seed; remove it, or restore that"):
        claim(folder, {"seed": 2, "mask": [True, False], "lora": "x"})
    with pytest.raises(ValueError, match="another more"):
        claim(folder, {"seed": 1, "mask": [True, False], "lora": None, "more": 0}, write=False)
    assert json.loads((folder / "made-of.json").read_text()) == {"seed": 1, "mask": [True, False], "lora": None}
    (folder / "made-of.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        claim(folder, {"seed": 1})
