"""What every test runs under: no network, one thread, the same random examples each time."""

import os

# Before anything imports diffusers or transformers: the tests only use their classes, never their downloads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
# Before anything imports Triton: kernels run in its interpreter. TRITON_INTERPRET=0 runs their tests on a GPU instead.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Launch configurations that somebody tuned for himself are none of the tests' business.
os.environ["TINYSR_CONFIG_DIR"] = os.path.join(os.path.dirname(__file__), "no-configurations")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, max_examples=25, print_blob=True
)
# HYPOTHESIS_PROFILE=search looks for new counterexamples instead of repeating the known ones.
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Random tensors are the same in every run and do not depend on which tests ran before."""
    torch.manual_seed(0)
