"""docs/accelerate.md: its example runs, and diffusers is imported by nobody but the user."""

from __future__ import annotations

import re
from typing import Any

import torch

from tests import ROOT
from tests.runtime.autoencoder.modules import is_fused, relative
from tests.test_house import python_files

IMPORTS = re.compile(r"^\s*(?:import|from) diffusers\b", re.MULTILINE)


def test_the_example_runs() -> None:
    text = (ROOT / "docs" / "accelerate.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    begin, end = code.split("tinysr_kernels.restore(vae)")
    names: dict[str, Any] = {}
    exec(begin, names)  # noqa: S102  our own page
    vae, latent, decoded = names["vae"], names["latent"], names["decoded"]
    assert is_fused(vae.encoder)
    assert is_fused(vae.decoder)
    exec(f"tinysr_kernels.restore(vae){end}", names)  # noqa: S102
    with torch.inference_mode():
        assert relative(decoded, vae.decode(latent).sample) < 1e-5
    assert "forward" not in vae.decoder.__dict__


def test_diffusers_is_never_imported() -> None:
    found = [path for path in python_files("tinysr_kernels") if IMPORTS.search(path.read_text(encoding="utf-8"))]
    assert found == []
