"""Parameters and multiply-accumulates of teacher and student, counted on tensors without data (the meta device).

`python -m model.compress count` counts the real shapes: SD3-medium's transformer and VAE as diffusers builds them, and
TinySR's networks, for one image of 512x512, as figure 5 of arXiv 2508.17434 does. Multiplications are those of
convolutions, linear layers and attention's two products, as torch's own counter sees them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.reference.kl_vae import KLVAE, kl_config, kl_vae_shapes
from model.reference.sd3_transformer import SD3Config, SD3Transformer
from model.reference.tiny_vae import TinyVAE
from model.reference.tinysr_dit import CONTEXT_LEFTOVER, TinySRTransformer
from tinysr_kernels.families import TinySRConfig

PROMPT_TOKENS = 333
"""Of SD3's pipeline: 77 of CLIP and 256 of T5."""
SD3_VAE = (128, 256, 512, 512)
SIDE = 512


@dataclass(frozen=True)
class Size:
    """Parameters and multiply-accumulates of one component."""

    parameters: int
    macs: int

    def __add__(self, other: Size) -> Size:
        return Size(self.parameters + other.parameters, self.macs + other.macs)


Table = dict[str, Size]
T = TypeVar("T", bound=nn.Module)


def macs(run: Callable[[], object]) -> int:
    """Multiply-accumulates of what `run` computes, on tensors of the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def without_data(module: T) -> T:
    """A copy on the meta device: torch's counter does not see the attention kernels of CPUs."""
    return copy.deepcopy(module).to("meta")


def parameters(module: nn.Module) -> int:
    """Number of parameters; the position table is a buffer and is not counted."""
    return sum(p.numel() for p in module.parameters())


def teacher_table(config: SD3Config, vae: KLVAE, latent: Tensor, tokens: int) -> Table:
    """The teacher's components for one latent [1,C,h,w]: VAE halves, image stream, prompt stream, conditioning."""
    latent, vae = latent.to("meta"), without_data(vae)
    with torch.device("meta"):
        transformer = SD3Transformer(config)
    prompt = latent.new_empty(1, tokens, config.joint_attention_dim)
    pooled = latent.new_empty(1, config.pooled_projection_dim)
    factor = 2 ** (len(vae.encoder.down_blocks) - 1)
    image = latent.new_empty(1, 3, latent.shape[2] * factor, latent.shape[3] * factor)
    named = {name: p.numel() for name, p in transformer.named_parameters()}
    conditioning = sum(n for name, n in named.items() if conditions(name))
    context = sum(n for name, n in named.items() if CONTEXT_LEFTOVER.search(name) and not conditions(name))
    with_prompt = macs(lambda: transformer(latent, prompt, pooled))
    # The image's stream alone is a student of as many blocks.
    alone = _image_stream(config, latent)
    return {
        "VAE encoder": Size(parameters(vae.encoder), macs(lambda: vae.encoder(image))),
        "transformer, image stream": Size(sum(named.values()) - conditioning - context, alone),
        "transformer, prompt stream": Size(context, with_prompt - alone - conditioning_macs(transformer)),
        "conditioning": Size(conditioning, conditioning_macs(transformer)),
        "VAE decoder": Size(parameters(vae.decoder), macs(lambda: vae.decoder(latent))),
    }


def conditions(name: str) -> bool:
    """Whether a transformer's parameter belongs to the modules that pre-caching drops."""
    return name.startswith(("time_text_embed.", "norm_out.")) or ".norm1." in name or ".norm1_context." in name


def conditioning_macs(transformer: SD3Transformer) -> int:
    """MACs of one row through every linear layer of those modules."""
    return sum(p.numel() for name, p in transformer.named_parameters() if conditions(name) and p.ndim == 2)


def _image_stream(config: SD3Config, latent: Tensor) -> int:
    network = student_transformer(config, config.num_layers, latent)
    return macs(lambda: network(latent))


def student_transformer(config: SD3Config, layers: int, latent: Tensor) -> TinySRTransformer:
    """TinySR's transformer cut from the teacher's, modulation cached."""
    with torch.device("meta"):
        return TinySRTransformer(
            dim=config.dim,
            layers=layers,
            head_dim=config.attention_head_dim,
            channels=config.in_channels,
            patch_size=config.patch_size,
            table=latent.shape[2] // config.patch_size,
            sample_size=config.sample_size,
            pos_embed_max_size=config.pos_embed_max_size,
            cached=True,
        )


def student_table(transformer: TinySRTransformer, vae: TinyVAE, latent: Tensor) -> Table:
    """The student's components for the same latent."""
    latent, vae, transformer = latent.to("meta"), without_data(vae), without_data(transformer)
    factor = vae.encoder.factor
    image = latent.new_empty(1, 3, latent.shape[2] * factor, latent.shape[3] * factor)
    return {
        "VAE encoder": Size(parameters(vae.encoder), macs(lambda: vae.encoder(image))),
        "transformer, image stream": Size(parameters(transformer), macs(lambda: transformer(latent))),
        "transformer, prompt stream": Size(0, 0),
        "conditioning": Size(0, 0),
        "VAE decoder": Size(parameters(vae.decoder), macs(lambda: vae.decoder(latent))),
    }


def real_tables(blocks: int = 12, tokens: int = PROMPT_TOKENS, separable_decoder: bool = False) -> tuple[Table, Table]:
    """(teacher, student) at SD3-medium's shapes, for 512x512 pixels."""
    config = SD3Config()
    with torch.device("meta"):
        latent = torch.empty(1, config.in_channels, SIDE // 8, SIDE // 8)
        vae = KLVAE(kl_vae_shapes(SD3_VAE, config.in_channels, 2), kl_config(32))
        tiny = TinyVAE.regular(separable_encoder=True, separable_decoder=separable_decoder, config=TinySRConfig())
        teacher = teacher_table(config, vae, latent, tokens)
        student = student_table(student_transformer(config, blocks, latent), tiny, latent)
    return teacher, student


def markdown(teacher: Table, student: Table) -> str:
    """Markdown table of both, with the reduction in percent."""
    rows = [(name, teacher[name], student[name]) for name in teacher]
    rows.append(("**total**", total(teacher), total(student)))
    lines = [
        "| component | parameters, teacher | student | gone | GMACs, teacher | student | gone |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, a, b in rows:
        cells = [_million(a.parameters), _million(b.parameters), gone(a.parameters, b.parameters)]
        cells += [f"{a.macs / 1e9:.3f}", f"{b.macs / 1e9:.3f}", gone(a.macs, b.macs)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def total(table: Table) -> Size:
    """All components together."""
    return sum(table.values(), Size(0, 0))


def gone(before: int, after: int) -> str:
    """Reduction from `before` to `after` in percent."""
    return f"{100 * (1 - after / before):.1f} %" if before else "-"


def _million(number: int) -> str:
    return f"{number / 1e6:.2f} M"
