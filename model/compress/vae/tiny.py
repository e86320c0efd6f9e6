"""From a pruned AutoencoderKL to the tiny VAE that TinySR deploys: AutoencoderTiny's layers, the teacher's start.

AutoencoderTiny (github.com/madebyollin/taesd) has no norms, ReLU instead of SiLU, one width and blocks
relu(conv.4(relu(conv.2(relu(conv.0(x))))) + x). A residual block conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))) + x fits
into one, but for the activation, once its norms are frozen at their mean statistics on calibration images:

- conv.0 is norm1's gain and shift on the center tap, conv.2 is norm2 after conv1, conv.4 is conv2;
- x is stored with a constant added per channel, so that the ReLU about the sum cuts (almost) nothing off;
- of a level's blocks those nearest to its end are taken; blocks without a counterpart start as the identity, shortcuts
  (changes of width) go into the convolution before them;
- the teacher's downsampling, padded right and bottom, is moved by one pixel into the symmetric window; its last row and
  column of taps, which fall outside, are added to their neighbors;
- the last convolution of either half is fitted by least squares to what the teacher gives.

It is where training starts, no more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.compress.vae.prune import watch_inputs
from model.reference.kl_vae import KLVAE
from model.reference.pruned_unet import Resnet
from model.reference.tiny_vae import Block, TinyDecoder, TinyEncoder, TinyVAE, decoder_steps, encoder_steps
from tinysr_kernels.families import TinySRConfig

QUANTILE = 0.01
"""Share of a stream's values that may lie below what its shift makes zero."""
RIDGE = 1e-4


def tiny_from_kl(vae: KLVAE, config: TinySRConfig, images: Tensor) -> TinyVAE:
    """The dense tiny VAE nearest to a KL VAE of one width without attention; `images` [N,3,H,W] in [-1,1].

    Raises ValueError if the VAE's levels are not as many as the configuration's stages, or its width is not one.
    """
    levels = len(vae.encoder.down_blocks)
    if levels != len(config.encoder_blocks) or levels != len(config.decoder_blocks):
        raise ValueError(f"{levels} levels cannot become {config.encoder_blocks} and {config.decoder_blocks} blocks")
    widths = {m.num_channels for m in vae.modules() if isinstance(m, nn.GroupNorm)}
    if len(widths) > 1:
        raise ValueError(f"the tiny VAE has one width; prune to one first (found {sorted(widths)})")
    z = vae.encode(images).detach()
    tiny = TinyVAE.regular(width=widths.pop(), latent_channels=z.shape[1], config=config).to(images.dtype)
    _add_biases(tiny)
    seen = watch_inputs(vae, images)
    _fill_encoder(tiny.encoder, vae, config.encoder_blocks, seen)
    _fill_decoder(tiny.decoder, vae, config.decoder_blocks, seen)
    fit_last(tiny.encoder.layers, (images + 1) / 2, z)
    fit_last(tiny.decoder.layers, torch.tanh(z / 3) * 3, (vae.decode(z).detach() + 1) / 2)
    return tiny


def _add_biases(tiny: TinyVAE) -> None:
    """The public layout has none on strided and enlarging convolutions, but takes them; shifted streams need them."""
    for module in tiny.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_channels))


def _tensors(conv: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a dense convolution that has one."""
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    return conv.weight, conv.bias


def _children(module: nn.Module, name: str) -> list[nn.Module]:
    """The modules of a list, by its name."""
    return list(module.get_submodule(name).children())


# ----------------------------------------------------------------------------------------------- frozen statistics
def _frozen(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A GroupNorm as gain and shift per channel, at its mean statistics over x [N,C,H,W]."""
    assert isinstance(norm, nn.GroupNorm)
    grouped = x.unflatten(1, (norm.num_groups, -1)).flatten(2)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0)
    deviation = (variance.mean(0) + norm.eps).sqrt()
    size = norm.num_channels // norm.num_groups
    gain = norm.weight / deviation.repeat_interleave(size)
    return gain, norm.bias - mean.mean(0).repeat_interleave(size) * gain


def _shift(streams: Sequence[Tensor]) -> Tensor:
    """[C]: what to add to a stream so that all but one in a hundred of its values are positive."""
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in streams], dim=1)
    rank = max(1, int(QUANTILE * values.shape[1]))
    return (-values.kthvalue(rank, dim=1).values).clamp(min=0)


# --------------------------------------------------------------------------------------------------------- the blocks
@torch.no_grad()
def _fill_block(block: nn.Module, resnet: Resnet | None, seen: dict[nn.Module, Tensor], shift: Tensor) -> None:
    """A residual block's weights into a tiny block's; None makes the block the identity on shifted streams."""
    assert isinstance(block, Block)
    (first, first_bias), (second, second_bias), (third, third_bias) = (_tensors(block.conv[i]) for i in (0, 2, 4))
    if resnet is None:
        third.zero_()
        third_bias.zero_()
        return
    gain, offset = _frozen(resnet.norm1, seen[resnet.norm1])
    first.zero_()
    first[:, :, 1, 1] = torch.diag(gain)
    first_bias.copy_(offset - gain * shift)
    gain, offset = _frozen(resnet.norm2, seen[resnet.norm2])
    weight, bias = _tensors(resnet.conv1)
    second.copy_(weight * gain[:, None, None, None])
    second_bias.copy_(bias * gain + offset)
    weight, bias = _tensors(resnet.conv2)
    third.copy_(weight)
    third_bias.copy_(bias)


