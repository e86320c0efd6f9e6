"""What every test runs under: no network, few threads, the same random examples each time."""

import os
import types
from typing import Any

# Before anything imports diffusers or transformers: the tests only use their classes, never their downloads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
# Before anything imports Triton: kernels run in its interpreter. TRITON_INTERPRET=0 runs their tests on a GPU instead.
os.environ.setdefault("TRITON_INTERPRET", "1")
# On a GPU, kernels that fail shall fail their tests instead of being replaced.
os.environ.setdefault("TINYSR_LAUNCH_GUARD", "0")

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

# One thread, or as many as tests/processors.py asks for.
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker that tests/processors.py selects by."""
    config.addinivalue_line("markers", "numeric: compares numbers that a processor's rounding moves; make processors")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Random tensors are the same in every run and do not depend on which tests ran before."""
    torch.manual_seed(0)


def _call(function: Any, arguments: dict[str, Any]) -> None:
    function(**arguments)


# CPython 3.11 and later keep frames in chunks of 16 KB, which they ask of the system, and give back, at every call
# across the end of one: Triton's interpreter may spend half of its time so. A frame of more than 1 MB gets a chunk of
# 2 MB, which has room for all that it calls.
_call_with_room = types.FunctionType(_call.__code__.replace(co_stacksize=1 << 17), globals())


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    """Call the test as pytest does, with room for the frames of what it calls."""
    _call_with_room(pyfuncitem.obj, {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames})
    return True
