"""What OSEDiff and its relatives share: one step of Stable Diffusion 2.1, adapted by LoRA.

The base model is a folder of diffusers' (UNet, VAE, noise schedule, text encoder). A family says which LoRA adapt it,
at which time step and scale, and how the noise-free latent follows from the UNet's prediction.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from tinysr_kernels import nets
from tinysr_kernels.checkpoint.detect import Folder
from tinysr_kernels.checkpoint.lora import Merged, Update
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.checkpoint.read.weights import Weights
from tinysr_kernels.checkpoint.sd import kl_vae, prompt, scheduler, unet
from tinysr_kernels.checkpoint.sd.normalized import Normalized
from tinysr_kernels.checkpoint.sources import FoundPart
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families.base import Adain, Checkpoint, ColorFix, Family, Found
from tinysr_kernels.families.config import Epsilon, Within
from tinysr_kernels.nets.diffusion import sd

_ALPHA_999 = scheduler.alpha_of(999)
Window = Annotated[int, Within(8, 1024)]
Alpha = Annotated[float, Within(1e-6, 0.999)]
"""The share of the image in a latent's variance."""


@dataclass(frozen=True)
class OneStepConfig:
    """What folded weights leave open; the number of heads is in the prompt's keys. Sides are in latent pixels."""

    scaling_factor: float = kl_vae.SCALING_FACTOR
    groups: tuple[int, ...] = (32,)
    vae_groups: tuple[int, ...] = (32,)
    unet_eps: Epsilon = 1e-5
    window: Window = 96
    overlap: Annotated[int, Within(1, 512)] = 32
    least: Annotated[int, Within(1, 1024)] = 64

    symmetric: ClassVar[bool] = False
    pillow: ClassVar[bool] = True

    @property
    def signal(self) -> float:
        """m in x0 = (z - n prediction) / m."""
        return 1.0

    @property
    def noise(self) -> float:
        """n in x0 = (z - n prediction) / m."""
        return 1.0

    @property
    def color_fix(self) -> ColorFix:
        """The release's."""
        return "adain"


@dataclass(frozen=True)
class NoiseConfig(OneStepConfig):
    """Of a UNet that predicts the noise eps: x0 = (z - sqrt(1-a) eps) / sqrt(a)."""

    alpha: Alpha = _ALPHA_999

    @property
    def signal(self) -> float:
        """sqrt(a)."""
        return self.alpha**0.5

    @property
    def noise(self) -> float:
        """sqrt(1-a)."""
        return (1 - self.alpha) ** 0.5


@dataclass(frozen=True)
class Adaptation:
    """What a family's LoRA do to the base model: updates by module, and weights of the UNet that are replaced first.

    merged: one phrase, for `info`.
    """

    merged: str
    unet: Mapping[str, Update]
    vae: Mapping[str, Update] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)


C = TypeVar("C", bound=OneStepConfig)


class OneStepFamily(Family[C]):
    """Recognized by its LoRA; the base model's UNet and VAE have a config.json each."""

    adain = Adain(eps=1e-5, least=0.0, clamp=True, enlarged=True)
    takes_embeddings = True
    per_image = True
    takes_prompt = True
    takes_lora_alpha = True

    timestep: ClassVar[int]
    window: ClassVar[int]
    overlap: ClassVar[int]
    least: ClassVar[int] = 64
    lora_alpha: ClassVar[float | None]
    """alpha of updates, whose scale is alpha / rank; None where files state it."""

    @abstractmethod
    def adaptation(self, found: Found) -> Adaptation:
        """Read the LoRA. CheckpointError for a key that has no meaning."""

    def select(self, folder: Folder, main: TensorFile) -> None:
        """CheckpointError where another part is not there."""
        for part in self.parts[1:]:
            if not folder.of(part.role):
                names = ", ".join(f'"{one.called[0]}": ...' for one in self.parts)
                raise CheckpointError(
                    f"{folder.path}: {main.where} is a LoRA of {self.name}, without {part.description} of the model "
                    "that it adapts; put the folder of Stable Diffusion 2.1-base, as diffusers writes it, and every "
                    f"file of the LoRA beside it, or pass {{{names}}}"
                )

    def read(self, found: Found) -> Checkpoint:
        """Both modules with their LoRA, the time step evaluated, and the prompt's keys and values."""
        base, half = found.parts[unet.UNET.role], found.parts[kl_vae.KL_VAE.role]
        size = unet.size_from_config(base.config or {}, base.config_where)
        layout = kl_vae.layout_from_config(half.config or {}, half.config_where)
        if layout.latent != size.latent:
            raise CheckpointError(
                f"{half.file.where}: expected {size.latent} latent channels, as the UNet {base.file.where} has, found "
                f"{layout.latent}"
            )
        embedding = _embedding(found, size.prompt)  # what is missing is said before gigabytes are checked
        adaptation = self.adaptation(found)
        network = Merged(_checked_unet(base, size, adaptation.replaced), adaptation.unet, base.file.where)
        vae = Merged(kl_vae.checked(half.file, layout), adaptation.vae, half.file.where)
        config = self.config_class(
            scaling_factor=layout.scaling_factor,
            groups=(size.groups,),
            vae_groups=(layout.groups,),
            unet_eps=size.eps,
            window=self.window,
            overlap=self.overlap,
            least=self.least,
            **self._schedule(found),
        )
        tensors = Normalized(network, vae, size, self.timestep, embedding)
        return Checkpoint(
            self.name, config, tensors, notices=found.notices, merged=[adaptation.merged], source=found.source
        )

    def _schedule(self, found: Found) -> dict[str, Any]:
        """What the noise schedule gives the configuration."""
        if not issubclass(self.config_class, NoiseConfig):
            return {}
        return {"alpha": scheduler.alpha(self.timestep, found.configs, found.notices)}

    def scale_alpha(self, found: Found) -> float | None:
        """alpha of updates: the caller's before the family's own."""
        return self.lora_alpha if found.lora_alpha is None else found.lora_alpha

    def fold(self, config: C, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Time and prompt, the scales of the latent and of its noise, and the range maps."""
        return sd.fold(tensors, config, dtype)

    def build(self, config: C, folded: Mapping[str, Tensor]) -> sd.OneStepSD:
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


def _embedding(found: Found, features: int) -> Tensor | None:
    """That of the prompt that all images share; None where each has its own."""
    if not found.per_image:
        return prompt.fixed_embedding(
            found.source,
            features,
            named=found.named,
            prompt=found.prompt,
            beside=found.beside,
            models=found.models,
            notices=found.notices,
        )
    if found.prompt is not None:
        found.notices.append("the prompt given is ignored: each image has its own embedding")
    return None


def _checked_unet(base: FoundPart, size: unet.Size, replaced: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The UNet's tensors, some replaced by what a LoRA file holds of them."""
    tensors = dict(base.file.only_tensors())
    for name, tensor in replaced.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            stored = list(tensors[name].shape) if name in tensors else "none"
            raise CheckpointError(
                f"{quoted('.base_layer.'.join(name.rsplit('.', 1)))} of the LoRA: found {list(tensor.shape)}, the base "
                f"model {base.file.where} has {stored}"
            )
        tensors[name] = tensor
    weights = Weights(tensors, base.file.where)
    unet.check(weights, size)
    return weights.finish()
