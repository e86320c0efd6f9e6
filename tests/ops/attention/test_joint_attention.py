"""joint_attention against exponentials written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.cases import Arguments
from tests.ops.contract import OperatorContract, reference_of
from tests.ops.mathematics import altered
from tinysr_kernels.ops.attention.joint_attention import JointAttention

reference = reference_of("joint_attention")


def streams(image: Tensor, text: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """q, k and v of the image, and of the text for every sample, where q may be of no token."""
    width = image.shape[2] // 3
    mine = list(image.split(width, 2))
    theirs = list(text.expand(len(image), -1, -1).split(width, 2))
    return mine, theirs if len(theirs) == 3 else [theirs[0][:, :0], *theirs]


def oracle(image: Tensor, text: Tensor, heads: int, scale: float) -> Tensor:
    mine, theirs = streams(image, text)
    width = mine[0].shape[2] // heads
    found = []
    for stream in (mine, theirs):
        own = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            q = stream[0][:, :, part]
            k, v = (torch.cat([mine[i], theirs[i]], 1)[:, :, part] for i in (1, 2))
            scores = scale * (q[:, :, None] * k[:, None]).sum(-1)
            powers = torch.exp(scores - scores.amax(-1, keepdim=True))
            own.append((powers[..., None] * v[:, None]).sum(2) / powers.sum(-1, keepdim=True))
        found.append(torch.cat(own, -1).flatten(0, 1))
    return torch.cat(found)


def eager(image: Tensor, text: Tensor, heads: int, scale: float) -> Tensor:
    mine, theirs = streams(image, text)
    parts = (torch.cat(pair, 1).unflatten(2, (heads, -1)).transpose(1, 2) for pair in zip(mine, theirs, strict=True))
    mixed = F.scaled_dot_product_attention(*parts, scale=scale).transpose(1, 2).flatten(2)
    tokens = image.shape[1]
    return torch.cat([mixed[:, :tokens].flatten(0, 1), mixed[:, tokens:].flatten(0, 1)])


def only_own_keys(image: Tensor, text: Tensor, heads: int, scale: float) -> Tensor:
    """The image's tokens do not see the text."""
    right = reference(image, text, heads, scale).clone()
    tokens = image.shape[0] * image.shape[1]
    right[:tokens] = reference(image, image[:, :1], heads, scale)[:tokens]
    return right


def sample_by_sample(image: Tensor, text: Tensor, heads: int, scale: float) -> Tensor:
    """Image and text of a sample, then those of the next."""
    texts = text.expand(len(image), -1, -1).split(1)
    return torch.cat([reference(*pair, heads, scale) for pair in zip(image.split(1), texts, strict=True)])


class TestJointAttention(OperatorContract):
    op = "joint_attention"
    oracle = staticmethod(oracle)
    eager = staticmethod(eager)
    channels_last = False
    same_bits_in_any_batch = False
    mutants = {
        "the image alone": only_own_keys,
        "no scale": altered(reference, "scale", lambda _: 1.0),
        "text in another order": altered(reference, "text", lambda t: t.flip(1)),
        "last token of the text left out": lambda image, text, heads, scale: F.pad(
            reference(image, text[:, :-1], heads, scale),
            (0, 0, 0, len(image) if text.shape[2] == image.shape[2] else 0),
        ),
        "one head": altered(reference, "heads", lambda _: 1),
        "sample by sample": sample_by_sample,
        "the first sample's text": altered(reference, "text", lambda t: t[:1]),
    }
    mistakes = [
        ({"image": torch.ones(17, 288)}, r"image must be \[N,T,3\*heads\*d\], found \[17, 288\]"),
        ({"image": torch.ones(2, 17, 289)}, r"image must be \[N,T,3\*2\*d\], found \[2, 17, 289\]"),
        ({"heads": 0}, "heads must be at least 1, found 0"),
        ({"text": torch.ones(21, 288)}, r"text must be \[N,P,3\*heads\*d\], found \[21, 288\]"),
        ({"text": torch.ones(3, 21, 288)}, r"text must be \[2 or 1, 1 or more, 288 or 192\], found \[3, 21, 288\]"),
        ({"text": torch.ones(2, 21, 96)}, r"text must be \[2 or 1, 1 or more, 288 or 192\], found \[2, 21, 96\]"),
        ({"text": torch.ones(2, 0, 288)}, r"text must be \[2 or 1, 1 or more, 288 or 192\], found \[2, 0, 288\]"),
    ]

    def one_by_one(self, **arguments: Any) -> tuple[Tensor, ...]:
        """The operator on each sample of the batch alone; its result is the images', then the texts'."""
        image, text = arguments["image"], arguments["text"]
        of_samples = zip(image.split(1), text.expand(len(image), -1, -1).split(1), strict=True)
        parts = [self.call(arguments | {"image": one, "text": two}) for one, two in of_samples]
        tokens = image.shape[1]
        return (torch.cat([*(part[:tokens] for part in parts), *(part[tokens:] for part in parts)]),)

    def terms(self, arguments: Arguments) -> float:
        """A score sums over a head's features, a result over the keys of both streams."""
        image, text = arguments["image"], arguments["text"]
        return 2 * (image.shape[2] // 3 // arguments["heads"] + image.shape[1] + text.shape[1])

    def counted_flops(self, arguments: Arguments) -> int:
        """Two matmuls per head over all keys, and 5 per score for the softmax."""
        image, text, heads = arguments["image"], arguments["text"], arguments["heads"]
        n, tokens, features = image.shape
        queries = tokens + (text.shape[1] if text.shape[2] == features else 0)
        return n * heads * queries * (tokens + text.shape[1]) * (4 * (features // 3 // heads) + 5)


@pytest.mark.parametrize(("parts", "queries"), [(3, 333), (2, 0)])
def test_cost_by_hand(parts: int, queries: int) -> None:
    image = torch.empty(2, 1024, 3 * 1536, dtype=torch.float16, device="meta")
    text = torch.empty(1, 333, parts * 1536, dtype=torch.float16, device="meta")
    call = JointAttention(image, text, 24, 0.125)
    found = call.cost()
    assert call.empty().shape == (2 * (1024 + queries), 1536)
    assert found.flops == 2 * 24 * (1024 + queries) * (1024 + 333) * (4 * 64 + 5)
    assert found.bytes == 2 * (2 * 1024 * 4608 + 333 * parts * 1536 + 2 * (1024 + queries) * 1536)
