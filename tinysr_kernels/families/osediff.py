"""OSEDiff (arXiv 2406.08177), as released: Stable Diffusion 2.1-base, and a LoRA with a trained conv_in beside it.

The base model is a folder of diffusers' (UNet, VAE, noise schedule, text encoder); osediff.pkl holds `state_dict_unet`
and `state_dict_vae`, low-rank updates of every convolution and projection of the UNet and of the VAE's encoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from tinysr_kernels import nets
from tinysr_kernels.checkpoint.detect import Folder, Part
from tinysr_kernels.checkpoint.embeddings import Candidate, timestep_features
from tinysr_kernels.checkpoint.lora import Merged, Update, read_updates
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.text import listed, quoted
from tinysr_kernels.checkpoint.read.weights import Weights
from tinysr_kernels.checkpoint.sd import kl_vae, prompt, scheduler, unet
from tinysr_kernels.checkpoint.sources import FoundPart, candidates
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families.base import Adain, Checkpoint, ColorFix, Family, Found
from tinysr_kernels.families.config import Epsilon, Within
from tinysr_kernels.nets import sd

LORA = Part(
    "osediff",
    "OSEDiff's LoRA (keys state_dict_unet.*, state_dict_vae.*)",
    re.compile(r"^state_dict_(unet|vae)\."),
    lora=True,
)
TIMESTEP = 999
LORA_ALPHA = 8
"""peft's default, with which it was trained and which the file does not state: the scale is 8 / rank, 2 as released."""
WINDOW, OVERLAP, LEAST = 96, 32, 64
"""In latent pixels: side of the UNet's windows in latents of more pixels, what neighbors share, the smallest side."""
REPLACED = "conv_in.base_layer."
"""The UNet's first convolution as trained, which replaces the base model's before its own update is added."""


@dataclass(frozen=True)
class OSEDiffConfig:
    """What OSEDiff's folded weights leave open; the number of heads is in the prompt's keys."""

    alpha: Annotated[float, Within(1e-6, 0.999)] = scheduler.alpha_of(TIMESTEP)
    """The share of the image in a latent's variance."""
    scaling_factor: float = kl_vae.SCALING_FACTOR
    groups: tuple[int, ...] = (32,)
    vae_groups: tuple[int, ...] = (32,)
    unet_eps: Epsilon = 1e-5
    window: Annotated[int, Within(8, 1024)] = WINDOW
    overlap: Annotated[int, Within(1, 512)] = OVERLAP
    least: Annotated[int, Within(1, 1024)] = LEAST

    @property
    def color_fix(self) -> ColorFix:
        """The release's."""
        return "adain"


