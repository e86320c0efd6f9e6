"""The small student: VAE, masks by three methods, and restoration for each mask."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from model.compress.conditions import embedding, student_tensors
from model.compress.mask_stage import MaskBatch, learn_mask
from model.compress.masks import Mask, Subject, select
from model.compress.released import write_json
from model.compress.restoration import adapt, distill_latents, finish, train_on_images
from model.compress.small.data import Pairs, color_jitter, draw
from model.compress.small.preset import Preset
from model.compress.small.teacher import Latents, Teacher, encode_pairs
from model.compress.teacher_files import LoRA
from model.compress.vae.prune import prune_kl
from model.compress.vae.separable import separable_state
from model.compress.vae.tiny import tiny_from_kl
from model.compress.vae.train import train_decoder, train_encoder
from model.reference.tiny_vae import TinyVAE
from model.reference.tinysr_dit import TinySRTransformer
from tinysr_kernels.families import TinySRConfig

Report = Callable[[str], None]


@dataclass
class Student:
    """A compressed network, as trained: modulation cached, LoRA merged."""

    transformer: TinySRTransformer
    vae: TinyVAE
    config: TinySRConfig
    mask: Mask


def config_of(preset: Preset, scaling: float) -> TinySRConfig:
    """The configuration that the weights do not determine."""
    return TinySRConfig(
        head_dim=preset.transformer.attention_head_dim,
        encoder_blocks=preset.encoder_blocks,
        decoder_blocks=preset.decoder_blocks,
        scaling_factor=scaling,
        overlap=preset.window // 2,
    )


# ---------------------------------------------------------------------------------------------------------------- VAE
def compress_vae(
    preset: Preset, teacher: Teacher, pairs: Pairs, config: TinySRConfig, folder: Path, report: Report
) -> TinyVAE:
    """Pruned, without attention, tiny, separable; then both halves trained."""
    enlarged, original = pairs.pixels(draw(preset.seed, 10**6), preset.calibration)
    images = torch.cat([enlarged[: preset.calibration // 2], original[preset.calibration // 2 :]])
    tiny = tiny_from_kl(prune_kl(teacher.vae, preset.width, images), config, images)
    vae = TinyVAE.from_state(separable_state(tiny.state_dict()), config).requires_grad_(True)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def inputs(step: int, count: int) -> Tensor:
        # At inference the encoder's input is the enlarged image.
        return pairs.pixels(draw(preset.student_encoder.seed + 1, step), count)[0]

    def outputs(step: int, count: int) -> Tensor:
        rng = draw(preset.student_decoder.seed + 2, step)
        return color_jitter([pairs.pixels(rng, count)[1]], rng)[0]

    train_encoder(vae.encoder, teacher.encode, inputs, preset.student_encoder, folder, report=report)
    train_decoder(
        vae.decoder,
        teacher.encode,
        outputs,
        preset.student_decoder,
        folder,
        weights=preset.decoder_weights,
        discriminator_width=preset.discriminator_width,
        report=report,
    )
    return vae.requires_grad_(False)


# -------------------------------------------------------------------------------------------------------------- masks
def image_stream(teacher: Teacher, mask: Sequence[bool] | None = None) -> tuple[TinySRTransformer, Tensor]:
    """(the teacher's image stream with the mask's blocks, with its modulation modules; temb [1,D])."""
    config, state = teacher.transformer.config, teacher.transformer.state_dict()
    mask = mask or [True] * config.num_layers
    tensors = dict(student_tensors(state, config, mask, window=teacher.window))
    network = TinySRTransformer.from_state(tensors, TinySRConfig(head_dim=config.attention_head_dim))
    return network, embedding(state, teacher.pooled, LoRA({}, "no LoRA")).float()


def find_mask(method: str, preset: Preset, teacher: Teacher, latents: Latents, folder: Path, report: Report) -> Mask:
    """The mask by `method` ("learned", "random", "similarity"); kept in `folder`."""
    path = folder / "mask.json"
    if path.exists():
        return tuple(json.loads(path.read_text(encoding="utf-8"))["mask"])
    layers, seed = preset.transformer.num_layers, preset.seed
    if method == "learned":
        mask = _learn_mask(preset, teacher, latents, folder, report)
    else:
        subject = Subject(layers, states=lambda: _states(teacher, latents.windows(0, seed, 32, preset.window)[0]))
        mask = select(method, subject, preset.masks.keep, group=preset.masks.group, seed=seed)
    write_json(path, {"method": method, "mask": list(mask)})
    report(f"mask, {method}: {''.join('01'[kept] for kept in mask)}")
    return mask


def _learn_mask(preset: Preset, teacher: Teacher, latents: Latents, folder: Path, report: Report) -> Mask:
    """Probabilities and LoRA trained together; the task loss is the latent's L1 distance from the original's."""
    network, temb = image_stream(teacher)
    adapt(network, preset.rank, preset.seed)

    def batch(step: int, count: int) -> MaskBatch:
        z, wanted = latents.windows(step, preset.seed + 3, count, preset.window)
        with torch.no_grad():
            shown = teacher(z)
        return MaskBatch(z, shown, lambda found: F.l1_loss(found, wanted))

    return learn_mask(network, temb, batch, preset.masks, folder, report=report)


@torch.no_grad()
def _states(teacher: Teacher, z: Tensor) -> list[Tensor]:
    """The image's tokens before, between and after the teacher's blocks."""
    found: list[Tensor] = []
    blocks = teacher.transformer.transformer_blocks
    hooks = [blocks[0].register_forward_pre_hook(lambda own, inputs: found.append(inputs[0]))]
    hooks += [block.register_forward_hook(lambda own, inputs, output: found.append(output[0])) for block in blocks]
    teacher(z)
    for hook in hooks:
        hook.remove()
    return found


# -------------------------------------------------------------------------------------------------------- restoration
@dataclass
class Distilled:
    """Windows of the student's latents and the teacher's x0 for its own, [K,C,window,window], precomputed."""

    z: Tensor
    wanted: Tensor

    def draw(self, seed: int, step: int, count: int) -> tuple[Tensor, Tensor]:
        index = torch.from_numpy(draw(seed, step).integers(len(self.z), size=count))
        return self.z[index].float(), self.wanted[index].float()


@torch.no_grad()
def distilled_pairs(
    preset: Preset, teacher: Teacher, vae: TinyVAE, latents: Latents, pairs: Pairs, folder: Path
) -> Distilled:
    """Every pair's latent in four windows, from the student's encoder, and the teacher's output for its own latent."""
    own = encode_pairs(vae, pairs, folder / "student-latents.pt", latents.scaling)
    path = folder / "distilled.pt"
    if not path.exists():
        starts = [(y, x) for y in (0, 16) for x in (0, 16)]
        cut = [(..., slice(y, y + preset.window), slice(x, x + preset.window)) for y, x in starts]
        source, z = (torch.cat([t[place] for place in cut]) for t in (latents.lr, own.lr))
        wanted = []
        for part in source.split(64):
            with torch.autocast("cpu", torch.bfloat16):
                wanted.append((part.float() - teacher(part.float()).float()).half())
        torch.save({"z": z, "wanted": torch.cat(wanted)}, path)
    stored = torch.load(path, weights_only=True)
    return Distilled(stored["z"], stored["wanted"])


