"""Models in other processes, and copies: by source and arguments, or by the folded weights."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import tinysr_kernels
from tests.layouts.adcsr import write_adcsr
from tests.layouts.tinysr import write_tinysr
from tests.runtime.sample_images import noise
from tinysr_kernels.runtime.arguments import portable


def again(model: tinysr_kernels.CompiledSR) -> tinysr_kernels.CompiledSR:
    return pickle.loads(pickle.dumps(model))


def same(a: tinysr_kernels.CompiledSR, b: tinysr_kernels.CompiledSR) -> None:
    image = noise(20, 21)
    assert a is not b
    assert np.array_equal(a(image), b(image))
    ours, theirs = a.info() | {"source": ""}, b.info() | {"source": ""}
    assert ours == theirs


def test_a_model_from_files_is_pickled_by_source_and_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tinysr(tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"dtype": "bfloat16", "color_fix": "wavelet", "upscale": 2, "max_graph_shapes": 3}
    model = tinysr_kernels.compile("folder", device="cpu", **options)
    data = pickle.dumps(model)
    assert len(data) < 2000
    os.chdir("/")  # a worker may start anywhere
    same(model, pickle.loads(data))
    demo = tinysr_kernels.compile("demo", device="cpu", tile=48, cuda_graphs=False)
    same(demo, again(demo))
    assert again(demo).info()["tile"] == 48


def test_a_checkpoint_in_memory_travels_as_folded_weights(tmp_path: Path) -> None:
    written = write_adcsr(tmp_path)
    parts = {"net_params": next(tmp_path.rglob("net_params*")), "decoder": written.decoder.state_dict()}
    model = tinysr_kernels.compile(parts, device="cpu")
    same(model, again(model))
    folder = tmp_path / "folder"
    write_tinysr(folder)
    fp8 = tinysr_kernels.compile(folder, device="cpu", quantize="fp8")
    same(fp8, again(fp8))


def test_a_source_that_is_gone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tinysr_kernels.compile("demo", device="cpu").save(path)
    data = pickle.dumps(tinysr_kernels.compile(path, device="cpu"))
    path.unlink()
    with pytest.raises(tinysr_kernels.CheckpointError, match=r"model\.safetensors"):
        pickle.loads(data)


def test_a_device_that_is_not_there_is_named() -> None:
    model = tinysr_kernels.compile("demo", device="cpu")
    model.device = torch.device("cuda", 99)
    for recipe in (model._recipe, None):
        model._recipe = recipe
        data = pickle.dumps(model)
        with pytest.raises(tinysr_kernels.InputError, match=r"cuda:99.*available here: cpu"):
            pickle.loads(data)


def test_copies_are_the_model_itself() -> None:
    model = tinysr_kernels.compile("demo", device="cpu")
    assert copy.copy(model) is model
    assert copy.deepcopy({"sr": model})["sr"] is model


def test_what_another_process_finds(tmp_path: Path) -> None:
    here = os.getcwd()
    assert portable("demo") == "demo"
    assert portable("hf://a/b") == "hf://a/b"
    assert portable(Path("x")) == os.path.join(here, "x")
    assert portable({"unet": "x", "decoder": tmp_path}) == {"unet": os.path.join(here, "x"), "decoder": str(tmp_path)}
    assert portable(["x"]) == [os.path.join(here, "x")]
    for memory in (torch.zeros(1), torch.nn.Linear(1, 1), {"unet": "x", "decoder": {"a": torch.zeros(1)}}, None, 3):
        assert portable(memory) is None


class Enlarged(Dataset[torch.Tensor]):
    """Images enlarged in the workers of a DataLoader."""

    def __init__(self, model: tinysr_kernels.CompiledSR) -> None:
        self.model = model

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.model(torch.full((3, 8, 8), 60 * index + 50, dtype=torch.uint8))


def test_spawned_workers_give_the_same() -> None:
    dataset = Enlarged(tinysr_kernels.compile("demo", device="cpu"))
    loader = DataLoader(dataset, num_workers=1, multiprocessing_context="spawn", batch_size=None)
    assert all(torch.equal(found, dataset[i]) for i, found in enumerate(loader))
