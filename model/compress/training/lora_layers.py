"""Low-rank adaptation of linear layers during training (arXiv 2106.09685), under the keys of TinySR's release.

An adapted layer keeps `weight` and `bias` where they were and adds `lora_A.weight` [r,in] and `lora_B.weight` [out,r];
it computes W x + b + B A x. Alpha equals the rank, so the scale is 1, as in the release; model/reference/lora.py merges
checkpoints of this form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

RANK = 64
"""Of mask learning and of restoration (arXiv 2508.17434, section 3.3)."""


class LoRALinear(nn.Linear):
    """A linear layer [...,in] -> [...,out] with a trainable low-rank change; its own weight and bias are frozen."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        where = {"device": base.weight.device, "dtype": base.weight.dtype}
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **where)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **where)
        nn.init.normal_(self.lora_A.weight, std=1 / rank)
        nn.init.zeros_(self.lora_B.weight)  # the network starts as it was

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_B(self.lora_A(x))

    def merged(self) -> nn.Linear:
        """The plain layer of weight W + B A, added in float32 or wider; trainable."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.no_grad():
            change = self.lora_B.weight.to(wide) @ self.lora_A.weight.to(wide)
            plain.weight = nn.Parameter((self.weight.to(wide) + change).to(self.weight.dtype))
        plain.bias = self.bias
        return plain.requires_grad_(True)


def inject(network: nn.Module, rank: int = RANK, where: str = "") -> list[str]:
    """Adapt every nn.Linear whose name matches the regular expression `where` (search); returns their names.

    All other parameters of the network are frozen. Raises ValueError for a rank below 1, for a network that is adapted
    already, and where no layer matches.
    """
    if rank < 1:
        raise ValueError(f"the rank must be at least 1, not {rank}")
    if adapted(network):
        raise ValueError("the network has low-rank layers already; merge them first")
    found = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and re.search(where, n)}
    if not found:
        raise ValueError(f"no linear layer's name matches {where!r}")
    network.requires_grad_(False)
    for name, layer in found.items():
        network.set_submodule(name, LoRALinear(layer, rank))
    return list(found)


def adapted(network: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters: A and B of every adapted layer."""
    return [p for layer in adapted(network).values() for part in layer.children() for p in part.parameters()]


def merge(network: nn.Module) -> list[str]:
    """Replace every adapted layer by an equivalent nn.Linear; returns their names."""
    layers = adapted(network)
    for name, layer in layers.items():
        network.set_submodule(name, layer.merged())
    return list(layers)


def lora_state(network: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """`<prefix><layer>.lora_A.weight` and `.lora_B.weight` of every adapted layer, detached."""
    return {
        f"{prefix}{name}.{part}": tensor
        for name, layer in adapted(network).items()
        for part, tensor in layer.state_dict().items()
        if part.startswith("lora_")
    }


@torch.no_grad()
def load_lora(network: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Fill the adapted layers; ValueError, without any change, unless names and shapes match exactly."""
    own = lora_state(network, prefix)
    if state.keys() != own.keys():
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        raise ValueError(f"the LoRA weights do not match: missing {missing[:3]}, unexpected {unexpected[:3]}")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"{name} has shape {list(state[name].shape)}, the layer {list(tensor.shape)}")
    for name, tensor in own.items():
        tensor.copy_(state[name])
