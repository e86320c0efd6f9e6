"""The networks that the tests of the runtime share."""

from __future__ import annotations

import pytest
import torch

from tests.runtime.test_runner import tinysr, unet
from tinysr_kernels.nets import Network


@pytest.fixture(scope="module")
def small() -> Network:
    return unet(torch.float32)


@pytest.fixture(scope="module")
def latent() -> Network:
    return tinysr(torch.float32)[0]
