"""A GPU as Triton's compiler needs it: a name for the code's target, no device behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

WARP_SIZE = 32


class TargetDriver:
    """Triton's active driver where kernels are compiled but not launched: it answers for which GPU."""

    def __init__(self, arch: int) -> None:
        """arch: the compute capability as one number, such as 90."""
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, WARP_SIZE)

    def get_current_target(self) -> Any:
        """What kernels are compiled for; kernels themselves may ask too."""
        return self.target

    def get_current_device(self) -> int:
        """The index that Triton keeps compiled kernels by."""
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        """CUDA's default stream."""
        return 0


@contextlib.contextmanager
def active(driver: Any) -> Iterator[None]:
    """Make a driver Triton's own inside, for all threads."""
    from triton.runtime import driver as drivers

    before = drivers._active  # Triton's reset_active() needs a GPU
    drivers.set_active(driver)
    try:
        yield
    finally:
        drivers._active = before
