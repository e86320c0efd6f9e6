"""Weights that change are folded again; copies, pickles and restored modules are what they seem to be."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tinysr_kernels
from tests.runtime.autoencoder.modules import autoencoder, both, image_for, is_fused, latent_for, randomise, relative
from tinysr_kernels.runtime.autoencoder.half import Half


def edit_in_place(module: Any) -> None:
    with torch.no_grad():
        module.decoder.conv_in.weight.mul_(1.5)


def edit_one_value(module: Any) -> None:
    """One that is not among those compared: torch counts the edit."""
    with torch.no_grad():
        module.decoder.conv_in.weight.view(-1)[1] += 5


def edit_in_inference_mode(module: Any) -> None:
    with torch.inference_mode():
        module.decoder.mid_block.resnets[0].norm1.bias.add_(0.5)


def edit_data(module: Any) -> None:
    """As libraries merge adapters: torch does not count it, and the storage is the same."""
    module.decoder.up_blocks[0].upsamplers[0].conv.weight.data += 0.05


def copy_to_data(module: Any) -> None:
    """As averages of weights are copied."""
    for p in module.parameters():
        p.data.copy_(p.data * 1.1)


def set_data(module: Any) -> None:
    module.decoder.conv_out.bias.data = module.decoder.conv_out.bias.data + 1


def other_weights() -> dict[str, Tensor]:
    return dict(autoencoder(seed=5).state_dict())


def replace_a_layer(module: Any) -> None:
    old = module.decoder.conv_out
    module.decoder.conv_out = torch.nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1)
    randomise(module.decoder.conv_out, 7)
    module.requires_grad_(False)


def change_eps(module: Any) -> None:
    for part in module.decoder.modules():
        if isinstance(part, torch.nn.GroupNorm):
            part.eps = 0.3


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": edit_in_place,
    "one value": edit_one_value,
    "in inference mode": edit_in_inference_mode,
    ".data in place": edit_data,
    ".data.copy_": copy_to_data,
    ".data set": set_data,
    "load_state_dict": lambda module: module.load_state_dict(other_weights()),
    "load_state_dict, assigned": lambda module: module.load_state_dict(other_weights(), assign=True),
    "float64": lambda module: module.double(),
    "channels_last": lambda module: module.to(memory_format=torch.channels_last),
    "a layer": replace_a_layer,
    "eps": change_eps,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_folded_again(change: str) -> None:
    plain = autoencoder()
    fused = tinysr_kernels.accelerate(autoencoder())
    both(fused, image_for(plain), latent_for(plain))
    for module in (plain, fused):
        CHANGES[change](module)
    image, latent = image_for(plain).to(plain.dtype), latent_for(plain).to(plain.dtype)
    for found, expected in zip(both(fused, image, latent), both(plain, image, latent), strict=True):
        assert relative(found, expected) < 1e-5
        assert found.stride() == expected.stride()
    assert is_fused(fused.decoder)


def test_unchanged_weights_are_folded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = tinysr_kernels.accelerate(autoencoder())
    made = []
    for _ in range(3):
        both(fused, image_for(fused), latent_for(fused))
        made.append((fused.encoder.forward._made, fused.decoder.forward._made))
    assert made[0] == made[1] == made[2]


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        fused = tinysr_kernels.accelerate(autoencoder())
        image, latent = image_for(fused), latent_for(fused)
        before = both(fused, image, latent)[1]
        edit_data(fused)
        after = both(fused, image, latent)[1]
    assert is_fused(fused.decoder)
    assert relative(after, before) > 1e-3
    assert torch.equal(both(fused, image.clone(), latent.clone())[1], after)


def by_pickle(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def by_torch(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle, by_torch])
def test_copies_stand_for_themselves(how: Callable[[Any], Any]) -> None:
    module = tinysr_kernels.accelerate(autoencoder(), quality="exact")
    image, latent = image_for(module), latent_for(module)
    before = both(module, image, latent)
    other = how(module)
    for half in (other.encoder, other.decoder):
        assert half.forward.module is half
        assert half.forward.settings == module.encoder.forward.settings
    assert all(torch.equal(*pair) for pair in zip(both(other, image, latent), before, strict=True))
    with torch.no_grad():
        other.decoder.conv_in.weight.zero_()
    assert not torch.equal(both(other, image, latent)[1], before[1])
    assert torch.equal(both(module, image, latent)[1], before[1])


def test_restore_leaves_nothing() -> None:
    module = autoencoder()
    image, latent = image_for(module), latent_for(module)
    before = both(module, image, latent)
    attributes = [{*half.__dict__} for half in (module, module.encoder, module.decoder)]
    assert tinysr_kernels.accelerate(module) is module
    assert not torch.equal(both(module, image, latent)[1], before[1])  # another order of operations
    assert tinysr_kernels.restore(module) is module
    assert [{*half.__dict__} for half in (module, module.encoder, module.decoder)] == attributes
    assert all(torch.equal(*pair) for pair in zip(both(module, image, latent), before, strict=True))
    assert tinysr_kernels.restore(tinysr_kernels.restore(module)) is module


def test_accelerating_twice_takes_the_last_settings() -> None:
    module = tinysr_kernels.accelerate(autoencoder(), quality="exact")
    tinysr_kernels.accelerate(module, quality="high")
    assert isinstance(module.decoder.forward, Half)
    assert module.decoder.forward.settings.quality == "high"
    tinysr_kernels.restore(module)
    assert "forward" not in module.decoder.__dict__


def test_the_module_keeps_its_interface(tmp_path: Path) -> None:
    plain, module = autoencoder("sd3"), autoencoder("sd3")
    keys, config = list(module.state_dict()), dict(module.config)
    tinysr_kernels.accelerate(module)
    both(module, image_for(module), latent_for(module))
    assert type(module) is type(plain)
    assert list(module.state_dict()) == keys
    assert sum(1 for _ in module.modules()) == sum(1 for _ in plain.modules())
    assert dict(module.config) == config
    assert (module.dtype, module.device) == (torch.float32, torch.device("cpu"))
    module.save_pretrained(tmp_path)
    again = type(module).from_pretrained(tmp_path)
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in again.state_dict().items())


def test_nothing_keeps_a_deleted_module() -> None:
    module = tinysr_kernels.accelerate(autoencoder())
    both(module, image_for(module), latent_for(module))
    decoder = weakref.ref(module.decoder)
    gc.disable()
    try:
        del module
        assert decoder() is None
    finally:
        gc.enable()


def test_tiles_slices_and_samples() -> None:
    """Tiling and slicing are diffusers' own, and a generator draws the same noise."""
    plain, fused = autoencoder(), tinysr_kernels.accelerate(autoencoder())
    image, latent = image_for(plain, 24, 32), latent_for(plain, 12, 16, 2)
    for module in (plain, fused):
        module.enable_tiling()
        module.enable_slicing()
        module.tile_sample_min_size, module.tile_latent_min_size = 16, 8
    for found, expected in zip(both(fused, image, latent), both(plain, image, latent), strict=True):
        assert found.shape == expected.shape
        assert relative(found, expected) < 1e-5
    drawn = [m.encode(image, return_dict=False)[0].sample(torch.Generator().manual_seed(3)) for m in (plain, fused)]
    assert relative(drawn[1], drawn[0]) < 1e-5
    assert relative(fused(image).sample, plain(image).sample) < 1e-4
    assert isinstance(fused.decode(latent, return_dict=False), tuple)
