"""The recipe on a real teacher, stage by stage: `python -m model.compress masks|vae|restore --config FILE`.

Every stage reads the previous one's result from the recipe's folder `out`. An interrupted stage is resumed:

    masks     mask.json                 which blocks stay
    vae       vae/separable/            the compressed VAE, trained
    restore   student/, student.safetensors   the finished network, in the released layout and in the project's own
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.compress.conditions import check_pooled, check_teacher, embedding, student_config, student_tensors
from model.compress.init import pooled_embedding, read_vae, start_vae
from model.compress.mask_stage import MaskBatch, learn_mask
from model.compress.masks import Mask
from model.compress.masks.decide import check_mask
from model.compress.recipe import Recipe
from model.compress.released import write_folded, write_json, write_transformer, write_vae
from model.compress.restoration import adapt, distill_latents, finish, train_on_images
from model.compress.teacher_files import LoRA, lora_in, part, transformer_config, weights_in
from model.compress.training.device import Device
from model.compress.training.image_folder import ImageFolder, Prefetcher
from model.compress.training.losses import perceptual
from model.compress.training.made_of import claim, fingerprint, names_and_sizes
from model.compress.vae.train import train_decoder, train_encoder
from model.reference.kl_vae import KLVAE
from model.reference.sd3_transformer import SD3Config, SD3Transformer
from model.reference.tiny_vae import TinyVAE
from model.reference.tinysr_dit import TinySRTransformer
from tinysr_kernels.families import TinySRConfig

Report = Callable[[str], None]
FACTOR = 8
SHARD, AT_ONCE = 512, 8
"""Pairs in a file, and how many of them are encoded at once."""


def own_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The teacher computes in bfloat16, in whatever precision the student is trained."""
    return torch.autocast(x.device.type, enabled=False)


@torch.no_grad()
def encoded(vae: KLVAE, x: Tensor) -> Tensor:
    """Images in [-1,1] -> latents of a VAE in bfloat16, not scaled, float32."""
    with own_precision(x):
        return vae.encode(x.to(torch.bfloat16)).float()


@dataclass
class Teacher:
    """The teacher in bfloat16, its LoRA merged; latents are times the scaling factor."""

    config: SD3Config
    transformer: SD3Transformer
    vae: KLVAE
    scaling: float
    prompt: Tensor
    temb: Tensor
    pooled: Tensor

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Images in [-1,1] -> latents, scaled, float32."""
        return encoded(self.vae, x) * self.scaling

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents -> images in [-1,1], float32; differentiable."""
        with own_precision(z):
            return self.vae.decode((z / self.scaling).to(torch.bfloat16)).float()

    @torch.no_grad()
    def predict(self, z: Tensor) -> Tensor:
        """Scaled latents -> what to subtract from them, float32."""
        with own_precision(z):
            return self.transformer(z.to(torch.bfloat16), self.prompt, self.pooled).float()

    @torch.no_grad()
    def restore(self, x: Tensor) -> Tensor:
        """Enlarged images in [-1,1] -> the restored images' latents (x0), scaled, float32."""
        z = self.encode(x)
        return z - self.predict(z)


def teacher_weights(recipe: Recipe) -> tuple[SD3Config, dict[str, Tensor]]:
    """The transformer's tensors in bfloat16, LoRA merged, read one at a time; ValueError as `init`."""
    folder, values = part(Path(recipe.teacher), "transformer", "SD3Transformer2DModel")
    config = transformer_config(values, str(folder / "config.json"))
    weights = weights_in(folder)
    shapes = {name: weights.shape(name) for name in weights}
    check_teacher(shapes, config, str(folder))
    lora = lora_in(_path(recipe.lora), "transformer")
    lora.check(shapes)
    return config, {name: lora.merged(name, weights[name]).to(torch.bfloat16) for name in weights}


