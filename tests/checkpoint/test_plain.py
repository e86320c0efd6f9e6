"""Objects in memory that are no plain tensors, mappings or modules: refused by what they are, whatever they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.checkpoint.edit import refused
from tests.fuzz.odd import BadMapping, BadPath, Hostile, Liar, OddModule, Sub, itself
from tests.layouts.unet import write_unet
from tinysr_kernels.checkpoint.plain import plain_mapping, plain_tensor, plain_values
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families import UNetConfig, load


def _freed() -> Tensor:
    made = torch.ones(2, 3)
    made.untyped_storage().resize_(0)
    return made


def _fake() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.ones(2, 3, device="meta"), "device 'meta'"),
        (lambda: torch.ones(2, 3).to_sparse(), "sparse"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "NestedTensor"),
        (lambda: torch.ones(()).expand(10**6, 10**6), "expanded"),
        (_freed, "freed"),
        (_fake, "FakeTensor"),
        (lambda: Liar(Tensor), "Liar"),
        (Hostile, "Hostile"),
        (lambda: Tensor, "_TensorMeta"),
        (lambda: None, "NoneType"),
    ],
)
def test_what_is_no_plain_tensor(make: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=f"here: .*{words}"):
        plain_tensor(make(), "here")


def test_what_is_one() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    own = values.clone()
    own.detach = own.cpu = Hostile()  # type: ignore[method-assign,assignment]
    imaginary = torch.complex(values, -values).conj().imag  # a lazy negative of what lies in memory
    for made in (values.T.clone().T, nn.Parameter(values), values.as_subclass(Sub), own, imaginary):
        plain = plain_tensor(made, "here")
        assert type(plain) is Tensor
        assert not plain.requires_grad
        assert torch.equal(plain, values)
    assert plain_tensor(values, "here").data_ptr() == values.data_ptr()
    assert plain_tensor(values, "here", copy=True).data_ptr() != values.data_ptr()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: {3: 1}, r"found 3 \(int\)"),
        (lambda: {Hostile(): 1}, "Hostile"),
        (lambda: BadMapping(endless=False), "no such thing"),
        (lambda: BadMapping(endless=True), "at most 10000"),
        (lambda: dict.fromkeys(map(str, range(100_000)), 1), "at most 10000"),
    ],
)
def test_what_is_no_mapping_of_names(make: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=f"here: .*{words}"):
        plain_mapping(make(), "here")


def test_configurations_become_plain_values() -> None:
    made = plain_values({"a": True, "b": 3, "c": (1.5, "x"), "d": torch.ones(3), "e": itself(list), "f": None})
    assert (made["a"], made["b"], made["c"], made["f"]) == (True, 3, [1.5, "x"], None)
    assert made["d"] == "<Tensor>"
    assert "<list>" in str(made["e"])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("config", "config cannot be read: KeyError"),
        ("keys", "config cannot be read"),
        ("list", "found list"),
        ("names", "expected names"),
        ("none", "found NoneType"),
        ("extra", "found no tensors|no tensors"),
        ("raises", "raised LookupError"),
        ("uninitialized", "cannot be read|raised"),
        ("itself", "raised RecursionError"),
    ],
)
def test_modules_that_raise_or_lie(fault: str, words: str) -> None:
    for ckpt in (OddModule(fault), {"transformer": OddModule(fault), "vae": {}}):
        with pytest.raises(CheckpointError):
            load(ckpt)
    with pytest.raises(CheckpointError, match=words):
        load(OddModule(fault))


# Made inside the tests: pytest itself asks a parameter for its class.
ODD_CHECKPOINTS = (
    lambda: None, lambda: 3, lambda: b"demo", object, Hostile, lambda: Liar(nn.Module), lambda: Liar(dict),
    lambda: Liar(str), lambda: BadPath(3), lambda: BadPath(b"x"), lambda: BadPath(OSError("no")),
    lambda: BadMapping(endless=True), lambda: torch.ones(3), lambda: [1], dict, lambda: {"transformer": None},
    lambda: {3: 4}, lambda: {"transformer": itself(list), "vae": itself(dict)}, lambda: itself(dict),
    lambda: "~nobody/x", lambda: "caf\udce9.pt", lambda: nn.Module,
)  # fmt: skip
ODD_EMBEDDINGS = (
    lambda: itself(list), lambda: itself(dict), lambda: [[[torch.ones(1, 3)]]], lambda: [1], lambda: [None, object()],
    Hostile, lambda: {3: 4}, lambda: [[]] * 1001,
)  # fmt: skip


@pytest.mark.parametrize("number", range(len(ODD_CHECKPOINTS)))
def test_what_is_no_checkpoint(number: int) -> None:
    assert refused(ODD_CHECKPOINTS[number]()).isprintable()


@pytest.mark.parametrize("number", range(len(ODD_EMBEDDINGS)))
def test_what_are_no_embeddings(tmp_path: Path, number: int) -> None:
    write_unet(tmp_path / "own.safetensors", channels=(4, 8), decoder_channels=(4, 4, 4, 4))
    refused(tmp_path, "embeddings", embeddings=ODD_EMBEDDINGS[number]())


class Held(nn.Module):
    def __init__(self, tensors: dict[str, Tensor], config: Any) -> None:
        super().__init__()
        self.tensors, self.config = tensors, config

    def state_dict(self, *_: Any, **__: Any) -> Any:
        return self.tensors


class Derived(UNetConfig):
    @property
    def head_dim(self) -> Any:  # type: ignore[override]
        raise OSError("no")


def test_a_configuration_made_in_code_is_checked_like_one_of_a_file(tmp_path: Path) -> None:
    layout = write_unet(tmp_path / "own.safetensors", channels=(4, 8), decoder_channels=(4, 4, 4, 4))
    tensors = layout.tensors()
    assert load(Held(tensors, layout.config)).config == layout.config
    for values, words in (
        ({"unet_eps": 0.0}, "unet_eps"),
        ({"groups": (2_000_000,)}, "groups"),
        ({"encoder_blocks": Hostile()}, "encoder_blocks"),
        ({"head_dim": True}, "head_dim"),
        ({"input": ["vae"]}, "input"),
    ):
        refused(Held(tensors, UNetConfig(**values)), "config", words)  # type: ignore[arg-type]
    refused(Held(tensors, Derived.__new__(Derived)), "config")
    refused(Held(tensors, {"head_dim": 48}), "config")


def test_training_on_changes_nothing(tmp_path: Path) -> None:
    layout = write_unet(tmp_path / "own.safetensors", channels=(4, 8), decoder_channels=(4, 4, 4, 4))
    tensors = layout.tensors()
    loaded = load(Held(tensors, layout.config)).tensors
    before = {name: tensor.clone() for name, tensor in loaded.items()}
    for tensor in tensors.values():
        tensor.zero_()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in before.items())
