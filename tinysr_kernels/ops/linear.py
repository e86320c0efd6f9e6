"""linear: a matrix product with everything that touches its result; unpatchify_subtract: the transformer's.

linear:  v = x @ weight.T + x2 @ weight2.T + bias
         out = residual + gate * act(v)
    act: none, gelu_tanh (tanh approximation), or geglu: v = [a, g] in halves, a * gelu(g) with exact GELU.
    gate multiplies where a gate could not be folded into the weight.
    Layouts: x [...,K], weight [O,K], x2 [...,K2], weight2 [O,K2], bias [O]; with F = O, or O/2 for geglu:
    gate [F], residual and out [...,F], out contiguous.

unpatchify_subtract:  out[n,c,y*p+i,x*p+j] = z[n,c,y*p+i,x*p+j] - (t @ weight.T + bias)[n, y*w+x, (i*p+j)*C+c]
    the projection of N x (h*w) tokens to p x p patches of C channels, laid out as an image and taken from the
    latent z: SD3's proj_out and unpatchify (order nhwpqc -> nchpwq) and TinySR's z - transformer(z) at once.
    Layouts: t [N,h*w,D], weight [p*p*C,D], bias [p*p*C], z [N,C,h*p,w*p] of any strides, out channels_last.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.ops.registry import (
    Cost,
    check,
    check_choice,
    check_rank,
    check_shape,
    empty_nhwc,
    nhwc,
    plain,
    register,
    size,
    wide,
)

LINEAR_ACTIVATIONS = ("none", "gelu_tanh", "geglu")
SCHEMA = (
    "linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, Tensor? gate=None, "
    'str activation="none", Tensor? x2=None, Tensor? weight2=None) -> Tensor'
)
UNPATCHIFY_SCHEMA = "unpatchify_subtract(Tensor t, Tensor weight, Tensor? bias, Tensor z, int patch_size) -> Tensor"


def _out_shape(x: Tensor, weight: Tensor, activation: str) -> tuple[int, ...]:
    features = weight.shape[0] // (2 if activation == "geglu" else 1)
    return (*x.shape[:-1], features)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    activation: str,
    x2: Tensor | None,
    weight2: Tensor | None,
) -> tuple[int, ...]:
    check(x.dim() >= 1, f"x must be [...,K], found {list(x.shape)}")
    check_rank("weight", weight, "O,K")
    o = weight.shape[0]
    check_shape("weight", weight, (o, x.shape[-1]))
    check_shape("bias", bias, (o,))
    check_choice("activation", activation, LINEAR_ACTIVATIONS)
    check(activation != "geglu" or o % 2 == 0, f"weight must have an even number of rows for geglu, found {o}")
    check((x2 is None) == (weight2 is None), "x2 and weight2 must be given together, found only one of them")
    if x2 is not None and weight2 is not None:
        check(x2.dim() >= 1, f"x2 must be [...,K2], found {list(x2.shape)}")
        check_shape("x2", x2, (*x.shape[:-1], x2.shape[-1]))
        check_shape("weight2", weight2, (o, x2.shape[-1]))
    out = _out_shape(x, weight, activation)
    check_shape("gate", gate, out[-1:])
    check_shape("residual", residual, out)
    return out


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    activation: str = "none",
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    Any floating dtype; the result has x's. Raises ValueError naming argument, expected and found.
    """
    _check(x, weight, bias, residual, gate, activation, x2, weight2)
    dtype = wide(x.dtype)
    v = F.linear(plain(x, dtype), plain(weight, dtype), None if bias is None else plain(bias, dtype))
    if x2 is not None and weight2 is not None:
        v = v + F.linear(plain(x2, dtype), plain(weight2, dtype))
    if activation == "gelu_tanh":
        v = F.gelu(v, approximate="tanh")
    elif activation == "geglu":
        a, g = v.chunk(2, -1)
        v = a * F.gelu(g)
    if gate is not None:
        v = v * gate.to(dtype)
    if residual is not None:
        v = v + residual.to(dtype)
    return plain(v, x.dtype)


def fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    activation: str = "none",
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    return x.new_empty(_check(x, weight, bias, residual, gate, activation, x2, weight2))


def cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    activation: str = "none",
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
) -> Cost:
    """FLOPs of the matrix products; bytes of every tensor once."""
    shape = _out_shape(x, weight, activation)
    rows = x.numel() // x.shape[-1]
    flops = 2 * rows * (weight.numel() + (0 if weight2 is None else weight2.numel()))
    moved = size(x, weight, bias, residual, gate, x2, weight2)
    return Cost(flops, moved + rows * shape[-1] * x.element_size())


def _check_unpatchify(t: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, patch_size: int) -> None:
    check_rank("z", z, "N,C,H,W")
    check_rank("t", t, "N,T,D")
    check(patch_size >= 1, f"patch_size must be at least 1, found {patch_size}")
    n, c, h, w = z.shape
    check(
        h % patch_size == 0 and w % patch_size == 0,
        f"z must be a multiple of the patch size {patch_size} per side, found {h}x{w}",
    )
    check_shape("t", t, (n, (h // patch_size) * (w // patch_size), t.shape[2]))
    features = patch_size * patch_size * c
    check_shape("weight", weight, (features, t.shape[2]))
    check_shape("bias", bias, (features,))


def unpatchify_reference(t: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, patch_size: int) -> Tensor:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    Any floating dtype; the result has z's. Raises ValueError naming argument, expected and found.
    """
    _check_unpatchify(t, weight, bias, z, patch_size)
    dtype = wide(t.dtype)
    v = F.linear(plain(t, dtype), plain(weight, dtype), None if bias is None else plain(bias, dtype))
    n, c, h, w = z.shape
    p = patch_size
    image = v.view(n, h // p, w // p, p, p, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
    return nhwc((z.to(dtype) - image).to(z.dtype))


def unpatchify_fake(t: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, patch_size: int) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    _check_unpatchify(t, weight, bias, z, patch_size)
    return empty_nhwc(z, tuple(z.shape))


def unpatchify_cost(t: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, patch_size: int) -> Cost:
    """FLOPs of the matrix product; bytes of every tensor once."""
    flops = 2 * t.shape[0] * t.shape[1] * weight.numel()
    return Cost(flops, size(t, weight, bias, z) + z.numel() * z.element_size())


linear = register(SCHEMA, reference, fake, cost)
unpatchify_subtract = register(UNPATCHIFY_SCHEMA, unpatchify_reference, unpatchify_fake, unpatchify_cost)
