"""Numbers and lists of configurations: absurd ones are refused by their name, in a moment, and in few words."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from tests.checkpoint.edit import edit_json, edit_metadata, refused
from tests.layouts.tinysr import TRANSFORMER, VAE, write_tinysr
from tests.layouts.unet import write_unet
from tinysr_kernels.families import FAMILIES, UNetConfig, config_from_dict, config_to_dict, load
from tinysr_kernels.families.config import Within, config_from_values

ABSURD: tuple[Any, ...] = (
    0, -1, 2**31 - 1, 2**63, 10**39, 1e308, 1e-308, -1e-5, math.nan, math.inf, True, None, "4", [], [0], [True],
    [2147483647], [1.0], ["1"], [[1]], [1] * 100_000, {}, "x" * 100_000,
)  # fmt: skip


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_field_refuses_every_absurd_value(family: str) -> None:
    default = config_to_dict(FAMILIES[family].config_class())
    started = time.process_time()
    for name in default:
        for value in ABSURD:
            with pytest.raises(ValueError, match=f"^{name}") as caught:
                config_from_dict(family, {name: value})
            assert len(str(caught.value)) < 400
            assert str(caught.value).isprintable()
    assert time.process_time() - started < 2
    assert config_from_dict(family, default) == FAMILIES[family].config_class()


def test_bounds_are_inclusive_and_kinds_exact() -> None:
    @dataclass(frozen=True)
    class Config:
        number: Annotated[float, Within(0.5, 2)] = 1.0
        whole: Annotated[int, Within(2, 3)] = 2
        several: Annotated[tuple[int, ...], Within(1, 4, entries=2)] = (1,)

    Config.__annotations__ = {
        "number": Annotated[float, Within(0.5, 2)],
        "whole": Annotated[int, Within(2, 3)],
        "several": Annotated[tuple[int, ...], Within(1, 4, entries=2)],
    }
    assert config_from_values(Config, {"number": 0.5, "whole": 3, "several": [4, 1]}) == Config(0.5, 3, (4, 1))
    assert type(config_from_values(Config, {"number": 2}).number) is float
    for values in ({"number": 0.49}, {"number": 2.01}, {"whole": 1}, {"whole": 4}, {"whole": 2.0}, {"several": [1] * 3},
                   {"several": [5]}, {"several": "1"}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(values))):
            config_from_values(Config, values)


@pytest.mark.parametrize("value", ABSURD, ids=lambda value: repr(value)[:20])
def test_numbers_in_a_file_of_ours(tmp_path: Path, value: Any) -> None:
    path = write_unet(tmp_path / "own.safetensors", channels=(4, 8), decoder_channels=(4, 4, 4, 4)).path
    for name in ("unet_eps", "encoder_blocks", "head_dim"):
        edit_metadata(path, config=json.dumps({name: value}))
        assert len(refused(path, "metadata config")) < 700


@pytest.mark.parametrize(
    ("part", "field"),
    [
        (TRANSFORMER, "attention_head_dim"),
        (TRANSFORMER, "num_layers"),
        (TRANSFORMER, "patch_size"),
        (VAE, "num_encoder_blocks"),
        (VAE, "decoder_block_out_channels"),
        (VAE, "latent_channels"),
        (VAE, "scaling_factor"),
        (VAE, "in_channels"),
    ],
)
def test_numbers_in_a_released_configuration(written: Path, part: str, field: str) -> None:
    path = written / part / "config.json"
    kept = path.read_text()
    try:
        for value in (value for value in ABSURD if value is not None):  # None leaves the field out
            edit_json(path, **{field: value})
            started = time.process_time()
            assert len(refused(written, part)) < 700
            assert time.process_time() - started < 2
    finally:
        path.write_text(kept)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tinysr")
    write_tinysr(folder, dim=64, layers=1, channels=4, vae_width=4)
    assert load(folder).tensors
    return folder


def test_a_unet_that_reduces_too_often(tmp_path: Path) -> None:
    """Images are padded to a multiple of what they are reduced by: two to the power of twelve, once for all."""
    write_unet(tmp_path / "deep.safetensors", UNetConfig(), channels=(4,) * 12, decoder_channels=(4, 4, 4, 4))
    refused(tmp_path, "downsamplers", "at most 8 reductions")