def restore(
    preset: Preset,
    teacher: Teacher,
    vae: TinyVAE,
    mask: Mask,
    config: TinySRConfig,
    distilled: Distilled,
    pairs: Pairs,
    folder: Path,
    report: Report,
) -> Student:
    """Both stages of restoration for one mask, in its own folder; the VAE is copied: its decoder is trained too."""
    network, temb = image_stream(teacher, mask)
    adapt(network, preset.rank, preset.seed)
    own = _copy(vae, config)

    def images(step: int, count: int) -> tuple[Tensor, Tensor]:
        rng = draw(preset.seed + 5, step)
        enlarged, original = color_jitter(list(pairs.pixels(rng, count)), rng)
        return enlarged, original

    distill_latents(
        network,
        temb,
        lambda step, count: distilled.draw(preset.seed + 4, step, count),
        preset.restore_latents,
        folder,
        report=report,
    )
    train_on_images(
        network,
        temb,
        own.encoder,
        own.decoder,
        config.scaling_factor,
        images,
        preset.restore_images,
        folder,
        weights=preset.image_weights,
        train_decoder=True,
        discriminator_width=preset.discriminator_width,
        report=report,
    )
    return Student(finish(network, temb), own.requires_grad_(False), config, mask)


def _copy(vae: TinyVAE, config: TinySRConfig) -> TinyVAE:
    copy = TinyVAE.from_state({name: t.clone() for name, t in vae.state_dict().items()}, config)
    copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copy