class OSEDiff(Family[OSEDiffConfig]):
    """Recognized by its LoRA; the base model's UNet and VAE have a config.json each."""

    name = "osediff"
    summary = "OSEDiff's osediff.pkl with the folder of Stable Diffusion 2.1-base"
    parts = (LORA, unet.UNET, kl_vae.KL_VAE)
    config_class = OSEDiffConfig
    adain = Adain(eps=1e-5, least=0.0, clamp=True, enlarged=True)
    takes_embeddings = True
    takes_prompt = True

    def select(self, folder: Folder, main: TensorFile) -> None:
        """CheckpointError where the base model is not there."""
        for part in (unet.UNET, kl_vae.KL_VAE):
            if not folder.of(part.role):
                raise CheckpointError(
                    f"{folder.path}: {main.where} is a LoRA, without {part.description} of the model that it adapts; "
                    "put the folder of Stable Diffusion 2.1-base, as diffusers writes it, beside it, or pass "
                    '{"osediff": ..., "unet": ..., "vae": ...}'
                )

    def read(self, found: Found) -> Checkpoint:
        """Both modules with their LoRA, the time step evaluated, and the prompt's keys and values."""
        lora, base, half = (found.parts[part.role] for part in self.parts)
        size = unet.size_from_config(base.config or {}, base.config_where)
        layout = kl_vae.layout_from_config(half.config or {}, half.config_where)
        if layout.latent != size.latent:
            raise CheckpointError(
                f"{half.file.where}: expected {size.latent} latent channels, as the UNet {base.file.where} has, found "
                f"{layout.latent}"
            )
        embedding = _embedding(found, size.prompt)
        updates = _updates(lora.file)
        network = _merged_unet(base, size, *updates["unet"])
        vae = Merged(_checked_vae(half, layout), updates["vae"][0])
        config = OSEDiffConfig(
            scheduler.alpha(TIMESTEP, found.configs, found.notices),
            layout.scaling_factor,
            (size.groups,),
            (layout.groups,),
            size.eps,
            WINDOW,
            OVERLAP,
            LEAST,
        )
        tensors = _Normalized(network, vae, size, embedding)
        merged = [f"LoRA {lora.file.where} into the UNet and the VAE's encoder, at scale {LORA_ALPHA} / rank"]
        return Checkpoint(self.name, config, tensors, notices=found.notices, merged=merged, source=found.source)

    def fold(self, config: OSEDiffConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Time and prompt, the scales of the latent and of its noise, and the range maps."""
        return sd.fold(tensors, config, dtype)

    def build(self, config: OSEDiffConfig, folded: Mapping[str, Tensor]) -> sd.OneStepSD:
        """The low-resolution image whole, or in blended tiles; the UNet in windows of its latent."""
        return sd.OneStepSD(folded, config)

    def folds(self, folded: Mapping[str, Tensor]) -> list[str]:
        """Also the time step and the scales around the latent."""
        return [
            "the time step into the biases of the UNet's residual blocks",
            "range map into the first and last convolution",
            "the scales of the latent and of its noise into the convolutions around them",
            *nets.folds(folded),
        ]


def _updates(file: TensorFile) -> dict[str, tuple[dict[str, Update], dict[str, Tensor]]]:
    """For "unet" and "vae": the updates by module, and what replaces weights of the base model."""
    found = {}
    for name in ("unet", "vae"):
        prefix = f"state_dict_{name}."
        own = {key[len(prefix) :]: tensor for key, tensor in file.tensors.items() if key.startswith(prefix)}
        whole = TensorFile(file.path / prefix[:-1], own)
        if not own:
            raise CheckpointError(f"{file.where}: {prefix[:-1]}: expected the LoRA of the {name}, found none")
        replaced = {key: own.pop(key) for key in list(own) if name == "unet" and key.startswith(REPLACED)}
        found[name] = read_updates(whole, LORA_ALPHA), replaced
    left = [key for key in file.tensors if not key.startswith(("state_dict_unet.", "state_dict_vae."))]
    if left:
        raise CheckpointError(f"{file.where}: {quoted(min(left))}: unexpected, OSEDiff has state_dict_unet and _vae")
    return found


def _merged_unet(
    base: FoundPart, size: unet.Size, updates: Mapping[str, Update], replaced: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The UNet's tensors, conv_in replaced before its update is added."""
    where = base.file.where
    tensors = dict(base.file.only_tensors())
    for part in ("weight", "bias"):
        if f"{REPLACED}{part}" not in replaced:
            raise CheckpointError(
                f"{REPLACED}{part}: expected in state_dict_unet of OSEDiff's LoRA, found {listed(replaced) or 'none'}"
            )
    for key, tensor in replaced.items():
        name = key.replace(REPLACED, "conv_in.")
        if name not in tensors or tensors[name].shape != tensor.shape:
            stored = list(tensors[name].shape) if name in tensors else "none"
            raise CheckpointError(f"state_dict_unet: {quoted(key)}: found {list(tensor.shape)}, the base has {stored}")
        tensors[name] = tensor
    weights = Weights(tensors, where)
    unet.check(weights, size)
    return Merged(weights.finish(), updates)


def _checked_vae(half: FoundPart, layout: kl_vae.Layout) -> dict[str, Tensor]:
    """The VAE's tensors under today's names."""
    stored = {kl_vae.modern(name): name for name in half.file.only_tensors()}
    tensors = {name: half.file.tensors[key] for name, key in stored.items()}
    weights = Weights(tensors, lambda name: f"{half.file.where}: {quoted(stored.get(name, name))}")
    kl_vae.check(weights, layout)
    return weights.finish()


class _Normalized(Mapping[str, Tensor]):
    """The tensors as `fold` expects them, each merged and evaluated when it is asked for.

    `unet.*` with `time_bias` in place of the time modules and `attn2.keys` and `values` [heads,T,d] in place of their
    projections; `encoder.*`, `decoder.*`, `quant_conv.*`, `post_quant_conv.*`.
    """

    def __init__(
        self, network: Mapping[str, Tensor], vae: Mapping[str, Tensor], size: unet.Size, embedding: Tensor
    ) -> None:
        self._network, self._vae = network, vae
        self._heads = dict(unet.attention_heads(size))
        self._embedding = embedding.double()
        self._temb = F.silu(_temb(network))
        self._names = list(vae)
        for name in network:
            projection = re.fullmatch(r"(.*)\.time_emb_proj\.weight", name)
            of_prompt = re.fullmatch(r"(.*\.attn2)\.to_([kv])\.weight", name)
            if projection:
                self._names.append(f"unet.{projection[1]}.time_bias")
            elif of_prompt:
                self._names.append(f"unet.{of_prompt[1]}.{'keys' if of_prompt[2] == 'k' else 'values'}")
            elif not name.startswith("time_embedding.") and ".time_emb_proj." not in name:
                self._names.append(f"unet.{name}")
        self._known = frozenset(self._names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            raise KeyError(name)
        if not name.startswith("unet."):
            return self._vae[name]
        name = name.removeprefix("unet.")
        module, _, last = name.rpartition(".")
        if last == "time_bias":
            projection = f"{module}.time_emb_proj"
            return _linear(self._network, projection, self._temb)[0].to(_wide(self._network[f"{projection}.weight"]))
        if last in ("keys", "values"):
            weight = self._network[f"{module}.to_{last[0]}.weight"]
            heads = self._heads[module.removesuffix(".attn2")]
            features = self._embedding @ weight.double().T
            return features.unflatten(1, (heads, -1)).transpose(0, 1).contiguous().to(_wide(weight))
        return self._network[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _wide(tensor: Tensor) -> torch.dtype:
    """float32, or float64 where the tensor is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _linear(tensors: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, tensors[f"{name}.weight"].double(), tensors[f"{name}.bias"].double())


def _temb(tensors: Mapping[str, Tensor]) -> Tensor:
    """The time step's embedding, float64 [1,E]."""
    features = timestep_features(tensors["time_embedding.linear_1.weight"].shape[1], float(TIMESTEP))
    return _linear(tensors, "time_embedding.linear_2", F.silu(_linear(tensors, "time_embedding.linear_1", features)))


def _embedding(found: Found, features: int) -> Tensor:
    """The prompt's embedding [T,X]: the caller's, that of a prompt given, the one found beside, that of no prompt.

    CheckpointError where there is none, several, or one of another width.
    """
    if found.named:
        if found.prompt is not None:
            found.notices.append("the prompt given is ignored: embeddings are given too")
        return _only(candidates(found.named), features, "embeddings", strict=True)
    beside = [one for one in candidates(found.beside) if _fits(one.tensor, features)]
    if beside and found.prompt is None:
        return _only(beside, features, found.source)
    encoder = prompt.text_encoder(found.models)
    if encoder is None:
        raise CheckpointError(
            f"{found.source}: expected the embedding of a prompt, found neither a file of one tensor [1,T,{features}] "
            "nor a text encoder; put text_encoder/ and tokenizer/ of Stable Diffusion 2.1-base into the folder, or "
            'save the last_hidden_state of its text encoder with torch.save(P, "prompt_embeds.pt") and put that there, '
            "or pass it as embeddings="
        )
    text = found.prompt or ""
    embedding = prompt.evaluate(encoder, text)
    found.notices.append(f"the prompt {quoted(text)} was evaluated by the text encoder {encoder}")
    return _only([Candidate("prompt", embedding, str(encoder))], features, str(encoder), strict=True)


def _fits(tensor: Tensor, features: int) -> bool:
    """Whether a tensor may be the embedding of a prompt, [1,T,X] or [T,X]."""
    shape = tuple(tensor.shape[1:] if tensor.ndim == 3 and tensor.shape[0] == 1 else tensor.shape)
    return len(shape) == 2 and shape[0] > 0 and shape[1] == features and tensor.is_floating_point()


def _only(found: list[Candidate], features: int, where: str, strict: bool = False) -> Tensor:
    """The one embedding among candidates, [T,X] and checked."""
    for one in found:
        if strict and not _fits(one.tensor, features):
            raise CheckpointError(
                f"{one.where}: expected the embedding of a prompt, [1,T,{features}] or [T,{features}] in floating "
                f"point, found {list(one.tensor.shape)} of {one.tensor.dtype}"
            )
    if not all(torch.equal(one.tensor.flatten(), found[0].tensor.flatten()) for one in found[1:]):
        raise CheckpointError(
            f"{where}: expected the embedding of one prompt, found several: {listed(one.where for one in found)}; pass "
            "one with embeddings="
        )
    if not found:
        raise CheckpointError(f"{where}: expected the embedding of a prompt, found none")
    tensor = found[0].tensor.flatten(0, -2)
    return Weights({found[0].name: tensor}, lambda _: found[0].where).take(found[0].name, [None, features])
