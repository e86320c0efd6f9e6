"""What a half of one of diffusers' autoencoders is made of: read from the modules themselves, at every call.

A module is known by its class, which must be diffusers' or torch's own and not a subclass, and by the values that its
`forward` depends on. Whatever is otherwise, a hook included, is named in an `Unknown`: the module then computes itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinysr_kernels.nets.tiny_vae import decoder_steps, encoder_steps

HALVES = {"Encoder": "encoder", "Decoder": "decoder", "EncoderTiny": "encoder", "DecoderTiny": "decoder"}
"""Classes of halves in diffusers/models/autoencoders/vae.py."""
PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor")
"""diffusers' attention processors that compute the same function."""


class Unknown(Exception):
    """Something that the fused network would compute otherwise; the text says where and what."""


@dataclass(frozen=True)
class Structure:
    """A half but for its weights: of an AutoencoderKL, its norms; of an AutoencoderTiny, its blocks per stage."""

    half: str
    groups: int = 0
    eps: float = 0.0
    attends: bool = False
    blocks: tuple[int, ...] = ()

    @property
    def first_weight(self) -> str:
        """The kernel whose second dimension is the channels of the input, [O,C,3,3]."""
        return f"{self.half}.{'layers.0' if self.blocks else 'conv_in'}.weight"


def read(module: nn.Module) -> tuple[Structure, dict[str, Tensor]]:
    """The structure of a half, and its parameters as `<half>.<name>`. Raises Unknown.

    The `forward` of the half itself is not looked at.
    """
    kind = _class(module)
    if kind not in HALVES:
        raise Unknown(f"a {kind}, where one of {', '.join(HALVES)} of diffusers was expected")
    if torch.nn.modules.module._has_any_global_hook():
        raise Unknown("hooks for all modules are registered with torch")
    reader = _Reader(HALVES[kind])
    reader.visit(module, reader.half)
    tensors = reader.tensors
    for name in tensors.keys() ^ reader.names:
        raise Unknown(f"{name} is {'unexpected' if name in tensors else 'missing'}")
    for name, tensor in tensors.items():
        if type(tensor) not in (nn.Parameter, Tensor):
            raise Unknown(f"{name} is a {type(tensor).__name__}")
    if kind.endswith("Tiny"):
        return Structure(reader.half, blocks=_stages(module, reader.half)), tensors
    if len(reader.norms) != 1:
        raise Unknown(f"its GroupNorms differ in groups or eps: {sorted(reader.norms)}")
    ((groups, eps),) = reader.norms
    attends = any(".attentions." in name for name in tensors)
    return Structure(reader.half, groups=groups, eps=eps, attends=attends), tensors


def _class(module: nn.Module) -> str:
    """The name of a class of torch's or diffusers' own; another one with its module's."""
    return _name(type(module))  # type: ignore[arg-type]


@functools.cache
def _name(kind: type) -> str:
    # Not torch.ao's, whose quantized layers have the same names.
    known = kind.__module__.startswith(("torch.nn.modules.", "diffusers."))
    return kind.__name__ if known else f"{kind.__module__}.{kind.__name__}"


