"""Which launch configuration is chosen, in which order, and what asking costs."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.launch.files import (
    ARGUMENTS,
    BUCKET,
    DEVICE,
    H200,
    KERNELS,
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
from tinysr_kernels.ops import REGISTRY, layer_norm_kernel
from tinysr_kernels.ops.sepconv import Config


def test_order(folders: tuple[Path, Path]) -> None:
    """User's file, bundled file, heuristic; a configuration given by the caller before all."""
    user, bundled = folders
    with notices() as said:
        assert choose() == configs.Choice(KERNELS.heuristic(H200, **ARGUMENTS), "heuristic")
        path = write(bundled, content())
        assert choose() == configs.Choice(Config(**MEASURED), path, config_file.Entry(Config(**MEASURED), 5.5, 7.0, 40))
        other = {**MEASURED, "warps": 8}
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
    assert said == []


def test_programmatic_dependent_launch_where_a_file_says_so(folders: tuple[Path, Path]) -> None:
    user, bundled = folders
    assert not configs.pdl(H200)
    write(bundled, content(**{config_file.PDL: True}))
    assert configs.pdl(H200)
    assert not configs.pdl(GPUS[80])
    write(user, content())  # says nothing
    assert configs.pdl(H200)
    write(user, content(**{config_file.PDL: False}))
    assert not configs.pdl(H200)
    write(user, content(**{config_file.PDL: 1}))  # what is no bool says nothing either
    assert configs.pdl(H200)
    write(user, content(**{config_file.PDL: False}, schema=7))  # does not count
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
def test_launches_are_told(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator's kernels are launched with launch_pdl where the files, or the tuner, say so; nobody else's are."""
    told: list[dict] = []

    class Made:
        def __getitem__(self, grid: object) -> object:
            return lambda **options: told.append(options)

    monkeypatch.setitem(vars(layer_norm_kernel.normalise), "made", Made())
    with using("triton"), configs.given_pdl(on):
        torch.ops.tinysr.layer_norm(torch.ones(2, 64), 1e-5)
    assert [one.get("launch_pdl", False) for one in told] == [on]
    assert not on or told[0]["launch_pdl"] is True


def test_another_card_has_another_file(folders: tuple[Path, Path]) -> None:
    write(folders[1], content())
    assert choose(GPUS[80]).source == "heuristic"
    assert len({configs.file_name(gpu.name) for gpu in GPUS.values()}) == len(GPUS)
    assert configs.file_name(H200.name) == "NVIDIA H200.json"
    assert configs.file_name("A/B\\C:D\0") == "A-B-C-D-.json"


def test_nearest_only_if_asked_for(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Same architecture, nearest number of multiprocessors; a file for the very device goes first."""
    user, bundled = folders
    cards = [Gpu("NVIDIA H100 PCIe", (9, 0), 114), Gpu("NVIDIA GH200", (9, 0), 130), Gpu("NVIDIA X", (10, 0), 132)]
    paths = [
        write(
            bundled,
            content(
                device={
                    **DEVICE,
                    "name": card.name,
                    "multiprocessors": card.multiprocessors,
                    "capability": list(card.capability),
                }
            ),
            card,
        )
        for card in cards
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


@pytest.mark.parametrize("op", [name for name, operator in REGISTRY.items() if operator.kernels])
def test_the_same_shapes_and_flags_get_the_same_configuration(op: str) -> None:
    """What the look-up goes by is all that bucket and heuristic look at."""
    from tests.ops.cases import CASES

    operator = REGISTRY[op]
    assert operator.kernels is not None
    for case in CASES[op]:
        arguments = operator.arguments(**case.arguments(torch.float16))
        read = {id(v) for v in operator.kernels.read(arguments)}
        unread = {k: v if id(v) in read else None for k, v in arguments.items()}
        assert operator.kernels.bucket(**unread) == operator.kernels.bucket(**arguments)
        assert operator.kernels.heuristic(H200, **unread) == operator.kernels.heuristic(H200, **arguments)


@pytest.mark.parametrize("op", [name for name, operator in REGISTRY.items() if operator.kernels])
def test_warm_lookup_takes_less_than_2_us(op: str, folders: tuple[Path, Path]) -> None:
    """Which configuration a call has on a GPU, for the operator's case with most tensors.

    On a slow processor or a busy machine, less than 20 times as long as a key of a few values takes to make and look up
    there: 0.1 to 0.2 us.
    """
    from tests.ops.cases import CASES

    operator = REGISTRY[op]
    kernels = operator.kernels
    assert kernels is not None
    cases = (operator.arguments(**case.arguments(torch.float16)) for case in CASES[op])
    arguments = max(cases, key=lambda some: sum(isinstance(v, torch.Tensor) for v in some.values()))
    first = next(iter(arguments.values()))
    write(folders[0], content())
    gpu = gpu_of(first)
    configs.choose(op, kernels, gpu, arguments)
    seconds = [_least_seconds(lambda: configs.choose(op, kernels, gpu, arguments)), _least_seconds(_a_key)]
    assert seconds[0] < max(2e-6, 20 * seconds[1])


def _least_seconds(call: Callable[[], object]) -> float:
    """Of one of 100 calls, the least of many: other processes take turns on the cores."""
    return min(timeit.repeat(call, number=100, repeat=500)) / 100


def _a_key() -> object:
    key = ("float16", 3, 4)
    return {}.get(f"{key[0]} {key[1]} {hash(key)}")


def test_memory_of_calls_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = REGISTRY["layer_norm"]
    assert operator.kernels is not None
    monkeypatch.setattr(configs, "WARM_LIMIT", 8)
    configs.forget()
    for rows in range(1, 30):
        configs.choose("layer_norm", operator.kernels, H200, operator.arguments(torch.empty(rows, 8), 1e-6))
        assert len(configs._warm) <= 8


def test_assumed_gpu() -> None:
    """Tensors on no GPU are planned for the one assumed."""
    x = torch.empty(1)
    with assume(GPUS[120]):
        assert gpu_of(x) == GPUS[120]
        assert gpu_of(x).shared_limit == 99 * 1024
    assert gpu_of(x) == H200