@torch.no_grad()
def _fill_conv(
    conv: nn.Module, source: nn.Module, shortcut: nn.Module | None, before: Tensor | None, after: Tensor, down: bool
) -> None:
    """A convolution between streams shifted by `before` and `after`, with the shortcut that follows it folded in."""
    weight, bias = (tensor.detach() for tensor in _tensors(source))
    if down:
        moved = torch.zeros_like(weight)
        moved[:, :, 1:, 1:] = weight[:, :, :2, :2]
        moved[:, :, 2, 1:] += weight[:, :, 2, :2]
        moved[:, :, 1:, 2] += weight[:, :, :2, 2]
        moved[:, :, 2, 2] += weight[:, :, 2, 2]
        weight = moved
    if isinstance(shortcut, nn.Conv2d):
        matrix = shortcut.weight[:, :, 0, 0]
        weight = torch.einsum("om,mihw->oihw", matrix, weight)
        bias = matrix @ bias + (0 if shortcut.bias is None else shortcut.bias)
    if before is not None:
        bias = bias - weight.sum(dim=(2, 3)) @ before
    own, own_bias = _tensors(conv)
    own.copy_(weight)
    own_bias.copy_(bias + after)


def _plan(resnets: Sequence[nn.Module], number: int) -> tuple[nn.Module | None, list[Resnet | None]]:
    """(shortcut to fold into the convolution before, counterpart of each tiny block) of one level's resnets."""
    shortcut = None
    whole: list[Resnet | None] = []
    for resnet in resnets:
        assert isinstance(resnet, Resnet)
        if resnet.conv_shortcut is None:
            whole.append(resnet)
        else:
            shortcut = resnet.conv_shortcut
    taken = whole[max(0, len(whole) - number) :]
    return shortcut, [None] * (number - len(taken)) + taken


def _streams(plan: Sequence[Resnet | None], seen: dict[nn.Module, Tensor], end: nn.Module) -> list[Tensor]:
    """What flows through a level: the inputs of its blocks and of what follows them."""
    return [seen[resnet.norm1] for resnet in plan if resnet is not None] + [seen[end]]


def _fill_encoder(encoder: TinyEncoder, vae: KLVAE, blocks: Sequence[int], seen: dict[nn.Module, Tensor]) -> None:
    source, shift = vae.encoder, None
    conv: nn.Module = source.conv_in
    steps = iter(encoder_steps(blocks))
    for level, (block, number) in enumerate(zip(source.down_blocks, blocks, strict=True)):
        last = level == len(blocks) - 1
        resnets = _children(block, "resnets") + (_children(source.mid_block, "resnets") if last else [])
        shortcut, plan = _plan(resnets, number)
        end = source.conv_norm_out if last else block.get_submodule("downsamplers.0")
        after = _shift(_streams(plan, seen, end))
        _, layer = next(steps)
        _fill_conv(encoder.layers[layer], conv, shortcut, shift, after, down=level > 0)
        if level == 0:
            # The tiny encoder sees [0,1], the teacher's [-1,1].
            _rescale_input(encoder.layers[layer])
        for resnet in plan:
            _, layer = next(steps)
            _fill_block(encoder.layers[layer], resnet, seen, after)
        if not last:
            conv, shift = end.get_submodule("conv"), after


@torch.no_grad()
def _rescale_input(conv: nn.Module) -> None:
    """conv(x) -> the same of (x+1)/2, but for the border, where padding is now black instead of gray."""
    weight, bias = _tensors(conv)
    bias.sub_(weight.sum(dim=(1, 2, 3)))
    weight.mul_(2)


def _fill_decoder(decoder: TinyDecoder, vae: KLVAE, blocks: Sequence[int], seen: dict[nn.Module, Tensor]) -> None:
    source, shift = vae.decoder, None
    conv: nn.Module = source.conv_in
    steps = iter([layer for kind, layer in decoder_steps(blocks) if kind in ("conv", "block")])
    for level, (block, number) in enumerate(zip(source.up_blocks, blocks, strict=True)):
        last = level == len(blocks) - 1
        resnets = (_children(source.mid_block, "resnets") if level == 0 else []) + _children(block, "resnets")
        shortcut, plan = _plan(resnets, number)
        end = source.conv_norm_out if last else block.get_submodule("upsamplers.0")
        after = _shift(_streams(plan, seen, end))
        _fill_conv(decoder.layers[next(steps)], conv, shortcut, shift, after, down=False)
        for resnet in plan:
            _fill_block(decoder.layers[next(steps)], resnet, seen, after)
        if not last:
            conv, shift = end.get_submodule("conv"), after


@torch.no_grad()
def fit_last(layers: nn.Sequential, x: Tensor, wanted: Tensor) -> None:
    """Fit the last convolution to `wanted` [N,O,H,W] by least squares over the features that reach it."""
    features = layers[:-1](x)
    columns = F.unfold(features, 3, padding=1).transpose(0, 1).flatten(1).double()
    columns = torch.cat([columns, torch.ones_like(columns[:1])])
    gram = columns @ columns.T / columns.shape[1]
    target = columns @ wanted.double().transpose(0, 1).flatten(1).T / columns.shape[1]
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solved = torch.linalg.solve(gram, target)
    weight, bias = _tensors(layers[-1])
    weight.copy_(solved[:-1].T.reshape(weight.shape))
    bias.copy_(solved[-1])
