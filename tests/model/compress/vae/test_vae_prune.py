"""Channel pruning: cutting channels that carry nothing of their own leaves every network's function as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.compress.vae.prune import choose, gram_matrices, importance, match_norms, mend, prune_kl, remove_attention
from model.compress.vae.spaces import Spaces, check, cut, kept_of, kl_spaces, tiny_spaces, unet_spaces, untouched
from model.reference.kl_vae import KLVAE, kl_config, kl_vae_shapes
from model.reference.pruned_unet import PrunedUNet
from model.reference.tiny_vae import TinyVAE
from model.reference.unet_shapes import unet_shapes
from tests.layouts.weights import fill, random_image
from tinysr_kernels.families import TinySRConfig, UNetConfig

GROUPS = 4


def shapes_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in state.items()}


def vae(channels: tuple[int, ...] = (8, 16), groups: int = GROUPS, layers: int = 1) -> KLVAE:
    network = KLVAE(kl_vae_shapes(channels, 4, layers), kl_config(groups)).double()
    fill(network, 0)
    return network


def widened(state: dict[str, Tensor], spaces: Spaces, names: set[str], unread: bool = False) -> dict[str, Tensor]:
    """The same function with every channel of `names` twice, neighbors, so that a group holds both copies.

    What reads the channels reads each copy with random weights that add up to the old ones; with `unread` the first
    copy alone.
    """
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name, tensor in state.items():
        for axis, stream in spaces.axes.get(name, []):
            parts = []
            for part, piece in zip(stream, tensor.split([spaces.widths[s] for s in stream], axis), strict=True):
                double = piece.repeat_interleave(2, axis) if part in names else piece
                if part in names and axis == 1:
                    shares = torch.rand(double.shape[1] // 2, generator=generator, dtype=double.dtype)
                    shares = torch.ones_like(shares) if unread else shares
                    shares = torch.stack([shares, 1 - shares], 1).flatten()
                    double = double * shares.reshape(1, -1, *[1] * (double.ndim - 2))
                parts.append(double)
            tensor = torch.cat(parts, axis)
        out[name] = tensor
    return out


def every_other(spaces: Spaces, names: set[str]) -> dict[str, Tensor]:
    return {name: torch.arange(0, 2 * spaces.widths[name], 2) for name in names}


def free(spaces: Spaces) -> set[str]:
    return set(spaces.widths) - spaces.fixed


# ---------------------------------------------------------------------------------------------------------- exactness
@pytest.mark.parametrize("attention", [True, False])
def test_copies_are_pruned_from_the_kl_vae_without_a_trace(attention: bool) -> None:
    state = vae().state_dict()
    state = dict(state) if attention else remove_attention(state)
    spaces = kl_spaces(shapes_of(state))
    narrow = KLVAE.from_state(state, kl_config(GROUPS))
    wide_state = widened(state, spaces, free(spaces))
    wide = KLVAE.from_state(wide_state, kl_config(GROUPS))
    image = random_image(16, 16, count=2).double() * 2 - 1
    z = torch.randn(2, 4, 4, 6, dtype=torch.float64)
    assert torch.allclose(wide.encode(image), narrow.encode(image), atol=1e-10)

    wide_spaces, keep = kl_spaces(shapes_of(wide_state)), every_other(spaces, free(spaces))
    if attention:
        # Attention reads its stream through linear layers, which are not mended: give it its weights back.
        mended = mend(wide_state, wide_spaces, keep, gram_matrices(wide, wide_spaces, image))
        for name, axes in spaces.axes.items():
            if "attentions" in name and name.endswith("weight") and axes[-1][0] == 1:
                mended[name] = state[name].repeat_interleave(2, 1)
    else:
        mended = mend(wide_state, wide_spaces, keep, gram_matrices(wide, wide_spaces, image))
    pruned = KLVAE.from_state(cut(mended, wide_spaces, keep, kl_config(GROUPS)), kl_config(GROUPS))
    assert shapes_of(pruned.state_dict()) == shapes_of(state)
    fresh = random_image(12, 16, seed=5).double() * 2 - 1
    assert torch.allclose(pruned.encode(fresh), wide.encode(fresh), atol=1e-8)
    assert torch.allclose(pruned.decode(z), wide.decode(z), atol=1e-8)
    match_norms(pruned, wide, wide_spaces, keep, image)
    assert torch.allclose(pruned.decode(z), wide.decode(z), atol=1e-8)


def test_copies_that_nothing_reads_are_found_by_importance() -> None:
    state = remove_attention(vae((8, 8)).state_dict())
    spaces = kl_spaces(shapes_of(state))
    wide = KLVAE.from_state(widened(state, spaces, free(spaces), unread=True), kl_config(GROUPS))
    pruned = prune_kl(wide, 8, random_image(16, 16, count=3).double() * 2 - 1)
    assert shapes_of(pruned.state_dict()) == shapes_of(state)
    z, image = torch.randn(2, 4, 4, 6, dtype=torch.float64), random_image(12, 8, seed=5).double() * 2 - 1
    assert torch.allclose(pruned.decode(z), wide.decode(z), atol=1e-8)
    assert torch.allclose(pruned.encode(image), wide.encode(image), atol=1e-8)


def test_groups_of_zeros_are_pruned_without_a_trace() -> None:
    """Whole groups may go: the statistics of the others do not see them."""
    network = vae()
    state = dict(network.state_dict())
    spaces = kl_spaces(shapes_of(state))
    hidden = "decoder.up_blocks.0.resnets.0.conv1"
    width = spaces.widths[hidden]
    gone = torch.arange(width // 2, width)
    for name in (f"{hidden}.weight", f"{hidden}.bias", "decoder.up_blocks.0.resnets.0.norm2.weight"):
        state[name] = state[name].index_fill(0, gone, 0.0)
    state["decoder.up_blocks.0.resnets.0.norm2.bias"][gone] = 0.0
    network.load_state_dict(state)
    config = UNetConfig(groups=(GROUPS, GROUPS // 2))
    with pytest.raises(ValueError, match="normalized in 4 groups, not 2"):
        cut(state, spaces, {hidden: torch.arange(width // 2)}, config)
    z = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    scores = importance(state, spaces, gram_matrices(network, spaces, random_image(16, 16).double() * 2 - 1))
    assert scores[hidden][gone].max() == 0
    assert scores[hidden][: width // 2].min() > 0
    odd = {name: tensor[: width // 2] if name.startswith(f"{hidden}.") else tensor for name, tensor in state.items()}
    norm = "decoder.up_blocks.0.resnets.0.norm2"
    odd |= {f"{norm}.{part}": state[f"{norm}.{part}"][: width // 2] for part in ("weight", "bias")}
    conv2 = "decoder.up_blocks.0.resnets.0.conv2.weight"
    odd[conv2] = state[conv2][:, : width // 2]
    halved = KLVAE(shapes_of(odd), UNetConfig(groups=(GROUPS,))).double()
    halved.load_state_dict(odd)
    halved.get_submodule(norm).num_groups = GROUPS // 2
    assert torch.allclose(halved.decode(z), network.decode(z), atol=1e-10)


def test_copies_are_pruned_from_the_unet_through_its_concatenations() -> None:
    config = UNetConfig(groups=(4, 2), head_dim=8)
    shapes = unet_shapes(4, 5, (8, 16), 2, transformers=(True, False), time_bias=True)
    narrow = PrunedUNet(shapes, config).double()
    fill(narrow, 3)
    state = narrow.state_dict()
    spaces = unet_spaces(shapes)
    assert untouched(spaces) == []
    assert any(len(stream) == 2 for stream in spaces.norms.values())
    wide_state = widened(dict(state), spaces, free(spaces))
    wide = PrunedUNet.from_state(wide_state, config).double()
    wide_spaces, keep = unet_spaces(shapes_of(wide_state)), every_other(spaces, free(spaces))
    halved = cut(wide_state, wide_spaces, keep, config)
    # The weights that read copies are shared between them at random, so give them back whole.
    restored = {
        name: state[name] if any(a == 1 for a, _ in spaces.axes.get(name, [])) else t for name, t in halved.items()
    }
    pruned = PrunedUNet.from_state(restored, config).double()
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    assert torch.allclose(pruned(x), wide(x), atol=1e-9)
    assert torch.allclose(narrow(x), wide(x), atol=1e-9)


def test_zero_channels_are_pruned_from_the_tiny_vae() -> None:
    """No norms there, so any channel may go."""
    config = TinySRConfig(encoder_blocks=(1, 2), decoder_blocks=(2, 1))
    network = TinyVAE.regular(width=12, latent_channels=4, config=config, separable_encoder=True).double()
    fill(network, 2)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    spaces = tiny_spaces(shapes_of(state), config.encoder_blocks, config.decoder_blocks)
    assert untouched(spaces) == []
    generator = torch.Generator().manual_seed(0)
    keep = {
        name: torch.randperm(width, generator=generator)[:7].sort().values
        for name, width in spaces.widths.items()
        if name not in spaces.fixed
    }
    for name, tensor in state.items():
        for axis, stream in spaces.axes[name]:
            if axis == 0 and stream[0] in keep and ".depthwise." not in name:
                lost = torch.ones(len(tensor), dtype=torch.bool)
                lost[kept_of(spaces, keep, stream)] = False
                tensor[lost] = 0.0
    network.load_state_dict(state)
    pruned = TinyVAE.from_state(cut(state, spaces, keep, UNetConfig()), config, torch.float64)
    image, z = torch.randn(1, 3, 8, 12, dtype=torch.float64), torch.randn(1, 4, 4, 5, dtype=torch.float64)
    assert torch.allclose(pruned.encode(image), network.encode(image), atol=1e-12)
    assert torch.allclose(pruned.decode(z), network.decode(z), atol=1e-12)
    assert pruned.encoder.layers[0].pointwise.out_channels == 7


# -------------------------------------------------------------------------------------------------- real pruning
def test_pruning_to_a_width_keeps_groups_and_mends() -> None:
    """Half of the channels of a random network: the mended one is nearer to the original than the cut one."""
    network = vae((16, 16), layers=2)
    images = random_image(24, 24, count=4).double() * 2 - 1
    plain = KLVAE.from_state(remove_attention(network.state_dict()), network.config).double()
    pruned = prune_kl(network, 8, images).double()
    assert max(t.shape[0] for t in pruned.state_dict().values()) == 8
    assert {m.num_groups for m in pruned.modules() if isinstance(m, torch.nn.GroupNorm)} == {GROUPS}
    state = plain.state_dict()
    spaces = kl_spaces(shapes_of(state))
    keep = choose(spaces, importance(state, spaces, gram_matrices(plain, spaces, images)), 8, network.config)
    bare = KLVAE.from_state(cut(state, spaces, keep, network.config), network.config).double()
    wanted = plain.encode(images)
    assert (pruned.encode(images) - wanted).norm() < (bare.encode(images) - wanted).norm()


def test_no_attention_is_left() -> None:
    network = vae((16, 16))
    pruned = prune_kl(network, 8, random_image(16, 16).double() * 2 - 1)
    assert not any("attentions" in name for name in pruned.state_dict())


@pytest.mark.parametrize("width", [6, 10])
def test_a_width_that_does_not_divide_the_groups_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"{width} channels do not divide into the 4 groups"):
        prune_kl(vae((16, 16)), width, random_image(16, 16).double())


def test_cuts_that_tear_groups_apart_are_refused() -> None:
    spaces = kl_spaces(kl_vae_shapes((8, 16), 4, 1))
    name = "encoder.conv_in"
    config = kl_config(GROUPS)
    with pytest.raises(ValueError, match=r"encoder\.down_blocks\.0\.resnets\.0\.norm1: its groups of 2"):
        check(spaces, {name: torch.tensor([0, 1, 2, 4, 6, 7])}, config)
    with pytest.raises(ValueError, match="must ascend within its 8"):
        check(spaces, {name: torch.tensor([3, 1])}, config)
    with pytest.raises(ValueError, match="no space that can be cut"):
        check(spaces, {"encoder.image": torch.tensor([0])}, config)
    unet = unet_spaces(unet_shapes(4, 4, (8, 8), 1))
    with pytest.raises(ValueError, match="normalizes several spaces together"):
        choose(unet, {}, 4, UNetConfig(groups=(4,)))


def test_every_tensor_of_the_kl_vae_is_reached() -> None:
    assert untouched(kl_spaces(kl_vae_shapes((8, 16), 4, 2))) == []
