"""Which launch configuration is chosen, in which order, and that a choice is cached."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.launch.files import (
    BUCKET,
    CALL,
    DEVICE,
    H200,
    MEASURED,
    choose,
    content,
    entry,
    notices,
    write,
)
from tinysr_kernels.launch import config_file, configs
from tinysr_kernels.launch.backend import using
from tinysr_kernels.launch.device import GPUS, Gpu, assume, gpu_of
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.conv.sepconv import Config
from tinysr_kernels.ops.norm.kernels import layer_norm as layer_norm_kernel


def test_order(folders: tuple[Path, Path]) -> None:
    """User's file, bundled file, heuristic; an override by the caller takes precedence over all."""
    user, bundled = folders
    with notices() as messages:
        assert choose() == configs.Choice(CALL.heuristic(H200), "heuristic")
        path = write(bundled, content())
        assert choose() == configs.Choice(Config(**MEASURED), path, config_file.Entry(Config(**MEASURED), 5.5, 7.0, 40))
        other = {**MEASURED, "num_warps": 8}
        path = write(user, content(entry(other)))
        assert (choose().config, choose().source) == (Config(**other), path)
        with configs.given(sepconv=Config(**MEASURED)):
            assert choose() == configs.Choice(Config(**MEASURED), "given")
        with configs.given(sepconv={BUCKET: Config(**MEASURED)}):
            assert choose() == configs.Choice(Config(**MEASURED), "given")
        with configs.given(sepconv={BUCKET + " ": Config(**MEASURED)}, layer_norm=1):
            assert choose().source == path
        assert choose().source == path
        assert configs.chosen()[path] >= 1
    assert messages == []


def test_predictions_come_after_measurements_and_say_what_they_are(folders: tuple[Path, Path]) -> None:
    """Predicted with any version of anything; measured with another Triton is not used."""
    _, bundled = folders
    predicted = {config_file.PREDICTED: True, "triton": "2.1.0", "torch": "1.0", "driver": None}
    with notices() as messages:
        path = write(bundled / "predicted", content(**predicted))
        assert choose() == configs.Choice(
            Config(**MEASURED), f"{path} (predicted)", config_file.Entry(Config(**MEASURED), 5.5, 7.0, 40, {}, True)
        )
        assert choose().source == f"{path} (predicted)"
        measured = write(bundled, content(entry({**MEASURED, "num_warps": 8})))
        assert (choose().config.num_warps, choose().source) == (8, measured)
    assert messages == []
    Path(measured).unlink()
    for not_true in (1, "true", None, False):
        write(bundled / "predicted", content(**{**predicted, config_file.PREDICTED: not_true}))
        assert choose().source == "heuristic"
    assert choose(Gpu("NVIDIA H200 NVL", (9, 0), 132)).source == "heuristic"


def test_programmatic_dependent_launch_if_a_file_enables_it(folders: tuple[Path, Path]) -> None:
    user, bundled = folders
    assert not configs.pdl(H200)
    write(bundled, content(**{config_file.PDL: True}))
    assert configs.pdl(H200)
    assert not configs.pdl(GPUS[80])
    write(user, content())  # without a setting
    assert configs.pdl(H200)
    write(user, content(**{config_file.PDL: False}))
    assert not configs.pdl(H200)
    write(user, content(**{config_file.PDL: 1}))  # a value that is no bool is ignored
    assert configs.pdl(H200)
    write(user, content(**{config_file.PDL: False}, schema=7))  # an invalid file
    assert configs.pdl(H200)
    with configs.given_pdl(False):
        assert not configs.pdl(H200)
    write(bundled, content())
    with configs.given_pdl(True):
        assert configs.pdl(H200)
        assert not configs.pdl(GPUS[80])
        assert not configs.pdl(GPUS[89])
        assert configs.pdl(GPUS[120])


