"""The object in the worker processes of the tests: it computes, or fails in the requested way."""

import os
import signal
import sys
import time

from autotune.device.worker import StickyError


class Faulty:
    """Counts, or fails as requested."""

    def __init__(self, start: int = 0) -> None:
        self.calls = start

    def add(self, n: int) -> int:
        self.calls += n
        return self.calls

    def fail(self, kind: str) -> None:
        sys.stderr.write("last line of stderr\n")
        sys.stderr.flush()
        if kind == "signal":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif kind == "exit":
            os._exit(3)
        elif kind == "hang":
            time.sleep(600)
        elif kind == "sticky":
            raise StickyError("an illegal memory access was encountered")
        raise ValueError("invalid argument")