def load_teacher(recipe: Recipe, device: torch.device) -> Teacher:
    """The teacher with its LoRA, VAE and embeddings on one device."""
    config, state = teacher_weights(recipe)
    pooled, prompt = pooled_embedding(Path(recipe.pooled)), pooled_embedding(Path(recipe.prompt))
    check_pooled(pooled, config.pooled_projection_dim)
    if prompt.ndim != 3 or prompt.shape[2] != config.joint_attention_dim:
        raise ValueError(f"{recipe.prompt}: expected [1, T, {config.joint_attention_dim}], found {list(prompt.shape)}")
    temb = embedding(state, pooled, LoRA({}, "no LoRA")).float()
    with torch.device("meta"):
        transformer = SD3Transformer(config)
    transformer.load_state_dict(state, assign=True)
    vae, scaling = read_vae(Path(recipe.teacher), _path(recipe.lora))
    half = torch.bfloat16
    return Teacher(
        config,
        transformer.to(device).requires_grad_(False),
        vae.to(device, half),
        scaling,
        prompt.to(device, half),
        temb.to(device),
        pooled.to(device, half),
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def image_stream(recipe: Recipe, mask: Mask | None) -> TinySRTransformer:
    """The teacher's image stream (of the mask's blocks) in float32, adapted by LoRA."""
    config, state = teacher_weights(recipe)
    mask = mask or tuple([True] * config.num_layers)
    tensors = dict(student_tensors(state, config, mask, window=recipe.image_size // FACTOR))
    network = TinySRTransformer.from_state(tensors, TinySRConfig(head_dim=config.attention_head_dim))
    adapt(network, recipe.lora_rank, recipe.seed)
    return network


def made_of(recipe: Recipe, *names: str, **more: Any) -> dict[str, Any]:
    """The recipe's files and settings of these names, as `claim` compares them; and more."""
    found: dict[str, Any] = {"seed": recipe.seed, "image_size": recipe.image_size}
    found["images"] = names_and_sizes(Path(recipe.images))
    if recipe.low_resolution is None:
        found["degradation"] = asdict(recipe.degradation)
    else:
        found["low_resolution"] = names_and_sizes(Path(recipe.low_resolution))
    for name in names:
        value = getattr(recipe, name)
        found[name] = fingerprint(Path(value)) if isinstance(value, str) else value
    return found | more


TEACHER = ("teacher", "lora", "prompt", "pooled")


def batches(recipe: Recipe, device: Device, seed: int) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """(step, count) -> enlarged and original images on the device, prefetched by threads."""
    folder = ImageFolder(
        Path(recipe.images), recipe.image_size, recipe.seed + seed, degradation=recipe.degradation,
        low=_path(recipe.low_resolution),
    )  # fmt: skip
    process = device.number[0]
    ahead: dict[int, Prefetcher] = {}

    def draw(step: int, count: int) -> tuple[Tensor, Tensor]:
        make = ahead.setdefault(count, Prefetcher(lambda number: folder.pairs(number, count, process)))
        enlarged, original = make(step)
        return enlarged.to(device.device), original.to(device.device)

    return draw


# ------------------------------------------------------------------------------------------------------------- commands
def run_masks(recipe: Recipe, report: Report) -> Mask:
    """Learn which blocks stay; the task loss is the perceptual one of the image that the teacher's VAE decodes."""
    device = Device(recipe.masks.stage.precision, recipe.device)
    claim(Path(recipe.out) / "masks", made_of(recipe, *TEACHER, "lora_rank"), write=device.main)
    teacher = load_teacher(recipe, device.device)
    network = image_stream(recipe, None).to(device.device)
    draw = batches(recipe, device, 1)
    kind, distance = perceptual(device.device)
    report(f"masks: perceptual loss is {kind}")

    def batch(step: int, count: int) -> MaskBatch:
        enlarged, original = draw(step, count)
        z = teacher.encode(enlarged)

        def task(x0: Tensor) -> Tensor:
            return distance(teacher.decode(x0), original)

        return MaskBatch(z, teacher.predict(z), task)

    out = Path(recipe.out)
    mask = learn_mask(network, teacher.temb, batch, recipe.masks, out / "masks", device=device, report=report)
    if device.main:
        write_json(out / "mask.json", {"mask": list(mask)})
    report("mask: " + "".join("01"[kept] for kept in mask))
    return mask


def run_vae(recipe: Recipe, report: Report) -> TinyVAE:
    """Compress the VAE and train both halves."""
    device = Device(recipe.encoder.precision, recipe.device)
    teacher, lora = Path(recipe.teacher), _path(recipe.lora)
    claim(Path(recipe.out) / "vae", made_of(recipe, "teacher", "lora", "vae_width"), write=device.main)
    folder, values = part(teacher, "transformer", "SD3Transformer2DModel")
    state, config = start_vae(teacher, lora, transformer_config(values, str(folder)), width=recipe.vae_width)
    vae = TinyVAE.from_state(state, config).requires_grad_(True).to(device.device)
    # The encoder learns TSD-SR's latents of enlarged images. The decoder is shown those of SD3's own encoder, of
    # originals: TSD-SR restores into SD3's latent space, and its LoRA is for damaged images.
    adapted, plain = (read_vae(teacher, one)[0].to(device.device, torch.bfloat16) for one in (lora, None))
    out = Path(recipe.out)
    enlarged, original = batches(recipe, device, 2), batches(recipe, device, 3)

    train_encoder(
        vae.encoder,
        lambda x: encoded(adapted, x),
        lambda step, count: enlarged(step, count)[0],
        recipe.encoder,
        out / "vae",
        device=device,
        report=report,
    )
    train_decoder(
        vae.decoder,
        lambda x: encoded(plain, x),
        lambda step, count: original(step, count)[1],
        recipe.decoder,
        out / "vae",
        weights=recipe.decoder_weights,
        device=Device(recipe.decoder.precision, recipe.device),
        report=report,
    )
    if device.main:
        write_vae(out, {name: t.cpu() for name, t in vae.state_dict().items()}, config)
    return vae


def read_mask(recipe: Recipe) -> Mask:
    """The result of `masks`; ValueError if it is missing or does not match the recipe."""
    path = Path(recipe.out) / "mask.json"
    if not path.exists():
        raise ValueError(f"{path}: missing; run `masks` first, or write it")
    mask = json.loads(path.read_text(encoding="utf-8"))["mask"]
    return check_mask(mask, len(mask), recipe.masks.keep)


def read_tiny(recipe: Recipe) -> tuple[TinyVAE, TinySRConfig]:
    """The result of `vae`; ValueError if it is missing."""
    folder = Path(recipe.out) / "vae" / "separable"
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: missing; run `vae` first")
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = TinySRConfig(
        encoder_blocks=tuple(values["num_encoder_blocks"]),
        decoder_blocks=tuple(values["num_decoder_blocks"]),
        scaling_factor=values["scaling_factor"],
    )
    weights = weights_in(folder)
    return TinyVAE.from_state({name: weights[name] for name in weights}, config), config


@torch.no_grad()
def encode_pairs(recipe: Recipe, teacher: Teacher, vae: TinyVAE, device: Device, report: Report) -> list[Path]:
    """The student's latents and the teacher's x0 for `latent_pairs` images, in files; divided between processes."""
    folder = Path(recipe.out) / "pairs"
    trained = fingerprint(Path(recipe.out) / "vae" / "separable")
    claim(folder, made_of(recipe, *TEACHER, "latent_pairs", vae=trained), write=device.main)
    folder.mkdir(parents=True, exist_ok=True)
    draw = batches(recipe, device, 4)
    process, number = device.number
    paths = [folder / f"{i:05d}.safetensors" for i in range(-(-recipe.latent_pairs // SHARD))]
    for i, path in enumerate(paths):
        if i % number != process or path.exists():
            continue
        parts: dict[str, list[Tensor]] = {"z": [], "wanted": []}
        count = min(SHARD, recipe.latent_pairs - i * SHARD)
        for start in range(0, count, AT_ONCE):
            # Consecutive numbers, as the batches are made ahead.
            enlarged, _ = draw((i * SHARD + start) // AT_ONCE, min(AT_ONCE, count - start))
            parts["wanted"].append(teacher.restore(enlarged).half().cpu())
            parts["z"].append((vae.encode(enlarged) * teacher.scaling).half().cpu())
        beside = path.with_suffix(".part")
        save_file({name: torch.cat(values).contiguous() for name, values in parts.items()}, beside)
        beside.replace(path)
        report(f"pairs: {path.name} of {len(paths)}")
    return paths


def read_pairs(path: Path) -> dict[str, Tensor]:
    """A file of `encode_pairs`; ValueError if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged ({error}); remove it, and it is made again") from error


def run_restore(recipe: Recipe, report: Report) -> None:
    """Both stages of restoration; writes the finished student."""
    mask, (vae, config) = read_mask(recipe), read_tiny(recipe)
    device = Device(recipe.restore_latents.precision, recipe.device)
    teacher = load_teacher(recipe, device.device)
    check_mask(mask, teacher.config.num_layers, recipe.masks.keep)
    vae.to(device.device)
    paths = encode_pairs(recipe, teacher, vae, device, report)
    device.wait()
    network, out = image_stream(recipe, mask).to(device.device), Path(recipe.out)
    inputs = made_of(recipe, *TEACHER, "lora_rank", mask=list(mask), pairs=fingerprint(out / "pairs" / "made-of.json"))
    claim(out / "restore", inputs, write=device.main)

    def latents(step: int, count: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([41, recipe.seed, step, device.number[0]])
        file = read_pairs(paths[int(rng.integers(len(paths)))])
        index = torch.from_numpy(rng.integers(len(file["z"]), size=count))
        return file["z"][index].float(), file["wanted"][index].float()

    temb = teacher.temb
    distill_latents(network, temb, latents, recipe.restore_latents, out / "restore", device=device, report=report)
    draw = batches(recipe, device, 5)
    train_on_images(
        network,
        temb,
        vae.encoder,
        vae.decoder,
        config.scaling_factor,
        draw,
        recipe.restore_images,
        out / "restore",
        teacher=teacher.restore,
        weights=recipe.image_weights,
        device=Device(recipe.restore_images.precision, recipe.device),
        observe=lambda step: sample(network, temb, vae, config, draw, out / "samples" / f"{step:06d}.png"),
        report=report,
    )
    if not device.main:
        return
    student = finish(network.cpu(), temb.cpu())
    write_transformer(out / "student", student.state_dict().items(), student_config(teacher.config, mask))
    write_vae(out / "student", {name: t.cpu() for name, t in vae.state_dict().items()}, config)
    write_folded(out / "student", out / "student.safetensors")
    report(f"written: {out / 'student'} and {out / 'student.safetensors'}")


@torch.no_grad()
def sample(
    network: TinySRTransformer,
    temb: Tensor,
    vae: TinyVAE,
    config: TinySRConfig,
    draw: Callable[[int, int], tuple[Tensor, Tensor]],
    path: Path,
) -> dict[str, float]:
    """Save enlarged, restored and original image side by side; PSNR of four images that training does not draw."""
    enlarged, original = draw(10**9, 4)
    z = vae.encode(enlarged) * config.scaling_factor
    found = vae.decode((z - network(z, temb=temb)) / config.scaling_factor).clamp(-1, 1)
    rows = torch.cat([torch.cat(list(t), 1) for t in (enlarged.clamp(-1, 1), found, original)], 2)
    image = ((rows.float().cpu() + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    error = ((found - original) / 2).square().mean(dim=(1, 2, 3))
    return {"psnr": float(-10 * error.log10().mean())}
