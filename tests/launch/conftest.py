"""Empty folders of configuration files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tinysr_kernels.launch import configs


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """The user's folder and the bundled one, both empty; that of predictions lies in the bundled one."""
    user, bundled = tmp_path / "user", tmp_path / "bundled"
    user.mkdir()
    (bundled / "predicted").mkdir(parents=True)
    monkeypatch.setenv(configs.USER_FOLDER, str(user))
    monkeypatch.setattr(configs, "BUNDLED", bundled)
    monkeypatch.setattr(configs, "PREDICTED", bundled / "predicted")
    configs.forget()
    yield user, bundled
    configs.forget()
