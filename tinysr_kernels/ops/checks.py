"""Checks of an operator's arguments: ValueError with the argument's name, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

ACTIVATIONS = ("none", "relu", "silu")


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds (works under fake tensors and torch.compile)."""
    if not condition:
        raise ValueError(message)


def check_rank(name: str, t: Tensor, layout: str) -> None:
    """Raise ValueError unless t has as many dimensions as `layout` (such as "N,C,H,W") names."""
    check(t.dim() == layout.count(",") + 1, f"{name} must be [{layout}], found {list(t.shape)}")


def check_shape(name: str, t: Tensor | None, expected: Sequence[int]) -> None:
    """Raise ValueError unless t is None or has exactly the expected shape."""
    if t is not None and tuple(t.shape) != tuple(expected):
        raise ValueError(f"{name} must be {list(expected)}, found {list(t.shape)}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    check(value in choices, f"{name} must be one of {tuple(choices)}, found {value!r}")


def check_together(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all of these arguments are given or none is."""
    given = [name for name, t in tensors.items() if t is not None]
    *most, last = tensors
    check(len(given) in (0, len(tensors)), f"{', '.join(most)} and {last} must be given together, found only {given}")


def check_epilogue(
    out: tuple[int, int, int, int], bias: Tensor | None, residual: Tensor | None, activation: str
) -> None:
    """ValueError unless bias [O] and residual fit the result [N,O,H,W] and the activation is known."""
    check_shape("bias", bias, (out[1],))
    check_shape("residual", residual, out)
    check_choice("activation", activation, ACTIVATIONS)


def check_shortcut(
    out: tuple[int, int, int, int], shortcut: Tensor | None, skip: Tensor | None, weight: Tensor | None
) -> None:
    """ValueError unless the tensors of a 1x1 shortcut come together and fit the result's shape [N,O,H,W].

    shortcut [N,C1,H,W]; skip [N,C2,H,W] or None; weight [O,C1+C2].
    """
    if shortcut is None or weight is None:
        given = [
            name for name, t in (("shortcut", shortcut), ("skip", skip), ("shortcut_weight", weight)) if t is not None
        ]
        check(not given, f"shortcut and shortcut_weight must be given together, found only {given}")
        return
    n, o, h, w = out
    channels = 0
    for name, t in (("shortcut", shortcut), ("skip", skip)):
        if t is not None:
            check_rank(name, t, "N,C,H,W")
            check_shape(name, t, (n, t.shape[1], h, w))
            channels += t.shape[1]
    check_shape("shortcut_weight", weight, (o, channels))