class _Reader:
    """Visits every module below a half.

    tensors: its parameters; names: those that its modules are known to have; norms: groups and eps of its GroupNorms.
    """

    def __init__(self, half: str) -> None:
        self.half = half
        self.tensors: dict[str, Tensor] = {}
        self.names: set[str] = set()
        self.norms: set[tuple[int, float]] = set()

    def visit(self, module: nn.Module, where: str) -> None:
        """Check the module and what lies below it. Raises Unknown."""
        kind = _class(module)
        if kind not in _CHECKS:
            raise Unknown(f"{where} is a {kind}")
        if where != self.half:
            _hooks(module, where)
        for name, tensor in module._parameters.items():
            if tensor is not None:
                self.tensors[f"{where}.{name}"] = tensor
        if module._buffers:
            raise Unknown(f"{where} has a buffer: {next(iter(module._buffers))}")
        children = {name: child for name, child in module._modules.items() if child is not None}
        _parts(kind, children, where)
        for name, child in children.items():
            self.visit(child, f"{where}.{name}")
        _CHECKS[kind](self, module, where)

    def expect(self, module: nn.Module, where: str, **values: Any) -> None:
        """Unknown unless the module's attributes have these values."""
        for name, value in values.items():
            found = getattr(module, name, value)
            if found != value:
                raise Unknown(f"{where}.{name} is {found!r}, known is {value!r}")

    def conv(self, module: Any, where: str) -> None:
        """Kernel, stride and padding follow from the place."""
        kernel, stride, padding = 3, 1, 1
        if where.endswith("conv_shortcut"):
            kernel, padding = 1, 0
        elif ".downsamplers." in where:
            stride, padding = 2, 0
        elif self.half == "encoder" and ".layers." in where and ".conv." not in where and module.bias is None:
            stride = 2
        values = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": 1}
        self.expect(module, where, **{name: (n, n) for name, n in values.items()}, groups=1, padding_mode="zeros")
        self.linear(module, where)

    def linear(self, module: Any, where: str) -> None:
        """Its weight, and its bias if it has one."""
        self.names.add(f"{where}.weight")
        if module.bias is not None:
            self.names.add(f"{where}.bias")

    def norm(self, module: nn.Module, where: str) -> None:
        """With an affine part; groups and eps are collected."""
        if not isinstance(module, nn.GroupNorm) or module.weight is None or module.bias is None:
            raise Unknown(f"{where} has no affine part")
        self.norms.add((module.num_groups, module.eps))
        self.names |= {f"{where}.weight", f"{where}.bias"}

    def resnet(self, module: Any, where: str) -> None:
        """Without time, scale, or sampling inside."""
        self.expect(module, where, output_scale_factor=1, upsample=None, downsample=None)
        if module.time_embedding_norm not in ("default", "group"):  # the same where there is no time
            raise Unknown(f"{where}.time_embedding_norm is {module.time_embedding_norm!r}")

    def attention(self, module: Any, where: str) -> None:
        """One head over all pixels, by a processor of diffusers' own."""
        self.expect(
            module,
            where,
            heads=1,
            residual_connection=True,
            rescale_output_factor=1,
            fused_projections=False,
            scale=module.to_q.weight.shape[0] ** -0.5,
            is_causal=False,
        )
        processor = type(module.processor)
        if processor.__name__ not in PROCESSORS or processor.__module__.split(".")[0] != "diffusers":
            raise Unknown(f"{where}.processor is a {processor.__name__}, known are {', '.join(PROCESSORS)}")
        layers = [_class(layer) for layer in module.to_out]
        if layers != ["Linear", "Dropout"]:
            raise Unknown(f"{where}.to_out is {', '.join(layers)}")

    def block(self, module: Any, where: str) -> None:
        """At most one sampler."""
        for name in ("downsamplers", "upsamplers"):
            samplers = getattr(module, name, None)
            if samplers is not None and len(samplers) != 1:
                raise Unknown(f"{where}.{name} has {len(samplers)} modules, known is 1")

    def middle(self, module: Any, where: str) -> None:
        """A residual block, then pairs of an attention and one more; or no attention at all."""
        attentions = [one for one in module.attentions if one is not None]
        if attentions and len(module.resnets) != len(attentions) + 1:
            raise Unknown(f"{where} has {len(module.resnets)} residual blocks and {len(attentions)} attentions")

    def upsampler(self, module: Any, where: str) -> None:
        """Nearest x2 and a convolution."""
        self.expect(module, where, use_conv=True, use_conv_transpose=False, interpolate=True, norm=None)

    def downsampler(self, module: Any, where: str) -> None:
        """A convolution of stride 2, padded on the right and the bottom."""
        self.expect(module, where, use_conv=True, padding=0, norm=None)

    def enlargement(self, module: Any, where: str) -> None:
        """Of AutoencoderTiny."""
        self.expect(module, where, size=None, mode="nearest")
        if module.scale_factor not in (2, (2, 2)):
            raise Unknown(f"{where}.scale_factor is {module.scale_factor}, known is 2")

    def tiny_block(self, module: Any, where: str) -> None:
        """Convolutions and ReLUs in turn, the input added."""
        kinds = [_class(layer) for layer in module.conv]
        if kinds != ["Conv2d", "ReLU", "Conv2d", "ReLU", "Conv2d"]:
            raise Unknown(f"{where} is a block of {', '.join(kinds)}")

    def nothing(self, module: nn.Module, where: str) -> None:
        """Whatever it is, its children decide."""