@pytest.mark.parametrize("on", [False, True])
def test_launches_have_the_pdl_option(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are launched with launch_pdl only if a file or the override enables it."""
    options_seen: list[dict] = []

    class Made:
        def __getitem__(self, grid: object) -> object:
            return lambda **options: options_seen.append(options)

    monkeypatch.setitem(vars(layer_norm_kernel.normalize), "made", Made())
    with using("triton"), configs.given_pdl(on):
        torch.ops.tinysr.layer_norm(torch.ones(2, 64), 1e-5)
    assert [one.get("launch_pdl", False) for one in options_seen] == [on]
    assert not on or options_seen[0]["launch_pdl"] is True


def test_another_gpu_has_another_file(folders: tuple[Path, Path]) -> None:
    write(folders[1], content())
    assert choose(GPUS[80]).source == "heuristic"
    assert len({configs.file_name(gpu.name) for gpu in GPUS.values()}) == len(GPUS)
    assert configs.file_name(H200.name) == "NVIDIA H200.json"
    assert configs.file_name("A/B\\C:D\0") == "A-B-C-D-.json"


def test_nearest_only_if_enabled(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Same architecture, nearest number of multiprocessors; the file of exactly this GPU takes precedence."""
    user, bundled = folders
    gpus = [Gpu("NVIDIA H100 PCIe", (9, 0), 114), Gpu("NVIDIA GH200", (9, 0), 130), Gpu("NVIDIA X", (10, 0), 132)]
    paths = [
        write(
            bundled,
            content(
                device={
                    **DEVICE,
                    "name": gpu.name,
                    "multiprocessors": gpu.multiprocessors,
                    "capability": list(gpu.capability),
                }
            ),
            gpu,
        )
        for gpu in gpus
    ]
    write(user, b"{", Gpu("NVIDIA Y", (9, 0), 132))
    assert choose().source == "heuristic"
    monkeypatch.setenv(configs.NEAREST, "1")
    configs.forget()
    assert choose().source == f"{paths[1]} (nearest)"
    path = write(bundled, content())
    assert choose().source == path


def test_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(configs.USER_FOLDER, "/there")
    assert configs.user_folder() == Path("/there")
    monkeypatch.delenv(configs.USER_FOLDER)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/configuration")
    assert configs.user_folder() == Path("/configuration/tinysr-kernels")
    monkeypatch.setenv("HOME", "/home/somebody")
    for ignored in ("relative", ""):
        monkeypatch.setenv("XDG_CONFIG_HOME", ignored)
        assert configs.user_folder() == Path("/home/somebody/.config/tinysr-kernels")


@pytest.mark.parametrize("op", sorted(REGISTRY))
def test_bucket_and_heuristic_read_only_the_fields_of_the_key(op: str) -> None:
    """A call whose other fields are an object without any attribute gets the same configuration."""
    from tests.ops.cases import CASES

    for case in CASES[op]:
        call = REGISTRY[op](**case.arguments(torch.float16))
        bare = type(call)(**{k: v if k in call.tuned_by else object() for k, v in call.arguments.items()})
        assert bare.bucket() == call.bucket()
        for gpu in GPUS.values():
            assert bare.heuristic(gpu) == call.heuristic(gpu)


@pytest.mark.parametrize("op", sorted(REGISTRY))
def test_a_choice_is_cached(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later calls of the same shapes and flags only look it up: no bucket, no heuristic, no file."""
    from tests.ops.cases import CASES

    call = REGISTRY[op](**CASES[op][0].arguments(torch.float16))
    first = call.choose(H200)

    def refuse(*_: object) -> None:
        raise AssertionError("chosen again")

    for name in ("bucket", "heuristic", "plan"):
        monkeypatch.setattr(REGISTRY[op], name, refuse)
    monkeypatch.setattr(configs, "_from_files", refuse)
    again = REGISTRY[op](**CASES[op][0].arguments(torch.float16))
    assert again.choose(H200) is first


def test_the_cache_of_choices_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "WARM_LIMIT", 8)
    configs.forget()
    for rows in range(1, 30):
        REGISTRY["layer_norm"](torch.empty(rows, 8), 1e-6).choose(H200)
        assert len(configs._warm) <= 8


def test_assumed_gpu() -> None:
    """Tensors that are not on a GPU are planned for the assumed one."""
    x = torch.empty(1)
    with assume(GPUS[120]):
        assert gpu_of(x) == GPUS[120]
        assert gpu_of(x).shared_limit == 99 * 1024
    assert gpu_of(x) == H200
