"""A new family is one file (`toy.py`) and one line in the registry: everything else works with it as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tinysr_kernels
from tests import ROOT
from tests.checkpoint.edit import edit, edit_json, edit_metadata, refused
from tests.families.toy import ToyConfig, ToySR
from tests.layouts.weights import write_safetensors
from tinysr_kernels.cli.main import main
from tinysr_kernels.families import FAMILIES
from tinysr_kernels.runtime.compiled import CompiledSR

STRENGTH = 0.3
MODEL = "any_name.safetensors"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line."""
    monkeypatch.setitem(FAMILIES, ToySR.name, ToySR())


def shapes(width: int, depth: int, ups: int) -> dict[str, tuple[int, int]]:
    inner = [f"body.{i}" for i in range(depth)] + [f"up.{j}" for j in range(ups)]
    return {"head": (width, 3), **dict.fromkeys(inner, (width, width)), "tail": (3, width)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as its authors would have published it."""
    folder = tmp_path / "published"
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (o, i) in shapes(width=10, depth=2, ups=2).items():
        tensors[f"toy.{name}.weight"] = torch.randn(o, i, 3, 3, generator=generator) / (9 * i) ** 0.5
        tensors[f"toy.{name}.bias"] = torch.randn(o, generator=generator) * 0.1
    write_safetensors(folder / MODEL, tensors)
    (folder / "config.json").write_text(json.dumps({"_class_name": "ToySRModel", "strength": STRENGTH}))
    return folder


def reference(folder: Path, image: Tensor) -> Tensor:
    """The formula at the head of toy.py in plain PyTorch, float64: [N,3,H,W] in [0,1] -> [N,3,4H,4W]."""
    from safetensors.torch import load_file

    t = {name.removeprefix("toy."): tensor.double() for name, tensor in load_file(folder / MODEL).items()}

    def conv(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, t[f"{name}.weight"], t[f"{name}.bias"], padding=1)

    h = conv("head", 2 * image.double() - 1)
    for i in range(2):
        h = torch.relu(STRENGTH * conv(f"body.{i}", h) + h)
    for j in range(2):
        h = torch.relu(conv(f"up.{j}", F.interpolate(h, scale_factor=2)))
    return conv("tail", h) / 2 + 0.5


def image(height: int = 12, width: int = 9) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(1))


def compiled(ckpt: object, **options: object) -> CompiledSR:
    return tinysr_kernels.compile(ckpt, device="cpu", backend="reference", **options)


@pytest.mark.parametrize("file", ["", MODEL], ids=["folder", "file"])
def test_compile_recognizes_and_runs_it(folder: Path, file: str) -> None:
    model = compiled(folder / file, color_fix="none", dtype="float64")
    assert (model.family, model.config) == ("toy-sr", ToyConfig(STRENGTH))
    expected = reference(folder, image()[None])[0].clamp(0, 1)
    torch.testing.assert_close(model(image().double()), expected, rtol=1e-12, atol=1e-12)


def test_its_defaults_are_its_own(folder: Path) -> None:
    model = compiled(folder)
    assert (model.color_fix, model.dtype, model.upscale) == ("wavelet", torch.float32, 4)
    assert model(image()).shape == (3, 48, 36)
    with pytest.raises(tinysr_kernels.InputError, match="enlarges by 4"):
        compiled(folder, upscale=2)
    with pytest.raises(tinysr_kernels.InputError, match="this checkpoint is toy-sr"):
        compiled(folder, quantize="fp8")


def test_tiles(folder: Path) -> None:
    """The second tile begins after 8 pixels; before that the first is alone and gives what the whole gives."""
    whole, tiled = (compiled(folder, color_fix="none", tile=tile)(image(40, 40)) for tile in (None, 32))
    assert tiled.shape == whole.shape
    torch.testing.assert_close(tiled[:, :32, :32], whole[:, :32, :32], rtol=1e-5, atol=1e-6)


def test_a_module(folder: Path) -> None:
    """Its keys are recognized as a file's are; the configuration is the module's own."""
    from safetensors.torch import load_file

    module = torch.nn.Module()
    for name, tensor in load_file(folder / MODEL).items():
        at: torch.nn.Module = module
        *path, last = name.split(".")
        for step in path:
            if not hasattr(at, step):
                at.add_module(step, torch.nn.Module())
            at = at.get_submodule(step)
        at.register_parameter(last, torch.nn.Parameter(tensor))
    module.config = {"strength": STRENGTH}
    torch.testing.assert_close(compiled(module)(image()), compiled(folder)(image()))


def test_saved_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    model = compiled(folder)
    model.save(tmp_path / "folded.safetensors")
    again = compiled(tmp_path / "folded.safetensors")
    assert (again.family, again.config) == ("toy-sr", ToyConfig(STRENGTH))
    assert torch.equal(again(image()), model(image()))
    edit_metadata(tmp_path / "folded.safetensors", config='{"strength": "large"}')
    refused(tmp_path / "folded.safetensors", "config", "strength must be a number from 0.0001 to 10000, found 'large'")


def test_the_command_describes_and_converts_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["info", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["family"], told["config"]["strength"], told["color_fix"]) == ("toy-sr", STRENGTH, "wavelet")
    assert told["launches_per_image"] > 6
    assert "2 nearest enlargements into 2x2 phases" in told["folded"]
    assert main(["info", str(folder)]) == 0
    assert "toy-sr" in capsys.readouterr().out
    assert main(["convert", str(folder), str(tmp_path / "out.safetensors")]) == 0
    assert torch.equal(compiled(tmp_path / "out.safetensors")(image()), compiled(folder)(image()))


def test_what_is_wrong_with_it_is_said(folder: Path, tmp_path: Path) -> None:
    path = folder / MODEL
    edit_json(folder / "config.json", strength=-1.0)
    refused(folder, "config.json", "strength", "positive", "-1.0")
    edit_json(folder / "config.json", strength=STRENGTH, _class_name="OtherModel")
    refused(path, "config.json", "_class_name", "'ToySRModel'", "'OtherModel'")
    edit_json(folder / "config.json", _class_name="ToySRModel")
    edit(path, lambda tensors: tensors.update({"toy.body.0.weight": torch.ones(10, 9, 3, 3)}))
    refused(folder, MODEL, "'toy.body.0.weight'", "[10, 10, 3, 3]", "[10, 9, 3, 3]")
    edit(path, lambda tensors: tensors.update({"toy.body.0.weight": torch.ones(10, 10, 3, 3), "toy.x": torch.ones(1)}))
    refused(folder, MODEL, "'toy.x'", "unexpected")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "a Toy-SR file")


def test_without_its_line_it_is_unknown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, ToySR.name)
    refused(folder, "expected a TinySR folder", MODEL)


def test_the_page_shows_this_file() -> None:
    """docs/add-a-family.md: its Python up to the registry is all of toy.py in order; the rest is of this file."""
    text = (ROOT / "docs" / "add-a-family.md").read_text(encoding="utf-8")
    fence = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
    family, test = (fence.findall(part) for part in text.split("## 7. The registry"))
    toy, own = ((ROOT / "tests" / "families" / n).read_text(encoding="utf-8") for n in ("toy.py", "test_toy_family.py"))
    assert without_space("".join(family)) == without_space(toy)
    assert len(test) == 2
    for block in test:
        assert without_space(block) in without_space(own), block


def without_space(text: str) -> str:
    """Blocks of a page may be indented and wrapped in another way than the file."""
    return re.sub(r"\s+", "", text)
