"""Channel pruning of AutoencoderKL to a maximum width, without retraining: choice of channels, and compensation.

Criterion: a channel's importance is the energy it passes on to the convolutions that read it, the sum over those of
E[x_c^2] * |W[:,c]|^2 relative to that of all their channels; x is measured on calibration images. (It is the criterion
of Wanda, arXiv 2306.11695, squared and summed over outputs.) GroupNorms keep their groups, so every group of a space
keeps the same number of its most important channels: the maximum width must be a multiple of the number of groups.

What is lost is mended twice. Every convolution takes over what the channels it no longer sees can be predicted to have
held, by least squares from those that stay (as channel pruning does it, arXiv 1707.06168): exact where a channel was a
copy or zero. And every GroupNorm's gain and shift are set so that its output has the mean and the deviation per channel
that the unpruned network's had, since the groups' own statistics have moved.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from model.compress.vae.spaces import Keep, Spaces, cut, groups_of, kept_of, kl_spaces, untouched
from model.reference.kl_vae import KLVAE, KLDownsampler
from model.reference.pruned_unet import Sampler
from tinysr_kernels.families import UNetConfig


def remove_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An AutoencoderKL's state without the attention of its middle blocks."""
    return {name: tensor for name, tensor in state.items() if ".mid_block.attentions." not in name}


def gram_matrices(network: nn.Module, spaces: Spaces, images: Tensor) -> dict[str, Tensor]:
    """Convolution -> E[x x^T] [C,C] float64 over its input pixels while `network` reconstructs `images`."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> RemovableHandle:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().double().transpose(0, 1).flatten(1)
            found[name] = x @ x.T / x.shape[1]

        return network.get_submodule(name).register_forward_pre_hook(hook)

    hooks = [watch(name) for name in spaces.consumers]
    _reproduce(network, images)
    for hook in hooks:
        hook.remove()
    return found


def watch_inputs(network: nn.Module, images: Tensor) -> dict[nn.Module, Tensor]:
    """Module -> its input, for the norms and samplers of a KL VAE that reconstructs `images`."""
    seen: dict[nn.Module, Tensor] = {}
    kinds = (nn.GroupNorm, Sampler, KLDownsampler)
    hooks = [
        module.register_forward_pre_hook(lambda own, inputs: seen.__setitem__(own, inputs[0].detach()))
        for module in network.modules()
        if isinstance(module, kinds)
    ]
    _reproduce(network, images)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def _reproduce(network: nn.Module, images: Tensor) -> None:
    """Run encoder and decoder; the latent is the mean."""
    network.decode(network.encode(images))  # type: ignore[operator]


def importance(state: Mapping[str, Tensor], spaces: Spaces, grams: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Space -> importance of each of its channels, float64."""
    scores = {name: torch.zeros(width, dtype=torch.float64) for name, width in spaces.widths.items()}
    for conv, stream in spaces.consumers.items():
        weight = state.get(f"{conv}.weight", state.get(f"{conv}.pointwise.weight"))
        if weight is None:
            raise KeyError(f"{conv}.weight")
        energy = grams[conv].diagonal() * weight.double().square().sum(dim=(0, *range(2, weight.ndim)))
        energy = energy / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)
        for name, part in zip(stream, energy.split([spaces.widths[n] for n in stream]), strict=True):
            scores[name] += part
    return scores


def choose(spaces: Spaces, scores: Mapping[str, Tensor], width: int, config: UNetConfig) -> dict[str, Tensor]:
    """The channels of each space wider than `width` that stay: of each group its most important ones.

    Raises ValueError where `width` does not divide into a space's groups, or the space is normalized beside another
    (the UNet's skips): such a cut has to be given.
    """
    groups = {}
    for norm, stream in spaces.norms.items():
        if len(stream) > 1 and any(spaces.widths[name] > width for name in stream):
            raise ValueError(f"{norm} normalizes several spaces together: choose the channels of {stream} yourself")
        for name in stream:
            groups[name] = groups_of(spaces.widths[name], config, norm)
    keep = {}
    for name, own in spaces.widths.items():
        if own <= width or name in spaces.fixed:
            continue
        number = groups.get(name, 1)
        if width % number:
            raise ValueError(f"{name}: {width} channels do not divide into the {number} groups of its GroupNorm")
        order = scores[name].reshape(number, -1).argsort(dim=1, descending=True, stable=True)[:, : width // number]
        keep[name] = (order + own // number * torch.arange(number)[:, None]).flatten().sort().values
    return keep


def mend(state: Mapping[str, Tensor], spaces: Spaces, keep: Keep, grams: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Before pruning: fold the least-squares prediction of removed inputs into each dense convolution."""
    out = dict(state)
    for conv, stream in spaces.consumers.items():
        name = f"{conv}.weight"
        kept = kept_of(spaces, keep, stream)
        gone = torch.ones(spaces.width(stream), dtype=torch.bool)
        gone[kept] = False
        if name not in state or not gone.any():
            continue
        gram = grams[conv]
        stand_in = gram[gone][:, kept] @ torch.linalg.pinv(gram[kept][:, kept], rtol=1e-10, hermitian=True)
        weight = state[name].double()
        change = torch.einsum("ol...,lk->ok...", weight[:, gone], stand_in)
        out[name] = weight.index_add(1, kept, change).to(state[name].dtype)
    return out


@torch.no_grad()
def match_norms(pruned: nn.Module, original: nn.Module, spaces: Spaces, keep: Keep, images: Tensor) -> None:
    """Give each GroupNorm of `pruned`, in running order, the output statistics that it had in `original`."""
    wanted: dict[str, tuple[Tensor, Tensor]] = {}

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.double().mean(dim=(0, 2, 3)), x.double().std(dim=(0, 2, 3))

    def note(name: str) -> RemovableHandle:
        kept = kept_of(spaces, keep, spaces.norms[name])

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            wanted[name] = moments(output[:, kept])

        return original.get_submodule(name).register_forward_hook(hook)

    def adjust(name: str) -> RemovableHandle:
        def hook(module: nn.GroupNorm, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            (mean, deviation), (found, spread) = wanted[name], moments(output)
            gain = torch.where(spread > 0, deviation / spread.clamp(min=1e-12), 1.0)
            module.bias.copy_(mean + (module.bias.double() - found) * gain)
            module.weight.copy_(module.weight.double() * gain)
            return module.forward(inputs[0])

        return pruned.get_submodule(name).register_forward_hook(hook)

    for network, attach in ((original, note), (pruned, adjust)):
        names = [name for name in spaces.norms if name in dict(pruned.named_modules())]
        hooks = [attach(name) for name in names]
        _reproduce(network, images)
        for hook in hooks:
            hook.remove()


def prune_kl(vae: KLVAE, width: int, images: Tensor) -> KLVAE:
    """The VAE with no space wider than `width` and without attention; `images` [N,3,H,W] in [-1,1] calibrate it.

    Raises ValueError if `width` does not divide into the GroupNorms' groups.
    """
    plain = KLVAE.from_state(remove_attention(vae.state_dict()), vae.config)
    state = plain.state_dict()
    spaces = kl_spaces({name: tuple(t.shape) for name, t in state.items()})
    if foreign := untouched(spaces):
        raise ValueError(f"{foreign[0]} is not a tensor of an AutoencoderKL")
    grams = gram_matrices(plain, spaces, images)
    keep = choose(spaces, importance(state, spaces, grams), width, vae.config)
    pruned = KLVAE.from_state(cut(mend(state, spaces, keep, grams), spaces, keep, vae.config), vae.config)
    match_norms(pruned, plain, spaces, keep, images)
    return pruned