def _hooks(module: nn.Module, where: str) -> None:
    """Unknown if calling the module does more than its class says."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(kinds):
        raise Unknown(f"{where} has hooks")
    if "forward" in module.__dict__ or module._compiled_call_impl is not None:
        raise Unknown(f"{where}.forward has been replaced")


def _stages(module: Any, half: str) -> tuple[int, ...]:
    """Blocks per stage of an AutoencoderTiny, whose layers must then be those of `nets/tiny_vae.py`."""
    kinds = [_class(layer) for layer in module.layers]
    blocks = [0]
    for kind in kinds[1:-1] if half == "encoder" else kinds[2:-1]:
        if kind == "AutoencoderTinyBlock":
            blocks[-1] += 1
        elif kind == "Conv2d":
            blocks.append(0)
    wanted = ["Conv2d"] if half == "encoder" else ["Conv2d", "ReLU"]
    names = {"block": ["AutoencoderTinyBlock"], "up": ["Upsample", "Conv2d"]}
    steps = encoder_steps if half == "encoder" else decoder_steps
    for step, _ in list(steps(tuple(blocks)))[1:]:
        wanted += names.get(step, ["Conv2d"])
    if kinds != wanted:
        raise Unknown(f"{half}.layers are {', '.join(kinds)}")
    return tuple(blocks)


_CONV, _NORM = "Conv2d", "GroupNorm"
_SAMPLED = {
    "conv_in": _CONV,
    "mid_block": "UNetMidBlock2D",
    "conv_norm_out": _NORM,
    "conv_act": "SiLU",
    "conv_out": _CONV,
}
_PARTS: Mapping[str, Mapping[str, str]] = {
    "Encoder": {**_SAMPLED, "down_blocks": "[DownEncoderBlock2D]"},
    "Decoder": {**_SAMPLED, "up_blocks": "[UpDecoderBlock2D]"},
    "DownEncoderBlock2D": {"resnets": "[ResnetBlock2D]", "downsamplers?": "[Downsample2D]"},
    "UpDecoderBlock2D": {"resnets": "[ResnetBlock2D]", "upsamplers?": "[Upsample2D]"},
    "UNetMidBlock2D": {"resnets": "[ResnetBlock2D]", "attentions": "[Attention]"},
    "ResnetBlock2D": {
        "norm1": _NORM,
        "conv1": _CONV,
        "norm2": _NORM,
        "conv2": _CONV,
        "conv_shortcut?": _CONV,
        "dropout": "Dropout",
        "nonlinearity": "SiLU",
    },
    "Attention": {"group_norm": _NORM, **dict.fromkeys(("to_q", "to_k", "to_v"), "Linear"), "to_out": "ModuleList"},
    "Upsample2D": {"conv": _CONV},
    "Downsample2D": {"conv": _CONV},
    "EncoderTiny": {"layers": "Sequential"},
    "DecoderTiny": {"layers": "Sequential"},
    "AutoencoderTinyBlock": {"conv": "Sequential", "skip": "Identity", "fuse": "ReLU"},
}
"""The children of each class: their names, "?" after those that may be absent, and their classes; in brackets that of
each module in a list. Of ModuleList and Sequential whoever holds them checks the rest; others have no children."""


def _parts(kind: str, children: Mapping[str, nn.Module], where: str) -> None:
    """Unknown if the children of a module of this class are others than known."""
    if kind in ("ModuleList", "Sequential"):
        return
    known = {name.rstrip("?"): wanted for name, wanted in _PARTS.get(kind, {}).items()}
    needed = {name for name in _PARTS.get(kind, {}) if not name.endswith("?")}
    different = (needed - children.keys()) | (children.keys() - known.keys())
    if different:
        raise Unknown(f"{where} ({kind}) has other parts than known: {sorted(different)}")
    for name, child in children.items():
        wanted, found = known[name], _class(child)
        if wanted.startswith("[") and found == "ModuleList":
            for j, item in child._modules.items():
                if item is not None and f"[{_class(item)}]" != wanted:
                    raise Unknown(f"{where}.{name}.{j} is a {_class(item)}, known is {wanted[1:-1]}")
        elif found != wanted:
            raise Unknown(f"{where}.{name} is a {found}, known is {wanted}")


_CHECKS: Mapping[str, Callable[[_Reader, Any, str], None]] = {
    "ResnetBlock2D": _Reader.resnet,
    "UNetMidBlock2D": _Reader.middle,
    "Attention": _Reader.attention,
    "DownEncoderBlock2D": _Reader.block,
    "UpDecoderBlock2D": _Reader.block,
    "Upsample2D": _Reader.upsampler,
    "Downsample2D": _Reader.downsampler,
    "AutoencoderTinyBlock": _Reader.tiny_block,
    "Upsample": _Reader.enlargement,
    "Conv2d": _Reader.conv,
    "Linear": _Reader.linear,
    "GroupNorm": _Reader.norm,
    **dict.fromkeys(("Encoder", "Decoder", "EncoderTiny", "DecoderTiny"), _Reader.nothing),
    **dict.fromkeys(("SiLU", "ReLU", "Identity", "Dropout", "ModuleList", "Sequential"), _Reader.nothing),
}
"""What else is checked of each class, once its children are known."""
